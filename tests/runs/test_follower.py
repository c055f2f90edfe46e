"""The live channel: what a viewer gets, from the log's bytes to the closing code."""

import asyncio
import json
import random
import socket
import time
from pathlib import Path

import psutil
import pytest
from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.db import OperationalError, connections
from django.db.models import F
from django.utils import timezone

from lorapilot.asgi import application
from lorapilot.models import SocketTicket
from lorapilot.services import issue_ticket
from runs import consumers, follower, services
from runs.consumers import RunConsumer
from runs.follower import Follower
from runs.models import MetricPoint, Run
from tests.factories import make_run
from tests.serving.conftest import started, wait_until  # noqa: F401 a fixture

pytestmark = pytest.mark.django_db(transaction=True)

ORIGIN = [(b"origin", b"http://localhost"), (b"host", b"localhost")]
TEXT = "".join(
    f"step {number} Größe ✓ 画像 \x1b[32mloss\x1b[0m {number / 7:.4f}\r\n" for number in range(2000)
).encode()


@pytest.fixture(autouse=True)
def quick_follower(monkeypatch):
    """Looks more often; keeps less of the log in memory than the tests write."""
    monkeypatch.setattr(follower, "LOG_SECONDS", 0.005)
    monkeypatch.setattr(follower, "ROW_SECONDS", 0.02)
    monkeypatch.setattr(follower, "RING_BYTES", 16 << 10)
    for module in (follower, consumers):
        monkeypatch.setattr(module, "FRAME_BYTES", 1 << 10)


@pytest.fixture
def run(workspace, alice):
    run = make_run(alice)
    run.log_path.parent.mkdir(parents=True)
    return run


@pytest.fixture
def ticket(alice):
    """A function: a new one of Alice's."""
    return lambda user=alice: database_sync_to_async(issue_ticket)(user)


class Viewer(WebsocketCommunicator):
    """One connection to a run's channel. `have`: the log as this viewer knows it."""

    def __init__(self, run_id, *, offset=None, have=b""):
        query = "" if offset is None else f"?offset={offset}"
        super().__init__(application, f"/ws/runs/{run_id}/{query}", headers=ORIGIN)
        self.have = have
        self.messages = []

    async def enter(self, ticket):
        connected, _ = await self.connect()
        assert connected
        await self.send_json_to({"type": "ticket", "ticket": ticket})
        return self

    async def receive_one(self):
        """The next message: a dict, or (offset, bytes)."""
        frame = await self.receive_from(timeout=5)
        if isinstance(frame, str):
            self.messages.append(json.loads(frame))
            return self.messages[-1]
        return int.from_bytes(frame[:8], "big"), frame[8:]

    async def receive_until(self, condition):
        while not (isinstance(message := await self.receive_one(), dict) and condition(message)):
            pass
        return message

    async def next_bytes(self):
        while not isinstance(message := await self.receive_one(), tuple):
            pass
        return message

    async def read_to(self, size):
        """Until `have` is so long; every frame has to go on where the one before ended."""
        while len(self.have) < size:
            offset, data = await self.next_bytes()
            assert offset == len(self.have)
            self.have += data
        return self.have

    async def closing_code(self):
        while (message := await self.receive_output(timeout=5))["type"] != "websocket.close":
            pass
        return message["code"]


async def last_viewer_to_leave():
    await asyncio.to_thread(wait_until, lambda: not Follower._followers, 5)


async def test_log_is_the_same_bytes_over_connections_that_break_anywhere(run, ticket):
    chance = random.Random(5)
    total = len(TEXT) * 2

    async def train():
        with run.log_path.open("ab", buffering=0) as log:
            log.write(TEXT)  # far more than is kept in memory
            at = 0
            while at < len(TEXT):
                piece = TEXT[at : at + chance.randrange(1, 3000)]
                log.write(piece)
                at += len(piece)
                await asyncio.sleep(0.001)

    training = asyncio.create_task(train())
    have, connections_made = b"", 0
    while len(have) < total:
        viewer = await Viewer(run.pk, offset=len(have), have=have).enter(await ticket())
        have = await viewer.read_to(min(total, len(have) + chance.randrange(1, 40_000)))
        if len(have) < total:
            have = have[: -chance.randrange(1, 900)]  # of the last piece only the start arrived
        await viewer.disconnect()
        connections_made += 1
    await training
    assert have == TEXT * 2 == run.log_path.read_bytes()
    assert connections_made > 5
    await last_viewer_to_leave()


