"""Space on the workspace's disk: how much a run will write, and whether it fits above the floor.

All hosts share the workspace, so any of them can answer. The estimate errs upwards: it is there to say no before hours
of work, not after them.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from django.conf import settings
from django.template.defaultfilters import filesizeformat

from lorapilot import workspace
from models_registry.enums import Role
from models_registry.models import BaseModel
from runs.models import Run
from runs.spec import RunSpec

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
STATES = 3  # two are kept while the third is written
MOMENTS = 3  # the weights, and an optimizer's two moments of each, in float32
LATENT_BYTES_A_PIXEL = 4 * 4 / 64  # four channels of float32 for 8 x 8 pixels
TOKEN_BYTES = 2048 * 4  # of SDXL's text encoders, in float32
SAMPLE_BYTES_A_PIXEL = 2  # PNG
LEAST_SHARE = 0.3  # of the estimate, however far a run has come: states are written to the end
LOG_BYTES = 32 * 1024**2  # log, events and TensorBoard


@dataclass(frozen=True, slots=True)
class Network:
    """LoRA numbers for each rank: the sum of inputs and outputs of the layers that are adapted, at full width."""

    parameters: int  # of the denoiser
    linear: int
    convolution: int
    text_encoder: int


# Counted in the models of lora_trainer/assets/configs.
NETWORKS = {
    "sd15": Network(859_520_964, 423_936, 626_880, 165_888),
    "sd2": Network(865_910_724, 432_128, 626_880, 423_936),
    "sdxl": Network(2_567_463_684, 2_659_840, 414_400, 903_168),
}


def free_bytes() -> int:
    """Where runs write: the outputs may be on a disk of their own."""
    return shutil.disk_usage(workspace.outputs()).free


def is_below_floor() -> bool:
    return free_bytes() < settings.DISK_FLOOR_BYTES


def lack_of_space(run: Run) -> str:
    """A sentence when what the run still has to write would not fit on the disk; empty when it does."""
    left = 1 - run.step / run.total_steps if run.total_steps else 1
    needed = int(run.needed_bytes * max(LEAST_SHARE, left))
    free = free_bytes() - settings.DISK_FLOOR_BYTES
    if needed <= free:
        return ""
    return (
        f"It waits for space on the disk: it needs about {filesizeformat(needed)}, and {filesizeformat(max(0, free))} "
        f"are free above the floor of {filesizeformat(settings.DISK_FLOOR_BYTES)}. Delete what is no longer needed; "
        "then it starts by itself."
    )


def needed_bytes(spec: RunSpec, base_model: BaseModel, *, images: int) -> int:
    """What a whole run writes at most: checkpoints, states, samples, and its pictures in the cache."""
    numbers = lora_numbers(spec, base_model)
    checkpoints = numbers * BYTES[spec.save_precision] * _checkpoints_kept(spec)
    states = numbers * 4 * (MOMENTS + bool(spec.ema_decay)) * STATES
    drawings = 2 + (spec.steps // spec.sample_every_steps if spec.sample_every_steps else 0)
    pixels = spec.resolution**2
    samples = drawings * max(1, len(spec.sample_prompts)) * pixels * SAMPLE_BYTES_A_PIXEL
    cache = images * (pixels * LATENT_BYTES_A_PIXEL * (1 + spec.flip) + spec.caption_tokens * TOKEN_BYTES)
    return int(checkpoints + states + samples + cache) + LOG_BYTES


def lora_numbers(spec: RunSpec, base_model: BaseModel) -> int:
    """Numbers in the LoRA. A narrower model of an architecture has less: widths go with the root of its size."""
    network = NETWORKS.get(base_model.architecture, NETWORKS["sdxl"])
    parameters = sum(
        part.parameters for part in base_model.components.all() if part.role in (Role.UNET, Role.CHECKPOINT)
    )
    width = math.sqrt(min(1.0, parameters / network.parameters)) if parameters else 1.0
    linear = network.linear + (network.text_encoder if spec.text_encoder_learning_rate else 0)
    return int(width * (spec.rank * linear + spec.conv_rank * network.convolution))


def _checkpoints_kept(spec: RunSpec) -> int:
    """With the final one, the best one, and one that is being written."""
    if not spec.save_every_steps:
        return 3
    saved = spec.steps // spec.save_every_steps
    if spec.keep_last:
        apart = math.lcm(spec.save_every_steps, spec.keep_every_steps) if spec.keep_every_steps else 0
        saved = min(saved, spec.keep_last + (spec.steps // apart if apart else 0))
    return saved + 3
