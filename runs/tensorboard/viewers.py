"""The TensorBoard processes of this web process, one for each person who looks.

Guarantees, each with a test in tests/runs/test_tensorboard.py:
- A process sees links to the runs that its user may see, and nothing else. They are looked up at each page load and
  then at most every 10 seconds; when one is taken away, the process, which has read it, ends before it answers again.
- It listens on a unix socket in a folder that only our system user can enter: there is no second port.
- It ends with the web process, after 10 minutes without a request, and, being the one that was used least recently, for
  a ninth viewer. The next request starts it again, also when somebody killed it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asgiref.sync import sync_to_async

from lorapilot import workspace
from lorapilot.children import limit_log
from lorapilot.models import User
from runs.tensorboard.sources import link_runs

PROGRAM = Path(__file__).with_name("serve.py")
PREFIX = "/tensorboard/app"
SYNC_SECONDS = 10.0
IDLE_SECONDS = 600.0
WATCH_SECONDS = 30.0
MOST_VIEWERS = 8  # about 90 MB of memory each
BACKLOG = 64

Clock = Callable[[], float]


@contextmanager
def short_address(path: Path) -> Iterator[str]:
    """The same socket file by a shorter way: the kernel takes 107 bytes, and a workspace may lie deeper."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Viewer:
    """One person's TensorBoard: a folder, and a process while somebody looks."""

    def __init__(self, user_id: int, now: float) -> None:
        self.folder = workspace.cache() / "tensorboard" / str(user_id)
        self.socket = self.folder / "socket"
        self.logs = self.folder / "logs"
        self.lock = asyncio.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.asked_at = now
        self.synced_at = float("-inf")

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def prepare(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def start(self, program: Path) -> None:
        """Who connects from now on is answered as soon as TensorBoard is ready, or cut off when it ends before.

        Linux ends the process with the *thread* that calls this: the event loop's, which lives as long as we do.
        """
        log = workspace.logs() / "tensorboard.log"
        limit_log(log)
        self.socket.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening, log.open("ab") as output:
            with short_address(self.socket) as address:
                listening.bind(address)
            listening.listen(BACKLOG)
            descriptor = listening.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-I", program, self.logs.name, str(descriptor), PREFIX, str(os.getpid())],
                cwd=self.folder,
                env={"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},  # none of the web server's secrets
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[descriptor],
            )

    def stop(self) -> None:
        """At once: it has nothing to save."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Viewers:
    """All of them. One event loop uses it."""

    def __init__(self, *, program: Path = PROGRAM, clock: Clock = time.monotonic) -> None:
        self._program = program
        self._clock = clock
        self._viewers: dict[int, Viewer] = {}
        self._watch: asyncio.Task[None] | None = None

    def is_running(self, user: User) -> bool:
        viewer = self._viewers.get(user.pk)
        return viewer is not None and viewer.is_alive

    async def open(self, user: User, *, is_page_load: bool = False) -> Path:
        """The socket of the user's TensorBoard, which shows what the user may see now."""
        viewer = self._viewers.get(user.pk)
        if viewer is None:
            viewer = self._viewers[user.pk] = Viewer(user.pk, self._clock())
        async with viewer.lock:
            viewer.asked_at = self._clock()
            if is_page_load or viewer.asked_at - viewer.synced_at >= SYNC_SECONDS:
                viewer.prepare()
                if await sync_to_async(link_runs)(user, viewer.logs):
                    viewer.stop()
                viewer.synced_at = self._clock()
            if not viewer.is_alive:
                self._make_room()
                viewer.start(self._program)
                self._watch_over()
        return viewer.socket

    def stop_idle(self) -> None:
        for viewer in self._alive():
            if self._clock() - viewer.asked_at >= IDLE_SECONDS:
                viewer.stop()

    def stop_all(self) -> None:
        for viewer in self._alive():
            viewer.stop()

    def _alive(self) -> list[Viewer]:
        return [viewer for viewer in self._viewers.values() if viewer.is_alive]

    def _make_room(self) -> None:
        """Before one is started."""
        by_use = sorted(self._alive(), key=lambda viewer: viewer.asked_at)
        for viewer in by_use[: max(0, len(by_use) + 1 - MOST_VIEWERS)]:
            viewer.stop()

    def _watch_over(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._stop_idle_ones())

    async def _stop_idle_ones(self) -> None:
        """While there are any."""
        while self._alive():
            await asyncio.sleep(WATCH_SECONDS)
            self.stop_idle()


VIEWERS = Viewers()
