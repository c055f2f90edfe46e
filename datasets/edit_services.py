"""Turns and crops pictures, and undoes it: see datasets/edits.py for what an edit is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.utils import timezone

from datasets import edits, fingerprints
from datasets.caption_edits import lock_dataset, touch
from datasets.models import Picture
from datasets.pictures import StagedPicture, ensure_thumbnail, staging_folder, store_picture, touch_picture
from lorapilot.errors import Conflict, Missing


def edit_picture(picture: Picture, *, rotation: int, crop: edits.Box | None) -> Picture:
    """Turn the picture as it was uploaded clockwise by `rotation` degrees, then cut `crop` out of it. Turned by 0 and
    uncut, it is again as it was uploaded. Raises UserError for what cannot be, Conflict when another is the same."""
    original = original_of(picture)
    crop = edits.check_edit((original["width"], original["height"]), rotation=rotation, crop=crop)
    if not rotation and crop is None:
        return _use(picture, original, edit=None)
    with staging_folder() as folder:
        staged = edits.stage_edited(original, rotation=rotation, crop=crop, name=picture.original_name, folder=folder)
        touch_picture(original["sha256"], original["extension"])
        store_picture(staged)
    return _use(picture, _facts(staged), edit={"rotation": rotation, "crop": crop, "original": original})


def original_of(picture: Picture) -> dict[str, Any]:
    """Its file as it was uploaded: {"sha256", "extension", "width", "height", "bytes"}."""
    return picture.edit["original"] if picture.edit else {name: getattr(picture, name) for name in edits.KEPT}


def _facts(staged: StagedPicture) -> dict[str, Any]:
    return {name: getattr(staged, name) for name in edits.KEPT}


def _use(picture: Picture, file: Mapping[str, Any], *, edit: dict[str, Any] | None) -> Picture:
    """From now on the picture is this file. The one before stays at least a day, and for good while a version lists it.

    One who edited it meanwhile is not overwritten.
    """
    touch_picture(picture.sha256, picture.extension)
    if not touch_picture(file["sha256"], file["extension"]):
        raise Missing("The picture's file is gone. Upload it again.")
    look = fingerprints.fingerprint(ensure_thumbnail(file["sha256"], file["extension"]))
    with transaction.atomic():
        dataset = lock_dataset(picture.dataset_id)
        if dataset.pictures.filter(sha256=file["sha256"]).exclude(pk=picture.pk).exists():
            raise Conflict("Another picture of the dataset looks exactly like this. Delete one of them.")
        unchanged = dataset.pictures.filter(pk=picture.pk, sha256=picture.sha256)
        values = {name: file[name] for name in edits.KEPT} | {"edit": edit, "fingerprint": look, "fault": ""}
        if not unchanged.update(**values, checked_at=timezone.now(), updated_at=timezone.now()):
            raise Conflict("Somebody else has just edited this picture. Look again.")
        touch(dataset.pk)
    picture.refresh_from_db()
    return picture
