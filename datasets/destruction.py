"""Pictures that go for good: their files, too, which deleting one from a dataset leaves to its versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet, TextField
from django.db.models.functions import Cast
from django.utils import timezone

from datasets import edits
from datasets.models import Dataset, DatasetVersion, Picture
from datasets.pictures import picture_path, thumbnail_path

Listed = Mapping[str, Any]


def missing_pictures(version: DatasetVersion) -> list[str]:
    """Names of the version's pictures whose files are gone."""
    return [one["name"] for one in version.pictures if not picture_path(one["sha256"], one["extension"]).exists()]


def versions_with(root: str, *, versions: QuerySet[DatasetVersion] | None = None) -> QuerySet[DatasetVersion]:
    """Those that list the picture, as it was uploaded or edited. Their captions could name it, and never do."""
    found = DatasetVersion.objects.all() if versions is None else versions
    return found.annotate(listed=Cast("pictures", TextField())).filter(listed__contains=f'"{root}"').defer("pictures")


def pictures_with(root: str) -> QuerySet[Picture]:
    """Rows of all datasets whose picture is this file, or was made of it."""
    return Picture.objects.filter(Q(sha256=root) | Q(edit__original__sha256=root))


def destroy_picture(picture: Picture, *, everywhere: bool) -> None:
    """Delete the picture for good: from all datasets of its owner, and its files, also those of edits.

    Versions stay, with its checksum and caption. A file that a dataset or version of somebody else lists stays for
    them, unless it goes `everywhere`.
    """
    root = edits.root_of({"sha256": picture.sha256, "edit": picture.edit})
    owner = picture.dataset.owner_id
    rows, versions = pictures_with(root), versions_with(root)
    files = _files(root, rows, versions)
    if not everywhere:
        kept = _files(root, rows.exclude(dataset__owner=owner), versions.exclude(owner=owner))
        files = {sha256: extension for sha256, extension in files.items() if sha256 not in kept}
        rows = rows.filter(dataset__owner=owner)
    with transaction.atomic():
        touched = Dataset.objects.filter(pk__in=rows.values("dataset")).order_by("pk")
        ids = list(touched.select_for_update().values_list("pk", flat=True))
        rows.delete()
        Dataset.objects.filter(pk__in=ids).update(updated_at=timezone.now())
    for sha256, extension in files.items():
        picture_path(sha256, extension).unlink(missing_ok=True)
        thumbnail_path(sha256).unlink(missing_ok=True)


def _files(root: str, rows: QuerySet[Picture], versions: QuerySet[DatasetVersion]) -> dict[str, str]:
    """Checksum and ending of the files of a picture that these rows and versions need."""
    listed: list[Listed] = list(rows.values("sha256", "extension", "edit"))
    for of_version in versions.values_list("pictures", flat=True).iterator(chunk_size=10):
        listed += [one for one in of_version if edits.root_of(one) == root]
    found = {}
    for one in listed:
        found[one["sha256"]] = one["extension"]
        if one.get("edit"):
            found[root] = one["edit"]["original"]["extension"]
    return found