async def test_log_goes_on_inside_a_character(run, ticket):
    run.log_path.write_bytes("Größe ✓\n".encode())
    viewer = await Viewer(run.pk, offset=3).enter(await ticket())
    assert await viewer.next_bytes() == (3, "Größe ✓\n".encode()[3:])  # the second byte of ö
    hello = viewer.messages[0]
    assert hello == {"v": 1, "type": "hello", "log_size": 12, "offset": 3}
    await viewer.disconnect()


@pytest.mark.parametrize(("asked", "offset"), [("999999", 12), ("9" * 30, 0), ("-1", 0), ("x", 0)])
async def test_offset_that_the_log_does_not_have_is_put_right(run, ticket, asked, offset):
    run.log_path.write_bytes(b"one\ntwo\nend\n")
    viewer = await Viewer(run.pk, offset=asked).enter(await ticket())
    assert (await viewer.receive_one())["offset"] == offset
    with run.log_path.open("ab") as log:
        log.write(b"more\n")
    viewer.have = run.log_path.read_bytes()[:offset]
    assert await viewer.read_to(17) == b"one\ntwo\nend\nmore\n"
    await viewer.disconnect()


async def test_log_without_offset_begins_with_a_line_near_its_end(run, ticket, monkeypatch):
    monkeypatch.setattr(consumers, "TAIL_BYTES", 1000)
    run.log_path.write_bytes(TEXT)
    viewer = await Viewer(run.pk).enter(await ticket())
    offset = (await viewer.receive_one())["offset"]
    assert len(TEXT) - 1000 < offset < len(TEXT) - 900
    assert TEXT[offset - 1 : offset] == b"\n"
    viewer.have = TEXT[:offset]
    assert await viewer.read_to(len(TEXT)) == TEXT
    await viewer.disconnect()


async def test_log_that_grew_while_nobody_watched_is_read_from_where_the_viewer_was(run, ticket):
    run.log_path.write_bytes(TEXT[:5000])
    viewer = await Viewer(run.pk, offset=0).enter(await ticket())
    have = await viewer.read_to(5000)
    await viewer.disconnect()
    await last_viewer_to_leave()
    run.log_path.write_bytes(TEXT[:90_000])  # while nobody watches, more than a new follower keeps
    viewer = await Viewer(run.pk, offset=len(have), have=have).enter(await ticket())
    have = await viewer.read_to(90_000)
    run.log_path.write_bytes(TEXT)
    assert await viewer.read_to(len(TEXT)) == TEXT
    await viewer.disconnect()


async def test_log_that_does_not_exist_yet_is_shown_from_its_first_byte(run, ticket):
    viewer = await Viewer(run.pk).enter(await ticket())
    assert (await viewer.receive_one())["log_size"] == 0
    run.log_path.write_bytes(b"hello\n")
    assert await viewer.read_to(6) == b"hello\n"
    await viewer.disconnect()


def measure(run, *steps):
    MetricPoint.objects.bulk_create(
        MetricPoint(run=run, step=step, attempt=1, loss=1 / step, learning_rate=0.1, at=timezone.now())
        for step in steps
    )
    Run.objects.filter(pk=run.pk).update(step=steps[-1], revision=F("revision") + 1)
    connections.close_all()


async def test_status_and_points_come_first_whole_and_then_as_they_change(run, ticket):
    await asyncio.to_thread(measure, run, 1, 2)
    viewer = await Viewer(run.pk).enter(await ticket())
    for _ in range(3):
        await viewer.receive_one()
    assert [message["type"] for message in viewer.messages] == ["hello", "status", "metrics"]
    assert (viewer.messages[1]["run"]["status"], viewer.messages[1]["run"]["step"]) == ("queued", 2)
    assert viewer.messages[2]["points"] == [[1, 1.0, 0.1], [2, 0.5, 0.1]]
    await asyncio.to_thread(measure, run, 3, 4)
    status = await viewer.receive_until(lambda message: message["type"] == "status")
    assert status["run"]["step"] == 4
    assert (await viewer.receive_one())["points"] == [[3, 1 / 3, 0.1], [4, 0.25, 0.1]]
    await viewer.disconnect()


