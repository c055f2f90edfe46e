"""Looks at every file of a dataset in the background: is it still what was uploaded, and what does it look like?
And keeps one of several that look alike.

A file was decoded to its last pixel when it came in, so one with the same checksum is good. Started over, the job goes
on with the pictures that it had not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from datasets import fingerprints, services
from datasets.caption_edits import lock_dataset, touch
from datasets.models import Dataset, DatasetVersion, Picture
from datasets.pictures import ensure_thumbnail, picture_path
from lorapilot import jobs, workspace
from lorapilot.errors import Conflict, UserError
from lorapilot.models import JOB_ENDED, Job, User

MISSING, DAMAGED = "missing", "damaged"


def check_dataset(dataset: Dataset, *, actor: User, again: bool = False) -> Job:
    """Queue the check of the pictures that were not checked yet, or of all `again`. One that goes on is not doubled."""
    if found := running_check(dataset):
        return found
    before = timezone.now().isoformat() if again else ""
    return jobs.enqueue(
        check_pictures, label=f"Check {dataset.name}"[:200], owner=actor, dataset_id=dataset.pk, before=before
    )


def running_check(dataset: Dataset) -> Job | None:
    """The check that goes on, or waits, now; of whoever asked for it."""
    kind = f"{check_pictures.__module__}.{check_pictures.__qualname__}"
    return Job.objects.filter(kind=kind, arguments__dataset_id=dataset.pk).exclude(status__in=JOB_ENDED).first()


@jobs.job
def check_pictures(progress: jobs.Progress, *, dataset_id: int, before: str) -> dict[str, Any]:
    """The job behind `check_dataset`: pictures that were never checked, and those that were checked earlier than
    `before`."""
    due = Q(checked_at=None)
    if before:
        due |= Q(checked_at__lt=datetime.fromisoformat(before))
    waiting = list(Picture.objects.filter(due, dataset=dataset_id).values_list("pk", "sha256", "extension"))
    faults = 0
    for done, (pk, sha256, extension) in enumerate(waiting):
        progress(done, len(waiting), "Checking the pictures")
        fault, look = check_file(sha256, extension)
        faults += bool(fault)
        # Not the row that was edited meanwhile: it names another file.
        Picture.objects.filter(pk=pk, sha256=sha256).update(fault=fault, fingerprint=look, checked_at=timezone.now())
    return {"checked": len(waiting), "unreadable": faults}


def check_file(sha256: str, extension: str) -> tuple[str, str]:
    """(fault, fingerprint) of a stored picture; the fault is empty for a good one."""
    try:
        if workspace.sha256_of(picture_path(sha256, extension)) != sha256:
            return DAMAGED, ""
        return "", fingerprints.fingerprint(ensure_thumbnail(sha256, extension))
    except FileNotFoundError:
        return MISSING, ""
    except OSError:  # the disk, or Pillow about a thumbnail that it cannot read
        return DAMAGED, ""


# --- One of several that look alike -----------------------------------------------------------------------------------
def keep_one(dataset: Dataset, *, pictures: Iterable[int], keep: int, caption_of: int) -> DatasetVersion:
    """Of these pictures, keep one, with the caption of one of them. Returns the version that the dataset was before:
    restoring it undoes this."""
    chosen = set(pictures)
    if len(chosen) < 2 or not {keep, caption_of} <= chosen:
        raise UserError("Choose the picture to keep, and whose caption it gets, among those that look alike.")
    with transaction.atomic():
        locked = lock_dataset(dataset.pk)
        if not chosen <= set(locked.pictures.values_list("pk", flat=True)):
            raise Conflict("Some of these pictures are no longer in the dataset. Look again.")
        before = services.pin_version(locked)
        if keep != caption_of:
            text = locked.pictures.get(pk=caption_of).caption
            services.set_caption(locked.pictures.get(pk=keep), caption=text)
        locked.pictures.filter(pk__in=chosen - {keep}).delete()
        touch(locked.pk)
    return before
