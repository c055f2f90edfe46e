"""Pictures to latents and captions to embeddings: each encoded once and kept, or anew at every use.

What is kept is encoded one by one, so that it depends on nothing but its own picture or caption, and what comes from
the disk is, on the CPU, bit for bit what encoding it again would give. It lies in the machine's memory and goes to the
device batch by batch, so that a large dataset does not fill a GPU.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, device

from lora_trainer.architectures.base import BaseModel, Conditioning
from lora_trainer.cache import DiskCache, cache_key, model_digest, tensors_digest
from lora_trainer.config import TrainingConfig
from lora_trainer.data import Picture
from lora_trainer.errors import DatasetError, ModelError
from lora_trainer.picture_files import picture_digest, upright_rgb

Report = Callable[[int, int], None]
"""Called with (done, total)."""
COLOUR_CHANGE = 0.05
"""color_aug: brightness, contrast and saturation are multiplied by 1 ± at most this."""


@dataclass(frozen=True)
class Use:
    """One use of a picture, with what was drawn for it."""

    index: int
    """Place among the pictures."""
    flipped: bool = False
    crop: tuple[int, int] | None = None
    """(left, top) in pixels of the resized picture; None: the middle."""
    colour: tuple[float, float, float] | None = None
    """Factors on brightness, contrast and saturation."""


def draw_use(picture: Picture, index: int, config: TrainingConfig, generator: torch.Generator) -> Use:
    """What the options leave to chance. Draws only for those that are on."""
    flipped = config.flip_aug and float(torch.rand((), generator=generator)) < 0.5
    crop = _random_crop(picture, generator) if config.random_crop else None
    return Use(index, flipped, crop, _random_colour(generator) if config.color_aug else None)


def _random_crop(picture: Picture, generator: torch.Generator) -> tuple[int, int]:
    place = picture.placement
    spare = [whole - part for whole, part in zip(place.resized, place.bucket, strict=True)]
    left, top = (int(torch.randint(pixels + 1, (), generator=generator)) for pixels in spare)
    return left, top


def _random_colour(generator: torch.Generator) -> tuple[float, float, float]:
    brightness, contrast, saturation = (1 + COLOUR_CHANGE * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    return brightness, contrast, saturation


def pixels(picture: Picture, use: Use) -> Tensor:
    """The picture as trained: [3, height, width] from -1 to 1, resized and cropped to its bucket."""
    image = _decoded(picture)
    place = picture.placement
    if image.size != place.resized:
        image = image.resize(place.resized, Image.Resampling.LANCZOS)
    left, top = use.crop or place.crop
    image = image.crop((left, top, left + place.bucket[0], top + place.bucket[1]))
    if use.colour:
        image = _recoloured(image, use.colour)
    if use.flipped:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _decoded(picture: Picture) -> Image.Image:
    image = upright_rgb(picture.path)
    if image.size != picture.size:
        raise DatasetError(f"The picture {picture.path} was changed while the run was starting; start again.")
    return image


def _recoloured(image: Image.Image, factors: tuple[float, float, float]) -> Image.Image:
    brightness, contrast, saturation = factors
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return ImageEnhance.Color(image).enhance(saturation)


def time_ids(picture: Picture, use: Use) -> list[float]:
    """SDXL's size conditioning: original height, width; crop top, left; target height, width; all in pixels."""
    width, height = picture.size
    place = picture.placement
    left, top = use.crop or place.crop
    if use.flipped:
        left = place.resized[0] - place.bucket[0] - left
    return [float(value) for value in (height, width, top, left, place.bucket[1], place.bucket[0])]


class Latents:
    """The pictures' latents by use. `keep`: encoded at most once, looked up in the cache first if there is one."""

    def __init__(
        self, model: BaseModel, pictures: Sequence[Picture], *, keep: bool, cache: DiskCache | None = None
    ) -> None:
        self._model = model
        self._pictures = pictures
        self._keep = keep
        self._cache = cache
        self._device: device = next(model.vae.parameters()).device
        self._kept: dict[Use, Tensor] = {}
        self._digests: dict[int, str] = {}
        self._from_cache = 0

    def fill(self, *, with_flips: bool, report: Report) -> None:
        """Encode everything before the first step, so that a damaged picture is found now."""
        wanted = [
            Use(index, flipped) for index in range(len(self._pictures)) for flipped in (False, True)[: 1 + with_flips]
        ]
        for done, use in enumerate(wanted, 1):
            self._latent(use)
            report(done, len(wanted))

    def check(self, report: Report) -> None:
        """Decode every picture once: where nothing is kept, a damaged one must not be found hours later."""
        for done, picture in enumerate(self._pictures, 1):
            _decoded(picture)
            report(done, len(self._pictures))

    def batch(self, uses: Iterable[Use]) -> Tensor:
        """[batch, channels, height/8, width/8] for pictures of one bucket, on the device."""
        return _moved(torch.stack([self._latent(use) for use in uses]), self._device)

    def summary(self) -> str:
        """A line for the log."""
        return _summary("latents", len(self._kept), self._from_cache, self._cache)

    def _latent(self, use: Use) -> Tensor:
        if not self._keep:
            return self._encode(use)
        if use not in self._kept:
            self._kept[use] = self._from_disk(use, self._cache) if self._cache else self._encode(use).cpu()
        return self._kept[use]

    def _from_disk(self, use: Use, cache: DiskCache) -> Tensor:
        transform = _transform(self._pictures[use.index], use)
        key = cache_key("latent", self._encoder, self._picture_digest(use.index), transform)
        if found := cache.get(key):
            self._from_cache += 1
            return found["latent"]
        latent = self._encode(use).cpu()
        cache.put(key, {"latent": latent})
        return latent

    @torch.no_grad()
    def _encode(self, use: Use) -> Tensor:
        picture = self._pictures[use.index]
        latent = self._model.latents_of(pixels(picture, use)[None].to(self._device))[0]
        if not torch.isfinite(latent).all():
            raise ModelError(
                f"The VAE answers {picture.path.name} with numbers that are not finite. Use a VAE that works for it: "
                "set 'vae' to another one."
            )
        return latent

    def _picture_digest(self, index: int) -> str:
        if index not in self._digests:
            self._digests[index] = picture_digest(self._pictures[index].path)
        return self._digests[index]

    @cached_property
    def _encoder(self) -> str:
        ramp = torch.linspace(-1, 1, 3 * 64 * 64, device=self._device).view(1, 3, 64, 64)
        with torch.no_grad():
            answer = self._model.latents_of(ramp)
        return _encoder_name(model_digest([self._model.vae]), {"answer": answer}, self._device)


