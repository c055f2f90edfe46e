"""Training the UNet together with both text encoders on drawn pictures, which are encoded to latents once.

The loss is that of Stable Diffusion XL: predict the noise. Captions, sizes and pooled embeddings enter as they do in
diffusers' StableDiffusionXLPipeline, so that the model works there unchanged.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from lora_trainer.pilot_tiny.draw import draw_scene, random_scene, write_caption
from lora_trainer.pilot_tiny.progress import Report, Steps, Training
from lora_trainer.pilot_tiny.train_vae import ENCODED_AT_ONCE, as_tensor, encode

NOISE_OFFSET = 0.05
SNR_GAMMA = 5.0
LARGE_AREA_BOOST = 6.0
"""Most weight of a very noisy timestep, where the colours of large areas are decided."""
NOISY_SHARE = 0.3
"""Share of timesteps drawn from the noisier half on top of the uniform ones."""
EMPTY_SHARE, ZERO_SHARE = 0.05, 0.05
"""Share of captions replaced by an empty one, and by zeros, which is what the pipeline uses for no negative prompt."""
UNKNOWN_WORD_SHARE = 0.05
"""Captions with a made-up word, so that a trigger word changes nothing until a LoRA teaches it."""
SHORT_TOKENS = 20
"""Longer than any caption here; most steps leave out the padding after it, which is faster."""


@dataclass(frozen=True)
class Lessons:
    """Pictures as latents with the token numbers of their captions."""

    latents: Tensor
    """[count, 4, 16, 16], scaled"""
    tokens: Tensor
    """[2, count, 77], for the two tokenizers"""
    empty: Tensor
    """[2, 77], the empty caption"""


def make_lessons(pipeline: Any, count: int, seed: int) -> Lessons:
    """Draw pictures, write their captions, and encode both."""
    random = Random(seed)  # noqa: S311 - reproducible, not secret
    scenes = [random_scene(random) for _ in range(count)]
    captions = [with_unknown_word(write_caption(scene, random), random) for scene in scenes]
    pictures = as_tensor([draw_scene(scene, random) for scene in scenes])
    latents = torch.cat([encode(pipeline.vae, some) for some in torch.split(pictures, ENCODED_AT_ONCE)])
    latents *= pipeline.vae.config.scaling_factor
    both = [pipeline.tokenizer, pipeline.tokenizer_2]
    tokens = torch.stack([tokenize(tokenizer, [*captions, ""]) for tokenizer in both])
    return Lessons(latents, tokens[:, :-1], tokens[:, -1])


def with_unknown_word(caption: str, random: Random) -> str:
    """Now and then the caption with three consonants before it."""
    if random.random() >= UNKNOWN_WORD_SHARE:
        return caption
    word = "".join(random.choice("bcdfghjklmnpqrstvwxz") for _ in range(3))
    return random.choice([f"{word} {caption}", f"a photo of {word}, {caption}"])


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """[count, 77]"""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def train_unet(
    pipeline: Any,
    *,
    steps: Steps,
    pictures: int,
    batch: int,
    learning_rate: float,
    seed: int,
    state: Path,
    report: Report,
) -> None:
    """Train in place, resuming from the state file if it exists."""
    lessons = make_lessons(pipeline, pictures, seed)
    learners = nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2])
    learners.requires_grad_(True).train()
    training = Training(
        learners.parameters(),
        learning_rate=learning_rate,
        betas=(0.9, 0.99),
        weight_decay=1e-3,
        average=0.999,
        seed=seed,
        state=state,
        report=report,
    )
    noise = Noise(pipeline.scheduler.config)
    for step in training.steps(steps, warmup=100, floor=0.005):
        # at the end always at full length, as the pipeline does it
        length = SHORT_TOKENS if step < 0.7 * steps.total and step % 4 else 77
        loss = unet_loss(pipeline, lessons, noise, training.generator, batch=batch, length=length)
        training.take_step(loss)
    training.average.store()
    learners.requires_grad_(False).eval()


class Noise:
    """The forward process of the pipeline's own schedule, and the weight of every timestep in the loss."""

    def __init__(self, scheduler_config: Any) -> None:
        scheduler_class: Any = DDPMScheduler
        self._scheduler: Any = scheduler_class.from_config(scheduler_config)
        kept = self._scheduler.alphas_cumprod
        snr = kept / (1 - kept)
        # min-SNR (Hang et al., 2023) for noise prediction, times the boost
        self.weights: Tensor = (SNR_GAMMA / snr).clamp(max=1) * snr.rsqrt().clamp(1, LARGE_AREA_BOOST)

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the noise in them, and the timesteps [batch], for latents [batch, 4, 16, 16]."""
        noise = torch.randn(latents.shape, generator=generator)
        noise += NOISE_OFFSET * torch.randn((*latents.shape[:2], 1, 1), generator=generator)
        total = len(self.weights)
        anywhere, noisy = (torch.randint(low, total, (len(latents),), generator=generator) for low in (0, total // 2))
        timesteps = torch.where(torch.rand(len(latents), generator=generator) < NOISY_SHARE, noisy, anywhere)
        return self._scheduler.add_noise(latents, noise, timesteps), noise, timesteps


def unet_loss(
    pipeline: Any, lessons: Lessons, noise: Noise, generator: torch.Generator, *, batch: int, length: int
) -> Tensor:
    """The squared error of the predicted noise in a random batch, weighted by timestep."""
    chosen = torch.randint(len(lessons.latents), (batch,), generator=generator)
    sequence, pooled = _embed(pipeline, lessons, chosen, generator, length)
    noisy, target, timesteps = noise.draw(lessons.latents[chosen], generator)
    conditions = {"text_embeds": pooled, "time_ids": _size_ids(batch, generator)}
    answer = pipeline.unet(noisy, timesteps, sequence, added_cond_kwargs=conditions).sample
    errors = (answer - target).square().mean((1, 2, 3))
    loss: Tensor = (errors * noise.weights[timesteps]).mean()
    return loss


def _embed(
    pipeline: Any, lessons: Lessons, chosen: Tensor, generator: torch.Generator, length: int
) -> tuple[Tensor, Tensor]:
    """The captions as a sequence [batch, length, 128] and pooled [batch, 80], some of them empty or zero."""
    dropped = torch.rand(len(chosen), generator=generator)
    tokens = lessons.tokens[:, chosen]
    tokens[:, dropped < EMPTY_SHARE] = lessons.empty[:, None]
    first, second = tokens[:, :, :length]
    narrow = pipeline.text_encoder(first, output_hidden_states=True).hidden_states[-2]
    wide = pipeline.text_encoder_2(second, output_hidden_states=True)
    kept = (dropped < 1 - ZERO_SHARE).float()
    sequence = torch.cat([narrow, wide.hidden_states[-2]], -1)
    return sequence * kept[:, None, None], wide.text_embeds * kept[:, None]


def _size_ids(batch: int, generator: torch.Generator) -> Tensor:
    """SDXL's size conditioning [batch, 6]; half of the originals pass for larger than 128 pixels."""
    larger = torch.randint(128, 1025, (batch,), generator=generator)
    original = torch.where(torch.rand(batch, generator=generator) < 0.5, 128, larger)
    top_left, target = torch.zeros(batch), torch.full((batch,), 128)
    return torch.stack([original, original, top_left, top_left, target, target], 1).float()
