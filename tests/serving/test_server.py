"""lorapilot/server.py as real processes: what stock daphne does wrong, one test each."""

import hashlib
import http.client
import json
import os
import signal
import socket
import time
from contextlib import ExitStack

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.serving.conftest import wait_until

MIB = 1024**2
FILE_BYTES = 256 * MIB
HANDSHAKE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def served_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "large.bin"
    with path.open("wb") as file:
        file.truncate(FILE_BYTES)
    return path


def serve(start, served_file, output):
    argv = ["-m", "lorapilot.server", "--port", "0", "--application", "tests.serving.app.application"]
    running = start(argv, output, SERVED_FILE=str(served_file))
    running.port = int(running.wait_for(r"Listening on http://127.0.0.1:(\d+)").group(1))
    assert ask(running.port, "GET", "/slow?seconds=0").status == 200
    return running


@pytest.fixture(scope="module")
def server(started_once, served_file, tmp_path_factory):
    """One for all tests that leave it running."""
    return serve(started_once, served_file, tmp_path_factory.mktemp("server") / "said.txt")


@pytest.fixture
def own_server(started, served_file, tmp_path):
    return serve(started, served_file, tmp_path / "said.txt")


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body=body, headers=headers or {})
    response = connection.getresponse()
    response.content = response.read()
    connection.close()
    return response


def raw(port, head, receive_buffer=None):
    """A socket on which `head` has been sent; with a small receive buffer, a slow client."""
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    client.sendall(head)
    return client


def read_all(client):
    content = b""
    while chunk := client.recv(65536):
        content += chunk
    return content


def test_body_too_large_is_refused_before_it_is_sent(server):
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
    client = raw(server.port, head)
    answer = client.recv(65536)
    client.close()
    assert answer.startswith(b"HTTP/1.1 413 Content Too Large\r\nContent-Type: text/html; charset=utf-8\r\n")
    assert b"<p>The request is larger than 32 MiB." in answer