async def test_deleted_run_says_so(run, ticket):
    viewer = await Viewer(run.pk).enter(await ticket())
    await viewer.receive_until(lambda message: message["type"] == "metrics")
    await database_sync_to_async(Run.objects.filter(pk=run.pk).delete)()
    assert await viewer.receive_until(lambda message: message["type"] != "status") == {"v": 1, "type": "deleted"}
    await viewer.disconnect()


def lose_connection():
    """As a database server that ends does it: this thread's connection is no good any more."""
    connections["default"].ensure_connection()
    connections["default"].connection.close()


async def test_status_comes_again_after_the_database_was_away(run, ticket):
    viewer = await Viewer(run.pk).enter(await ticket())
    await viewer.receive_until(lambda message: message["type"] == "metrics")
    await sync_to_async(lose_connection)()
    await asyncio.to_thread(measure, run, 1)
    status = await viewer.receive_until(lambda message: message["type"] == "status")
    assert status["run"]["step"] == 1
    await viewer.disconnect()


async def test_browser_s_session_needs_no_ticket(run, client_of, alice):
    browser = await database_sync_to_async(client_of)(alice)
    viewer = Viewer(run.pk)
    viewer.scope["headers"].append((b"cookie", f"sessionid={browser.cookies['sessionid'].value}".encode()))
    assert await viewer.connect() == (True, None)
    assert (await viewer.receive_one())["type"] == "hello"
    await viewer.disconnect()


async def test_ticket_opens_one_socket(run, ticket):
    theirs = await ticket()
    first = await Viewer(run.pk).enter(theirs)
    assert (await first.receive_one())["type"] == "hello"
    second = await Viewer(run.pk).enter(theirs)
    assert await second.closing_code() == 4401
    await first.disconnect()


@pytest.mark.parametrize("said", ["expired", "unknown", "no JSON", "another type"])
async def test_ticket_that_is_none_closes_the_socket(run, ticket, said):
    theirs = await ticket()
    await database_sync_to_async(SocketTicket.objects.update)(expires_at=timezone.now()) if said == "expired" else None
    viewer = Viewer(run.pk)
    await viewer.connect()
    messages = {
        "expired": json.dumps({"type": "ticket", "ticket": theirs}),
        "unknown": json.dumps({"type": "ticket", "ticket": "x" * 43}),
        "no JSON": theirs,
        "another type": json.dumps({"type": "x", "ticket": theirs}),
    }
    await viewer.send_to(text_data=messages[said])
    assert await viewer.closing_code() == 4401


async def test_silence_instead_of_a_ticket_closes_the_socket(run, monkeypatch):
    monkeypatch.setattr(consumers, "TICKET_SECONDS", 0.05)
    viewer = Viewer(run.pk)
    await viewer.connect()
    assert await viewer.closing_code() == 4401


async def test_stranger_and_missing_run_look_the_same(run, ticket, charlie, alice):
    for user, run_id in ((charlie, run.pk), (alice, run.pk + 1)):
        viewer = await Viewer(run_id).enter(await ticket(user))
        assert await viewer.closing_code() == 4404


async def test_run_that_is_no_longer_shared_closes_the_socket(run, ticket, bob, team, monkeypatch):
    monkeypatch.setattr(consumers, "RECHECK_SECONDS", 0.05)
    await database_sync_to_async(services.share_run)(run, groups=[team])
    viewer = await Viewer(run.pk).enter(await ticket(bob))
    await viewer.receive_until(lambda message: message["type"] == "metrics")
    await database_sync_to_async(services.share_run)(run, groups=[])
    assert await viewer.closing_code() == 4404


async def test_foreign_page_is_refused(run):
    viewer = Viewer(run.pk)
    viewer.scope["headers"] = [(b"origin", b"http://elsewhere.example"), (b"host", b"localhost")]
    assert (await viewer.connect())[0] is False


