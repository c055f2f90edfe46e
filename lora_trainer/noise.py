"""The diffusion side of a step: which noise at which timestep, what the denoiser should answer, and how wrong it is.

Options mean what they mean in sd-scripts. The schedule is `kept` [timesteps], the share of the picture's variance that
is left at each timestep, alpha-bar in Ho et al. (2020): x_t = sqrt(kept) x + sqrt(1 - kept) noise, and
SNR = kept / (1 - kept).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn.functional import interpolate

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError, ModelError

HIGHEST_SNR = 1000.0
"""The first timesteps count as this one in the weights that divide by the SNR or its root."""


@dataclass(frozen=True)
class NoisyBatch:
    """A batch of latents after noise, with the answer wanted."""

    noisy: Tensor
    """[batch, channels, height/8, width/8], in the latents' number format"""
    timesteps: Tensor
    """[batch], whole numbers from 0"""
    target: Tensor
    """Like `noisy`, in float32 at least: the noise itself, or the velocity for a v-prediction model."""


class NoiseProcess:
    """Adds noise as the base model's own schedule says, and measures answers against it.

    With zero_terminal_snr, or a model whose scheduler says rescale_betas_zero_snr, the schedule is shifted and scaled
    so that nothing of the picture is left at the last timestep (Lin et al., 2023, arXiv 2305.08891, algorithm 1). An
    SNR of 0 has no finite weight, so the weights of the loss come from the schedule before that rescaling, whose
    lowest SNR is about 0.005. sd-scripts does the same.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], prediction: str, config: TrainingConfig) -> None:
        _check(prediction, config)
        self.prediction = prediction
        self._config = config
        plain = _kept(scheduler_config, rescaled=False)
        rescaled = config.zero_terminal_snr or bool(scheduler_config.get("rescale_betas_zero_snr"))
        self._kept = _kept(scheduler_config, rescaled=True) if rescaled else plain
        self._weights = _loss_weights(plain / (1 - plain), prediction, config)
        self._thresholds = _huber_thresholds(self._kept, config)

    def draw(self, latents: Tensor, generator: torch.Generator) -> NoisyBatch:
        """Noise and timesteps for latents [batch, channels, h, w], all from the CPU's `generator`: every device trains
        on the same noise, and what is drawn does not depend on what is in the latents."""
        config = self._config
        noise = _normal(latents.shape, latents, generator)
        if config.noise_offset:
            noise = noise + self._offset(latents, generator)
        if config.multires_noise_iterations:
            noise = _with_coarser_noise(noise, config, generator)
        end = min(config.max_timestep, len(self._kept))
        timesteps = torch.randint(config.min_timestep, end, (len(latents),), generator=generator).to(latents.device)
        batch = self.at(latents, timesteps, noise)
        if config.ip_noise_gamma:
            more = noise + self._perturbation(latents, generator)
            batch = replace(batch, noisy=self._mix(latents, timesteps, more))
        return batch

    def at(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> NoisyBatch:
        """The batch for given timesteps [batch] and noise like `latents` [batch, channels, h, w], on one device."""
        self._follow(latents.device)
        target = noise
        if self.prediction == "v_prediction":
            # Salimans & Ho (2022): v = sqrt(kept) noise - sqrt(1 - kept) x
            kept = _each(self._kept, timesteps)
            target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        return NoisyBatch(self._mix(latents, timesteps, noise), timesteps, target)

    def loss(self, answer: Tensor, batch: NoisyBatch) -> Tensor:
        """[batch] weighted losses, float32, of the denoiser's `answer`, shaped like `batch.target`."""
        error = answer.float() - batch.target.float()  # [batch, channels, h, w]
        losses = self._distance(error, batch.timesteps).mean(dim=(1, 2, 3))
        return losses * self._weights[batch.timesteps]

    def _follow(self, device: torch.device) -> None:
        """Take the schedule's tables to where the latents are: once, not at every step."""
        if self._kept.device != device:
            self._kept, self._weights, self._thresholds = (
                table.to(device) for table in (self._kept, self._weights, self._thresholds)
            )

    def _mix(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        kept = _each(self._kept, timesteps)
        return (kept.sqrt() * latents + (1 - kept).sqrt() * noise).to(latents.dtype)

    def _offset(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """[batch, channels, 1, 1]: one draw a channel on top of the pixels' own (Guttenberg, "Diffusion with Offset
        Noise", 2023), stronger by the channel's mean with adaptive_noise_scale."""
        config = self._config
        share = _uniform(generator) if config.noise_offset_random_strength else 1.0
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs()  # [batch, channels, 1, 1]
        strength = (share * config.noise_offset + config.adaptive_noise_scale * means).clamp(min=0)
        return strength * _normal(means.shape, latents, generator)

    def _perturbation(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Like `latents`: noise that goes in, but that the answer does not have to name (Ning et al., "Input
        Perturbation Reduces Exposure Bias in Diffusion Models", 2023)."""
        config = self._config
        share = _uniform(generator) if config.ip_noise_gamma_random_strength else 1.0
        return share * config.ip_noise_gamma * _normal(latents.shape, latents, generator)

    def _distance(self, error: Tensor, timesteps: Tensor) -> Tensor:
        """Like `error` [batch, channels, h, w]. `huber` is the pseudo-Huber loss, 2c(sqrt(e² + c²) - c); `smooth_l1` is
        the same over c. Both grow like e² below their threshold c and like |e| above it."""
        kind = self._config.loss_type
        if kind == "l2":
            return error.square()
        if kind == "l1":
            return error.abs()
        threshold = _each(self._thresholds, timesteps)
        distance = 2 * ((error.square() + threshold.square()).sqrt() - threshold)
        return threshold * distance if kind == "huber" else distance


def _check(prediction: str, config: TrainingConfig) -> None:
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"The base model predicts '{prediction}'; only epsilon and v_prediction can be trained.")
    if config.scale_v_pred_loss_like_noise_pred and prediction == "epsilon":
        raise ConfigError("'scale_v_pred_loss_like_noise_pred' is for v-prediction, and the base model predicts noise.")
    if config.v_pred_like_loss and prediction == "v_prediction":
        raise ConfigError("'v_pred_like_loss' is for models that predict noise, and the base model predicts velocity.")


def _kept(scheduler_config: Mapping[str, Any], *, rescaled: bool) -> Tensor:
    """[timesteps], float32, on the CPU"""
    scheduler_class: Any = DDPMScheduler
    scheduler: Any = scheduler_class.from_config(scheduler_config, rescale_betas_zero_snr=rescaled)
    kept: Tensor = scheduler.alphas_cumprod
    return kept.float()


def _loss_weights(snr: Tensor, prediction: str, config: TrainingConfig) -> Tensor:
    """Factor on the loss at every timestep [timesteps], in sd-scripts' order."""
    is_noise = prediction == "epsilon"
    capped = snr.clamp(max=HIGHEST_SNR)
    like_noise = capped / (capped + 1)  # a velocity's loss times this is that of the noise that it amounts to
    weights = torch.ones_like(snr)
    if config.min_snr_gamma:
        # Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy"
        weights = weights * snr.clamp(max=config.min_snr_gamma) / (snr if is_noise else snr + 1)
    if config.scale_v_pred_loss_like_noise_pred:
        weights = weights * like_noise
    if config.v_pred_like_loss:
        weights = weights + weights / like_noise * config.v_pred_like_loss
    if config.debiased_estimation_loss:
        # Yu et al. (2023), "Debias the Training of Diffusion Models"
        weights = weights / (capped.sqrt() if is_noise else capped + 1)
    return weights


def _huber_thresholds(kept: Tensor, config: TrainingConfig) -> Tensor:
    """c at every timestep [timesteps]; unless constant, from near 1 at the first to near huber_c at the last (Khrapov
    et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss", 2024)."""
    lowest = config.huber_c
    if config.huber_schedule == "exponential":
        share = torch.arange(len(kept)) / len(kept)
        return lowest**share * config.huber_scale
    if config.huber_schedule == "snr":
        sigma = ((1 - kept) / kept).sqrt()  # infinite at a last timestep with nothing kept, where c is huber_c
        return (1 - lowest) / (1 + sigma).square() + lowest
    return torch.full_like(kept, lowest * config.huber_scale)


def _with_coarser_noise(noise: Tensor, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Pyramid noise: noise of ever lower resolution on top, scaled back to a standard deviation of 1 over the batch
    (Whitaker, "Multi-Resolution Noise for Diffusion Model Training", 2023)."""
    height, width = noise.shape[2:]
    for level in range(config.multires_noise_iterations):
        shrink = (2 + 2 * _uniform(generator)) ** level
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = _normal((*noise.shape[:2], *size), noise, generator)
        smooth = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        noise = noise + smooth * config.multires_noise_discount**level
        if min(size) == 1:
            break
    return noise / noise.std()


def _each(table: Tensor, timesteps: Tensor) -> Tensor:
    """[batch, 1, 1, 1]: the table's value at each picture's timestep"""
    return table[timesteps][:, None, None, None]


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(like.device)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
