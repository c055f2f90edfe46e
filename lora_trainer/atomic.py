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
    """Put a folder with these files at `path`, replacing what was there; raises OSError and leaves no trace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            _write_synced(temporary / name, content)
        _sync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


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
