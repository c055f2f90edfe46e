"""Read a log by byte offset. The log is the truth about what was printed: raw bytes, only ever appended to.

No Django import: the follower, the API and tests read logs through these functions.
"""

from __future__ import annotations

import os
from pathlib import Path


def size(path: Path) -> int:
    """Bytes in the log; 0 while there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_at(path: Path, offset: int, limit: int) -> bytes:
    """At most `limit` bytes from `offset`; empty past the end or while there is no log."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(descriptor, limit, offset)
    finally:
        os.close(descriptor)


def tail_offset(path: Path, most_bytes: int) -> int:
    """Where the last `most_bytes` start, moved on to the start of a line if there is one."""
    start = size(path) - most_bytes
    if start <= 0:
        return 0
    line_end = read_at(path, start, most_bytes).find(b"\n")
    return start + line_end + 1


def last_words(path: Path, since: int, most_bytes: int = 16 << 10) -> bytes:
    """The end of what was logged after `since`: it may say why a trainer ended."""
    return read_at(path, max(since, size(path) - most_bytes), most_bytes)
