"""Deletes many pictures of a dataset at once, and brings them back. The others and their captions stay as they are."""

from __future__ import annotations

from django.db import transaction

from datasets import edits, services
from datasets.caption_edits import claim_undo, forget_old_edits, lock_revisions, touch
from datasets.models import BulkEdit, Dataset, Picture
from datasets.selections import Selection
from lorapilot.errors import Conflict
from lorapilot.models import User

BATCH = 500


def remove_pictures(dataset: Dataset, *, selection: Selection, actor: User | None) -> BulkEdit:
    """Take the selected pictures out of the dataset, all or none. Their files stay for at least a day."""
    chosen = selection.rows(dataset, "sha256", "extension", "edit")
    for row in chosen:
        edits.touch_files(row)
    ids = [row["pk"] for row in chosen]
    batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    with transaction.atomic():
        lock_revisions(dataset)
        removed = [row for batch in batches for row in dataset.pictures.filter(pk__in=batch).values(*services.RESTORED)]
        if not removed:
            raise Conflict("Somebody deleted these pictures meanwhile.")
        edit = BulkEdit.objects.create(
            dataset=dataset, actor=actor, label="Delete pictures", picture_count=len(removed), removed=removed
        )
        for batch in batches:
            dataset.pictures.filter(pk__in=batch).delete()
        forget_old_edits(dataset)
        touch(dataset.pk)
    return edit


def restore_pictures(edit: BulkEdit) -> tuple[int, int]:
    """Undo a deletion. Returns how many pictures are back, and how many are not: their file is gone, or the same
    picture was uploaded again. Raises Conflict when it was undone already."""
    kept = [row for row in edit.removed if edits.touch_files(row)]
    with transaction.atomic():
        lock_revisions(edit.dataset)
        claim_undo(edit)
        there = set(edit.dataset.pictures.values_list("sha256", flat=True))
        back = [Picture(dataset=edit.dataset, **row) for row in kept if row["sha256"] not in there]
        Picture.objects.bulk_create(back, batch_size=BATCH)
        touch(edit.dataset_id)
    return len(back), edit.picture_count - len(back)
