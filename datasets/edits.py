"""Turned and cropped pictures: what an edit is, and the file that it makes. No database here.

An edit never touches the file that was uploaded: it makes another one, stored by its own content like every picture.
The picture's row then names the edited file, so that thumbnails, the bucket preview, versions and trainers use it
without knowing of edits; `edit["original"]` says what comes back when the edit is undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from datasets.pictures import StagedPicture, opened, picture_path, stage_picture, touch_picture
from lorapilot.errors import Missing, UserError

Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels of the picture, upright and turned."""
Size = tuple[int, int]

ROTATIONS = (0, 90, 180, 270)
LEAST_SIDE = 16
OF = ("sha256", "edit")  # the fields that say which files a picture needs
KEPT = ("sha256", "extension", "width", "height", "bytes")  # of the original file
_TURNS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}


def files_of(picture: Mapping[str, Any]) -> set[str]:
    """Hashes of the files that a picture, or an entry of a version, needs: its own, and that of the original."""
    return {picture["sha256"], root_of(picture)}


def root_of(picture: Mapping[str, Any]) -> str:
    """The hash of the uploaded file, whatever was made of it."""
    edit = picture.get("edit")
    return str(edit["original"]["sha256"] if edit else picture["sha256"])


def touch_files(picture: Mapping[str, Any]) -> bool:
    """Keep the files of a picture that nothing lists for another day. False when one is gone."""
    edit = picture.get("edit")
    files = [picture, edit["original"]] if edit else [picture]
    there = [touch_picture(file["sha256"], file["extension"]) for file in files]
    return all(there)


def has_files(picture: Mapping[str, Any]) -> bool:
    """Whether the files of a picture that a version lists are still there."""
    edit = picture.get("edit")
    files = [picture, edit["original"]] if edit else [picture]
    return all(picture_path(file["sha256"], file["extension"]).exists() for file in files)


def turned_size(size: Size, rotation: int) -> Size:
    return size if rotation % 180 == 0 else (size[1], size[0])


def turned_box(box: Box, size: Size, degrees: int) -> Box:
    """The box around the same content after the picture of this size is turned clockwise by `degrees`."""
    for _ in range(degrees % 360 // 90):
        left, top, width, height = box
        box, size = (size[1] - top - height, left, height, width), (size[1], size[0])
    return box


def check_edit(size: Size, *, rotation: int, crop: Box | None) -> Box | None:
    """The crop; None when it is the whole picture. `size`: of the original. Raises UserError for what cannot be."""
    if rotation not in ROTATIONS:
        raise UserError("A picture is turned by 0, 90, 180 or 270 degrees.", field="rotation")
    if crop is None:
        return None
    width, height = turned_size(size, rotation)
    left, top, wide, high = crop
    if min(wide, high) < LEAST_SIDE:
        raise UserError(f"A side has at least {LEAST_SIDE} pixels: choose a larger part.", field="crop")
    if left < 0 or top < 0 or left + wide > width or top + high > height:
        raise UserError(f"The part reaches beyond the picture, which has {width} × {height} pixels.", field="crop")
    return None if (wide, high) == (width, height) else crop


def stage_edited(
    original: Mapping[str, Any], *, rotation: int, crop: Box | None, name: str, folder: Path
) -> StagedPicture:
    """The edited picture as a PNG in a staging folder, so that no pixel is changed by saving it."""
    path = folder / "edited.png"
    try:
        with opened(picture_path(original["sha256"], original["extension"])) as image:
            edited = turned(ImageOps.exif_transpose(image), rotation)
            if crop:
                left, top, width, height = crop
                edited = edited.crop((left, top, left + width, top + height))
            if edited.mode in {"CMYK", "YCbCr"}:
                edited = edited.convert("RGB")
            edited.info.pop("exif", None)  # upright now
            edited.save(path, "PNG", compress_level=1, icc_profile=edited.info.get("icc_profile"))
    except FileNotFoundError:
        raise Missing("The picture's file is gone. Upload it again.") from None
    except OSError:
        raise UserError("The picture's file is damaged. Upload it again.") from None
    return stage_picture(path, name=name, folder=folder)


def turned(image: Image.Image, rotation: int) -> Image.Image:
    return image.transpose(_TURNS[rotation]) if rotation else image
