"""How late, how complete and how dear is the live log? Prints the tables of docs/benchmarks.md.

    python -m benchmarks.live_log            every size, some ten minutes
    python -m benchmarks.live_log --quick    a look whether all is well

A writer appends lines to a run's train.log, each with the moment at which it was written; viewers are websocket clients
with tickets, in processes of their own. Our server (lorapilot.server with the real application, a workspace and an
SQLite database) is followed by the plainest that does something like it, under the same load: `tail -F` in a pipe, and
a server that sends each piece of it to everybody at once ("bare"), or what has come together in 100 ms ("bare,
batched"). Then: viewers that leave and come back (ours with `?offset=`, and its server killed on the way), and viewers
that never read.

Everything runs on one machine and one clock. There are no limits to keep: the exit code is 1 only when our server lost
or doubled a byte.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, broadcast, serve

from lorapilot.listening import address_of, listen
from lorapilot.management.api_client import Client

ROOT = Path(__file__).resolve().parent.parent
LINE_BYTES = 80
"""`<8 digits: number> <19 digits: nanoseconds> …`; all of one length, so that a line's place says where it ends."""
SIZES = ["50x1", "50x50", "50x500", "1000x1", "1000x50", "1000x500", "10000x1", "10000x50"]
QUICK_SIZES = ["50x1", "1000x20"]
BATCH_SECONDS = 0.1
"""Of "bare, batched": as often as our follower looks."""
VIEWERS_IN_A_PROCESS = 250
CONNECTING_AT_ONCE = 10
QUIET_SECONDS = 5.0
"""When nobody has got anything for so long, what is missing is lost."""
RETURN_SECONDS = 1.0
"""Mean time after which a restless viewer leaves."""
MIB = 1024**2
OURS, BARE, BATCHED = "ours", "bare", "bare, batched"
SPAWN = multiprocessing.get_context("spawn")
PREPARE = """
import django
django.setup()
from django.core.management import call_command
from lorapilot.services import create_first_admin
from models_registry.services import register_bundled_models
call_command("migrate", interactive=False, verbosity=0)
register_bundled_models()
print(create_first_admin())
"""


# --- The servers ------------------------------------------------------------------------------------------------------
class Server(Protocol):
    """Shows the log at `log` to whoever comes."""

    log: Path

    def pid(self) -> int: ...

    def door(self) -> Door: ...


@dataclass(frozen=True)
class Door:
    """How to get in. Without a token: no ticket, no offsets; every binary message is what comes next."""

    port: int
    path: str = "/"
    token: str = ""


def environment(workspace: Path, **more: str) -> dict[str, str]:
    """For a platform that knows nothing of an installation of yours."""
    own = {
        "LORAPILOT_WORKSPACE": str(workspace),
        "LORAPILOT_ENV_FILE": os.devnull,
        "LORAPILOT_HOST_NAME": "benchmark",
        "DJANGO_SETTINGS_MODULE": "lorapilot.settings",
        "STATIC_ROOT": str(workspace / "staticfiles"),
        "API_RATE": "1000000/min",  # all viewers are one user here, and each needs a ticket
        "API_LOGIN_RATE": "1000/min",
    }
    unwanted = {"DATABASE_URL", "REDIS_URL", "DEBUG", "ALLOWED_HOSTS", "SECRET_KEY"}
    return {name: value for name, value in os.environ.items() if name not in unwanted} | own | more


class OurServer:
    """lorapilot.server, on a socket that stays open when it is killed: that is how `manage.py up` runs it."""

    def __init__(self, folder: Path, redis: str) -> None:
        self.workspace = folder / "workspace"
        self.workspace.mkdir(parents=True)
        self.environment = environment(self.workspace, REDIS_URL=redis)
        self.output = folder / "server.log"
        prepared = subprocess.run(
            [sys.executable, "-c", PREPARE], cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, check=True
        )
        self.listening = listen("127.0.0.1", 0)
        self.start()
        self.token = new_token(address_of(self.listening), prepared.stdout.decode().strip())
        self._make_run()

    def start(self) -> None:
        descriptor = self.listening.fileno()
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lorapilot.server", "--fd", str(descriptor)],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                pass_fds=[descriptor],
            )

    def _make_run(self) -> None:
        """A run that waits for ever: nothing trains here."""
        with Client(address_of(self.listening), self.token) as client:
            run = submit(client, name="watched", settings={"steps": 1})
        self.path = f"/ws/runs/{run['id']}/"
        self.log = self.workspace / "outputs" / run["output_name"] / "_logs" / "train.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def kill_and_start(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def pid(self) -> int:
        return self.process.pid

    def door(self) -> Door:
        return Door(self.listening.getsockname()[1], self.path, self.token)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.listening.close()


