"""Files from the network, from a real server that misbehaves: the right bytes, or nothing under the file's name."""

import hashlib
import os
import random
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorapilot import outbound
from lorapilot.errors import Conflict, UserError
from lorapilot.outbound import Interrupted, is_public
from models_registry import downloads_http
from models_registry.downloads_http import Client, Denied, Remote, Stopped, place_of

BODY = random.Random(0).randbytes(3_000_000)
HALF = 1_500_000


def remote_of(hub, *, body=BODY, name="model.safetensors", **values):
    hub.put("a/b", **{name: body})
    address = f"http://{hub.storage_host}/a/b/{name}"
    return Remote(address, **{"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} | values)


def fetch(hub, models, remote, **values):
    seen = []
    Client(**values).fetch(remote, models / "vae" / "model.safetensors", seen.append)
    return seen


def left_in(models):
    return sorted(path.name for path in (models / "vae").iterdir())


def ranges(hub):
    return [headers.get("Range") for headers in hub.requests_of("model.safetensors")]


def test_fetch_brings_the_file(hub, models):
    seen = fetch(hub, models, remote_of(hub))
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY
    assert left_in(models) == ["model.safetensors"]
    assert (seen[-1], seen == sorted(seen)) == (len(BODY), True)


def test_fetch_of_an_empty_file_asks_nobody(hub, models):
    fetch(hub, models, Remote("http://nowhere.invalid/x", 0))
    assert (left_in(models), hub.asked) == (["model.safetensors"], [])


def test_fetch_goes_on_after_each_break(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"after": HALF, "breaks": True}, {"after": 700_000, "breaks": True}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY
    assert ranges(hub) == [None, f"bytes={HALF}-", f"bytes={HALF + 700_000}-"]


def test_fetch_goes_on_after_busy_answers(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"status": 503}, {"status": 429}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_gives_up_and_keeps_what_has_arrived(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"after": HALF, "breaks": True}, *[{"status": 503}] * 6]
    with pytest.raises(UserError, match=r"503 Service Unavailable[.] Try again later: what has arrived is kept"):
        fetch(hub, models, remote)
    assert left_in(models) == ["model.safetensors.part", "model.safetensors.part.etag"]
    assert (models / "vae" / "model.safetensors.part").read_bytes() == BODY[:HALF]
    hub.asked.clear()
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY
    assert ranges(hub) == [f"bytes={HALF}-"]


def test_fetch_starts_over_where_range_is_ignored(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"after": HALF, "breaks": True}, {"ignores_range": True}]
    seen = fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY
    assert (ranges(hub), 0 in seen) == ([None, f"bytes={HALF}-"], True)


def test_fetch_starts_over_when_the_file_has_changed_meanwhile(hub, models):
    """The bytes of the old file must not become the beginning of the new one: no checksum is known here."""
    remote = remote_of(hub, sha256="")
    old = bytes(len(BODY))
    hub.faults["model.safetensors"] = [{"body": old, "after": HALF, "breaks": True}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_without_a_strong_etag_never_joins_two_answers(hub, models):
    remote = remote_of(hub, sha256="")
    hub.faults["model.safetensors"] = [{"body": bytes(len(BODY)), "etag": 'W/"1"', "after": HALF, "breaks": True}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_without_a_strong_etag_asks_for_the_whole_file_again(hub, models):
    """Also where the server would go on with anything: `If-Range` without a validator means nothing."""
    remote = remote_of(hub, sha256="")
    weak = {"body": bytes(len(BODY)), "etag": 'W/"1"'}
    hub.faults["model.safetensors"] = [weak | {"after": HALF, "breaks": True}, {"goes_on_anyway": True}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY
    assert ranges(hub) == [None, None]
    assert [headers.get("If-Range") for headers in hub.requests_of("model.safetensors")] == [None, None]


def test_fetch_of_a_file_that_always_changes_ends(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"etag": f'"{n}"', "after": HALF, "breaks": True} for n in range(9)]
    with pytest.raises(UserError, match="keeps changing"):
        fetch(hub, models, remote)
    assert "model.safetensors" not in left_in(models)


def test_fetch_refuses_another_size_than_announced(hub, models):
    remote = remote_of(hub, size=len(BODY) + 1)
    with pytest.raises(UserError, match="3,000,000 bytes instead of 3,000,001"):
        fetch(hub, models, remote)


def test_fetch_refuses_more_than_announced(hub, models):
    remote = remote_of(hub, size=HALF)
    hub.faults["model.safetensors"] = [{"length": "unknown"}]
    with pytest.raises(UserError, match="more than the 1,500,000 bytes"):
        fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors.part").stat().st_size <= HALF


@pytest.mark.parametrize("fault", [{}, {"ignores_range": True}, {"etag": 'W/"1"'}])
def test_fetch_tells_how_many_bytes_too_many_were_announced(hub, models, fault):
    """Whether the server goes on where the rest is asked for, or begins anew each time: soon, and with the numbers."""
    remote = remote_of(hub, size=len(BODY) + 5)
    hub.faults["model.safetensors"] = [fault | {"length": len(BODY) + 5} for _ in range(9)]
    if not fault:
        hub.faults["model.safetensors"][1:] = []
    with pytest.raises(UserError, match=r"127[.]0[.]0[.]1 announced 3,000,005 bytes and sent 3,000,000: the file"):
        fetch(hub, models, remote)
    assert len(hub.requests_of("model.safetensors")) == (3 if fault else 2)


def test_fetch_survives_a_length_that_promises_too_much(hub, models):
    """The server announces everything, sends half and closes in good order: what is missing is asked for again."""
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"length": len(BODY), "after": HALF, "breaks": True}]
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_refuses_a_wrong_checksum_and_starts_over_next_time(hub, models):
    remote = remote_of(hub)
    damaged = b"x" + BODY[1:]
    hub.faults["model.safetensors"] = [{"body": damaged}]
    with pytest.raises(UserError, match=r"model[.]safetensors arrived damaged"):
        fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors.part").stat().st_size == 0
    fetch(hub, models, remote)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_checks_small_files_of_the_hub_by_git_s_name(hub, models):
    sha1 = hashlib.sha1(b"blob 5\0hello").hexdigest()
    fetch(hub, models, remote_of(hub, body=b"hello", sha256="", git_sha1=sha1))
    assert (models / "vae" / "model.safetensors").read_bytes() == b"hello"
    (models / "vae" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="damaged"):
        fetch(hub, models, remote_of(hub, body=b"jello", sha256="", git_sha1=sha1))


