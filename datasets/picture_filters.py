"""Which pictures of a dataset are meant, and in which order: what the grid, the API and bulk edits have in common.

A list is read on from a cursor, the last picture and its place in the order (keyset pagination), so that the hundredth
page costs what the first one does, and pictures that come or go move nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import F, Q, QuerySet
from django.db.models.functions import Length, Lower

from datasets.caption_operations import word_pattern
from datasets.fingerprints import alike
from datasets.models import Dataset, Picture
from datasets.quality import DROPPED, bucket_of
from datasets.quality_forms import USUAL_RESOLUTION, query_of, rules_of
from lora_trainer.buckets import BucketRules, rules_in_proportion
from lorapilot.access import is_number
from lorapilot.errors import UserError

SHORT_CHARACTERS = 20
SHOWN = {
    "missing": "Without caption",
    "short": f"Caption under {SHORT_CHARACTERS} characters",
    "no-trigger": "Without the trigger word",
    "leaking": "Trigger word in a wrong place",
    "alike": "Looks like another",
}
SORTED = {
    "arrival": "Oldest first",
    "-arrival": "Newest first",
    "name": "Name, A to Z",
    "-name": "Name, Z to A",
    "size": "Smallest first",
    "-size": "Largest first",
    "length": "Shortest caption first",
    "-length": "Longest caption first",
}
KEYS: dict[str, Any] = {
    "name": Lower("original_name"),
    "size": F("width") * F("height"),
    "length": Length("caption"),
}
SIZE = F("width") * 2**32 + F("height")  # both sides as one number
BUCKET = re.compile(rf"[0-9]{{1,18}}x[0-9]{{1,18}}|{DROPPED}")
USUAL_RULES = rules_in_proportion(USUAL_RESOLUTION)
LONGEST = 200
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class PictureFilter:
    """`text`: in the caption or the file's name; `tag`: a whole tag; `show`: one of SHOWN; `below`: a side is shorter
    than so many pixels; `bucket`: where `rules` put it, as in `832x1216` or `dropped`; `sort`: one of SORTED."""

    text: str = ""
    tag: str = ""
    show: str = ""
    below: int = 0
    sort: str = "arrival"
    bucket: str = ""
    rules: BucketRules = USUAL_RULES

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> PictureFilter:
        """From `?q=&tag=&show=&below=&sort=&bucket=` and bucket settings. Raises UserError that names the wrong one."""
        show, sort = query.get("show", ""), query.get("sort", "") or "arrival"
        if show and show not in SHOWN:
            raise UserError(f"Show one of: {', '.join(SHOWN)}.", field="show")
        if sort not in SORTED:
            raise UserError(f"Sort by one of: {', '.join(SORTED)}.", field="sort")
        below = query.get("below", "") or "0"
        if not (is_number(below) and int(below) <= LARGEST):
            raise UserError("Enter a number of pixels.", field="below")
        bucket = query.get("bucket", "")
        if bucket and not BUCKET.fullmatch(bucket):
            raise UserError(f"Name a bucket by its sides, as in 832x1216, or {DROPPED}.", field="bucket")
        return cls(_text(query, "q"), _text(query, "tag"), show, int(below), sort, bucket, rules_of(query))

    def as_query(self) -> dict[str, str]:
        """What `from_query` takes, without what is not set."""
        values = {"q": self.text, "tag": self.tag, "show": self.show, "below": str(self.below or "")}
        values |= {"sort": "" if self.sort == "arrival" else self.sort, "bucket": self.bucket}
        return {name: value for name, value in values.items() if value} | query_of(self.rules)

    @property
    def is_narrow(self) -> bool:
        return bool(self.text or self.tag or self.show or self.below or self.bucket)

    def pictures(self, dataset: Dataset) -> QuerySet[Picture]:
        """The pictures that are meant, in order."""
        found = dataset.pictures.filter(self._narrowing(dataset)) if self.is_narrow else dataset.pictures.all()
        name, direction = self.sort.removeprefix("-"), "-" if self.sort.startswith("-") else ""
        if name == "arrival":
            return found.order_by(f"{direction}pk")
        return found.annotate(sort_key=KEYS[name]).order_by(f"{direction}sort_key", f"{direction}pk")

    def page(self, dataset: Dataset, *, after: str, size: int) -> tuple[list[Picture], str]:
        """Up to `size` pictures behind the cursor `after` (empty: from the start), and the next page's cursor; empty
        when this is the last one."""
        found = self.pictures(dataset)
        rows = list((found.filter(self._behind(after)) if after else found)[: size + 1])
        return rows[:size], self._cursor(rows[size - 1]) if len(rows) > size else ""

    def _narrowing(self, dataset: Dataset) -> Q:
        meant = Q()
        if self.text:
            meant &= Q(caption__icontains=self.text) | Q(original_name__icontains=self.text)
        if self.tag:
            meant &= with_tag(self.tag)
        if self.below:
            meant &= Q(width__lt=self.below) | Q(height__lt=self.below)
        if self.bucket:
            meant &= in_bucket(dataset, self.bucket, self.rules)
        if self.show == "missing":
            meant &= Q(caption="")
        elif self.show == "short":
            meant &= Q(
                pk__in=Picture.objects.alias(n=Length("caption")).filter(dataset=dataset, n__lt=SHORT_CHARACTERS)
            )
        elif self.show == "no-trigger":
            meant &= without_trigger(dataset)
        elif self.show == "leaking":
            meant &= leaking(dataset, foreign_triggers(dataset))
        elif self.show == "alike":
            meant &= looking_alike(dataset)
        return meant

    def _cursor(self, picture: Any) -> str:
        return f"{picture.pk}~{picture.sort_key}" if self.sort.removeprefix("-") in KEYS else str(picture.pk)

    def _behind(self, cursor: str) -> Q:
        name, side = self.sort.removeprefix("-"), "lt" if self.sort.startswith("-") else "gt"
        pk, _, key = cursor.partition("~")
        value: str | int = key
        if name in ("size", "length") and is_number(key):
            value = int(key)
        if not is_number(pk) or "\0" in key or (name in ("size", "length") and isinstance(value, str)):
            raise UserError("There is no such place in the list. Load the dataset again.", field="after")
        further = Q(**{f"pk__{side}": int(pk)})
        if name == "arrival":
            return further
        return Q(**{f"sort_key__{side}": value}) | (Q(sort_key=value) & further)


def _text(query: Mapping[str, str], name: str) -> str:
    return " ".join(query.get(name, "").replace("\0", " ").split())[:LONGEST]


# --- Conditions -------------------------------------------------------------------------------------------------------
def with_tag(tag: str) -> Q:
    exactly = Q(caption__iregex=rf"(^|,)\s*{re.escape(tag)}\s*(,|$)")
    # Most captions are passed over by what the database does itself; SQLite's LIKE knows the case of ASCII only.
    return Q(caption__icontains=tag) & exactly if tag.isascii() else exactly


def in_bucket(dataset: Dataset, bucket: str, rules: BucketRules) -> Q:
    """Pictures that the trainer puts there: its own code says so of each size that the dataset has."""
    sizes = dataset.pictures.order_by().values_list("width", "height").distinct()
    fitting = [width * 2**32 + height for width, height in sizes if bucket_of((width, height), rules) == bucket]
    return Q(pk__in=Picture.objects.alias(size=SIZE).filter(dataset=dataset, size__in=fitting))


def without_trigger(dataset: Dataset) -> Q:
    """Captions in which the trigger word does not stand alone. All of them mean none, when there is no trigger word."""
    if not dataset.trigger_word:
        return Q(pk__in=[])
    return ~Q(caption__iregex=word_pattern([dataset.trigger_word]))


def leaking(dataset: Dataset, foreign: Sequence[str]) -> Q:
    """Captions with the trigger word inside another word, or with one of the `foreign` ones."""
    meant = Q(pk__in=[])
    if dataset.trigger_word:
        meant |= Q(caption__iregex=word_pattern([dataset.trigger_word], inside=True))
    return meant | Q(caption__iregex=word_pattern(foreign)) if foreign else meant


def looking_alike(dataset: Dataset) -> Q:
    """Pictures that look like another one of the dataset, of those that were checked for it."""
    rows = list(dataset.pictures.order_by("pk").values_list("pk", "fingerprint"))
    groups = alike(tuple(fingerprint for _, fingerprint in rows))
    return Q(pk__in=[rows[place][0] for group in groups for place in group])


def foreign_triggers(dataset: Dataset) -> list[str]:
    """Trigger words of the owner's other datasets, but for the same word."""
    others = Dataset.objects.filter(owner=dataset.owner_id).exclude(pk=dataset.pk).exclude(trigger_word="")
    words = others.values_list("trigger_word", flat=True).order_by("trigger_word").distinct()[:200]
    return [word for word in words if word.casefold() != dataset.trigger_word.casefold()]
