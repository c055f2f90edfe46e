"""The processes of `manage.py up` and `worker`: started, watched, restarted, stopped. Linux only; no Django import.

Guarantees, each with a test in tests/serving/:
- A child that dies is started again, at once the first time, then with a growing pause. What it left behind in its
  session is killed first.
- A stop signals the children themselves, never their process groups (a group SIGTERM hangs django-q2), waits, and then
  kills their sessions. Trainers live in sessions of their own, and go on.
- When this process dies without a word, its children notice (PDEATHSIG) and end too.
- Orphans that the system hands to us, as a subreaper or as PID 1, are reaped.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)

STEADY_SECONDS = 60.0  # a child that lived so long starts with a clean record
LONGEST_PAUSE_SECONDS = 30.0
LOG_BYTES = 20 * 1024**2  # a log beyond this is moved to `<name>.1`
TICK_SECONDS = 0.5

Say = Callable[[str], None]


def die_with_parent(parent: int, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Get `with_signal` when the parent process ends; end now when it already has."""
    LIBC.prctl(PR_SET_PDEATHSIG, with_signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that it can be reaped."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_session(leader: int) -> None:
    """SIGKILL every process of the session that `leader` started."""
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def limit_log(path: Path) -> None:
    """Move what is in a long log to `<name>.1`. Its writers append, and go on at the start of the emptied file."""
    if path.exists() and path.stat().st_size > LOG_BYTES:
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)


@dataclass
class Child:
    """One process that ought to be running, and its log."""

    name: str
    argv: Sequence[str]
    log_path: Path
    folder: Path  # where it runs
    hand_down: Sequence[int] = ()  # file descriptors
    on_death: Callable[[], None] = lambda: None

    process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0
    _due_at: float = 0.0
    _failures: int = 0
    _log_offset: int = 0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def is_due(self) -> bool:
        return not self.is_alive and time.monotonic() >= self._due_at

    def start(self) -> None:
        limit_log(self.log_path)
        with self.log_path.open("ab") as log:
            self._log_offset = log.tell()
            self.process = subprocess.Popen(
                self.argv,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=self.hand_down,
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    def bury(self) -> float:
        """Clear away after a death. Returns the pause in seconds before the next start."""
        assert self.process is not None  # noqa: S101 for mypy: only a started child dies
        kill_session(self.process.pid)
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self._failures = 0
        pause = 0.0 if self._failures == 0 else min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** (self._failures - 1))
        self._failures += 1
        self._due_at = time.monotonic() + pause
        self.on_death()
        return pause

    def new_lines(self) -> list[str]:
        """The whole lines that the child has logged since the last call."""
        limit_log(self.log_path)
        with self.log_path.open("rb") as log:
            self._log_offset = min(self._log_offset, log.seek(0, os.SEEK_END))
            log.seek(self._log_offset)
            text = log.read(LOG_BYTES)
        whole = text[: text.rfind(b"\n") + 1]
        self._log_offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def last_words(self) -> str:
        lines = [line for line in self.new_lines() if line.strip()]
        return lines[-1] if lines else ""

    def terminate(self) -> None:
        if self.is_alive and self.process is not None:
            self.process.send_signal(signal.SIGTERM)


class Family:
    """Runs children until SIGTERM, SIGINT or SIGHUP; a second signal ends the patience."""

    def __init__(self, children: Sequence[Child], *, say: Say, grace_seconds: float) -> None:
        self.children = children
        self.say = say
        self.grace_seconds = grace_seconds
        self._stop_signals = 0
        self._seen_zombie = 0

    def run(self) -> None:
        """Returns after a stop, when every child is gone."""
        with Alarm(self._on_signal) as alarm:
            for child in self.children:
                child.start()
            while not self._stop_signals:
                alarm.wait(TICK_SECONDS)
                self._reap()
                self._restart()
                self._report()
            self._stop(alarm)

    def _on_signal(self, number: int) -> None:
        if number != signal.SIGCHLD:
            self._stop_signals += 1

    def _reap(self) -> None:
        """Take the exit status of children, and of orphans that nobody else in this process waits for."""
        for child in self.children:
            if child.process is not None and child.process.returncode is None and child.process.poll() is not None:
                self._mourn(child)
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        zombie = found.si_pid if found else 0
        if zombie and zombie == self._seen_zombie:  # for a whole round: no other thread's subprocess
            os.waitpid(zombie, os.WNOHANG)
        self._seen_zombie = zombie

    def _mourn(self, child: Child) -> None:
        assert child.process is not None  # noqa: S101 for mypy
        if self._stop_signals:
            return
        code = child.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        words = child.last_words()
        pause = child.bury()
        again = f"in {pause:g} s" if pause else "now"
        self.say(f"{child.name} ended ({how}); starting it again {again}." + (f" It said: {words}" if words else ""))

    def _restart(self) -> None:
        for child in self.children:
            if not self._stop_signals and child.is_due:
                child.start()

    def _report(self) -> None:
        for child in self.children:
            for line in child.new_lines():
                if " ERROR " in line or " CRITICAL " in line:
                    self.say(f"{child.name}: {line}")

    def _stop(self, alarm: Alarm) -> None:
        self.say("Stopping. Training goes on. Once more to stop without waiting.")
        for child in self.children:
            child.terminate()
        deadline = time.monotonic() + self.grace_seconds
        while any(child.is_alive for child in self.children):
            alarm.wait(0.1)
            self._reap()
            if time.monotonic() > deadline or self._stop_signals > 1:
                break
        for child in self.children:
            if child.process is not None:
                kill_session(child.process.pid)
                child.process.wait()


class Alarm:
    """Signals as something to wait for. While one is held, the process's signal handlers are ours."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda caught, _: self._on_signal(caught))
        return self

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or at once when a signal came."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        if ready:
            os.read(self._reader, 4096)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)


def running_children(parent: int) -> dict[str, float]:
    """Which of our own processes `parent` keeps, and since when (Unix seconds): `web`, and clusters by their names."""
    running = {}
    try:
        for child in psutil.Process(parent).children():
            with suppress(psutil.Error):
                if name := _role(child.cmdline()):
                    running[name] = child.create_time()
    except psutil.Error:  # it has just ended
        return {}
    return running


def _role(argv: Sequence[str]) -> str:
    """As `python` below builds it; empty for other programs."""
    match argv[1:]:
        case ["-m", "lorapilot.server", *_]:
            return "web"
        case ["-m", "lorapilot.cluster", name, *_]:
            return name
    return ""


def python(*arguments: str) -> list[str]:
    """The command line of one of our own modules, tied to this process."""
    return [sys.executable, "-m", *arguments, "--parent", str(os.getpid())]
