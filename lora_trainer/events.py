"""The run's story as JSON lines, for programs that follow it: `{"v": 1, "event": NAME, "at": unix_seconds, …}`.

Guarantee: a line is written by a single `os.write` on a file opened for appending, so a reader who stops at the last
newline never sees half an event, and a second attempt at the same run adds to the file. Only a disk that fills up can
tear a line; what follows then starts on a line of its own, so a reader who passes over what is no JSON loses that one
event. Fields: docs/trainer.md.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

VERSION = 1
ENDS = {"error", "stopped", "finished"}


class EventLog:
    """Appends events to one file. A new folder is made for it when needed. Of several processes only the first one
    tells how the run goes; any of them may tell why it ends."""

    def __init__(self, path: Path, *, is_first: bool = True) -> None:
        self.path = path
        self._is_first = is_first
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._opened_at_bytes = os.fstat(self._descriptor).st_size
        self._is_torn = self._opened_at_bytes > 0 and os.pread(self._descriptor, 1, self._opened_at_bytes - 1) != b"\n"

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; raises OSError (disk full) like any other write."""
        if self._is_first:
            self._write(event, fields)

    def emit_error(self, code: str, message: str) -> None:
        """Write why this process ends, whichever it is."""
        self._write("error", {"code": code, "message": message})

    def has_ended(self) -> bool:
        """True when one of the processes has said, since this one began, how the run ends."""
        size = os.fstat(self._descriptor).st_size - self._opened_at_bytes
        if size <= 0:  # a pipe or a device, which cannot be read back
            return False
        return any(_name(line) in ENDS for line in os.pread(self._descriptor, size, self._opened_at_bytes).splitlines())

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        record = {"v": VERSION, "event": event, "at": round(time.time(), 3), **fields}
        text = json.dumps({key: _json_number(value) for key, value in record.items()}, ensure_ascii=False)
        left = b"\n" * self._is_torn + text.encode("utf-8", "replace") + b"\n"
        while left:
            # a file system with room for a part takes that part, and only then says that it is full
            written = os.write(self._descriptor, left)
            left = left[written:]
            self._is_torn = bool(left)


def _name(line: bytes) -> str:
    try:
        return str(json.loads(line)["event"])
    except (ValueError, KeyError, TypeError):
        return ""


def _json_number(value: Any) -> Any:
    # NaN and infinity are no JSON: strict readers (JavaScript among them) refuse the whole line
    return None if isinstance(value, float) and not math.isfinite(value) else value
