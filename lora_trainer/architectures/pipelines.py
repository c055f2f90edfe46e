"""A diffusers pipeline from a folder or a single file, frozen and on its device. Nothing comes from the network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from lora_trainer.architectures import clip, original_names, single_file
from lora_trainer.architectures.base import LoadOptions
from lora_trainer.architectures.detection import (
    CONFIGS,
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    vae_folder,
    weights_variant,
)
from lora_trainer.errors import ModelError, explain

PADDING = {
    "sd15": {"tokenizer": clip.END},
    "sd2": {"tokenizer": "!"},
    "sdxl": {"tokenizer": clip.END, "tokenizer_2": "!"},
}
PREDICTIONS = ("epsilon", "v_prediction")
SD_SCALING = 0.18215
"""Of VAEs whose configuration is older than the option."""


def read_pipeline(
    key: str, pipeline_class: Any, options: LoadOptions, *, without: dict[str, Any], configs: Path | None
) -> Any:
    """The model as a pipeline of frozen modules in eval mode, with the scheduler that the options ask for.

    `without`: arguments that keep safety checkers and the like out. `configs`: what a single file's modules look
    like, instead of what the package brings along. Raises ModelError.
    """
    _quiet()
    configs = configs or CONFIGS / key
    is_folder = options.path.is_dir()
    try:
        if is_folder:
            parts = _folder_parts(key, options)
        else:
            parts = single_file.read_model(key, options, configs)
            parts |= {name: clip.make_tokenizer(pad) for name, pad in PADDING[key].items()}
        if options.vae is not None:
            parts["vae"] = _read_vae(
                options.vae, options.device, options.path / "vae" / "config.json" if is_folder else configs / "vae.json"
            )
        if is_folder:
            pipeline = pipeline_class.from_pretrained(str(options.path), **parts, **without, local_files_only=True)
        else:
            pipeline = pipeline_class(**parts, **without)
    except Exception as error:
        # the libraries raise many kinds for a damaged model; out of memory is not one of them
        if explain(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"The base model {options.path} cannot be loaded: {reason}") from error
    _freeze(pipeline, key, options)
    _set_prediction(pipeline, options)
    return pipeline


@torch.no_grad()
def scaled_latents(vae: Any, pixels: Tensor) -> Tensor:
    """See `BaseModel.latents_of`."""
    latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def _folder_parts(key: str, options: LoadOptions) -> dict[str, Any]:
    """The parts that have weights; what else the pipeline needs, it reads itself."""
    folder = options.path
    parts = {"unet": _read_part(UNet2DConditionModel, folder / "unet", options.dtype)}
    for name, (_, encoder_class) in single_file.TEXT_ENCODERS[key].items():
        parts[name] = _read_part(encoder_class, folder / name, options.dtype)
    if options.vae is None:
        parts["vae"] = _read_part(AutoencoderKL, folder / "vae", torch.float32)
    return parts


def _read_part(module_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """One module; ModelError when its weights are not exactly those that its configuration asks for."""
    stem = DIFFUSERS_WEIGHTS if module_class in (UNet2DConditionModel, AutoencoderKL) else TRANSFORMERS_WEIGHTS
    module, report = module_class.from_pretrained(
        str(folder),
        dtype=dtype,
        variant=weights_variant(folder, stem),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(name) for name in report.get(what, ()) if not original_names.is_extra(str(name)))
        if wrong:
            raise ModelError(
                f"{folder} does not fit its config.json ({what.replace('_', ' ')}: {len(wrong):,}, such as "
                f"{wrong[0]}). Copy or download the model again."
            )
    return module


def _read_vae(path: Path, device: torch.device, config: Path) -> Any:
    """`config`: of the base model's own VAE, which this one has to fit."""
    if path.is_file():
        return single_file.read_vae(path, device, config)
    vae = _read_part(AutoencoderKL, vae_folder(path), torch.float32)
    wanted = single_file.read_config(config).get("scaling_factor", SD_SCALING)
    if not math.isclose(vae.config.scaling_factor, wanted):
        raise ModelError(
            f"The VAE {path} belongs to another architecture: its scaling factor is {vae.config.scaling_factor:g} "
            f"instead of {wanted:g}. Choose another VAE, or leave 'vae' empty."
        )
    return vae


def _freeze(pipeline: Any, key: str, options: LoadOptions) -> None:
    if getattr(pipeline.vae.config, "latents_mean", None) is not None:
        raise ModelError(f"The VAE of {options.path} normalises its latents by channel, which is not supported yet.")
    pipeline.set_progress_bar_config(disable=True)
    for name in ("unet", *single_file.TEXT_ENCODERS[key]):
        getattr(pipeline, name).requires_grad_(False).eval().to(options.device, options.dtype)
    pipeline.vae.requires_grad_(False).eval().to(options.device, torch.float32)


def _set_prediction(pipeline: Any, options: LoadOptions) -> None:
    if options.v_parameterization is not None:
        prediction = PREDICTIONS[options.v_parameterization]
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise ModelError(
            f"The base model {options.path} predicts '{prediction}'; only epsilon and v_prediction can be trained."
        )


def _quiet() -> None:
    """Their progress bars would tear our log lines."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
