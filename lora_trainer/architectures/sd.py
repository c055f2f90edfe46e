"""Stable Diffusion 1.5 and 2: one CLIP text encoder, a UNet that takes its states, latents of 4 channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lora_trainer.architectures import clip
from lora_trainer.architectures.base import UNET, BaseModel, Conditioning, LoadOptions
from lora_trainer.architectures.pipelines import read_pipeline, scaled_latents
from lora_trainer.errors import ModelError

WITHOUT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class StableDiffusion:
    """See `base.BaseModel`."""

    def __init__(self, key: str, pipeline: Any, options: LoadOptions) -> None:
        self.key = key
        self.pipeline = pipeline
        self.unet: Any = pipeline.unet
        self.vae: Any = pipeline.vae
        self.text_encoders: list[nn.Module] = [pipeline.text_encoder]
        self.tokenizers: list[Any] = [pipeline.tokenizer]
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self.prediction: str = pipeline.scheduler.config.prediction_type
        self._options = options
        layers = clip.layers(pipeline.text_encoder)
        if options.clip_skip > layers:
            raise ModelError(
                f"'clip_skip' is {options.clip_skip}, but the text encoder has only {layers} layers. Lower it."
            )

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        return [clip.tokenize(self.tokenizers[0], captions, self._options.max_token_length)]

    def token_count(self, caption: str) -> int:
        return len(clip.caption_ids(self.tokenizers[0], caption))

    def encode(self, tokens: list[Tensor]) -> Conditioning:
        encoder = self.text_encoders[0]
        # hidden_states[-1] is the last layer's before the norm
        states = clip.run(encoder, tokens[0]).hidden_states[-max(1, self._options.clip_skip)]
        return Conditioning(clip.join(clip.text_model(encoder).final_layer_norm(states), tokens[0]))

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Conditioning, sizes: Tensor) -> Tensor:
        dtype = self._options.dtype
        answer: Tensor = self.unet(noisy.to(dtype), timesteps, condition.sequence.to(dtype)).sample
        return answer.to(noisy.dtype)

    def latents_of(self, pixels: Tensor) -> Tensor:
        return scaled_latents(self.vae, pixels)

    def parts(self) -> dict[str, nn.Module]:
        return {UNET: self.unet, "te1": self.text_encoders[0]}

    def file_name(self, part: str, path: str) -> str:
        # here Kohya's files have diffusers' own names, and one text encoder without a number
        return f"lora_unet_{path.replace('.', '_')}" if part == UNET else clip.kohya_name("lora_te", path)

    def facts(self) -> dict[str, str]:
        is_v2, is_velocity = self.key == "sd2", self.prediction == "v_prediction"
        architecture = f"stable-diffusion-v2-{'768-v' if is_velocity else '512'}" if is_v2 else "stable-diffusion-v1"
        return {
            "ss_base_model_version": f"sd_{'v2' if is_v2 else 'v1'}{'_v' * is_velocity}",
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": "diffusers",
            "ss_v2": str(is_v2),
        }


def load(key: str, options: LoadOptions, *, configs: Path | None = None) -> BaseModel:
    """`key`: sd15 or sd2. `configs`: a folder like those in `assets/configs`, for single files of another size."""
    pipeline = read_pipeline(key, StableDiffusionPipeline, options, without=WITHOUT, configs=configs)
    return StableDiffusion(key, pipeline, options)
