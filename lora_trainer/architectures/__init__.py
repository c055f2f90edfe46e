"""The base models that can be trained: which one a path is (torch-free), and loading it.

An architecture is a file beside this one that fulfils `base.BaseModel`, and a line in ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_trainer.architectures import detection
from lora_trainer.architectures.detection import unet_config
from lora_trainer.errors import ModelError

__all__ = ["ARCHITECTURES", "Architecture", "check_model", "find_architecture", "load_base_model", "unet_config"]

if TYPE_CHECKING:  # base.py imports torch, which takes seconds
    from lora_trainer.architectures.base import BaseModel, LoadOptions


@dataclass(frozen=True)
class Architecture:
    """A kind of base model."""

    key: str
    """As LoRA Pilot's registry names it."""
    load: Callable[[LoadOptions], BaseModel]
    """Imports torch when it is called."""


def _load_sd15(options: LoadOptions) -> BaseModel:
    from lora_trainer.architectures import sd

    return sd.load("sd15", options)


def _load_sd2(options: LoadOptions) -> BaseModel:
    from lora_trainer.architectures import sd

    return sd.load("sd2", options)


def _load_sdxl(options: LoadOptions) -> BaseModel:
    from lora_trainer.architectures import sdxl

    return sdxl.load(options)


ARCHITECTURES = {
    one.key: one
    for one in (Architecture("sd15", _load_sd15), Architecture("sd2", _load_sd2), Architecture("sdxl", _load_sdxl))
}


def find_architecture(path: Path, *, vae: Path | None = None) -> Architecture:
    """What the folder or file is; ModelError when it is no model that can be trained."""
    if not path.exists():
        raise ModelError(f"The base model {path} does not exist. {detection.WANTED}")
    return ARCHITECTURES[detection.detect(path, has_vae=vae is not None)]


def check_model(path: Path, *, vae: Path | None = None) -> Architecture:
    """What it is; ModelError (a sentence or two) for whatever can be seen to be wrong without loading weights."""
    architecture = find_architecture(path, vae=vae)
    if vae is not None:
        detection.check_vae(vae)
    return architecture


def load_base_model(options: LoadOptions) -> BaseModel:
    """The frozen base model on its device; ModelError when it cannot be loaded."""
    return check_model(options.path, vae=options.vae).load(options)
