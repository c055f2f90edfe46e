"""How much device memory a run will take, about: for people who choose a batch size, not for a decision of ours."""

from __future__ import annotations

from models_registry.enums import Role
from models_registry.models import BaseModel
from runs.disk import lora_numbers
from runs.enums import DeviceKind
from runs.spec import RunSpec

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
BYTES_A_TRAINED_NUMBER = 16  # weight, gradient and AdamW's two moments, in float32
# What the backward pass keeps of one pixel in 16 bits: (all of it, with gradient checkpointing). Counted by
# `python -m lora_trainer --dry-run` on the models of lora_trainer/assets/configs, 512 and 1024 pixels.
KEPT = {"sd15": (3525, 586), "sd2": (3525, 586), "sdxl": (6514, 548)}
DENOISERS = (Role.UNET, Role.TRANSFORMER, Role.CHECKPOINT)


def expected_bytes(spec: RunSpec, base_model: BaseModel, device: DeviceKind) -> int | None:
    """Frozen weights, what is trained, and what the backward pass keeps; None where it was never measured."""
    if base_model.architecture not in KEPT:
        return None
    size = BYTES["fp32" if device == DeviceKind.CPU else spec.precision]
    weights = sum(part.parameters for part in base_model.components.all() if part.role in DENOISERS) * size
    kept = KEPT[base_model.architecture][spec.gradient_checkpointing] * size // 2
    return (
        weights + lora_numbers(spec, base_model) * BYTES_A_TRAINED_NUMBER + kept * spec.resolution**2 * spec.batch_size
    )
