"""Runs one attempt of a trainer: `python -I runner.py ATTEMPT_FOLDER`, in a session of its own.

It outlives the worker that started it. Standard library only, Linux only; imports nothing of ours.
  reads   launch.json   argv, env, cwd, log, lock, stop: [{signal, grace_seconds}, …]
  writes  runner.json   pid, start_ticks, boot_id (who I am), then trainer_pid
          exit.json     code, stop_requested (by tmp + fsync + rename, as runner.json)
The trainer's stdout and stderr are appended to the log. SIGTERM to this process asks for a stop: the plan's signals go
to the trainer's group one after another. At the end nothing that the trainer started is left. A second runner of the
same run finds the lock taken and exits with 75; a trainer dies with its runner.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS = 0.1
CLEAR_AWAY_SECONDS = 30.0
LOCKED = 75  # EX_TEMPFAIL
LIBC = ctypes.CDLL(None, use_errno=True)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid and the boot id it names one process for ever."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All or nothing, and on disk when this returns."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def reset_signals() -> None:
    """A worker started in the background hands down SIGINT as ignored; a trainer would never hear a stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def prepare_child() -> None:
    """In the trainer's process, before exec: die with the runner, and take signals in the usual way."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def descendants() -> list[int]:
    """Every process below this one."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(pid) for pid in task.read_text().split()]
            except OSError:  # it ended while we looked
                continue
            found += children
            waiting += children
    return found


def send(group: int, name: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, getattr(signal, name))


class StopPlan:
    """Walks down the list of signals, one grace period after another."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps = list(steps)
        self.requested = False
        self._next_at = 0.0

    def request(self, *_: object) -> None:
        self.requested = True

    def advance(self, group: int) -> None:
        if self.requested and self.steps and time.monotonic() >= self._next_at:
            step = self.steps.pop(0)
            send(group, step["signal"])
            self._next_at = time.monotonic() + step["grace_seconds"]


def wait(trainer: subprocess.Popen[bytes], stop: StopPlan) -> int:
    """Until the trainer ends. Its orphans come to us (subreaper); they are reaped on the way."""
    while trainer.poll() is None:
        stop.advance(trainer.pid)
        time.sleep(POLL_SECONDS)
    return trainer.returncode


def clear_away(group: int) -> None:
    """Kill what the trainer left behind, also what moved to another session, until nothing is below us.

    A process that hangs in the kernel (a driver) cannot be killed: after a while the end is told without it.
    """
    send(group, "SIGKILL")
    deadline = time.monotonic() + CLEAR_AWAY_SECONDS
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def main(folder: Path) -> int:
    """Returns as soon as the attempt is under way (0) or refused (LOCKED); the child that trains goes on alone.

    So whoever started us waits for a moment only, and has no child left to bury.
    """
    launch = json.loads((folder / "launch.json").read_text())
    lock = os.open(launch["lock"], os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return LOCKED
    if (folder / "runner.json").exists():
        return LOCKED  # this attempt was launched before: an attempt runs once
    ready, tell_ready = os.pipe()
    if os.fork():
        os.close(tell_ready)
        return 0 if os.read(ready, 1) else 1  # the child keeps the lock
    os.close(ready)
    os.setsid()
    run_attempt(folder, launch, tell_ready)
    os._exit(0)


def run_attempt(folder: Path, launch: dict[str, Any], tell_ready: int) -> None:
    reset_signals()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop = StopPlan(launch["stop"])
    signal.signal(signal.SIGTERM, stop.request)
    me = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "boot_id": boot_id()}
    write_json(folder / "runner.json", me)
    os.write(tell_ready, b"1")
    os.close(tell_ready)
    code = train(folder, launch, me, stop)
    write_json(folder / "exit.json", {"code": code, "stop_requested": stop.requested, "ended_at": time.time()})


def train(folder: Path, launch: dict[str, Any], me: dict[str, Any], stop: StopPlan) -> int:
    with Path(launch["log"]).open("ab", buffering=0) as log:
        try:
            trainer = subprocess.Popen(
                launch["argv"],
                cwd=launch["cwd"],
                env=launch["env"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=prepare_child,  # noqa: PLW1509 one thread here
            )
        except OSError as error:
            log.write(f"The trainer could not be started: {error}\n".encode())
            return 127
    write_json(folder / "runner.json", me | {"trainer_pid": trainer.pid})
    code = wait(trainer, stop)
    clear_away(trainer.pid)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
