"""A stored picture as a small JPEG, for a provider: on white where it is transparent, turned as EXIF says."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from datasets.pictures import opened
from lorapilot.errors import UserError

JPEG_QUALITY = 90


def as_jpeg(path: Path, *, pixels: int) -> bytes:
    """At most `pixels` wide and high. Raises UserError when the file is gone or does not decode."""
    try:
        with opened(path) as image:
            image.draft("RGB", (pixels, pixels))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=3)
            flat = _on_white(small)
    except FileNotFoundError:
        raise UserError("The picture's file is gone. Upload it again.") from None
    except Exception:  # noqa: BLE001 a decoder that is fed with damaged bytes raises anything
        raise UserError("The picture cannot be read.") from None
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered.getchannel("A"))
    return flat