def new_token(address: str, password: str) -> str:
    account = {"username": "admin", "password": password, "name": "benchmark"}
    with Client(address, "") as client:
        del client.http.headers["Authorization"]
        return str(client.call("POST", "/tokens/", json=account)["token"])


def submit(client: Client, *, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Queue a run of the bundled model on the demo's pictures."""
    pictures = ROOT / "lora_trainer" / "assets" / "demo-dataset"
    dataset = client.find("/datasets/", "benchmark")
    if dataset is None:
        dataset = client.call("POST", "/datasets/", json={"name": "benchmark", "trigger_word": "sks face"})
        client.upload_pictures(dataset["id"], [f for f in sorted(pictures.iterdir()) if f.suffix in (".png", ".txt")])
    model = client.find("/models/", "pilot-tiny")
    assert model is not None  # noqa: S101 it was registered just now
    asked = {"dataset": dataset["id"], "base_model": model["id"], "output_name": name, "settings": settings}
    run: dict[str, Any] = client.call("POST", "/runs/", json=asked)
    return run


class BareServer:
    """`tail -F` and a broadcast."""

    def __init__(self, folder: Path, batch_seconds: float) -> None:
        folder.mkdir(parents=True)
        self.log = folder / "train.log"
        self.log.touch()
        pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=run_bare_server, args=(self.log, batch_seconds, theirs), daemon=True)
        self.process.start()
        self.port: int = pipe.recv()

    def pid(self) -> int:
        return self.process.pid or 0

    def door(self) -> Door:
        return Door(self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def run_bare_server(log: Path, batch_seconds: float, pipe: Connection) -> None:
    asyncio.run(_broadcast_tail(log, batch_seconds, pipe))


async def _broadcast_tail(log: Path, batch_seconds: float, pipe: Connection) -> None:
    viewers: set[ServerConnection] = set()

    async def hold(viewer: ServerConnection) -> None:
        viewers.add(viewer)
        await viewer.wait_closed()
        viewers.discard(viewer)

    async with serve(hold, "127.0.0.1", 0) as server:
        argv = ["tail", "-n", "+1", "-F", f"--pid={os.getpid()}", str(log)]
        tail = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, limit=MIB)
        pipe.send(next(iter(server.sockets)).getsockname()[1])
        while chunk := await tail.stdout.read(MIB):  # type: ignore[union-attr]  # it is a pipe
            broadcast(viewers, chunk)
            if batch_seconds:
                await asyncio.sleep(batch_seconds)


# --- The writer -------------------------------------------------------------------------------------------------------
def line(number: int, moment: int) -> bytes:
    start = f"{number:08d} {moment:019d} Größe ✓ step {number} ".encode()
    return start + b"." * (LINE_BYTES - 1 - len(start)) + b"\n"


