"""The logs of the platform's own processes, `<workspace>/logs/*.log` and what was moved to `.log.1`, for staff.

A name from outside is only compared with the names that are there; it never becomes a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from django.http import Http404

from lorapilot import workspace

PAGE_BYTES = 200 * 1024
PATTERNS = ("*.log", "*.log.1")


@dataclass(frozen=True, slots=True)
class ServiceLog:
    path: Path
    bytes: int
    changed_at: datetime

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Whole lines of a log, from byte `start` to before byte `end`."""

    start: int
    end: int
    text: str


def list_logs() -> list[ServiceLog]:
    """All of them by name. A link, or a file that goes away meanwhile, is no log."""
    logs = []
    for path in sorted(path for pattern in PATTERNS for path in workspace.logs().glob(pattern)):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if path.is_file() and not path.is_symlink():
            logs.append(ServiceLog(path, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)))
    return logs


def get_log(name: str) -> ServiceLog:
    """The log of that name. Raises Http404 for any other text."""
    found = next((log for log in list_logs() if log.name == name), None)
    if found is None:
        raise Http404
    return found


def read_before(log: ServiceLog, before: int | None = None) -> Excerpt:
    """At most 200 KiB that end at byte `before`, or at the end of the log; a torn first line stands on the older page.

    A log that was emptied meanwhile is read from its own end.
    """
    with log.path.open("rb") as file:
        size = file.seek(0, 2)
        end = size if before is None else min(before, size)
        start = max(0, end - PAGE_BYTES)
        file.seek(start)
        piece = file.read(end - start)
    if start:
        torn = piece.find(b"\n") + 1  # 0: one line longer than a page
        start, piece = start + torn, piece[torn:]
    return Excerpt(start, end, piece.decode(errors="replace"))
