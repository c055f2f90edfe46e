"""Event files as TensorBoard reads them, written by hand: records of protobuf messages with masked CRC-32C sums."""

from __future__ import annotations

import struct
from pathlib import Path


def write_events(folder: Path, losses: list[float], *, tag: str = "loss/train", name: str = "1.host.1.0") -> Path:
    """One event file with a number for each step from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{name}"
    events = [_double(1, 1e9) + _bytes(3, b"brain.Event:2")]
    events += [_number(1e9 + step, step, tag, loss) for step, loss in enumerate(losses, 1)]
    path.write_bytes(b"".join(map(_record, events)))
    return path


def _number(at: float, step: int, tag: str, value: float) -> bytes:
    """An Event with a Summary of one simple value."""
    content = _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
    return _double(1, at) + b"\x10" + _varint(step) + _bytes(5, _bytes(1, content))


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _bytes(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_sum(length) + content + _masked_sum(content)


def _masked_sum(content: bytes) -> bytes:
    found = 0xFFFFFFFF
    for byte in content:
        found ^= byte
        for _ in range(8):
            found = found >> 1 ^ (0x82F63B78 if found & 1 else 0)
    found ^= 0xFFFFFFFF
    return struct.pack("<I", ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF)