def write_lines(log: Path, lines_per_second: int, seconds: float) -> None:
    """A line at a time, each with a system call of its own, as a trainer does that flushes what it prints."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    started = time.monotonic()
    for number in range(int(lines_per_second * seconds)):
        early = started + number / lines_per_second - time.monotonic()
        if early > 0:
            time.sleep(early)
        os.write(descriptor, line(number, time.monotonic_ns()))


def write_at_once(log: Path, size: int) -> None:
    with log.open("ab") as file:
        for number in range(size // LINE_BYTES):
            file.write(line(number, time.monotonic_ns()))


def moments_of(text: bytes) -> NDArray[np.int64]:
    """When each line was written, nanoseconds."""
    return np.array([int(text[at + 9 : at + 28]) for at in range(0, len(text), LINE_BYTES)], np.int64)


def lateness(written: NDArray[np.int64], places: array[int], moments: array[int]) -> NDArray[np.float64]:
    """Milliseconds from writing each line to receiving its last byte; `places` grow, and belong to `moments`."""
    ends = np.arange(1, len(written) + 1) * LINE_BYTES
    which = np.searchsorted(np.asarray(places), ends)
    came = which < len(places)
    return (np.asarray(moments)[which[came]] - written[came]) / 1e6


# --- The viewers ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Audience:
    """What the viewers of one process do."""

    door: Door
    log: Path
    viewers: int
    seed: int
    is_restless: bool = False
    is_stalled: bool = False


@dataclass
class Viewer:
    """What one viewer has got, over all of its connections."""

    door: Door
    have: int = 0
    lost: int = 0
    doubled: int = 0
    returns: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    places: array[int] = field(default_factory=lambda: array("q"))
    moments: array[int] = field(default_factory=lambda: array("q"))

    def take(self, message: bytes) -> None:
        offset, data = self.have, message
        if self.door.token:
            offset, data = int.from_bytes(message[:8], "big"), message[8:]
        self.lost += max(0, offset - self.have)
        self.doubled += max(0, self.have - offset)
        self.have = offset + len(data)
        self.digest.update(data)


class Socket(asyncio.Protocol):
    """A websocket client that does as little as possible: what is measured here is the server.

    It reads what RFC 6455 lets a server send in one frame, answers pings, and asks for nothing.
    """

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.rest = b""
        self.is_open = False
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        door = self.viewer.door
        host = f"127.0.0.1:{door.port}"
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET {door.path}?offset={self.viewer.have} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
        head += f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
        transport.write(f"{head}\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.rest += data
        if not self.is_open and not self._open():
            return
        before, at = self.viewer.have, 0
        while (frame := self._frame_at(at)) is not None:
            opcode, start, at = frame
            self._take(opcode, self.rest[start:at])
        self.rest = self.rest[at:]
        if self.viewer.have != before:
            self.viewer.places.append(self.viewer.have)
            self.viewer.moments.append(now)

    def _open(self) -> bool:
        head, blank, rest = self.rest.partition(b"\r\n\r\n")
        if not blank:
            return False
        if not head.startswith(b"HTTP/1.1 101 "):
            self.opened.set_exception(ConnectionError(head.decode()))
            return False
        self.is_open, self.rest = True, rest
        self.opened.set_result(None)
        if not self.viewer.door.token:
            self.ready.set_result(None)
        return True

    def _frame_at(self, at: int) -> tuple[int, int, int] | None:
        """Opcode, start and end of the next frame's content, if all of it is here."""
        if len(self.rest) < at + 2:
            return None
        opcode, length = self.rest[at] & 0x0F, self.rest[at + 1]
        start = at + {126: 4, 127: 10}.get(length, 2)
        if length >= 126:
            length = int.from_bytes(self.rest[at + 2 : start], "big")
        return (opcode, start, start + length) if start + length <= len(self.rest) else None

    def _take(self, opcode: int, content: bytes) -> None:
        if opcode == 2:
            self.viewer.take(content)
        elif opcode == 1 and not self.ready.done():
            self.ready.set_result(None)  # `hello`
        elif opcode == 9:
            self.say(10, content)

    def say(self, opcode: int, content: bytes) -> None:
        """A short frame, masked with zeros."""
        self.transport.write(bytes([0x80 | opcode, 0x80 | len(content)]) + bytes(4) + content)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)
        for waiting in (self.opened, self.ready):
            if not waiting.done():
                waiting.set_exception(ConnectionError("closed too early"))
                waiting.exception()  # somebody may wait for one of them only