def test_body_too_large_says_so_in_json_to_an_api_client(server):
    client = raw(server.port, b"POST /api/v1/x/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
    head, body = client.recv(65536).split(b"\r\n\r\n")
    client.close()
    assert b"Content-Type: application/json\r\n" in head
    assert json.loads(body) == {
        "detail": "The request is larger than 32 MiB. Send fewer files at once, or upload large files in chunks."
    }


def test_body_too_large_without_length_is_refused_on_the_way(server):
    client = raw(server.port, b"POST /upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n%s\r\n" % (MIB, bytes(MIB))
    before = server.memory()
    for _ in range(40):  # the end of the body is never sent
        client.sendall(chunk)
    assert client.recv(65536).startswith(b"HTTP/1.1 413 ")
    client.close()
    assert server.memory() - before < 16 * MIB


def test_body_too_large_of_a_client_that_sends_it_all_is_answered(server):
    response = ask(server.port, "POST", "/upload", bytes(40 * MIB))
    assert response.status == 413
    assert ask(server.port, "GET", "/slow?seconds=0").status == 200


def test_form_upload_costs_little_memory(server):
    content = os.urandom(20 * MIB)
    head = b'--a-boundary\r\nContent-Disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
    body = head + content + b"\r\n--a-boundary--\r\n"
    before = server.memory()
    response = ask(server.port, "POST", "/upload", body, {"Content-Type": "multipart/form-data; boundary=a-boundary"})
    assert json.loads(response.content) == {"files": {"picture": hashlib.sha256(content).hexdigest()}}
    assert server.memory() - before < 80 * MIB  # stock daphne: 250


def test_body_within_the_limit_arrives_whole(server):
    content = os.urandom(8 * MIB)
    response = ask(server.port, "POST", "/upload", content)
    assert json.loads(response.content) == {"body": hashlib.sha256(content).hexdigest()}


def test_large_file_arrives_whole_in_little_memory(server):
    before = server.memory()
    response = ask(server.port, "GET", "/file")
    assert len(response.content) == FILE_BYTES
    assert server.memory() - before < 24 * MIB


def test_client_that_stops_reading_a_file_costs_little_memory(server):
    before = server.memory()
    clients = [raw(server.port, b"GET /file HTTP/1.1\r\nHost: localhost\r\n\r\n", 16 * 1024) for _ in range(5)]
    time.sleep(1)  # stock daphne would have read all of it by now
    grown = server.memory() - before
    assert ask(server.port, "GET", "/slow?seconds=0").status == 200
    for client in clients:
        client.close()
    assert grown < 24 * MIB


def test_head_has_headers_and_no_body(server):
    client = raw(server.port, b"HEAD /file HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head, body = read_all(client).split(b"\r\n\r\n")
    client.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: %d" % FILE_BYTES in head.lower()
    assert body == b""


def test_download_goes_on_where_it_broke_off(server):
    response = ask(server.port, "GET", "/file", headers={"Range": f"bytes={FILE_BYTES - 10}-"})
    assert (response.status, response.content) == (206, bytes(10))
    assert response.headers["Content-Range"] == f"bytes {FILE_BYTES - 10}-{FILE_BYTES - 1}/{FILE_BYTES}"


def test_websocket_reader_that_stops_costs_little_memory(server):
    before = server.memory()
    clients = [raw(server.port, HANDSHAKE % b"/flood", 16 * 1024) for _ in range(5)]
    counts = [server.said.count("sent")]
    while len(counts) < 2 or counts[-1] != counts[-2] or counts[-1] == 0:  # until the application waits
        time.sleep(0.2)
        counts.append(server.said.count("sent"))
        assert counts[-1] < 5 * 400, "it never waits"
    grown = server.memory() - before
    for client in clients:
        client.close()
    assert grown < 10 * MIB
    assert ask(server.port, "GET", "/slow?seconds=0").status == 200  # although the application talks on


def test_websocket_message_of_ours_may_be_longer_than_theirs(server):
    with connect(f"ws://127.0.0.1:{server.port}/long") as client:
        assert client.recv() == "hello"
        assert client.recv() == bytes(300 * 1024)


def test_websocket_message_that_is_too_long_closes_the_socket(server):
    with connect(f"ws://127.0.0.1:{server.port}/quiet") as client:
        assert client.recv() == "hello"
        client.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
    assert closed.value.rcvd.code == 1009


@pytest.mark.parametrize("sockets", [0, 1, 20])
def test_stop_says_goodbye_to_websockets(own_server, sockets):
    codes = []
    with ExitStack() as stack:
        address = f"ws://127.0.0.1:{own_server.port}/quiet"
        clients = [stack.enter_context(connect(address)) for _ in range(sockets)]
        assert [client.recv() for client in clients] == ["hello"] * sockets
        own_server.process.send_signal(signal.SIGTERM)
        for client in clients:
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
            codes.append(closed.value.rcvd.code)
    assert codes == [4012] * sockets
    assert own_server.process.wait(10) == 0, own_server.said


def test_stop_lets_a_request_finish(own_server):
    client = raw(own_server.port, b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.1)
    own_server.process.send_signal(signal.SIGTERM)
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.close()
    assert own_server.process.wait(10) == 0


def test_stop_does_not_wait_for_clients_that_do_not_answer(own_server):
    stuck = raw(own_server.port, b"GET /stuck?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    endless = raw(own_server.port, b"GET /slow?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    half_read = raw(own_server.port, b"GET /file HTTP/1.1\r\nHost: localhost\r\n\r\n", 16 * 1024)
    silent = raw(own_server.port, HANDSHAKE % b"/flood", 16 * 1024)
    own_server.wait_for("sent")
    own_server.process.send_signal(signal.SIGTERM)
    assert own_server.process.wait(15) == 0, own_server.said
    for client in (stuck, endless, half_read, silent):
        client.close()


def test_port_that_is_taken_is_one_sentence(started, server, tmp_path):
    second = started(["-m", "lorapilot.server", "--port", str(server.port)], tmp_path / "second.txt")
    assert second.process.wait(20) == 69
    assert second.said == f"Cannot listen on 127.0.0.1:{server.port}: Address already in use.\n"


def test_server_dies_with_its_parent(started, tmp_path):
    orphan = started(["-m", "lorapilot.server", "--port", "0", "--parent", "1"], tmp_path / "orphan.txt")
    assert wait_until(lambda: orphan.process.poll() is not None)
