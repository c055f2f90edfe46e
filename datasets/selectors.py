"""What a user may see of datasets. Pictures, versions and media are reached through their dataset only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db.models import Count, OuterRef, Q, QuerySet, Subquery, Sum
from django.shortcuts import get_object_or_404

from datasets.models import Dataset, DatasetVersion, Picture, Upload
from datasets.pictures import picture_path
from lorapilot.access import get_editable, get_owned, get_visible
from lorapilot.models import User


def visible_datasets(user: User) -> QuerySet[Any]:
    """With owner, groups, `picture_count`, `missing_count` (pictures without a caption) and `cover_id` (a picture)."""
    cover = Picture.objects.filter(dataset=OuterRef("pk")).order_by("pk").values("pk")[:1]
    found: QuerySet[Any] = (
        Dataset.objects.visible_to(user)
        .select_related("owner")
        .prefetch_related("groups", "editor_groups")
        .annotate(
            picture_count=Count("pictures"),
            missing_count=Count("pictures", filter=Q(pictures__caption="")),
            cover_id=Subquery(cover),
        )
        .order_by("-updated_at", "-pk")
    )
    return found


def pictures_of(dataset: Dataset, *, only_missing: bool = False) -> QuerySet[Picture]:
    """In the order in which they came; `only_missing`: those without a caption."""
    found = dataset.pictures.order_by("pk")
    return found.filter(caption="") if only_missing else found


def visible_picture(user: User, *, dataset_id: int, picture_id: int) -> Picture:
    dataset = get_visible(Dataset, user, pk=dataset_id)
    return get_object_or_404(Picture.objects.select_related("dataset"), dataset=dataset, pk=picture_id)


def editable_picture(user: User, *, dataset_id: int, picture_id: int) -> Picture:
    dataset = get_editable(Dataset, user, pk=dataset_id)
    return get_object_or_404(Picture.objects.select_related("dataset"), dataset=dataset, pk=picture_id)


def owned_picture(user: User, *, dataset_id: int, picture_id: int) -> Picture:
    """For what cannot be undone."""
    dataset = get_owned(Dataset, user, pk=dataset_id)
    return get_object_or_404(Picture.objects.select_related("dataset"), dataset=dataset, pk=picture_id)


def open_upload(user: User, *, upload_id: Any) -> Upload:
    """Only who began an upload goes on with it, and only while they may still change the dataset."""
    upload = get_object_or_404(Upload.objects.select_related("dataset", "job__owner"), owner=user, pk=upload_id)
    get_editable(Dataset, user, pk=upload.dataset_id)
    return upload


def version_files(version: DatasetVersion) -> list[dict[str, Any]]:
    """For a trainer's manifest: `{"image": absolute path, "caption", "repeats"}` of each picture of a version."""
    return [_file(picture) for picture in version.pictures]


def current_files(dataset: Dataset) -> list[dict[str, Any]]:
    """The same of a dataset as it is now."""
    return [_file(picture) for picture in pictures_of(dataset).values("sha256", "extension", "caption", "repeats")]


def script_rows(user: User) -> list[dict[str, Any]]:
    """For scripts: the user's datasets, named as Kohya's tools name folders (`<repeats>_<name>`). `path` names it in
    other calls; there is no folder."""
    found = visible_datasets(user).annotate(size_bytes=Sum("pictures__bytes", default=0))
    return [
        {
            "name": f"1_{dataset.name}",
            "display": dataset.name,
            "images": dataset.picture_count,
            "size_bytes": dataset.size_bytes,
            "has_tags": dataset.missing_count < dataset.picture_count,
            "path": f"datasets/1_{dataset.name}",
        }
        for dataset in found
    ]


def _file(picture: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": str(picture_path(picture["sha256"], picture["extension"]).resolve()),
        "caption": picture["caption"],
        "repeats": picture["repeats"],
    }