class Stand:
    """The viewers of one process."""

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self.viewers = [Viewer(audience.door) for _ in range(audience.viewers)]
        self.client = Client(f"http://127.0.0.1:{audience.door.port}", audience.door.token)
        self.thread = ThreadPoolExecutor(1)  # for the client, which waits
        self.gate = asyncio.Semaphore(CONNECTING_AT_ONCE)

    async def enter(self, viewer: Viewer) -> Socket:
        """Returns when the server has said hello."""
        loop = asyncio.get_running_loop()
        async with self.gate:
            ticket = await loop.run_in_executor(self.thread, self._ticket) if viewer.door.token else ""
            _, socket = await loop.create_connection(lambda: Socket(viewer), "127.0.0.1", viewer.door.port)
            await socket.opened
            if ticket:
                socket.say(1, json.dumps({"type": "ticket", "ticket": ticket}).encode())
            await socket.ready
        return socket

    def _ticket(self) -> str:
        return str(self.client.call("POST", "/tickets/")["ticket"])

    async def stay(self, viewer: Viewer, socket: Socket, chance: random.Random) -> None:
        """Leave and come back, for ever; also when it was the server that left."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(socket.ended), chance.expovariate(1 / RETURN_SECONDS))
            socket.transport.abort()  # what is on its way is not read any more
            socket = await self._come_back(viewer)
            viewer.returns += 1

    async def _come_back(self, viewer: Viewer) -> Socket:
        while True:
            try:
                return await self.enter(viewer)
            except OSError:
                await asyncio.sleep(0.1)

    async def wait(self, size: int) -> None:
        """Until everybody has `size` bytes, or nobody has got anything for a while."""
        loop = asyncio.get_running_loop()
        seen, since = -1, loop.time()
        while any(viewer.have < size for viewer in self.viewers) and loop.time() < since + QUIET_SECONDS:
            total = sum(viewer.have for viewer in self.viewers)
            if total != seen:
                seen, since = total, loop.time()
            await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Report:
    """What the viewers of one process got."""

    lost: int
    doubled: int
    identical: int
    viewers: int
    returns: int
    pieces: int
    """How often something came."""
    lateness: NDArray[np.float64]


def run_audience(audience: Audience, pipe: Connection) -> None:
    asyncio.run(_watch(audience, pipe))


async def _watch(audience: Audience, pipe: Connection) -> None:
    """Says that all are in; is told how long the log has become; says when all have it; reports when asked to."""
    stand = Stand(audience)
    sockets = await asyncio.gather(*(stand.enter(viewer) for viewer in stand.viewers))
    if audience.is_stalled:
        for socket in sockets:
            socket.transport.pause_reading()
    restless = []
    if audience.is_restless:
        chances = [random.Random(f"{audience.seed} {number}") for number in range(audience.viewers)]
        rows = zip(stand.viewers, sockets, chances, strict=True)
        restless = [asyncio.create_task(stand.stay(*row)) for row in rows]
    pipe.send(None)
    while (size := await asyncio.to_thread(pipe.recv)) is not None:
        await stand.wait(size)
        pipe.send(None)
    for task in restless:
        task.cancel()
    await asyncio.gather(*restless, return_exceptions=True)
    pipe.send(_report(stand, audience.log))


def _report(stand: Stand, log: Path) -> Report:
    text = log.read_bytes()
    viewers = stand.viewers
    whole = hashlib.sha256(text).digest()
    written = moments_of(text)
    late = [lateness(written, viewer.places, viewer.moments) for viewer in viewers if viewer.places]
    return Report(
        lost=sum(viewer.lost + max(0, len(text) - viewer.have) for viewer in viewers),
        doubled=sum(viewer.doubled for viewer in viewers),
        identical=sum(viewer.digest.digest() == whole for viewer in viewers),
        viewers=len(viewers),
        returns=sum(viewer.returns for viewer in viewers),
        lateness=np.concatenate(late) if late else np.zeros(0),
        pieces=sum(len(viewer.places) for viewer in viewers),
    )


class Crowd:
    """All viewers, in as many processes as they need."""

    def __init__(self, server: Server, viewers: int, seed: int = 0, **options: bool) -> None:
        self.log = server.log
        self.members: list[tuple[Any, Connection]] = []
        processes = -(-viewers // VIEWERS_IN_A_PROCESS)
        for number in range(processes):
            share = viewers // processes + (number < viewers % processes)
            audience = Audience(server.door(), self.log, share, seed + number, **options)
            pipe, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=run_audience, args=(audience, theirs), daemon=True)
            process.start()
            self.members.append((process, pipe))
        self._hear()

    def _hear(self) -> list[Any]:
        return [pipe.recv() for _, pipe in self.members]

    def _tell(self, what: object) -> None:
        for _, pipe in self.members:
            pipe.send(what)

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(process.pid) for process, _ in self.members)

    def wait(self) -> None:
        self._tell(self.log.stat().st_size)
        self._hear()

    def report(self) -> Report:
        self._tell(None)
        parts: list[Report] = self._hear()
        for process, _ in self.members:
            process.join()
        counts = ("lost", "doubled", "identical", "viewers", "returns", "pieces")
        sums = {name: sum(getattr(part, name) for part in parts) for name in counts}
        return Report(**sums, lateness=np.concatenate([part.lateness for part in parts]))


# --- What is measured -------------------------------------------------------------------------------------------------
def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of those below it."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def memory(pid: int) -> int:
    """Bytes that only this process has."""
    return int(psutil.Process(pid).memory_full_info().uss)


def unsent(port: int) -> int:
    """Bytes in the kernel's send queues of the server's connections."""
    total = 0
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues = row.split()[:5]
        if int(local.split(":")[1], 16) == port and state == "01":
            total += int(queues.split(":")[0], 16)
    return total


@dataclass(frozen=True)
class Cell:
    """One size, one server."""

    size: str
    program: str
    report: Report
    server_cpu: float
    """Of one core, as is the viewers'."""
    viewers_cpu: float
    memory: int
    pieces: float
    """A second and viewer."""

    def late(self, percent: float) -> float:
        return float(np.percentile(self.report.lateness, percent)) if len(self.report.lateness) else float("nan")


