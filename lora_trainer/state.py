"""What resuming needs, as a folder `state/step00000123/` that is complete or absent.

Guarantee: on the CPU in float32, a run that is killed and resumed from its state ends with the same weights, bit for
bit, as one that was never interrupted. The learning rate and the picture order are functions of the step and the seed,
so the state holds only the LoRA, the optimizer, the random generators and the step.
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_trainer.atomic import write_folder
from lora_trainer.errors import ConfigError

KEPT = 2
FORMAT = 1
_COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class TrainingState:
    """One moment between two steps."""

    step: int
    """Optimizer steps done."""
    batches_per_epoch: int
    """To notice that the dataset has changed since."""
    lora: dict[str, Tensor]
    """float32, on the CPU"""
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    """Loss scaling of fp16."""
    noise_generator: Tensor
    global_generator: Tensor
    """PyTorch's own CPU generator: dropout."""


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write the state of a step under `folder` and forget all but the newest two; returns the new one's path."""
    path = folder / f"step{state.step:08d}"
    facts = {"format": FORMAT, "step": state.step, "batches_per_epoch": state.batches_per_epoch}
    rest = {
        "optimizer": state.optimizer,
        "scaler": state.scaler,
        "noise_generator": state.noise_generator,
        "global_generator": state.global_generator,
    }
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    files = {"lora.safetensors": save(state.lora), "training.pt": buffer.getvalue()}
    write_folder(path, {**files, "state.json": json.dumps(facts).encode(), _COMPLETE: b""})
    _forget_old(folder)
    return path


def load_state(path: Path) -> TrainingState:
    """Read a state; raises ConfigError, as the path comes from the option `resume`."""
    if not (path / _COMPLETE).is_file():
        raise ConfigError(f"'resume': {path} is not a complete state folder of this trainer.")
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        rest = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        lora = load((path / "lora.safetensors").read_bytes())
        return TrainingState(step=facts["step"], batches_per_epoch=facts["batches_per_epoch"], lora=lora, **rest)
    except MemoryError:
        raise
    except Exception as error:
        raise ConfigError(f"'resume': the state {path} is damaged ({type(error).__name__}); choose another.") from error


def _forget_old(folder: Path) -> None:
    states = sorted(path for path in folder.glob("step*") if (path / _COMPLETE).is_file())
    for old in states[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    # what a killed process left half-written
    for torn in folder.glob(".step*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
