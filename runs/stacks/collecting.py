"""A trainer's finished LoRA file, taken into the run's folder with the run's provenance in its metadata."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.safetensors_header import HeaderError, read_header
from lorapilot import workspace

COPY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Collected:
    bytes: int
    sha256: str


def collect(source: Path, target: Path, metadata: Mapping[str, str]) -> Collected | None:
    """Write `source`, a safetensors file, as `target` with `metadata` added; then remove `source`.

    All or nothing, and safe to repeat: when `source` is gone already, `target` is what it became. None when both are
    missing, or when `source` is no complete safetensors file.
    """
    if not source.is_file():
        return digest_of(target)
    draft = target.with_name(f".{target.name}.tmp")
    collected = _rewrite(source, draft, metadata)
    if collected is None:
        return None
    draft.replace(target)
    source.unlink(missing_ok=True)
    return collected


def _rewrite(source: Path, draft: Path, metadata: Mapping[str, str]) -> Collected | None:
    try:
        read_header(source)
    except HeaderError:
        return None  # still being written, or torn
    with source.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header["__metadata__"] = header.get("__metadata__", {}) | dict(metadata)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors stay aligned
        digest = hashlib.sha256()
        with draft.open("wb") as out:
            for block in (struct.pack("<Q", len(text)), text, *iter(lambda: file.read(COPY_BYTES), b"")):
                out.write(block)
                digest.update(block)
    return Collected(draft.stat().st_size, digest.hexdigest())


def digest_of(path: Path) -> Collected | None:
    """Of a file as it is; None when it is missing."""
    if not path.is_file():
        return None
    return Collected(path.stat().st_size, workspace.sha256_of(path))