@contextmanager
def serving(program: str, folder: Path, redis: str) -> Iterator[Any]:
    server = OurServer(folder, redis) if program == OURS else BareServer(folder, BATCH_SECONDS * (program == BATCHED))
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def writing(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    """While a process of its own writes; at the end it has written all."""
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.join()


def measure(program: str, size: str, seconds: float, folder: Path, redis: str) -> Cell:
    rate, viewers = (int(number) for number in size.split("x"))
    with serving(program, folder, redis) as server:
        crowd = Crowd(server, viewers)
        started, server_before, viewers_before = time.monotonic(), cpu_seconds(server.pid()), crowd.cpu_seconds()
        with writing(write_lines, server.log, rate, seconds):
            pass
        crowd.wait()
        passed = time.monotonic() - started
        server_cpu, viewers_cpu = cpu_seconds(server.pid()) - server_before, crowd.cpu_seconds() - viewers_before
        used, report = memory(server.pid()), crowd.report()
        pieces = report.pieces / passed / viewers
        return Cell(size, program, report, server_cpu / passed, viewers_cpu / passed, used, pieces)


def measure_returns(program: str, viewers: int, seconds: float, seed: int, folder: Path, redis: str) -> Report:
    """1,000 lines a second for viewers that come and go. Ours is also killed on the way, as `up` would find it."""
    with serving(program, folder, redis) as server:
        crowd = Crowd(server, viewers, seed, is_restless=True)
        with writing(write_lines, server.log, 1000, seconds):
            if program == OURS:
                time.sleep(seconds / 2)
                server.kill_and_start()
        crowd.wait()
        return crowd.report()


@dataclass(frozen=True)
class Stall:
    """What one viewer costs that does not read: bytes."""

    program: str
    of_the_process: float
    of_the_kernel: float


def measure_stall(program: str, viewers: int, size: int, folder: Path, redis: str) -> Stall:
    """As many read `size` bytes first, and one goes on reading: what the server needs anyway is not counted."""
    with serving(program, folder, redis) as server:
        port = server.door().port
        reader, others = Crowd(server, 1), Crowd(server, viewers)
        write_at_once(server.log, size)
        for crowd in (reader, others):
            crowd.wait()
        others.report()
        before, queued = memory(server.pid()), unsent(port)
        stalled = Crowd(server, viewers, is_stalled=True)
        write_at_once(server.log, size)
        wait_until_steady(server.pid())
        stall = Stall(program, (memory(server.pid()) - before) / viewers, (unsent(port) - queued) / viewers)
        reader.wait()
        for crowd in (reader, stalled):
            crowd.report()
        return stall


def wait_until_steady(pid: int) -> None:
    """Until a process has stopped working."""
    before, used = -1.0, cpu_seconds(pid)
    while used - before > 0.05:
        time.sleep(1)
        before, used = used, cpu_seconds(pid)


# --- What is printed --------------------------------------------------------------------------------------------------
def facts(options: argparse.Namespace) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    layer = f"Redis at {options.redis}" if options.redis else "without Redis"
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, load {load} before, {options.seconds:g} s each, {layer}"
    )


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*names: str) -> str:
    return f"{row(*names)}\n{row(*('---' for _ in names))}"


