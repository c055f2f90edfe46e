"""Training the autoencoder: first encoder and decoder together, later the decoder alone on the finished latent space.

Training the decoder alone changes no latent, so a UNet that was trained before keeps its meaning.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_trainer.pilot_tiny.draw import PIXELS, draw_clutter, draw_scene, random_scene
from lora_trainer.pilot_tiny.progress import Report, Steps, Training

BATCH = 8
ENCODED_AT_ONCE = 25
CROP = 64
"""Pixels; training on parts of pictures is as good and four times faster."""
KL_WEIGHT = 3e-4
LATENT_NOISE = 0.1
"""The decoder also sees latents with up to so much noise, of their own spread, as the UNet's are never perfect."""
CLUTTER = {False: 0.35, True: 0.15}
"""Share of pictures that show anything but a shape, by whether only the decoder is trained."""


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """[count, 3, height, width], bytes."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def as_floats(pictures: Tensor) -> Tensor:
    """Bytes to the autoencoder's range, -1 to 1."""
    return pictures.float() / 127.5 - 1


def draw_pictures(count: int, seed: int, *, clutter: float) -> Tensor:
    """[count, 3, 128, 128] bytes, a share of them clutter."""
    random = Random(seed)  # noqa: S311 - reproducible, not secret
    return as_tensor(
        [
            draw_clutter(random) if random.random() < clutter else draw_scene(random_scene(random), random)
            for _ in range(count)
        ]
    )


def train_vae(
    vae: Any,
    *,
    steps: Steps,
    pictures: int,
    learning_rate: float,
    decoder_only: bool,
    seed: int,
    state: Path,
    report: Report,
) -> None:
    """Train in place, resuming from the state file if it exists."""
    drawn = draw_pictures(pictures, seed, clutter=CLUTTER[decoder_only])
    vae.requires_grad_(True)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    training = Training(
        (weight for weight in vae.parameters() if weight.requires_grad),
        learning_rate=learning_rate,
        betas=(0.9, 0.98),
        weight_decay=1e-4,
        average=0.998,
        seed=seed,
        state=state,
        report=report,
    )
    for _ in training.steps(steps, warmup=30, floor=0.03):
        crops = as_floats(random_crops(drawn, training.generator))
        loss = vae_loss(vae, crops, training.generator, decoder_only=decoder_only)
        training.take_step(loss)
    training.average.store()
    vae.requires_grad_(False).eval()
    if not decoder_only:
        vae.register_to_config(scaling_factor=unit_scale(vae, drawn[:200]))


def unit_scale(vae: Any, pictures: Tensor) -> float:
    """The factor that gives the latents of these pictures a standard deviation of 1."""
    return 1 / torch.cat([encode(vae, some) for some in torch.split(pictures, ENCODED_AT_ONCE)]).std().item()


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Bytes [count, 3, height, width] to latents [count, 4, height/8, width/8], not scaled."""
    latents: Tensor = vae.encode(as_floats(pictures)).latent_dist.mode()
    return latents


def random_crops(drawn: Tensor, generator: torch.Generator) -> Tensor:
    """[BATCH, 3, CROP, CROP] bytes, cut on the grid of latents and in half of all batches mirrored."""
    places = (PIXELS - CROP) // 8 + 1
    chosen = torch.randint(len(drawn), (BATCH,), generator=generator).tolist()
    corners = (torch.randint(places, (BATCH, 2), generator=generator) * 8).tolist()
    crops = torch.stack(
        [drawn[index, :, y : y + CROP, x : x + CROP] for index, (y, x) in zip(chosen, corners, strict=True)]
    )
    return crops.flip(-1) if torch.rand((), generator=generator) < 0.5 else crops


def vae_loss(vae: Any, pictures: Tensor, generator: torch.Generator, *, decoder_only: bool) -> Tensor:
    """Absolute and squared error, the error of the slopes (for edges), and the latents' divergence from a normal."""
    with torch.set_grad_enabled(not decoder_only):
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.sample(generator=generator)
    divergence = posterior.kl().mean() / latents[0].numel()
    if decoder_only:
        strength = LATENT_NOISE * torch.rand((len(latents), 1, 1, 1), generator=generator) * latents.std()
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
    decoded = vae.decode(latents).sample
    error = decoded - pictures
    slopes = sum(error.diff(dim=dim).abs().mean() for dim in (-1, -2))
    loss: Tensor = error.abs().mean() + error.square().mean() + slopes + KL_WEIGHT * divergence
    return loss
