"""The bytes of an upload that has not arrived in full: `<workspace>/cache/uploads/<uuid>`. No database here.

An exclusive lock on the file admits one writer at a time, over all processes; the kernel drops it with its process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from django.conf import settings

from lorapilot import workspace
from lorapilot.errors import Conflict, UserError

SPARE_BYTES = 1024**3  # stays free on the disk: trainings write there too
UUID_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def uploads_root() -> Path:
    return workspace.cache() / "uploads"


def partial_path(upload_id: uuid.UUID) -> Path:
    return uploads_root() / str(upload_id)


def ensure_room(size: int) -> None:
    """Raises UserError when `size` bytes, once as they come and once unpacked, would fill the disk."""
    if shutil.disk_usage(workspace.cache()).free < 2 * size + SPARE_BYTES:
        raise UserError("The server's disk has no room for this file. Ask the operator to free some.")


@contextmanager
def locked_partial(upload_id: uuid.UUID) -> Iterator[BinaryIO]:
    """The partial file, open for this writer alone. Raises Conflict while another one has it."""
    path = partial_path(upload_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict("Another request is writing to this upload. Ask for its offset, then go on there.") from None
        yield file


def write_chunk(file: BinaryIO, *, offset: int, room: int, chunk: Iterable[bytes], sha256: str = "") -> int:
    """Write `chunk` at `offset`, to the disk itself. Returns its size. Raises UserError beyond `room` bytes, or when
    its checksum is another than `sha256`, if given."""
    limit = min(room, settings.MAX_BODY_BYTES)
    digest = hashlib.sha256()
    file.seek(offset)
    size = 0
    for block in chunk:
        size += len(block)
        if size > limit:
            raise UserError(f"The chunk has more than the {limit:,} bytes that may come now. Send fewer.")
        digest.update(block)
        file.write(block)
    if sha256 and digest.hexdigest() != sha256:
        raise Conflict("The piece arrived damaged: its checksum differs. Send it again.", field="sha256")
    file.flush()
    os.fsync(file.fileno())
    return size


def hash_partial(upload_id: uuid.UUID) -> str:
    return workspace.sha256_of(partial_path(upload_id))


def kept_uploads() -> list[uuid.UUID]:
    """Whose bytes are here. Other names are left alone: NFS keeps an open file that was removed as `.nfs…`."""
    root = uploads_root()
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return [uuid.UUID(name) for name in names if UUID_NAME.fullmatch(name)]


def remove_partial(upload_id: uuid.UUID) -> None:
    partial_path(upload_id).unlink(missing_ok=True)


def remove_older_than(folder: Path, *, seconds: float) -> None:
    """What an upload or an import left behind that nobody knows of any more."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another process does the same
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