def ratio(ours: float, other: float) -> str:
    return f"{ours / other:.2f}" if other else ""


def print_cell(cell: Cell, ours: Cell) -> None:
    is_ours = cell is ours
    late = [f"{cell.late(percent):.1f}" for percent in (50, 99, 100)]
    ratios = [
        "" if is_ours else ratio(one, other)
        for one, other in ((ours.late(99), cell.late(99)), (ours.server_cpu, cell.server_cpu))
    ]
    report = cell.report
    print(
        row(
            *cell.size.split("x"),
            cell.program,
            *late,
            ratios[0],
            f"{cell.pieces:.1f}",
            f"{cell.server_cpu:.3f}",
            ratios[1],
            f"{cell.viewers_cpu:.2f}",
            f"{cell.memory / MIB:.0f}",
            f"{report.lost}, {report.doubled}",
            f"{report.identical}/{report.viewers}",
        ),
        flush=True,
    )


def end_on_sigterm() -> None:
    """As on Ctrl-C: what was started is ended, and the folder removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main() -> int:
    options = _options()
    end_on_sigterm()
    print(facts(options), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        reports = list(_run(options, Path(name)))
    return int(any(report.lost or report.doubled or report.identical < report.viewers for report in reports))


def _run(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    """Everything; yields what our server's viewers got."""
    columns = ["lines/s", "viewers", "server", "late by: median, ms", "99 %", "most", "99 %: ours ÷ it", "pieces/s"]
    columns += ["CPU of a core", "CPU: ours ÷ it", "viewers' CPU", "memory, MiB", "bytes lost, doubled", "identical"]
    print(head(*columns), flush=True)
    for size in options.sizes:
        cells: list[Cell] = []
        for program in options.servers:
            where = folder / f"{size} {program}"
            cells.append(measure(program, size, options.seconds, where, options.redis))
            print_cell(cells[-1], cells[0])
        yield cells[0].report
    if options.restless:
        print(f"\n{head('server', 'viewers', 'returns', 'bytes lost', 'doubled', 'identical')}", flush=True)
        for program in (OURS, BARE):
            where = folder / f"returns {program}"
            seconds = 2 * options.seconds
            report = measure_returns(program, options.restless, seconds, options.seed, where, options.redis)
            identical = f"{report.identical}/{report.viewers}"
            print(row(program, report.viewers, report.returns, report.lost, report.doubled, identical), flush=True)
            if program == OURS:
                yield report
    if options.stalled:
        print(f"\n{head('server', 'MiB of the process for each viewer', 'MiB in the kernel')}", flush=True)
        for program in (OURS, BARE):
            where = folder / f"stall {program}"
            stall = measure_stall(program, options.stalled, options.stall_mib * MIB, where, options.redis)
            print(row(program, f"{stall.of_the_process / MIB:.2f}", f"{stall.of_the_kernel / MIB:.2f}"), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, 2 seconds each")
    parser.add_argument("--sizes", nargs="*", metavar="LINESxVIEWERS", help="lines a second times viewers")
    parser.add_argument(
        "--servers", nargs="*", choices=(OURS, BARE, BATCHED), help="the first is what others are compared to"
    )
    parser.add_argument("--seconds", type=float, help="of each size; default 10")
    parser.add_argument(
        "--restless", type=int, help="how many viewers leave and come back; default 20, 0: leave that out"
    )
    parser.add_argument("--stalled", type=int, help="how many viewers never read; default 10, 0: leave that out")
    parser.add_argument("--stall-mib", type=int, help="size of the log that they do not read; default 64")
    parser.add_argument("--seed", type=int, default=1, help="of when viewers leave")
    parser.add_argument("--redis", default="", metavar="URL", help="give our server a Redis")
    defaults = {"sizes": SIZES, "seconds": 10.0, "restless": 20, "stalled": 10, "stall_mib": 64}
    quick = {"sizes": QUICK_SIZES, "seconds": 2.0, "restless": 5, "stalled": 2, "stall_mib": 16}
    options = parser.parse_args()
    for option, value in (quick if options.quick else defaults).items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    options.servers = options.servers or [OURS, BARE, BATCHED]
    return options


if __name__ == "__main__":
    sys.exit(main())
