"""One attempt's process, seen through its folder: start the runner, ask how it is, stop it. No Django import."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs.supervision import runner

RUNNER = Path(runner.__file__)
LAUNCH, RUNNER_RECORD, EXIT = "launch.json", "runner.json", "exit.json"
START_SECONDS = 30.0
FREE_SECONDS = 4.0
GONE_SECONDS = 5.0  # a killed process takes a moment to go; one that hangs in the kernel stays


@dataclass(frozen=True, slots=True)
class Launch:
    """What the runner reads. `lock`: one per run, so that two attempts never train at once."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    log: str
    lock: str
    stop: list[dict[str, Any]]
    secrets: list[str] = field(default_factory=list)  # names of variables of the runner's that the trainer gets, too


class NotStarted(Exception):
    """The runner ended before it had written who it is: it was killed, or another one holds the run's lock."""


def start(folder: Path, launch: Launch, secrets: Mapping[str, str] | None = None) -> None:
    """Start the runner of this attempt; it has written who it is when this returns. Raises NotStarted otherwise.

    Starting an attempt that was started before changes nothing. `secrets`: variables for the trainer that are in no
    file; they go through the environment of the runner, which launch.json tells their names only.
    """
    runner.write_json(folder / LAUNCH, {name: getattr(launch, name) for name in launch.__slots__})
    with (folder / "runner.log").open("ab") as log:
        ended = subprocess.run(
            [sys.executable, "-I", str(RUNNER), str(folder)],
            env=os.environ | dict(secrets or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            timeout=START_SECONDS,
            check=False,
        )
    if ended.returncode != 0 and not has_started(folder):
        raise NotStarted(f"The runner did not start (exit code {ended.returncode}). See {folder / 'runner.log'}.")


def is_free(lock: Path) -> bool:
    """Whether a runner could take the run's lock: after a moment, as one that is fenced needs one to end."""
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        return runner.take(descriptor, FREE_SECONDS)
    finally:
        os.close(descriptor)


def has_started(folder: Path) -> bool:
    return (folder / RUNNER_RECORD).exists()


def read_exit(folder: Path) -> dict[str, Any] | None:
    """exit.json, once the runner has written it."""
    try:
        content: dict[str, Any] = json.loads((folder / EXIT).read_text())
    except FileNotFoundError:
        return None
    return content


def is_alive(folder: Path) -> bool:
    """True while this attempt's runner, and no other process with its pid, runs on this boot of this host."""
    record = _record(folder)
    if record is None or record["boot_id"] != runner.boot_id():
        return False
    try:
        return runner.start_ticks(record["pid"]) == record["start_ticks"] and not _is_zombie(record["pid"])
    except (FileNotFoundError, ProcessLookupError):
        return False


def request_stop(folder: Path, *, now: bool = False) -> None:
    """Ask the runner to walk through its stop plan, or `now` to skip to its end. Asking again changes nothing."""
    record = _record(folder)
    if record is not None and is_alive(folder):
        os.kill(record["pid"], signal.SIGQUIT if now else signal.SIGTERM)


def end_all(folder: Path) -> None:
    """Kill this attempt's runner, and with it all that it started."""
    record = _record(folder)
    if record is not None and is_alive(folder):
        os.kill(record["pid"], signal.SIGKILL)
        while is_alive(folder):
            time.sleep(0.01)
    end_leftovers(folder)


def attempts_running_here(outputs: Path) -> list[Path]:
    """The attempt folders below `outputs` whose runners are alive on this machine."""
    folders = [_attempt_of(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [folder for folder in folders if folder is not None and folder.is_relative_to(outputs)]


def _attempt_of(process: Path) -> Path | None:
    """The last argument of a runner; None for another process."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    is_runner = len(arguments) > 2 and arguments[-3].decode(errors="replace") == str(RUNNER)
    return Path(arguments[-2].decode(errors="replace")) if is_runner else None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / RUNNER_RECORD).read_text())
    except FileNotFoundError:
        return None
    return content


def _is_zombie(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat[stat.rindex(b")") + 2 : stat.rindex(b")") + 3] == b"Z"


def end_leftovers(folder: Path) -> None:
    """Kill what is left of this attempt's session after its runner died, and wait until it is gone.

    Another session with the same id is spared.
    """
    record = _record(folder)
    if record is None or record["boot_id"] != runner.boot_id() or is_alive(folder):
        return
    try:
        if runner.start_ticks(record["pid"]) != record["start_ticks"]:
            return  # the pid, and with it the session's id, belongs to somebody else now
    except (FileNotFoundError, ProcessLookupError):
        pass
    deadline = time.monotonic() + GONE_SECONDS
    while (left := _session_members(record["pid"])) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _session_members(session: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session and not _is_zombie(int(entry.name)):
                    members.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return members
