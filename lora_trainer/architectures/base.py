"""What a base model is to the rest of the trainer. An architecture is one file beside this one; __init__.py lists them.

Shapes: latents [batch, channels, height/8, width/8]; token ids [batch, chunks, 77], one tensor for each text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, device, dtype, nn

UNET = "unet"
"""Name of the denoiser among the parts that can get a LoRA; text encoders are te1, te2, …"""


@dataclass(frozen=True)
class Conditioning:
    """Captions as the denoiser takes them. Rows can be stacked along the first dimension."""

    sequence: Tensor
    """[batch, tokens, features]"""
    pooled: Tensor | None = None
    """[batch, features], for architectures that have it"""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a base model is loaded. Nothing ever comes from the network."""

    path: Path
    """A diffusers folder or one .safetensors file."""
    vae: Path | None
    device: device
    dtype: dtype
    """Of the frozen denoiser and text encoders. The VAE stays in float32, since SDXL's own overflows in float16."""
    max_token_length: int
    """75, 150 or 225"""
    clip_skip: int
    """As sd-scripts counts: 0 and 1 take the last layer. Only architectures that have it."""
    v_parameterization: bool | None
    """Unset: as the model says."""


class BaseModel(Protocol):
    """A loaded, frozen base model. Attributes are plain modules on the device, in eval mode, without gradients."""

    key: str
    """sd15, sd2, sdxl: as LoRA Pilot's registry names architectures."""
    unet: Any
    vae: Any
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    scheduler_config: Mapping[str, Any]
    prediction: str
    """epsilon or v_prediction"""
    pipeline: Any
    """The diffusers pipeline of these same modules, for sample pictures."""

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """Ids on the CPU; what does not fit in max_token_length is cut off."""

    def token_count(self, caption: str) -> int:
        """Tokens of the caption without start and end, uncut."""

    def encode(self, tokens: list[Tensor]) -> Conditioning:
        """With gradients when a text encoder has some to give. Long captions as sd-scripts encodes them."""

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Conditioning, sizes: Tensor) -> Tensor:
        """The denoiser's answer, like `noisy`.

        `sizes` [batch, 6]: original height, width; crop top, left; target height, width; in pixels (SDXL's size
        conditioning; other architectures pass over it).
        """

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Scaled latents (the mode) of pictures [batch, 3, height, width] from -1 to 1."""

    def parts(self) -> dict[str, nn.Module]:
        """What can get a LoRA: `unet`, and `te1`, `te2`, … in order."""

    def file_name(self, part: str, path: str) -> str:
        """The name that a module has in Kohya's file, such as `lora_unet_input_blocks_4_1_proj_in` or
        `lora_te1_text_model_encoder_layers_0_mlp_fc1`. `path`: dotted, as in `parts()[part].named_modules()`."""

    def facts(self) -> dict[str, str]:
        """For the LoRA's metadata: ss_base_model_version, modelspec.architecture, modelspec.implementation, and
        ss_v2 ("True" or "False")."""
