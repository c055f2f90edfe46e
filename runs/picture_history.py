"""Which runs and LoRAs saw a picture or a version, and what deleting it for good would touch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Q, QuerySet

from datasets import destruction, edits
from datasets.models import Dataset, DatasetVersion, Picture
from lorapilot.errors import Conflict
from lorapilot.models import User
from runs.enums import ACTIVE, Status
from runs.models import Run
from runs.selectors import list_runs


@dataclass(frozen=True, slots=True)
class Seen:
    """A run that was, or will be, trained on the picture."""

    run: Run
    caption: str
    is_edited: bool
    loras: list[str]
    """Names of its LoRA files."""


@dataclass(frozen=True, slots=True)
class Affected:
    """What deleting a picture for good touches, as far as the user may see it."""

    datasets: list[str]
    versions: list[str]
    runs: list[Seen]
    hidden_runs: int
    """Runs of others on these versions."""


def root_of(picture: Picture) -> str:
    return edits.root_of({"sha256": picture.sha256, "edit": picture.edit})


def runs_that_saw(user: User, root: str) -> list[Seen]:
    """The runs that `user` may see whose version lists the picture that was uploaded as `root`, however it was cropped
    then; the newest first."""
    with_it = destruction.versions_with(root).values("pk")
    runs = list_runs(user).filter(dataset_version__in=with_it).prefetch_related("checkpoints").order_by("-pk")
    return [_seen(run, root) for run in runs]


def _seen(run: Run, root: str) -> Seen:
    listed: dict[str, Any] = next(one for one in run.dataset_version.pictures if edits.root_of(one) == root)
    loras = [checkpoint.path for checkpoint in run.checkpoints.all()]
    return Seen(run, listed["caption"], bool(listed.get("edit")), loras)


def runs_on_versions(user: User, dataset: Dataset) -> dict[int, list[Run]]:
    """By the versions' ids, the runs on them that `user` may see; the newest first."""
    found: dict[int, list[Run]] = {}
    runs = Run.objects.visible_to(user).filter(dataset_version__dataset=dataset)
    for run in runs.only("output_name", "dataset_version").order_by("-pk"):
        found.setdefault(run.dataset_version_id, []).append(run)
    return found


def affected_by_destroying(user: User, picture: Picture) -> Affected:
    """Staff delete a picture everywhere; an owner from own datasets and versions."""
    root = root_of(picture)
    versions, rows = _reached(user, picture)
    runs = [seen for seen in runs_that_saw(user, root) if user.is_staff or _is_reached(seen.run, picture)]
    total = Run.objects.filter(dataset_version__in=versions.values("pk")).count()
    return Affected(
        datasets=sorted(rows.values_list("dataset__name", flat=True)),
        versions=[str(version) for version in versions.order_by("name", "number")],
        runs=runs,
        hidden_runs=total - len(runs),
    )


def _reached(user: User, picture: Picture) -> tuple[QuerySet[DatasetVersion], QuerySet[Picture]]:
    root, owner = root_of(picture), picture.dataset.owner_id
    versions, rows = destruction.versions_with(root), destruction.pictures_with(root)
    if user.is_staff:
        return versions, rows
    return versions.filter(owner=owner), rows.filter(dataset__owner=owner)


def _is_reached(run: Run, picture: Picture) -> bool:
    return bool(run.dataset_version.owner_id == picture.dataset.owner_id)


def destroy_picture(user: User, picture: Picture) -> None:
    """Delete the picture for good; see datasets/destruction.py. Raises Conflict while a run waits for it or reads it.

    The caller has checked that `user` may change the dataset, and has asked.
    """
    versions, _ = _reached(user, picture)
    needing = Run.objects.filter(
        Q(status__in=ACTIVE) | Q(status=Status.QUEUED), dataset_version__in=versions.values("pk")
    )
    if needing.exists():
        names = sorted(run.output_name for run in list_runs(user).filter(pk__in=needing.values("pk")))
        shown = f": {', '.join(names[:5])}" if names else ""
        raise Conflict(f"Runs that wait or train need this picture{shown}. Stop them first.")
    destruction.destroy_picture(picture, everywhere=user.is_staff)
