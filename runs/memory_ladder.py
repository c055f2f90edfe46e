"""What the next attempt changes after one ran out of memory: one rung at a time, what costs least first.

The first two rungs train the same, only slower: every update still sees as many pictures. The others change the result
a little, and are named so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from runs.enums import DeviceKind
from runs.spec import RunSpec

EIGHT_BIT = {"AdamW": "AdamW8bit"}
SMALLEST_RESOLUTION = 256
RESOLUTION_STEP = 64


@dataclass(frozen=True, slots=True)
class Rung:
    """`changes`: settings for the next attempt. `sentence`: for the run's history."""

    changes: dict[str, Any]
    sentence: str


def next_rung(spec: RunSpec, device: DeviceKind, *, stack: str = "builtin") -> Rung | None:
    """The next thing to try below `spec` with the trainer `stack`; None at the end of the ladder."""
    for rung in RUNGS if stack == "builtin" else OF_EVERY_TRAINER:
        found = rung(spec, device)
        if found is not None:
            return found
    return None


def effective(spec: dict[str, Any], adaptations: dict[str, Any]) -> RunSpec:
    """The settings of a run's next attempt."""
    return RunSpec.from_values(spec | adaptations)


def _checkpointing(spec: RunSpec, _: DeviceKind) -> Rung | None:
    if spec.gradient_checkpointing:
        return None
    return Rung({"gradient_checkpointing": True}, "Gradient checkpointing is on: slower, the result is the same.")


def _smaller_batch(spec: RunSpec, _: DeviceKind) -> Rung | None:
    """The largest batch of at most half the size with which an update sees exactly as many pictures."""
    pictures = spec.batch_size * spec.gradient_accumulation_steps
    smaller = next((size for size in range(spec.batch_size // 2, 0, -1) if pictures % size == 0), 0)
    if not smaller:
        return None
    accumulated = pictures // smaller
    return Rung(
        {"batch_size": smaller, "gradient_accumulation_steps": accumulated},
        f"Batches of {smaller} instead of {spec.batch_size}, {accumulated} of them to an update: "
        "each update sees as many pictures as before.",
    )


def _eight_bit(spec: RunSpec, device: DeviceKind) -> Rung | None:
    if device != DeviceKind.CUDA or spec.optimizer not in EIGHT_BIT or not find_spec("bitsandbytes"):
        return None
    optimizer = EIGHT_BIT[spec.optimizer]
    return Rung(
        {"optimizer": optimizer}, f"The optimizer is {optimizer} instead of {spec.optimizer}; its memory starts anew."
    )


def _lower_resolution(spec: RunSpec, _: DeviceKind) -> Rung | None:
    lower = int(spec.resolution * 0.75) // RESOLUTION_STEP * RESOLUTION_STEP
    if not spec.lower_resolution_when_out or lower < SMALLEST_RESOLUTION:
        return None
    return Rung({"resolution": lower}, f"The resolution is {lower} instead of {spec.resolution} pixels.")


RUNGS: tuple[Callable[[RunSpec, DeviceKind], Rung | None], ...] = (
    _checkpointing,
    _smaller_batch,
    _eight_bit,
    _lower_resolution,
)
# Another trainer has a Python of its own, may have an optimizer by an option, and cannot load the state of another one.
OF_EVERY_TRAINER = tuple(rung for rung in RUNGS if rung is not _eight_bit)
