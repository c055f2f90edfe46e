"""Edits of many captions: planned, shown, applied, undone. Computing happens before the transaction, not inside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from datasets import caption_operations
from datasets.caption_edits import Wanted, change_captions, undo_captions
from datasets.caption_operations import Operation
from datasets.models import BulkEdit, Dataset
from datasets.picture_removal import restore_pictures
from datasets.selections import Selection
from lorapilot.errors import Conflict
from lorapilot.models import User

SHOWN_CHANGES = 50
OUTDATED = "The captions have changed since this preview. Look at the new one, then apply it."


@dataclass(frozen=True)
class Plan:
    """What an operation would change. `fingerprint` says which plan it is: of the same captions, the same."""

    operation: Operation
    selected_count: int
    changes: list[Wanted]

    @property
    def shown(self) -> list[Wanted]:
        """The first 50 changes."""
        return self.changes[:SHOWN_CHANGES]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for change in self.changes:
            digest.update(repr((change.picture_id, change.before, change.after)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Applied:
    """`edit` is None when nothing had to change; `left_alone`: changed by somebody else meanwhile."""

    edit: BulkEdit | None
    left_alone: int

    @property
    def changed(self) -> int:
        return self.edit.picture_count if self.edit else 0


def plan_edit(dataset: Dataset, *, operation: Operation, selection: Selection) -> Plan:
    """What would change. Writes nothing. Raises UserError for an operation or a selection that is none."""
    operation = caption_operations.checked(operation, trigger_word=dataset.trigger_word)
    rows = selection.rows(dataset, "original_name", "caption", "revision")
    captions = caption_operations.apply(operation, [row["caption"] for row in rows])
    changes = [
        Wanted(row["pk"], row["original_name"], row["revision"], row["caption"], caption)
        for row, caption in zip(rows, captions, strict=True)
        if caption != row["caption"]
    ]
    return Plan(operation, len(rows), changes)


def apply_edit(
    dataset: Dataset, *, operation: Operation, selection: Selection, actor: User, fingerprint: str = ""
) -> Applied:
    """Change the captions, all or none. With the `fingerprint` of a preview, exactly what it showed: Conflict
    otherwise."""
    plan = plan_edit(dataset, operation=operation, selection=selection)
    if fingerprint and fingerprint != plan.fingerprint:
        raise Conflict(OUTDATED, field="fingerprint")
    return Applied(*change_captions(dataset, wanted=plan.changes, label=plan.operation.label(), actor=actor))


def undo_edit(edit: BulkEdit) -> tuple[int, int]:
    """Undo an edit or a deletion as a whole. Returns how many captions or pictures are back, and how many are not."""
    return restore_pictures(edit) if edit.is_deletion else undo_captions(edit)
