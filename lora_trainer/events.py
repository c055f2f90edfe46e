"""The run's story as JSON lines, for programs that follow it: `{"v": 1, "event": NAME, "at": unix_seconds, …}`.

Guarantee: a line is written by a single `os.write` on a file opened for appending, so a reader who stops at the last
newline never sees half an event, and a second attempt at the same run adds to the file. Fields: docs/trainer.md.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

VERSION = 1


class EventLog:
    """Appends events to one file. A new folder is made for it when needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; raises OSError (disk full) like any other write."""
        record = {"v": VERSION, "event": event, "at": round(time.time(), 3), **fields}
        line = json.dumps({key: _json_number(value) for key, value in record.items()}, ensure_ascii=False)
        os.write(self._descriptor, line.encode("utf-8", "replace") + b"\n")

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _json_number(value: Any) -> Any:
    # NaN and infinity are no JSON: strict readers (JavaScript among them) refuse the whole line
    return None if isinstance(value, float) and not math.isfinite(value) else value
