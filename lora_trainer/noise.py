"""The diffusion side of a step: which noise at which timestep, what the UNet should answer, and how much it counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ModelError


@dataclass(frozen=True)
class NoisyBatch:
    """A batch of latents after noise, with the answer wanted."""

    noisy: Tensor
    """[batch, 4, height/8, width/8]"""
    timesteps: Tensor
    """[batch], whole numbers from 0"""
    target: Tensor
    """Like `noisy`: the noise itself, or the velocity for a v-prediction model."""
    weights: Tensor
    """[batch] factors on the loss"""


class NoiseProcess:
    """Adds noise as the base model's own schedule says. All randomness comes from the generator passed in."""

    def __init__(self, scheduler_config: Mapping[str, Any], config: TrainingConfig) -> None:
        scheduler_class: Any = DDPMScheduler
        self._scheduler: Any = scheduler_class.from_config(scheduler_config)
        self.prediction: str = self._scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The base model predicts '{self.prediction}'; only epsilon and v_prediction can be trained."
            )
        self._noise_offset = config.noise_offset
        self._weights = self._loss_weights(config.min_snr_gamma)

    def add(self, latents: Tensor, generator: torch.Generator) -> NoisyBatch:
        """Draw timesteps and noise for latents [batch, 4, h, w]."""
        # drawn on the CPU, so that every device trains on the same noise
        timesteps = torch.randint(len(self._weights), (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        if self._noise_offset:
            noise += self._noise_offset * torch.randn((*latents.shape[:2], 1, 1), generator=generator)
        weights = self._weights[timesteps].to(latents.device)
        timesteps, noise = timesteps.to(latents.device), noise.to(latents.device)
        target = noise if self.prediction == "epsilon" else self._scheduler.get_velocity(latents, noise, timesteps)
        return NoisyBatch(self._scheduler.add_noise(latents, noise, timesteps), timesteps, target, weights)

    def _loss_weights(self, gamma: float) -> Tensor:
        """Min-SNR weight of every timestep (Hang et al., 2023): min(SNR, gamma) / SNR, over SNR + 1 for velocities."""
        kept: Tensor = self._scheduler.alphas_cumprod.float()
        if not gamma:
            return torch.ones_like(kept)
        # a zero-terminal schedule ends with SNR 0
        snr = (kept / (1 - kept)).clamp(min=1e-8)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)
