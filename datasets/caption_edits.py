"""Writes captions: of one picture, or of many at once. Nothing that was saved is lost.

Each saved caption raises its picture's revision. Who edits names the revision that they saw; when somebody else saved
since, `CaptionConflict` carries what is there now, and nothing is written. What a caption was before is kept: the last
50 single changes of a picture, and the last 10 bulk edits of a dataset. A bulk edit, and its undoing, is one
transaction: a server that dies in the middle leaves the captions as they were.

Whatever changes a dataset locks its row first, then what is in it: who comes second waits, and nobody for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from django.db import transaction
from django.db.models import F, OuterRef, QuerySet, Subquery
from django.utils import timezone

from datasets.captions import clean_caption
from datasets.models import BulkEdit, CaptionChange, Dataset, Picture
from lorapilot.errors import Conflict, Missing
from lorapilot.models import User

KEPT_CHANGES = 50
KEPT_EDITS = 10
FEW = 20  # so many captions of an import take no place among the bulk edits
BATCH = 1000


class CaptionConflict(Conflict):
    """Somebody saved another caption meanwhile. `picture` has it, with its revision; `yours` was not saved."""

    def __init__(self, picture: Picture, *, yours: str) -> None:
        super().__init__("Somebody changed this caption meanwhile. Choose which one stays.", field="caption")
        self.picture = picture
        self.yours = yours


@dataclass(frozen=True)
class Wanted:
    """A caption that is to change: what it was, and at which revision, when somebody decided what it becomes."""

    picture_id: int
    name: str
    revision: int
    before: str
    after: str


# --- One picture ------------------------------------------------------------------------------------------------------
def set_caption(picture: Picture, *, caption: str, revision: int | None = None, actor: User | None = None) -> Picture:
    """Save a caption. Raises CaptionConflict when `revision` is given and no longer the picture's."""
    text = clean_caption(caption)
    with transaction.atomic():
        now = _locked_picture(picture)
        if text != now.caption:
            if revision is not None and revision != now.revision:
                raise CaptionConflict(now, yours=text)
            change = CaptionChange(picture=now, actor=actor, before=now.caption, after=text, revision=now.revision + 1)
            change.save(force_insert=True)
            _forget_old_changes(now)
            _write(now, text)
    picture.caption, picture.revision, picture.updated_at = now.caption, now.revision, now.updated_at
    return picture


def undo_caption(picture: Picture, *, revision: int | None = None) -> Picture:
    """Bring back the caption before the last change; again, the one before that. Raises Conflict when none is kept."""
    with transaction.atomic():
        now = _locked_picture(picture)
        change = now.caption_changes.filter(is_undone=False).order_by("-pk").first()
        if change is None or change.after != now.caption:
            raise Conflict("No earlier caption of this picture is kept.")
        if revision is not None and revision != now.revision:
            raise CaptionConflict(now, yours=change.before)
        CaptionChange.objects.filter(pk=change.pk).update(is_undone=True)
        _write(now, change.before)
    picture.caption, picture.revision, picture.updated_at = now.caption, now.revision, now.updated_at
    return picture


def history_of(picture: Picture) -> QuerySet[CaptionChange]:
    """The kept changes of a caption, the last one first; undone ones too."""
    return picture.caption_changes.select_related("actor").order_by("-pk")


def _locked_picture(picture: Picture) -> Picture:
    lock_dataset(picture.dataset_id)
    found = Picture.objects.select_for_update().filter(pk=picture.pk).first()
    if found is None:
        raise Missing("The picture was deleted meanwhile.")
    return found


def _write(picture: Picture, caption: str) -> None:
    picture.caption = caption
    picture.revision += 1
    picture.save(update_fields=["caption", "revision", "updated_at"])
    touch(picture.dataset_id)


def _forget_old_changes(picture: Picture) -> None:
    single = picture.caption_changes.filter(edit=None).order_by("-pk")
    CaptionChange.objects.filter(pk__in=list(single.values_list("pk", flat=True)[KEPT_CHANGES:])).delete()


def lock_dataset(dataset_id: int) -> Dataset:
    """The row as it is now, which nobody else changes until the transaction ends."""
    found: Dataset | None = Dataset.objects.select_for_update().filter(pk=dataset_id).first()
    if found is None:
        raise Missing("The dataset was deleted meanwhile.")
    return found