async def test_viewer_that_waits_delays_nobody_and_gets_everything_later(run, ticket, alice):
    """`send` that does not return is how the server tells that a client has not read."""
    may_send, is_complete, pieces = asyncio.Event(), asyncio.Event(), []

    async def send(message):
        if "bytes" in message:
            pieces.append(message["bytes"][8:])
            await may_send.wait()
            if sum(map(len, pieces)) == 5 * len(TEXT):
                is_complete.set()

    scope = {"type": "websocket", "url_route": {"kwargs": {"run_id": run.pk}}, "user": alice, "query_string": b""}
    inbox = asyncio.Queue()
    await inbox.put({"type": "websocket.connect"})
    waiting = asyncio.create_task(RunConsumer.as_asgi()(scope, inbox.get, send))
    reader = await Viewer(run.pk, offset=0).enter(await ticket())
    run.log_path.write_bytes(TEXT * 5)
    assert await reader.read_to(5 * len(TEXT)) == TEXT * 5
    assert (len(pieces), len(Follower._followers[run.pk].ring)) == (1, follower.RING_BYTES)
    may_send.set()
    await asyncio.wait_for(is_complete.wait(), 5)
    assert b"".join(pieces) == TEXT * 5
    await inbox.put({"type": "websocket.disconnect", "code": 1000})
    await waiting
    await reader.disconnect()


def unsent(port):
    """Bytes in the kernel's send queues of a server's connections."""
    rows = [row.split()[1:5] for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(queues.split(":")[0], 16) for local, _, _, queues in rows if local.endswith(f":{port:04X}"))


@pytest.mark.parametrize("text", ["", "[" * 1000, "[]", '{"type": "ticket"}', '{"type": "other", "ticket": "x"}'])
def test_message_that_is_no_ticket_is_none(text):
    assert consumers._ticket(text) == ""


def test_viewer_that_stops_reading_costs_a_server_less_than_a_mebibyte(run, alice, started, tmp_path):  # noqa: F811
    database = connections["default"].settings_dict["NAME"]
    environment = {"DATABASE_URL": f"sqlite:///{database}", "LORAPILOT_WORKSPACE": str(settings.WORKSPACE)}
    server = started(["-m", "lorapilot.server", "--port", "0"], tmp_path / "said.txt", **environment)
    port = int(server.wait_for(r"Listening on http://127.0.0.1:(\d+)").group(1))

    def watch():
        viewer = socket.create_connection(("127.0.0.1", port), timeout=20)
        head = f"GET /ws/runs/{run.pk}/?offset=0 HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
        head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        viewer.sendall(f"{head}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
        assert viewer.recv(1000).startswith(b"HTTP/1.1 101 ")
        message = json.dumps({"type": "ticket", "ticket": issue_ticket(alice)}).encode()
        viewer.sendall(bytes([0x81, 0x80 | len(message)]) + bytes(4) + message)
        return viewer

    with run.log_path.open("wb") as log:
        log.truncate(16 << 20)
    viewers = [watch()]
    received = 0
    while received < 16 << 20:  # what the server needs once, it has now
        received += len(viewers[0].recv(1 << 20))
    before = server.memory() + unsent(port)
    viewers += [watch() for _ in range(10)]
    wait_until(lambda: unsent(port) > 10 << 16)
    used = [-1.0, 0.0]
    while used[-1] - used[-2] > 0.02:  # until the server has nothing left to do
        time.sleep(0.3)
        used.append(sum(psutil.Process(server.pid).cpu_times()[:2]))
    grown = server.memory() + unsent(port) - before
    for viewer in viewers:
        viewer.close()
    assert grown < 10 << 20  # stock daphne: more than 160


async def test_socket_whose_database_is_away_closes_so_that_its_client_comes_back(monkeypatch):
    async def away(self):
        raise OperationalError("the server closed the connection unexpectedly")

    codes = []

    async def close(self, code):
        codes.append(code)

    monkeypatch.setattr(RunConsumer, "_find_run", away)
    monkeypatch.setattr(RunConsumer, "close", close)
    await RunConsumer()._show()
    assert codes == [consumers.COME_BACK]
