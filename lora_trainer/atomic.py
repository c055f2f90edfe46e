"""Files that are either complete or absent: written beside their final name, synced, then renamed."""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Put a complete file at `path`, replacing what was there; raises OSError and leaves no trace on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # containers that share a folder may have equal process ids
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _write_synced(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files at `path`, replacing what was there; raises OSError and leaves no trace.

    The files are written in the order given. What was there stays until the new folder is complete.
    """
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}{ending}.tmp") for ending in ("", "-former"))
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            _write_synced(temporary / name, content)
        _sync_folder(temporary)
        # a folder cannot be renamed onto one that has files; two renames are over at once, emptying it is not
        if path.exists():
            path.rename(former)
        temporary.rename(path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if former.exists():
            former.rename(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(former, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    # the rename itself must survive a power cut
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