def touch(dataset_id: int) -> None:
    """`updated_at` follows what is in the dataset, too."""
    Dataset.objects.filter(pk=dataset_id).update(updated_at=timezone.now())


# --- Many pictures ----------------------------------------------------------------------------------------------------
@transaction.atomic
def change_captions(
    dataset: Dataset, *, wanted: Sequence[Wanted], label: str, actor: User | None
) -> tuple[BulkEdit | None, int]:
    """Change all these captions, or none. Returns the edit, which can be undone, and how many captions were left alone,
    because somebody else changed or deleted them since `wanted` was made. None: there was nothing to change."""
    revisions = lock_revisions(dataset)
    due = [one for one in wanted if revisions.get(one.picture_id) == one.revision and one.before != one.after]
    left = sum(one.before != one.after for one in wanted) - len(due)
    if not due:
        return None, left
    edit = BulkEdit.objects.create(dataset=dataset, actor=actor, label=label[:200], picture_count=len(due))
    CaptionChange.objects.bulk_create(
        (
            CaptionChange(
                picture_id=one.picture_id,
                edit=edit,
                actor=actor,
                before=one.before,
                after=one.after,
                revision=one.revision + 1,
            )
            for one in due
        ),
        batch_size=BATCH,
    )
    _take_over(edit, "after", CaptionChange.objects.filter(edit=edit))
    forget_old_edits(dataset)
    return edit, left


def replace_captions(dataset: Dataset, *, captions: Mapping[int, str], label: str, actor: User | None) -> list[str]:
    """New captions by picture id, whatever is there now: for imports. Returns the names of those pictures. A few are
    undone one by one, many as a bulk edit."""
    with transaction.atomic():
        lock_dataset(dataset.pk)
        found = list(dataset.pictures.select_for_update().filter(pk__in=captions).order_by("pk"))
        if len(found) <= FEW:
            for picture in found:
                set_caption(picture, caption=captions[picture.pk], actor=actor)
        else:
            texts = [clean_caption(captions[one.pk]) for one in found]
            rows = zip(found, texts, strict=True)
            wanted = [Wanted(one.pk, one.original_name, one.revision, one.caption, text) for one, text in rows]
            change_captions(dataset, wanted=wanted, label=label, actor=actor)
    return [one.original_name for one in found]


@transaction.atomic
def undo_captions(edit: BulkEdit) -> tuple[int, int]:
    """Bring back what the captions were. Returns how many came back, and how many stay as they are because somebody
    changed or deleted them since. Raises Conflict when it was undone already."""
    lock_revisions(edit.dataset)
    claim_undo(edit)
    same = edit.changes.filter(is_undone=False, picture__caption=F("after"))
    due = same.count()
    # The changes that count are marked before the captions change, and the update goes by the mark.
    edit.changes.exclude(pk__in=same.values("pk")).update(is_undone=True)
    _take_over(edit, "before", CaptionChange.objects.filter(edit=edit, is_undone=False))
    edit.changes.update(is_undone=True)
    return due, edit.picture_count - due


def claim_undo(edit: BulkEdit) -> None:
    """Of two who undo an edit, one does."""
    if not BulkEdit.objects.filter(pk=edit.pk, undone_at=None).update(undone_at=timezone.now()):
        raise Conflict("This was undone already.")


def lock_revisions(dataset: Dataset) -> dict[int, int]:
    """The revisions of all pictures, which change no more until the transaction ends."""
    lock_dataset(dataset.pk)
    return dict(dataset.pictures.select_for_update().order_by("pk").values_list("pk", "revision"))


def _take_over(edit: BulkEdit, column: str, changes: QuerySet[CaptionChange]) -> None:
    """One statement for all captions: from `column` of their change."""
    mine = changes.filter(picture=OuterRef("pk"))
    Picture.objects.filter(pk__in=changes.values("picture")).update(
        caption=Subquery(mine.values(column)[:1]), revision=F("revision") + 1, updated_at=timezone.now()
    )
    touch(edit.dataset_id)


def forget_old_edits(dataset: Dataset) -> None:
    old = list(dataset.bulk_edits.order_by("-pk").values_list("pk", flat=True)[KEPT_EDITS:])
    BulkEdit.objects.filter(pk__in=old).delete()
