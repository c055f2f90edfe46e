"""Pictures to latents and captions to embeddings, each encoded once and kept in memory.

Latents are [4, height/8, width/8]; an SDXL caption is a sequence [77, width of both encoders] and a pooled vector.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_trainer.data import Picture, upright_rgb

Report = Callable[[int, int], None]
"""Called with (done, total)."""
CAPTIONS_AT_ONCE = 16


def pixels(picture: Picture, *, flipped: bool) -> Tensor:
    """The picture as trained: [3, height, width] from -1 to 1, resized and cropped to its bucket."""
    image = upright_rgb(picture.path)
    place = picture.placement
    if image.size != place.resized:
        image = image.resize(place.resized, Image.Resampling.LANCZOS)
    left, top = place.crop
    image = image.crop((left, top, left + place.bucket[0], top + place.bucket[1]))
    if flipped:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def time_ids(picture: Picture, *, flipped: bool) -> list[float]:
    """SDXL's size conditioning: original height, width; crop top, left; target height, width; all in pixels."""
    width, height = picture.size
    place = picture.placement
    left, top = place.crop
    if flipped:
        left = place.resized[0] - place.bucket[0] - left
    return [float(value) for value in (height, width, top, left, place.bucket[1], place.bucket[0])]


class Latents:
    """The pictures' latents by (index, flipped): from memory when kept there, else encoded at each use."""

    def __init__(self, vae: Any, pictures: Sequence[Picture], *, keep: bool) -> None:
        self._vae = vae
        self._pictures = pictures
        self._keep = keep
        self._kept: dict[tuple[int, bool], Tensor] = {}

    def fill(self, *, with_flips: bool, report: Report) -> None:
        """Encode everything before the first step."""
        wanted = [
            (index, flipped) for index in range(len(self._pictures)) for flipped in (False, True)[: 1 + with_flips]
        ]
        for done, (index, flipped) in enumerate(wanted, 1):
            self._kept[index, flipped] = self._encode(index, flipped=flipped)
            report(done, len(wanted))

    def batch(self, items: Iterable[tuple[int, bool]]) -> Tensor:
        """[batch, 4, height/8, width/8] for pictures of one bucket."""
        return torch.stack(
            [self._kept[item] if self._keep else self._encode(item[0], flipped=item[1]) for item in items]
        )

    @torch.no_grad()
    def _encode(self, index: int, *, flipped: bool) -> Tensor:
        # one at a time, so that a latent does not depend on its neighbours; the mode, as sampling would only add noise
        image = pixels(self._pictures[index], flipped=flipped)[None].to(self._vae.device)
        latent: Tensor = self._vae.encode(image).latent_dist.mode()[0] * self._vae.config.scaling_factor
        return latent


@dataclass(frozen=True)
class Embedding:
    """One caption: `sequence` [77, features] and `pooled` [features of the second encoder]."""

    sequence: Tensor
    pooled: Tensor


class Captions:
    """The captions' embeddings by text."""

    def __init__(self, pipeline: Any, device: torch.device, *, keep: bool) -> None:
        self._pipeline = pipeline
        self._device = device
        self._keep = keep
        self._kept: dict[str, Embedding] = {}

    def fill(self, captions: Iterable[str], report: Report) -> None:
        """Encode these before the first step."""
        distinct = sorted(set(captions))
        for start in range(0, len(distinct), CAPTIONS_AT_ONCE):
            some = distinct[start : start + CAPTIONS_AT_ONCE]
            self._kept.update(zip(some, self._encode(some), strict=True))
            report(start + len(some), len(distinct))

    def batch(self, captions: list[str]) -> Embedding:
        """Sequence [batch, 77, features] and pooled [batch, features]."""
        rows = [self._kept[caption] for caption in captions] if self._keep else self._encode(captions)
        return Embedding(torch.stack([row.sequence for row in rows]), torch.stack([row.pooled for row in rows]))

    def too_long(self, captions: Iterable[str]) -> list[str]:
        """The captions of which the model sees only the first 77 tokens."""
        tokenizer = self._pipeline.tokenizer
        return [text for text in set(captions) if len(tokenizer(text).input_ids) > tokenizer.model_max_length]

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> list[Embedding]:
        sequences, _, pooled, _ = self._pipeline.encode_prompt(
            captions, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [Embedding(*row) for row in zip(sequences, pooled, strict=True)]
