"""Picture files: their endings, their size from the header alone, and their decoded content. Torch-free.

Whatever is wrong with a file becomes a DatasetError that names it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError, features

from lora_trainer.buckets import Size
from lora_trainer.errors import DatasetError

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
if features.check("avif"):
    PICTURE_ENDINGS.add(".avif")

_ORIENTATION = 0x0112
"""The Exif tag that says how the camera was held; 5 to 8 swap width and height."""


def picture_size(path: Path) -> Size:
    """(width, height) as a viewer shows it; reads only the header."""
    with open_picture(path) as image, _damage_named(path):
        return (image.height, image.width) if _orientation(image) >= 5 else (image.width, image.height)


def open_picture(path: Path) -> Image.Image:
    """Open a picture file, or say which one is at fault."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DatasetError(f"The picture {path} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(f"The picture {path} has too many pixels to be read safely; make it smaller.") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DatasetError(f"The picture {path} cannot be read; replace or remove it.") from error


def upright_rgb(path: Path) -> Image.Image:
    """The decoded picture, turned as its camera says."""
    with open_picture(path) as image, _damage_named(path):
        upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
        return _eight_bits(upright, path).convert("RGB")


def picture_digest(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"The picture {path} cannot be read; replace or remove it.") from error


def _orientation(image: Image.Image) -> int:
    # a PNG without Exif so far would be decoded to its end in search of some
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey brought to 8 bits, where Pillow's own conversion would make almost everything white."""
    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DatasetError(f"The picture {path} has more than 16 bits a pixel and colour; save it with 8 or 16.")
    return image


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever they stumble over
        raise DatasetError(f"The picture {path} is damaged; replace or remove it.") from error
