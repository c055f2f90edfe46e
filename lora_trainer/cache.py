"""Encoded pictures and captions on disk, shared between runs: what was encoded once is read ever after.

An entry is one .safetensors file, named after the SHA-256 of everything that its content depends on. Guarantees: an
entry is complete or absent, however many processes fill the cache and whenever one is killed; nothing that is read is
believed before its checksum fits, so a torn, damaged or foreign file counts as missing and is replaced. A cache that
cannot be written (a full disk, a read-only folder) is only read from then on, and `trouble` says why. Nothing is ever
removed but what killed processes left half-written: the folder may be emptied at any time.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lora_trainer.atomic import write_file
from lora_trainer.errors import ConfigError

FORMAT = 1
"""Part of every key: raised when the same inputs come to mean another result."""
HALF_WRITTEN_SECONDS = 24 * 3600.0
"""After so long nobody is writing that file any more."""


class DiskCache:
    """Tensors by key, in a folder that other runs may use at the same time."""

    def __init__(self, folder: Path) -> None:
        self.hits = 0
        self.misses = 0
        self.trouble = ""
        """Why nothing more is written; empty as long as all is well."""
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_half_written(folder)
        except OSError as error:
            raise ConfigError(f"'cache_dir': {folder} cannot be used as a folder ({error.strerror}).") from error

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors on the CPU; None when there is none, or none that can be believed."""
        try:
            found = _read(self._path(key).read_bytes(), key)
        except OSError:
            found = None
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors. Never raises for what the disk does: see `trouble`."""
        if self.trouble:
            return
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(ready, {"key": key, "sha256": tensors_digest(ready)})
        try:
            write_file(self._path(key), content)
        except OSError as error:
            self.trouble = f"The cache {self._folder} cannot be written ({error.strerror}), so nothing more is added."

    def _path(self, key: str) -> Path:
        # 256 folders: some file systems are slow with a hundred thousand files in one
        return self._folder / key[:2] / f"{key}.safetensors"


def cache_key(kind: str, *facts: str) -> str:
    """The name of what depends on these facts and nothing else."""
    return hashlib.sha256(json.dumps([FORMAT, kind, *facts]).encode()).hexdigest()


def model_digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of the modules' weights: names, types, shapes and bytes."""
    return tensors_digest(
        {
            f"{place}.{name}": tensor
            for place, module in enumerate(modules)
            for name, tensor in module.state_dict().items()
        }
    )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # numpy has no bfloat16, but every type has bytes
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(content: bytes, key: str) -> dict[str, Tensor] | None:
    """The tensors, when the file is whole, made for this key, unchanged since and free of NaN and infinity."""
    try:
        tensors = load(content)
        metadata = _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    if metadata != {"key": key, "sha256": tensors_digest(tensors)}:
        return None
    return tensors if all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()) else None


def _metadata(content: bytes) -> Any:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _remove_half_written(folder: Path) -> None:
    """What processes left that were killed while they wrote."""
    for path in folder.glob("??/.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > HALF_WRITTEN_SECONDS:
                path.unlink()
        except OSError:  # another run was faster, or the folder is read-only
            continue
