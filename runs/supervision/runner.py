"""Runs one attempt of a trainer: `python -I runner.py ATTEMPT_FOLDER`, in a session of its own.

It outlives the worker that started it. Standard library only, Linux only; imports nothing of ours.
  reads   launch.json   argv, env, secrets (names of variables of ours that the trainer gets, too), cwd, log, lock,
                        stop: [{signal, grace_seconds, command}, …]
  writes  runner.json   pid, start_ticks, boot_id (who I am), then trainer_pid
          exit.json     code, stop_requested, signals (sent for the stop), oom_kills (by the kernel meanwhile),
                        log_offset (where this attempt's output begins); by tmp + fsync + rename, as runner.json
The trainer's stdout and stderr are appended to the log. SIGTERM to this process asks for a stop: the plan's signals go
to the trainer's group one after another; SIGQUIT skips to the last of them. At the end nothing that the trainer started
is left. A second runner of the same run waits a moment for the lock, and exits with 75; a trainer dies with its runner.
When the folder of a later attempt appears, this one was moved to another host: it ends itself at once.
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
FENCE_SECONDS = 1.0
LOCK_SECONDS = 5.0  # somebody may be looking whether it is free
WRITE_SECONDS = 600.0  # the disk may be full
RESERVED_BYTES = 4096
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


def write_exit(folder: Path, content: dict[str, Any]) -> None:
    """As `write_json`, also on a full disk: the space was reserved at the start; where that does not help, patience."""
    (folder / ".reserved").unlink(missing_ok=True)
    deadline = time.monotonic() + WRITE_SECONDS
    while True:
        try:
            return write_json(folder / "exit.json", content)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def oom_kills() -> int:
    """How many processes the kernel has killed for memory since the boot, on this machine and in our control group."""
    return sum(_counter(path) for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")))


def _counter(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_fenced(folder: Path) -> bool:
    """True once a later attempt of the run exists."""
    return (folder.parent / str(int(folder.name) + 1)).exists()


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
    """Walks down the list of signals, one grace period after another.

    A step with a `command` starts that instead, and is over when it ends; it is killed when its time is over.
    """

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps = list(steps)
        self.requested = False
        self.sent: list[str] = []
        self._next_at = 0.0
        self._asking: subprocess.Popen[bytes] | None = None

    def request(self, *_: object) -> None:
        self.requested = True

    def request_now(self, *_: object) -> None:
        """Skip to the last step."""
        self.requested = True
        del self.steps[:-1]
        self._next_at = 0.0

    def advance(self, group: int) -> None:
        if self._asking is not None and self._asking.poll() is not None:
            self._asking, self._next_at = None, 0.0
        if self.requested and self.steps and time.monotonic() >= self._next_at:
            self.end_asking()
            step = self.steps.pop(0)
            self._next_at = time.monotonic() + step["grace_seconds"]
            if step.get("command"):
                self._ask(step["command"])
            else:
                self.sent.append(step["signal"])
                send(group, step["signal"])

    def _ask(self, command: list[str]) -> None:
        try:
            self._asking = subprocess.Popen(
                command,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=prepare_child,  # noqa: PLW1509 one thread here
            )
        except OSError:
            self._next_at = 0.0

    def end_asking(self) -> None:
        if self._asking is not None:
            self._asking.kill()
            self._asking.wait()
            self._asking = None


def wait(trainer: subprocess.Popen[bytes], stop: StopPlan, folder: Path) -> int:
    """Until the trainer ends. Its orphans come to us (subreaper); they are reaped on the way."""
    look_at = 0.0
    while trainer.poll() is None:
        stop.advance(trainer.pid)
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + FENCE_SECONDS
            if is_fenced(folder):
                send(trainer.pid, "SIGKILL")
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


def take(lock: int, seconds: float) -> bool:
    """Take the lock of the run, or give up after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


def main(folder: Path) -> int:
    """Returns as soon as the attempt is under way (0) or refused (LOCKED); the child that trains goes on alone.

    So whoever started us waits for a moment only, and has no child left to bury.
    """
    launch = json.loads((folder / "launch.json").read_text())
    lock = os.open(launch["lock"], os.O_WRONLY | os.O_CREAT, 0o600)
    if not take(lock, LOCK_SECONDS):
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
    signal.signal(signal.SIGQUIT, stop.request_now)
    me = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "boot_id": boot_id()}
    write_json(folder / "runner.json", me)
    os.write(tell_ready, b"1")
    os.close(tell_ready)
    (folder / ".reserved").write_bytes(b"\0" * RESERVED_BYTES)
    killed_before = oom_kills()
    log_offset = log_size(Path(launch["log"]))
    code = train(folder, launch, me, stop)
    facts = {"code": code, "stop_requested": stop.requested, "signals": stop.sent}
    facts |= {"oom_kills": oom_kills() - killed_before, "log_offset": log_offset, "ended_at": time.time()}
    write_exit(folder, facts)


def log_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def train(folder: Path, launch: dict[str, Any], me: dict[str, Any], stop: StopPlan) -> int:
    """Returns the trainer's exit code, negative for a signal; 127 when there is no such program."""
    with Path(launch["log"]).open("ab", buffering=0) as log:
        try:
            trainer = subprocess.Popen(
                launch["argv"],
                cwd=launch["cwd"],
                env=launch["env"] | {name: os.environ[name] for name in launch.get("secrets", ())},
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
    code = wait(trainer, stop, folder)
    stop.end_asking()
    clear_away(trainer.pid)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