class Texts:
    """The captions' embeddings by text. `keep`: encoded at most once, looked up in the cache first if there is one."""

    def __init__(self, model: BaseModel, *, keep: bool, cache: DiskCache | None = None) -> None:
        self._model = model
        self._keep = keep
        self._cache = cache
        self._device: device = next(model.text_encoders[0].parameters()).device
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._from_cache = 0

    def fill(self, captions: Iterable[str], report: Report) -> None:
        """Encode these before the first step."""
        distinct = sorted(set(captions))
        for done, caption in enumerate(distinct, 1):
            self._row(caption)
            report(done, len(distinct))

    def batch(self, captions: list[str]) -> Conditioning:
        """The captions' rows, on the device."""
        if not self._keep:
            return self._encode(captions)
        rows = [self._row(caption) for caption in captions]
        joined = {name: _moved(torch.cat([row[name] for row in rows]), self._device) for name in rows[0]}
        return Conditioning(joined["sequence"], joined.get("pooled"))

    def summary(self) -> str:
        """A line for the log."""
        return _summary("captions", len(self._kept), self._from_cache, self._cache)

    def _row(self, caption: str) -> dict[str, Tensor]:
        if caption not in self._kept:
            self._kept[caption] = self._from_disk(caption, self._cache) if self._cache else self._encoded(caption)
        return self._kept[caption]

    def _from_disk(self, caption: str, cache: DiskCache) -> dict[str, Tensor]:
        # the ids instead of the text: they say what the tokenizers made of it, and how much of it is read
        ids = {str(place): tensor for place, tensor in enumerate(self._model.tokenize([caption]))}
        key = cache_key("caption", self._encoder, tensors_digest(ids))
        if found := cache.get(key):
            self._from_cache += 1
            return found
        row = self._encoded(caption)
        cache.put(key, row)
        return row

    def _encoded(self, caption: str) -> dict[str, Tensor]:
        row = {name: tensor.cpu() for name, tensor in _tensors(self._encode([caption])).items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in row.values()):
            raise ModelError(
                f"The text encoders answer the caption '{caption[:80]}' with numbers that are not finite. Use "
                "mixed_precision = 'bf16' or 'no', or another base model."
            )
        return row

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Conditioning:
        return self._model.encode(self._model.tokenize(captions))

    @cached_property
    def _encoder(self) -> str:
        answer = _tensors(self._encode(["a photo of a red circle"]))
        return _encoder_name(model_digest(self._model.text_encoders), answer, self._device)


def _tensors(condition: Conditioning) -> dict[str, Tensor]:
    row = {"sequence": condition.sequence}
    return row if condition.pooled is None else {**row, "pooled": condition.pooled}


def _transform(picture: Picture, use: Use) -> str:
    """What is done to the picture between its file and the VAE."""
    place = picture.placement
    return f"lanczos {place.resized}, {place.bucket} at {place.crop}{', mirrored' if use.flipped else ''}"


def _encoder_name(weights: str, answer: dict[str, Tensor], where: device) -> str:
    """Names what encodes: its weights; what it makes of an example, which shows everything else that matters (the VAE's
    scale, skipped layers); and the arithmetic, as another PyTorch, or another number of threads, may round otherwise.
    """
    machine = f"cpu {torch.get_num_threads()}" if where.type == "cpu" else where.type
    return f"{weights} {tensors_digest(answer)} {torch.__version__} {machine}"


def _moved(tensor: Tensor, where: device) -> Tensor:
    if where.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # lets the copy run beside the GPU's work
    return tensor.to(where, non_blocking=True)


def _summary(what: str, count: int, from_cache: int, cache: DiskCache | None) -> str:
    if cache is None:
        return f"{what}: {count} encoded"
    trouble = f". Warning: {cache.trouble}" if cache.trouble else ""
    return f"{what}: {from_cache} from the cache, {count - from_cache} encoded{trouble}"