def test_fetch_keeps_the_same_file_and_touches_no_other(hub, models):
    target = models / "vae" / "model.safetensors"
    target.parent.mkdir()
    target.write_bytes(BODY)
    remote = remote_of(hub)
    assert fetch(hub, models, remote)[-1] == len(BODY)
    target.write_bytes(b"mine")
    with pytest.raises(Conflict, match="is there already, and is another file"):
        fetch(hub, models, remote)
    assert (target.read_bytes(), hub.asked) == (b"mine", [])


def test_fetch_by_two_at_a_time_is_refused(hub, models):
    remote = remote_of(hub)
    hub.faults["model.safetensors"] = [{"after": HALF, "waits": True}]
    first = threading.Thread(target=fetch, args=(hub, models, remote))
    first.start()
    assert hub.reached.wait(20)
    with pytest.raises(Conflict, match="is being pulled already"):
        fetch(hub, models, remote)
    hub.go_on.set()
    first.join(20)
    assert (models / "vae" / "model.safetensors").read_bytes() == BODY


def test_fetch_leaves_alone_what_another_process_has_finished_meanwhile(hub, models, monkeypatch):
    """It opened the beginning before the other one gave it its name, and locks it after that."""
    remote, target = remote_of(hub), models / "vae" / "model.safetensors"
    lock = downloads_http.fcntl.flock

    def finish_and_lock(file, how):
        os.write(file.fileno(), BODY)
        target.with_name("model.safetensors.part").rename(target)
        lock(file, how)

    monkeypatch.setattr(downloads_http.fcntl, "flock", finish_and_lock)
    with pytest.raises(Conflict, match="is being pulled already"):
        fetch(hub, models, remote)
    assert (left_in(models), target.read_bytes() == BODY, hub.asked) == (["model.safetensors"], True, [])


@pytest.mark.parametrize("closes", [False, True])
def test_stop_ends_a_fetch_that_waits_for_bytes(hub, models, closes):
    remote, client, ended = remote_of(hub), Client(), []
    hub.faults["model.safetensors"] = [{"after": HALF, "waits": True, "closes": closes}]

    def run():
        try:
            client.fetch(remote, models / "vae" / "model.safetensors", lambda _size: None)
        except Stopped:
            ended.append("stopped")

    thread = threading.Thread(target=run)
    thread.start()
    assert hub.reached.wait(20)
    client.stop()
    thread.join(10)
    assert (ended, hub.go_on.is_set()) == (["stopped"], False)
    assert left_in(models) == ["model.safetensors.part", "model.safetensors.part.etag"]


def test_fetch_does_not_follow_a_link_at_the_place_of_its_beginning(hub, models, tmp_path):
    remote = remote_of(hub)
    (models / "vae").mkdir()
    (models / "vae" / "model.safetensors.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        fetch(hub, models, remote)
    assert not (tmp_path / "elsewhere").exists()


def test_fetch_on_a_full_disk_says_so(hub, models, monkeypatch):
    remote = remote_of(hub)

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _chunk):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    begin = downloads_http._Part.__init__
    monkeypatch.setattr(downloads_http._Part, "__init__", lambda self, file, *rest: begin(self, Full(file), *rest))
    with pytest.raises(UserError, match="The disk is full"):
        fetch(hub, models, remote)


