"""TrainPilot's guided profiles: a dataset's size, a base model and a device in; the values of a RunSpec out.

Pure functions. The numbers are the documented ones of TrainPilot; what the base model, the device or the trainer makes
different is said in `notes`, one sentence each, and shown before the start and with the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from runs.enums import DeviceKind, Profile
from runs.stacks.base import Imported


@dataclass(frozen=True, slots=True)
class Numbers:
    """One profile. `repeats` is [(up to so many pictures, repeats), …]; past the last one it is 1."""

    target_steps: int
    most_epochs: int
    rank: int
    alpha: float
    batch_size: int
    gradient_accumulation_steps: int
    caption_tokens: int
    precision: str
    text_encoder_learning_rate: float
    repeats: tuple[tuple[int, int], ...] = ()
    learning_rate: float = 2.5e-4


PROFILES: dict[Profile, Numbers] = {
    Profile.QUICK_TEST: Numbers(600, 12, 32, 16, 1, 2, 150, "fp16", 2e-5),
    Profile.REGULAR: Numbers(1200, 25, 48, 24, 2, 2, 225, "bf16", 3e-5, ((30, 4), (60, 2))),
    Profile.HIGH_QUALITY: Numbers(2400, 45, 64, 32, 4, 1, 225, "bf16", 3e-5, ((60, 6), (150, 3))),
}
MANY_IMAGES = 80  # above it the target grows by a third
PROFILE_RESOLUTION = 1024
# What the documented base configuration says beside the profiles' numbers.
BASE: dict[str, Any] = {
    "resolution": PROFILE_RESOLUTION,
    "enable_bucket": True,
    "lr_schedule": "cosine_with_restarts",
    "lr_cycles": 2,
    "warmup_steps": 100,  # and never more than a tenth of the run
    "shuffle_caption": True,
    "keep_tokens": 1,
    "flip": True,
    "caption_dropout": 0.1,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.02,
    "max_grad_norm": 0.8,
    "optimizer": "AdamW",
    "weight_decay": 0.01,
    "seed": 31337,
}


@dataclass(frozen=True, slots=True)
class Filled:
    """What a profile makes of a dataset, a base model and a device."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # Kohya's own, of the base configuration


def repeats_for(profile: Profile, images: int) -> int:
    return next((repeats for most, repeats in PROFILES[profile].repeats if images <= most), 1)


def updates_per_epoch(images: int, *, repeats: int, batch_size: int, gradient_accumulation_steps: int) -> int:
    return math.ceil(math.ceil(images * repeats / batch_size) / gradient_accumulation_steps)


def steps_for(profile: Profile, images: int) -> int:
    """min(target, most epochs x updates per epoch); the target grows by a third above 80 images."""
    numbers = PROFILES[profile]
    target = numbers.target_steps + (numbers.target_steps // 3 if images > MANY_IMAGES else 0)
    per_epoch = updates_per_epoch(
        images,
        repeats=repeats_for(profile, images),
        batch_size=numbers.batch_size,
        gradient_accumulation_steps=numbers.gradient_accumulation_steps,
    )
    return min(target, numbers.most_epochs * per_epoch)


def fill(
    profile: Profile,
    *,
    images: int,
    resolution: int,
    device: DeviceKind,
    model_name: str,
    base: Imported | None = None,
) -> Filled:
    """`resolution`: the base model's native side in pixels. `base`: the user's base configuration instead of ours."""
    numbers = PROFILES[profile]
    steps = steps_for(profile, images)
    precision, notes = _fit_precision(numbers.precision, device)
    below = BASE if base is None else base.values
    warmup = int(steps * base.warmup_share) if base and base.warmup_share else below.get("warmup_steps", 0)
    if resolution != below.get("resolution", PROFILE_RESOLUTION):
        wanted = below.get("resolution", PROFILE_RESOLUTION)
        notes.append(f"Resolution {resolution} instead of {wanted}: {model_name} was made for {resolution} pixels.")
    values = below | {
        "resolution": resolution,
        "repeats": repeats_for(profile, images),
        "steps": steps,
        "batch_size": numbers.batch_size,
        "gradient_accumulation_steps": numbers.gradient_accumulation_steps,
        "rank": numbers.rank,
        "alpha": numbers.alpha,
        "conv_rank": numbers.rank,
        "conv_alpha": numbers.alpha,
        "network_dropout": 0.05,
        "learning_rate": numbers.learning_rate,
        "text_encoder_learning_rate": numbers.text_encoder_learning_rate,
        "caption_tokens": numbers.caption_tokens,
        "precision": precision,
        "warmup_steps": min(warmup, steps // 10),
        "gradient_checkpointing": device != DeviceKind.CPU,
        "less_memory_when_out": True,
        "save_every_steps": max(1, steps // 5),
        "sample_every_steps": max(1, steps // 5),
    }
    return Filled(values, notes, {} if base is None else base.options)


def _fit_precision(precision: str, device: DeviceKind) -> tuple[str, list[str]]:
    if device == DeviceKind.CPU and precision != "fp32":
        return "fp32", [f"Precision fp32 instead of {precision}: this run gets a CPU, which is faster and exact in it."]
    return precision, []
