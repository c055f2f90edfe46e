"""Stable Diffusion XL: two text encoders side by side, a pooled vector and the picture's sizes go into the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lora_trainer.architectures import clip
from lora_trainer.architectures.base import UNET, BaseModel, Conditioning, LoadOptions
from lora_trainer.architectures.pipelines import read_pipeline, scaled_latents
from lora_trainer.sgm_names import sgm_name

WITHOUT = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}


class StableDiffusionXL:
    """See `base.BaseModel`."""

    key = "sdxl"

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.pipeline = pipeline
        self.unet: Any = pipeline.unet
        self.vae: Any = pipeline.vae
        self.text_encoders: list[nn.Module] = [pipeline.text_encoder, pipeline.text_encoder_2]
        self.tokenizers: list[Any] = [pipeline.tokenizer, pipeline.tokenizer_2]
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self.prediction: str = pipeline.scheduler.config.prediction_type
        self._options = options

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        return [clip.tokenize(one, captions, self._options.max_token_length) for one in self.tokenizers]

    def token_count(self, caption: str) -> int:
        return len(clip.caption_ids(self.tokenizers[0], caption))

    def encode(self, tokens: list[Tensor]) -> Conditioning:
        outputs = [clip.run(encoder, ids) for encoder, ids in zip(self.text_encoders, tokens, strict=True)]
        # of both encoders the last layer but one, without the norm
        states = [clip.join(one.hidden_states[-2], ids) for one, ids in zip(outputs, tokens, strict=True)]
        pooled = clip.pool(self.text_encoders[1], outputs[1], tokens[1], self.tokenizers[1].eos_token_id)
        return Conditioning(torch.cat(states, dim=-1), pooled)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Conditioning, sizes: Tensor) -> Tensor:
        if condition.pooled is None:
            raise ValueError("SDXL's conditioning has a pooled vector")
        dtype = self._options.dtype
        extra = {"text_embeds": condition.pooled.to(dtype), "time_ids": sizes}
        answer: Tensor = self.unet(
            noisy.to(dtype), timesteps, condition.sequence.to(dtype), added_cond_kwargs=extra
        ).sample
        return answer.to(noisy.dtype)

    def latents_of(self, pixels: Tensor) -> Tensor:
        return scaled_latents(self.vae, pixels)

    def parts(self) -> dict[str, nn.Module]:
        return {UNET: self.unet, "te1": self.text_encoders[0], "te2": self.text_encoders[1]}

    def file_name(self, part: str, path: str) -> str:
        if part == UNET:
            return f"lora_unet_{sgm_name(path, self.unet.config).replace('.', '_')}"
        return clip.kohya_name(f"lora_{part}", path)

    def facts(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "ss_v2": "False",
        }


def load(options: LoadOptions, *, configs: Path | None = None) -> BaseModel:
    """`configs`: a folder like those in `assets/configs`, for single files of another size."""
    pipeline = read_pipeline("sdxl", StableDiffusionXLPipeline, options, without=WITHOUT, configs=configs)
    return StableDiffusionXL(pipeline, options)
