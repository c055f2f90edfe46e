"""Loading an SDXL-architecture base model from a diffusers folder, never from the network."""

from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import StableDiffusionXLPipeline

from lora_trainer.errors import ModelError, explain
from lora_trainer.model_folder import check_model_folder, weights_variant


def load_base_model(folder: Path, *, device: torch.device, unet_dtype: torch.dtype) -> Any:
    """The base model as a frozen pipeline on the device.

    The VAE stays in float32, since SDXL's own overflows in float16; UNet and text encoders take `unet_dtype`.
    Raises ModelError when the folder is something else or incomplete.
    """
    check_model_folder(folder)
    pipeline = _read_pipeline(folder)
    if getattr(pipeline.vae.config, "latents_mean", None) is not None:
        raise ModelError(f"The base model {folder} normalises its latents by channel, which is not supported yet.")
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False).eval().to(device, unet_dtype)
    pipeline.vae.requires_grad_(False).eval().to(device, torch.float32)
    return pipeline


def _read_pipeline(folder: Path) -> Any:
    _quiet()
    pipeline_class: Any = StableDiffusionXLPipeline
    try:
        return pipeline_class.from_pretrained(
            str(folder),
            dtype=torch.float32,
            variant=weights_variant(folder),
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
        )
    except Exception as error:
        # diffusers raises many kinds for a damaged folder; out of memory is not one of them
        if explain(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"The base model {folder} cannot be loaded: {reason}") from error


def _quiet() -> None:
    """Their progress bars would tear our log lines."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
