"""What a .safetensors file holds, from its header alone: a 24 GB file is described in milliseconds.

The file is 8 bytes (length of the header, little-endian), the header (a JSON object: tensor name → dtype, shape and
offsets into the data; `__metadata__` maps texts to texts), then the data. Files come from strangers, so nothing in
the header is believed before it is checked: what `read_header` returns describes exactly the bytes of the file.
Torch-free on purpose; only the standard library.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

SCALARS = {"F16": "<e", "F32": "<f", "F64": "<d"}


class HeaderError(Exception):
    """The file is not a whole, well-formed .safetensors file. `str(error)` is a sentence that says why."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """`tensors` in the order of the file's data; `file_bytes` is the size of the whole file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    file_bytes: int

    @property
    def parameters(self) -> int:
        """How many numbers the file holds."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The type of most of its numbers; empty when there are none."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
        return max(counts, key=lambda dtype: counts[dtype], default="")


def read_header(path: str | os.PathLike[str], *, most_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The checked header of a .safetensors file. Reads only the header, whatever the file's size; of a header longer
    than `most_bytes` nothing.

    Raises HeaderError (a sentence) for a file that is cut off, damaged, lying or no .safetensors at all;
    OSError when it cannot be opened.
    """
    path = Path(path)
    name = path.name
    if not path.is_file() and path.exists():  # opening a named pipe would wait until somebody writes
        raise HeaderError(f"{name} is not a regular file.")
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = _header_length(name, file.read(8), file_bytes)
        if length > most_bytes:
            raise HeaderError(f"{name} has a header of {length:,} bytes; at most {most_bytes:,} are read here.")
        raw = file.read(length)
    metadata, entries = _parse(name, raw)
    return Header(
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType(_checked_tensors(name, entries, file_bytes - 8 - length)),
        file_bytes=file_bytes,
    )


def read_scalars(path: Path, header: Header, keys: Container[str]) -> dict[str, float]:
    """The values of those `keys` of the file with this header that are single numbers, of a type with a point."""
    found: dict[str, float] = {}
    with path.open("rb") as file:
        place = 8 + int.from_bytes(file.read(8), "little")
        for key, tensor in header.tensors.items():
            if key in keys and tensor.elements == 1 and tensor.dtype in ("BF16", *SCALARS):
                file.seek(place)
                found[key] = _scalar(tensor.dtype, file.read(tensor.bytes))
            place += tensor.bytes
    return found


def _scalar(dtype: str, raw: bytes) -> float:
    if dtype == "BF16":  # the upper half of a float32
        dtype, raw = "F32", b"\0\0" + raw
    return float(struct.unpack(SCALARS[dtype], raw)[0])


def _header_length(name: str, first: bytes, file_bytes: int) -> int:
    if len(first) < 8:
        raise HeaderError(f"{name} has only {file_bytes} bytes: it is no .safetensors file, or it was cut off.")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"{name} is no .safetensors file: it does not start with the length of a header.")
    if 8 + length > file_bytes:
        raise HeaderError(f"{name} was cut off inside its header. Copy or download it again.")
    return length


def _parse(name: str, raw: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The header's JSON: metadata, and the still unchecked entries of the tensors."""
    if not raw.startswith(b"{"):
        raise HeaderError(f"{name} is no .safetensors file: its header is not JSON.")
    try:
        text = raw.decode()  # here, since json.loads would also take UTF-16
        entries = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{name} has a damaged header ({_short(error)}). Copy or download it again.") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{name} has a damaged header: its metadata must map texts to texts.")
    if not all(_is_whole_text(part) for part in (*metadata, *metadata.values(), *entries)):
        raise HeaderError(f"{name} has a damaged header: it contains half a character.")
    return metadata, entries


def _is_whole_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _checked_tensors(name: str, entries: dict[str, Any], data_bytes: int) -> dict[str, Tensor]:
    """Tensors in the order of their data, which they cover from the first byte to the last, once."""
    spans = sorted((*_span(name, key, entry), key) for key, entry in entries.items())
    end_before = 0
    for begin, end, key in spans:
        if begin != end_before:
            what = "overlaps the tensor before it" if begin < end_before else "leaves a gap before it"
            raise HeaderError(f"{name} has a damaged header: tensor {_short(key)} {what}.")
        end_before = end
    if end_before > data_bytes:
        raise HeaderError(
            f"{name} was cut off: its header describes {end_before:,} bytes of tensors, the file holds {data_bytes:,}. "
            "Copy or download it again."
        )
    if end_before < data_bytes:
        raise HeaderError(f"{name} is damaged: {data_bytes - end_before:,} bytes at its end belong to no tensor.")
    return {key: _checked_tensor(name, key, entries[key], end - begin) for begin, end, key in spans}


def _span(name: str, key: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{name} has a damaged header: tensor {_short(key)} has no valid place in the file.")
    return offsets[0], offsets[1]


def _checked_tensor(name: str, key: str, entry: dict[str, Any], span: int) -> Tensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"{name} has a tensor of a type that is not known here: {_short(key)} is {_short(dtype)}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"{name} has a damaged header: tensor {_short(key)} has no valid shape.")
    if math.prod(shape) * BITS[dtype] != span * 8:
        raise HeaderError(
            f"{name} has a damaged header: tensor {_short(key)} of type {dtype} and shape {_short(shape)} "
            f"does not fit its {span:,} bytes."
        )
    return Tensor(dtype, tuple(shape), span)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)


def _short(value: object) -> str:
    """Something of the file's, quoted, without control characters and never longer than a line."""
    text = ascii(value) if not isinstance(value, Exception) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
