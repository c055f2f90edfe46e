"""One .safetensors file in the original layout to diffusers' and transformers' modules.

Nothing is taken on trust: every parameter of the modules must be filled with a tensor of its shape, and every tensor
of the file must be used or be a known extra. The file does not carry configurations and the tokenizer: those are in
`assets`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from lora_trainer.architectures import detection, original_names
from lora_trainer.architectures.base import LoadOptions
from lora_trainer.architectures.original_names import Source
from lora_trainer.errors import ModelError

SCHEDULERS: dict[str, Any] = {"DDIMScheduler": DDIMScheduler, "EulerDiscreteScheduler": EulerDiscreteScheduler}
# pipeline part → where it begins in the file, and its class; OpenCLIP's begin with …model.
TEXT_ENCODERS: dict[str, dict[str, tuple[str, Any]]] = {
    "sd15": {"text_encoder": ("cond_stage_model.transformer.", CLIPTextModel)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", CLIPTextModel)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", CLIPTextModel),
        "text_encoder_2": ("conditioner.embedders.1.model.", CLIPTextModelWithProjection),
    },
}
DIFFUSERS_VAE_MARK = "encoder.down_blocks.0.resnets.0.conv1.weight"


class Target(NamedTuple):
    """Where weights go."""

    device: torch.device
    dtype: torch.dtype


class OriginalFile:
    """An open file that knows which of its tensors have not been used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        opening: Any = safe_open  # without types
        self._file = opening(path, framework="pt")
        self.names: set[str] = set(self._file.keys())
        self._unused = set(self.names)

    def fill(self, module: nn.Module, sources: Mapping[str, Source], prefix: str, to: Target) -> None:
        """Give an empty module its weights."""
        self._refuse_missing({prefix + source.name for source in sources.values()})
        shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
        tensors = {
            name: self._tensor(prefix + source.name, source, shapes[name]).to(to.device, to.dtype, copy=True)
            for name, source in sources.items()
        }
        module.load_state_dict(tensors, assign=True)

    def pass_over(self, prefix: str) -> None:
        """The tensors whose names begin so may stay unused."""
        self._unused = {name for name in self._unused if not name.startswith(prefix)}

    def refuse_unused(self) -> None:
        """Raise ModelError when the file holds what no module took, so that it must be some other kind of model."""
        strangers = sorted(name for name in self._unused if not original_names.is_extra(name))
        if strangers:
            raise ModelError(
                f"{self._path} holds tensors that its architecture does not have ({len(strangers):,}, such as "
                f"{ascii(strangers[0])[1:-1][:80]}). Choose another version of this model."
            )

    def _refuse_missing(self, names: set[str]) -> None:
        missing = sorted(names - self.names)
        if missing:
            raise ModelError(
                f"{self._path} lacks tensors of its architecture ({len(missing):,}, such as {missing[0]}). "
                "Copy or download the model again, or choose another version of it."
            )

    def _tensor(self, name: str, source: Source, shape: torch.Size) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        self._unused.discard(name)
        if source.third is not None and len(tensor) == 3 * shape[0]:
            tensor = tensor.chunk(3)[source.third]
        if source.is_transposed:
            tensor = tensor.T.contiguous()
        if tensor.shape != shape and _without_ones(tensor.shape) == _without_ones(shape):
            tensor = tensor.reshape(shape)  # a 1x1 convolution in one layout is a linear layer in the other
        if tensor.shape != shape:
            raise ModelError(
                f"{self._path} does not fit its architecture: {name} is {tuple(tensor.shape)} instead of "
                f"{tuple(shape)}. Choose another version of this model."
            )
        return tensor


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def read_model(key: str, options: LoadOptions, configs: Path) -> dict[str, Any]:
    """The modules and the scheduler, by their names in a diffusers pipeline; no VAE when the options name another."""
    file = OriginalFile(options.path)
    to = Target(options.device, options.dtype)
    parts: dict[str, Any] = {"unet": _unet(file, to, configs)}
    for name, (prefix, kind) in TEXT_ENCODERS[key].items():
        parts[name] = _text_encoder(file, prefix, kind, to, configs / f"{name}.json")
    if options.vae is None:
        parts["vae"] = _vae(file, detection.VAE_PREFIX, options.device, configs / "vae.json")
    else:
        file.pass_over(detection.VAE_PREFIX)
    file.refuse_unused()
    scheduler = read_config(configs / "scheduler.json") | detection.prediction_facts(options.path)
    parts["scheduler"] = SCHEDULERS[scheduler["_class_name"]].from_config(scheduler)
    return parts


def read_vae(path: Path, device: torch.device, config: Path) -> Any:
    """A VAE from one file: alone in either layout, or inside a checkpoint."""
    file = OriginalFile(path)
    if detection.VAE_PREFIX + detection.VAE_MARK in file.names:
        return _vae(file, detection.VAE_PREFIX, device, config)
    vae = _vae(file, "", device, config)
    file.refuse_unused()
    return vae


def read_config(path: Path) -> dict[str, Any]:
    """A configuration that the package brings along."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _unet(file: OriginalFile, to: Target, configs: Path) -> Any:
    unet_class: Any = UNet2DConditionModel
    with init_empty_weights(), no_init_weights():
        unet = unet_class.from_config(read_config(configs / "unet.json"))
    file.fill(unet, original_names.unet_sources(unet.state_dict(), unet.config), detection.UNET_PREFIX, to)
    return unet


def _text_encoder(file: OriginalFile, prefix: str, kind: Any, to: Target, config: Path) -> nn.Module:
    with init_empty_weights(), no_init_weights():
        encoder: Any = kind(CLIPTextConfig(**read_config(config)))
    parameters = encoder.state_dict()
    if not prefix.endswith(".model."):
        # some converters left the wrapper out
        is_wrapped = any(name.startswith(f"{prefix}text_model.") for name in file.names)
        file.fill(encoder, original_names.clip_sources(parameters, is_wrapped=is_wrapped), prefix, to)
        return encoder  # type: ignore[no-any-return]
    file.fill(encoder, original_names.open_clip_sources(parameters), prefix, to)
    # SD 2 takes the last layer but one, so its configuration ends there; the file has the last one too
    file.pass_over(f"{prefix}transformer.resblocks.{encoder.config.num_hidden_layers}.")
    return encoder  # type: ignore[no-any-return]


def _vae(file: OriginalFile, prefix: str, device: torch.device, config: Path) -> Any:
    vae_class: Any = AutoencoderKL
    with init_empty_weights(), no_init_weights():
        vae = vae_class.from_config(read_config(config))
    sources = original_names.vae_sources(vae.state_dict(), vae.config)
    if f"{prefix}{DIFFUSERS_VAE_MARK}" in file.names:
        sources = original_names.diffusers_vae_sources(vae.state_dict(), file.names)
    file.fill(vae, sources, prefix, Target(device, torch.float32))
    return vae
