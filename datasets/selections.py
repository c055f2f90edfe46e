"""The pictures that an action on many is meant for: the ones that were picked, or all that a filter finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets.models import Dataset
from datasets.picture_filters import PictureFilter
from lorapilot.access import is_number
from lorapilot.errors import UserError

MOST_PICKED = 10_000
NONE_PICKED = "Select at least one picture."


@dataclass(frozen=True)
class Selection:
    """`picked` ids; None: all that `filter` finds. Ids of other datasets are nobody's."""

    picked: frozenset[int] | None
    filter: PictureFilter = field(default_factory=PictureFilter)

    @classmethod
    def of(cls, ids: Iterable[str | int]) -> Selection:
        """Raises UserError for what is no id, and for more than 10,000 of them."""
        texts = [str(one).strip() for one in ids]
        texts = [text for text in texts if text]
        if not all(map(is_number, texts)):
            raise UserError("A picture's id is a number.", field="pictures")
        if len(texts) > MOST_PICKED:
            raise UserError(f"Select at most {MOST_PICKED:,} pictures, or all that match.", field="pictures")
        return cls(frozenset(map(int, texts)))

    @classmethod
    def from_form(cls, form: Mapping[str, Any], picked: Iterable[str]) -> Selection:
        """From a page's form: `scope=all` with the filter's fields, or `ids` (commas between them) and `picked`."""
        if form.get("scope") == "all":
            return cls(None, PictureFilter.from_query(form))
        return cls.of([*str(form.get("ids", "")).split(","), *picked])

    def rows(self, dataset: Dataset, *columns: str) -> list[dict[str, Any]]:
        """These columns, and `pk`, of the selected pictures, in order. Raises UserError when there are none."""
        found = self.filter.pictures(dataset).values("pk", *columns)
        rows = [row for row in found if self.picked is None or row["pk"] in self.picked]
        if not rows:
            raise UserError(NONE_PICKED if self.picked is not None else "No picture matches.", field="pictures")
        return rows
