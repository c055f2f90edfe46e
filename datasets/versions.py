"""Versions beside each other, and back again.

Guarantees: restoring pins the present state first, so that it can be undone; pictures that stay keep their row,
also those that are turned or cropped by it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import transaction
from django.utils import timezone

from datasets import edits, services
from datasets.caption_edits import lock_dataset
from datasets.models import Dataset, DatasetVersion, Picture
from lorapilot.errors import Missing

Listed = Mapping[str, Any]
_WORDS = re.compile(r"\s+|[\w'-]+|[^\w\s]")


# --- Differences ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Change:
    """A picture that is on both sides, otherwise."""

    before: Listed
    after: Listed

    @property
    def is_edited(self) -> bool:
        return bool(self.before["sha256"] != self.after["sha256"])

    @property
    def caption(self) -> list[tuple[str, str]]:
        """The caption in pieces: ("=", text), ("-", what went), ("+", what came); empty when it is the same."""
        before, after = self.before["caption"], self.after["caption"]
        return text_diff(before, after) if before != after else []


@dataclass
class Diff:
    trigger_word: tuple[str, str]
    added: list[Listed] = field(default_factory=list)
    removed: list[Listed] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    missing: list[Listed] = field(default_factory=list)
    """Would be added too, but their files were deleted for good."""

    @property
    def is_empty(self) -> bool:
        pictures = self.added or self.removed or self.changed or self.missing
        return self.trigger_word[0] == self.trigger_word[1] and not pictures


def diff(before: Dataset | DatasetVersion, after: Dataset | DatasetVersion) -> Diff:
    """What became otherwise. A dataset counts as it is now. A picture that was turned or cropped is the same one."""
    old, new = _by_root(before), _by_root(after)
    found = Diff((before.trigger_word, after.trigger_word))
    found.removed = [old[root] for root in old.keys() - new.keys()]
    for root in new.keys() - old.keys():
        (found.added if edits.has_files(new[root]) else found.missing).append(new[root])
    both = (Change(old[root], new[root]) for root in old.keys() & new.keys())
    found.changed = [change for change in both if _content(change.before) != _content(change.after)]
    for rows in (found.added, found.removed, found.missing):
        rows.sort(key=lambda listed: (listed["name"], listed["sha256"]))
    found.changed.sort(key=lambda change: (change.after["name"], change.after["sha256"]))
    return found


def text_diff(before: str, after: str) -> list[tuple[str, str]]:
    """By words, as pieces that give `before` without the "+" ones and `after` without the "-" ones."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    pieces: list[tuple[str, str]] = []
    for kind, start, end, from_, to in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("=", "".join(old[start:end])))
            continue
        pieces += [
            (sign, text) for sign, text in (("-", "".join(old[start:end])), ("+", "".join(new[from_:to]))) if text
        ]
    return pieces


def _by_root(state: Dataset | DatasetVersion) -> dict[str, Listed]:
    listed = state.pictures if isinstance(state, DatasetVersion) else services.list_pictures(state)
    return {edits.root_of(picture): picture for picture in listed}


def _content(listed: Listed) -> tuple[Any, ...]:
    return listed["sha256"], listed["caption"], listed["repeats"]


# --- Restore ----------------------------------------------------------------------------------------------------------
@dataclass
class Restored:
    """`before`: the version that the dataset was until now; None when it was empty."""

    before: DatasetVersion | None
    missing: list[str] = field(default_factory=list)
    """Names of pictures that did not come back, as their files were deleted for good."""


def restore_version(dataset: Dataset, version: DatasetVersion) -> Restored:
    """Make the dataset hold what the version lists: pictures, captions, repeats, edits and trigger word."""
    wanted = {listed["sha256"]: listed for listed in version.pictures}
    gone = {sha256 for sha256, listed in wanted.items() if not edits.touch_files(listed)}
    if wanted and len(gone) == len(wanted):
        raise Missing("All pictures of this version were deleted for good.")
    with transaction.atomic():
        locked = lock_dataset(dataset.pk)
        before = services.pin_version(locked) if locked.pictures.exists() else None
        there = list(locked.pictures.all())
        staying = _matched(there, wanted, gone)
        locked.pictures.exclude(pk__in=[picture.pk for picture, _ in staying]).delete()
        found = gone | {listed["sha256"] for _, listed in staying}
        _reset(staying)
        _bring_back(locked, [listed for sha256, listed in wanted.items() if sha256 not in found])
        Dataset.objects.filter(pk=locked.pk).update(trigger_word=version.trigger_word, updated_at=timezone.now())
    lost = gone - {picture.sha256 for picture in there}
    return Restored(before, [wanted[sha256]["name"] for sha256 in lost])


def _matched(
    there: Iterable[Picture], wanted: Mapping[str, Listed], gone: Collection[str]
) -> list[tuple[Picture, Listed]]:
    """Pictures that stay, each with what it becomes: those with the very file, then those that were turned or cropped
    since, by the file that was uploaded."""
    same = [(picture, wanted[picture.sha256]) for picture in there if picture.sha256 in wanted]
    taken = {picture.sha256 for picture, _ in same}
    by_root = {
        edits.root_of(listed): listed for sha256, listed in wanted.items() if sha256 not in taken and sha256 not in gone
    }
    edited = []
    for picture in there:
        root = edits.root_of({"sha256": picture.sha256, "edit": picture.edit})
        if picture.sha256 not in taken and root in by_root:
            edited.append((picture, by_root.pop(root)))
    return same + edited


def _bring_back(dataset: Dataset, wanted: Iterable[Listed]) -> None:
    Picture.objects.bulk_create(
        [
            Picture(
                dataset=dataset,
                original_name=listed["name"],
                edit=listed.get("edit"),
                **{name: listed[name] for name in services.LISTED},
            )
            for listed in wanted
        ],
        batch_size=500,
    )


RESET = ("caption", "repeats", "edit", *edits.KEPT)


def _reset(pairs: Sequence[tuple[Picture, Listed]]) -> None:
    changed = []
    for picture, listed in pairs:
        values = {name: listed.get(name) for name in RESET}
        if any(getattr(picture, name) != value for name, value in values.items()):
            picture.revision += picture.caption != listed["caption"]  # who edits it now is told
            if picture.sha256 != listed["sha256"]:  # nobody has looked at this file
                picture.fingerprint, picture.fault, picture.checked_at = "", "", None
            for name, value in values.items():
                setattr(picture, name, value)
            picture.updated_at = timezone.now()
            changed.append(picture)
    written = [*RESET, "revision", "fingerprint", "fault", "checked_at", "updated_at"]
    Picture.objects.bulk_update(changed, written, batch_size=200)
