"""Is this folder a base model that the trainer can use? Answered from its JSON files, without PyTorch."""

import json
from pathlib import Path
from typing import Any

from lora_trainer.errors import ModelError

PIPELINE = "StableDiffusionXLPipeline"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WANTED = "The trainer needs an SDXL base model as a folder in diffusers' layout."


def check_model_folder(folder: Path) -> None:
    """Raise ModelError with what is wrong and what is needed instead."""
    if not folder.exists():
        raise ModelError(f"The base model {folder} does not exist. {WANTED}")
    if not folder.is_dir():
        raise ModelError(f"The base model {folder} is a single file. {WANTED}")
    index = _read_json(folder / "model_index.json", folder)
    if index.get("_class_name") != PIPELINE:
        raise ModelError(f"The base model {folder} is a {index.get('_class_name')}, not SDXL. {WANTED}")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ModelError(f"The base model {folder} lacks its folder '{part}'. Copy or download the model again.")
    unet = _read_json(folder / "unet" / "config.json", folder)
    if unet.get("addition_embed_type") != "text_time" or unet.get("in_channels") != 4:
        raise ModelError(f"The base model {folder} has a UNet of another kind (an inpainting model?). {WANTED}")


def weights_variant(folder: Path) -> str | None:
    """'fp16' when the folder holds only half-precision files under their variant name."""
    unet = folder / "unet"
    plain = any(unet.glob("diffusion_pytorch_model.safetensors*"))
    return "fp16" if not plain and any(unet.glob("diffusion_pytorch_model*fp16*.safetensors*")) else None


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"The base model {folder} has no {path.name}, so it is no diffusers folder. {WANTED}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"The base model {folder} is damaged: {path.name} cannot be read ({error}).") from error
    return content if isinstance(content, dict) else {}
