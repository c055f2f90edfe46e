"""Where files live: `<workspace>/{datasets,models,outputs,cache,logs}`. Names are safe slugs, and every path is
resolved and must stay inside its root, symbolic links included. What all do with a file is here, too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from django.conf import settings

READ_BYTES = 4 * 1024**2
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Device names of Windows: a workspace is often shared with a PC that runs ComfyUI.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def folder(name: str) -> Path:
    """One of the workspace's folders, made when it is missing."""
    path: Path = settings.WORKSPACE / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def datasets() -> Path:
    return folder("datasets")


def models() -> Path:
    return folder("models")


def outputs() -> Path:
    return folder("outputs")


def cache() -> Path:
    return folder("cache")


def logs() -> Path:
    return folder("logs")


def is_safe_name(name: str) -> bool:
    """True for a name that is one plain path component everywhere: letters, digits, `.`, `_`, `-`, 1 to 100 of them."""
    return (
        bool(SAFE_NAME.fullmatch(name))
        and name.split(".", maxsplit=1)[0].lower() not in RESERVED
        and not name.endswith(".")
    )


def inside(root: Path, relative: str | os.PathLike[str]) -> Path:
    """`root / relative`, resolved. Raises ValueError when that leaves the root (`..`, absolute, links)."""
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{os.fspath(relative)!r} is outside {root}.")
    return path


def sha256_of(path: Path, tell: Callable[[int], None] | None = None) -> str:
    """Hexadecimal. `tell` hears how many bytes have been read."""
    digest, read = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            read += len(block)
            if tell:
                tell(read)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Names in it are on the disk for sure from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