# --- Tokens -----------------------------------------------------------------------------------------------------------
def test_token_goes_to_its_host_and_not_on_to_the_storage(hub, models):
    hub.put("a/b", **{"model.safetensors": BODY})
    address = f"{hub.address}/a/b/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors"
    remote = Remote(address, len(BODY))
    fetch(hub, models, remote, tokens={"127.0.0.1": "secret"})
    told = [(server, headers.get("Authorization")) for server, _, headers in hub.asked]
    assert told == [("hub", "Bearer secret"), ("storage", None)]


def test_denied_when_the_server_wants_a_token(hub):
    hub.put("a/b", **{"x.safetensors": b"x"})
    hub.gated.add("a/b")
    with pytest.raises(Denied):
        Client().size(f"{hub.address}/a/b/resolve/main/x.safetensors")


# --- Who may be asked -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://huggingface.co/x", "only https"),
        ("ftp://huggingface.co/x", "only https"),
        ("file:///etc/passwd", "only https"),
        ("https://example.org/x", "example.org is not among the hosts"),
        ("https://huggingface.co.example.org/x", "not among the hosts"),
        ("https://evilhuggingface.co/x", "not among the hosts"),
        ("https://169.254.169.254/latest/meta-data", "not among the hosts"),
        ("https://me@huggingface.co/x", "no address"),
        ("https://huggingface.co:99999/x", "no address"),
        ("https://[::1/x", "no address"),
    ],
)
def test_place_refuses(address, reason):
    with pytest.raises(UserError, match=reason):
        place_of(address)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["169.254.169.254"], ["fe80::1%eth0"]],
)
def test_place_refuses_a_name_that_leads_inside(monkeypatch, addresses):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_values: answer)
    with pytest.raises(UserError, match="private network"):
        place_of("https://huggingface.co/x")


def test_place_of_a_name_that_cannot_be_found(monkeypatch):
    def fail(*_args, **_values):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(Interrupted, match="cannot be found"):
        place_of("https://huggingface.co/x")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("fd00::1", False),
        ("::ffff:192.168.1.1", False),
        ("64:ff9b::c0a8:101", False),
        ("2002:c0a8:101::1", False),
    ],
)
def test_is_public(address, public):
    assert is_public(address) is public


def test_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """A name whose second look-up leads inside: there is no second look-up."""
    asked = []
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])

    def look_up(*_args, **_values):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in next(answers)]

    def connect(address, **_values):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(Interrupted):
        Client()._json("https://huggingface.co/api/models/a/b")
    assert asked == [("8.8.8.8", 443)]


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2:8000/x", "only https"),
        ("https://127.0.0.2:8000/x", "not among the hosts"),
        ("https://localhost:8000/x", "private network"),
        ("file:///etc/passwd", "only https"),
    ],
)
def test_redirects_are_checked(hub, models, settings, location, reason):
    settings.DOWNLOAD_HOSTS = ["localhost"]
    hub.put("a/b", **{"model.safetensors": BODY})
    hub.faults["model.safetensors"] = [{"location": location}]
    remote = Remote(f"{hub.address}/a/b/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors", len(BODY))
    with pytest.raises(UserError, match=reason):
        fetch(hub, models, remote)
    assert [server for server, _, _ in hub.asked] == ["hub"]


def test_redirects_end(hub, models):
    hub.put("a/b", **{"model.safetensors": BODY})
    address = "/a/b/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors"
    hub.faults["model.safetensors"] = [{"location": address}] * 20
    with pytest.raises(UserError, match="more than 5 times"):
        fetch(hub, models, Remote(f"{hub.address}{address}", len(BODY)))
    assert len(hub.asked) == 6


# --- TLS --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def https(tmp_path, settings):
    """An https server whose certificate nobody trusts yet: (address, certificate)."""
    certificate = _certificate(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_args: None  # a client that does not trust us hangs up
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    settings.DOWNLOAD_LOCAL_HOSTS = [f"localhost:{server.server_address[1]}"]
    yield f"https://localhost:{server.server_address[1]}/x", certificate
    server.shutdown()
    server.server_close()


def _certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + built.public_bytes(serialization.Encoding.PEM))
    return file


def test_https_with_a_certificate_that_is_not_trusted_is_refused(https):
    with pytest.raises(UserError, match="localhost has no valid certificate"):
        Client().json(https[0])


def test_https_checks_the_name_and_works(https, monkeypatch):
    address, certificate = https
    context = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(outbound, "tls", lambda: context)
    assert Client().json(address) == {}
