"""A picture as every trainer reads it the same way: upright, in sRGB, 8 bits a channel, one frame. No files here.

Most pictures are so already and stay byte for byte what they are. Any other is decoded, changed, and kept as PNG, which
loses nothing more; what was done is told in sentences. Profiles and EXIF data come from strangers: what cannot be
read of them is ignored, never an error.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageChops, ImageCms

from lorapilot.errors import UserError

KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: a phone's JPEG with one more picture
READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF")
READABLE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"}
DEEP_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION = 0x0112  # EXIF 2.32, table 4
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PROFILE_BYTES = 4 * 1024**2
# Of 255: what a profile may differ from sRGB and still count as it; there are dozens of files that all mean sRGB.
SAME_COLOUR = 2
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile (ICC.1, 7.2.6): the mode that it describes


@dataclass
class Converted:
    """`changes` says what was done to the pixels; without any, the file stands as it came. `notes` is what else to
    know."""

    image: Image.Image
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(image: Image.Image, *, flatten: str = "") -> Converted:
    """Decode an opened picture to its last pixel. `flatten`: the colour `#rrggbb` behind it; empty keeps transparency.

    Raises UserError for a kind of pixels that has no meaning here, and whatever the decoder raises.
    """
    found = Converted(image)
    if image.mode not in READABLE_MODES | DEEP_MODES:
        raise UserError(f"Pictures of the kind {image.mode} are not supported. Save it with 8 bits a channel.")
    profile = image.info.get("icc_profile")
    is_deep = _is_deep(image)
    _take_first_frame(found)
    found.image.load()
    orientation = _orientation(image)  # after the pixels: a PNG may have its EXIF data there, and TIFF is turned by now
    if is_deep:
        _make_shallow(found)
    if profile:
        _apply_profile(found, profile)
    _make_rgb(found)
    if orientation in UPRIGHT:
        found.image = found.image.transpose(UPRIGHT[orientation])
        found.changes.append("It was turned upright, as its EXIF data says.")
    if flatten:
        _flatten(found, flatten)
    if image.format not in KEPT_FORMATS:
        found.changes.append(f"{image.format} was converted to PNG.")
    return found


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 a parser that is fed with damaged or hostile bytes raises anything
        return 1


def _take_first_frame(found: Converted) -> None:
    image = found.image
    if image.format == "MPO":
        return
    if image.format == "TIFF":  # counting its pages means reading all of them
        with suppress(Exception):  # a second page that is damaged does not matter
            image.seek(1)
        if not image.tell():
            return
        image.seek(0)
    elif not getattr(image, "is_animated", False):
        return
    found.changes.append("It has several frames: the first was taken.")


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits a channel. Pillow cuts colours down itself when it decodes; grey it leaves."""
    return image.mode in DEEP_MODES or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _make_shallow(found: Converted) -> None:
    if found.image.mode in DEEP_MODES:
        found.image = found.image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    found.changes.append("16 bits a channel were converted to 8.")


def _make_rgb(found: Converted) -> None:
    if found.image.mode in ("CMYK", "YCbCr", "RGBX"):
        found.changes.append(f"{found.image.mode} was converted to RGB.")
        found.image = found.image.convert("RGB")
    elif found.image.mode in ("RGBa", "La"):
        found.changes.append("Premultiplied transparency was converted.")
        found.image = found.image.convert("RGBA")


def _apply_profile(found: Converted, raw: bytes) -> None:
    try:
        colours = _colours(found.image)
        if len(raw) > MAX_PROFILE_BYTES or _space_of(raw) != colours.mode:
            raise ValueError("a profile of other pixels than these")  # noqa: TRY301 said like any other fault of it
        if colours.mode != "CMYK" and _is_srgb(raw, colours.mode):
            return
        converted = _to_srgb(colours, raw)
    except Exception:  # noqa: BLE001 a parser that is fed with damaged or hostile bytes raises anything
        found.notes.append("Its colour profile is unreadable and was ignored.")
        return
    if found.image.has_transparency_data:
        converted.putalpha(found.image.convert("RGBA").getchannel("A"))
    found.image = converted
    found.changes.append("Its colours were converted to sRGB.")


def _colours(image: Image.Image) -> Image.Image:
    """Without transparency or palette: what a profile speaks of."""
    if image.mode in ("L", "CMYK", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _profile(raw: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(raw))


def _space_of(raw: bytes) -> str | None:
    return SPACES.get(_profile(raw).profile.xcolor_space)


def _to_srgb(image: Image.Image, raw: bytes) -> Image.Image:
    # As a stranger's profile wants it (intent 0, perceptual), into the sRGB of the library itself.
    converted = ImageCms.profileToProfile(image, _profile(raw), ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise ValueError("nothing came out")
    return converted


@lru_cache(maxsize=8)
def _is_srgb(raw: bytes, mode: str) -> bool:
    """Whether the profile leaves colours as they are, tried on 512 of them."""
    levels = [round(step * 255 / 7) for step in range(8)]
    if mode == "L":
        sample = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        cube = bytes(level for red in levels for green in levels for blue in levels for level in (red, green, blue))
        sample = Image.frombytes("RGB", (512, 1), cube)
    difference = ImageChops.difference(_to_srgb(sample, raw), sample.convert("RGB"))
    return max(highest for _, highest in difference.getextrema()) <= SAME_COLOUR  # type: ignore[misc]  # RGB: pairs


def _flatten(found: Converted, colour: str) -> None:
    if not found.image.has_transparency_data:
        return
    image = found.image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return
    behind = Image.new("RGBA", image.size, colour)
    behind.alpha_composite(image)
    found.image = behind.convert("RGB")
    found.changes.append(f"Its transparency was filled with {colour}.")


def plain(image: Image.Image) -> Image.Image:
    """The pixels alone, to be saved: no profile, no EXIF data, nothing else that came along."""
    if image.mode in ("P", "PA", "LA", "1", "L") and image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("P", "PA", "1"):
        image = image.convert("RGB")
    image.info.clear()
    return image
