"""What resuming needs, as a folder `state/step00000123/` that is complete or absent.

Guarantee: on the CPU in float32, a run that is killed and resumed from its state ends with the same weights, bit for
bit, as one that was never interrupted. The learning rate and the picture order are functions of the step and the seed,
and states are only taken between steps, when no gradients are accumulated; so the state holds the LoRA, the optimizer,
the loss scaler, the moving average, every process's random generators, what validation remembers, the step and the
place in the epoch. Which of these go on under another configuration: adapting.py.
"""

import dataclasses
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_trainer.adapting import Setup
from lora_trainer.atomic import write_folder
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError, explain
from lora_trainer.state_files import complete_states, is_complete, state_folder, with_proof

KEPT = 2
FORMAT = 3
OLDEST_FORMAT = 2
"""Without `setup`, `epoch` and `epoch_images`."""


@dataclass(frozen=True)
class TrainingState:
    """One moment between two steps."""

    step: int
    """Optimizer steps done."""
    batches_per_epoch: int
    lora: dict[str, Tensor]
    """float32, on the CPU"""
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    """Loss scaling of fp16."""
    ema: dict[str, Any] | None
    generators: list[dict[str, Tensor | None]]
    """Of each process: `noise` (ours), `torch` and `cuda` (PyTorch's own: dropout)."""
    validation: dict[str, Any]
    """Best loss so far, and how many validations did not beat it."""
    recipe: str = ""
    """`recipe_digest` of the configuration that wrote it."""
    epoch: int = 0
    """In which the next step lies, counted from 0."""
    epoch_images: int = 0
    """Pictures of that epoch that all processes together have used."""
    setup: Setup | None = None
    """What it was saved under; None when that was not noted yet."""


# where results go, and what is drawn on the way, changes no weight
_NOT_THE_RECIPE = {
    "output_dir", "output_name", "save_model_as", "save_precision", "save_every_n_steps", "save_every_n_epochs",
    "save_last_n_epochs", "save_best", "save_state", "resume", "events_file", "logging_dir", "no_metadata", "metadata",
    "training_comment", "metadata_title", "metadata_author", "metadata_description", "metadata_license",
    "metadata_tags", "metadata_trigger_phrase", "metadata_usage_hint", "cache_dir", "dataset_manifest",
    "train_data_dir", "reg_data_dir", "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first",
    "sample_sampler", "sample_prompts",
}  # fmt: skip


def recipe_digest(config: TrainingConfig, device: str) -> str:
    """Equal digests train alike, bit for bit, on the CPU in float32: options, PyTorch's version, device, threads."""
    options = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_THE_RECIPE}
    facts = [options, torch.__version__, device, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write the state of a step under `folder` and forget older ones, see `_forget_old`; returns the new one's path."""
    path = state_folder(folder, state.step)
    names = ("step", "batches_per_epoch", "epoch", "epoch_images", "validation", "recipe")
    facts = {"format": FORMAT} | {name: getattr(state, name) for name in names}
    facts["setup"] = state.setup.as_json() if state.setup else None
    rest = {name: getattr(state, name) for name in ("optimizer", "scaler", "ema", "generators")}
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    files = {"lora.safetensors": save(state.lora), "training.pt": buffer.getvalue()}
    write_folder(path, with_proof({**files, "state.json": json.dumps(facts).encode()}))
    _forget_old(folder, path)
    return path


def load_state(path: Path) -> TrainingState:
    """Read a state; raises ConfigError, as the path comes from the option `resume`."""
    if not is_complete(path):
        raise ConfigError(f"'resume': {path} is not a complete state folder of this trainer.")
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        written_in = facts.pop("format")
        rest = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
        lora = load((path / "lora.safetensors").read_bytes())
        if OLDEST_FORMAT <= written_in <= FORMAT:
            setup = Setup.from_json(facts.pop("setup")) if facts.get("setup") else None
            return TrainingState(lora=lora, **facts | {"setup": setup}, **rest)
    except Exception as error:
        if explain(error):  # out of memory, which is no damage
            raise
        raise ConfigError(f"'resume': the state {path} is damaged ({type(error).__name__}); choose another.") from error
    raise ConfigError(f"'resume': the state {path} was written by another version; start again without it.")


def _forget_old(folder: Path, newest: Path) -> None:
    """Keep the one just written and the complete ones of the highest steps; a damaged one is no substitute for them.

    A run that was resumed from an earlier state writes below the steps of those that it left: nothing says that they
    are not wanted any more.
    """
    states = [path for path, _ in complete_states(folder)]
    for old in states[KEPT:]:
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)
    # what a killed process left half-written
    for torn in folder.glob(".step*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
