"""What is wrong with a dataset before it is trained on, and what the trainer will make of its pictures.

Reads only: two queries, whatever the number of pictures. What takes longer, reading every file, is done by a job
(datasets/checking.py) and kept with the pictures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from django.db.models import Count

from datasets import fingerprints, lint
from datasets.models import Dataset, Picture
from lora_trainer.buckets import BucketRules, Placement, Size, place
from lorapilot.models import User

LEAST_SIDE = 256  # pixels; a picture with a shorter side teaches little, unless the run is smaller itself
DROPPED = "dropped"  # the bucket of what is left out
FIELDS = ("original_name", "caption", "sha256", "width", "height", "fingerprint", "fault", "checked_at", "edit")


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture, and where the trainer puts it; None: it is left out."""

    picture: Picture
    placement: Placement | None

    @property
    def scale(self) -> float:
        """Above 1: it is enlarged."""
        return self.placement.resized[0] / self.picture.width if self.placement else 0.0

    @property
    def part(self) -> tuple[float, float, float, float]:
        """(left, top, width, height) in pixels of the picture itself that are trained."""
        if self.placement is None:
            return 0, 0, 0, 0
        across = self.picture.width / self.placement.resized[0]
        down = self.picture.height / self.placement.resized[1]
        (left, top), (width, height) = self.placement.crop, self.placement.bucket
        return left * across, top * down, width * across, height * down

    @property
    def lost_percent(self) -> float:
        """How much of the picture's area is cut off."""
        _, _, width, height = self.part
        return max(0.0, 100 - 100 * width * height / (self.picture.width * self.picture.height))


@dataclass(frozen=True, slots=True)
class Bucket:
    size: Size
    placed: list[Placed]

    @property
    def name(self) -> str:
        """As addresses have it."""
        return _bucket_name(self.size) if any(self.size) else DROPPED


@dataclass
class Report:
    """Complete when it is handed out: what is derived is computed once."""

    rules: BucketRules
    pictures: list[Picture]
    placed: list[Placed]
    findings: lint.Findings
    unreadable: list[Picture] = field(default_factory=list)
    tiny: list[Picture] = field(default_factory=list)
    elsewhere: list[tuple[Picture, list[str]]] = field(default_factory=list)
    """The very same file, and the names of the user's other datasets that have it."""
    alike: list[list[Picture]] = field(default_factory=list)
    unchecked: int = 0

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The fullest first."""
        found: dict[Size, list[Placed]] = defaultdict(list)
        for one in self.placed:
            if one.placement:
                found[one.placement.bucket].append(one)
        return [Bucket(size, found[size]) for size in sorted(found, key=lambda size: (-len(found[size]), size))]

    @cached_property
    def dropped(self) -> list[Placed]:
        return [one for one in self.placed if one.placement is None]

    @cached_property
    def enlarged(self) -> list[Placed]:
        """The one that is enlarged most comes first."""
        return sorted((one for one in self.placed if one.scale > 1), key=lambda one: -one.scale)

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many pictures (of what looks alike: groups; of what is in all captions: tags), by what is wrong."""
        found = self.findings
        return {
            "unreadable": len(self.unreadable),
            "dropped": len(self.dropped),
            "tiny": len(self.tiny),
            "alike": len(self.alike),
            "elsewhere": len(self.elsewhere),
            "without_caption": len(found.empty),
            "without_trigger": len(found.without_trigger),
            "contradictory": len({number for number, *_ in found.contradictory}),
            "repeated": len(found.repeated),
            "long": len(found.long),
            "in_all": len(found.in_all),
        }

    @cached_property
    def largest(self) -> set[int]:
        """Of each group that looks alike, the id of the picture to keep: most pixels, then the longest caption."""
        return {max(group, key=lambda one: (one.width * one.height, len(one.caption))).pk for group in self.alike}

    @cached_property
    def worded(self) -> set[int]:
        """And that whose caption to keep: the same picture, unless it has none."""
        best = (max(group, key=lambda one: (bool(one.caption), *self._keeps(one))) for group in self.alike)
        return {one.pk for one in best}

    def _keeps(self, picture: Picture) -> tuple[bool, int]:
        return picture.pk in self.largest, len(picture.caption)

    def at(self, places: Iterable[int]) -> list[Picture]:
        return [self.pictures[number] for number in places]

    @cached_property
    def without_caption(self) -> list[Picture]:
        return self.at(self.findings.empty)

    @cached_property
    def without_trigger(self) -> list[Picture]:
        return self.at(self.findings.without_trigger)

    @cached_property
    def contradictory(self) -> list[tuple[Picture, str, str]]:
        return [(self.pictures[number], one, other) for number, one, other in self.findings.contradictory]

    @cached_property
    def repeated(self) -> list[tuple[Picture, list[str]]]:
        return [(self.pictures[number], tags) for number, tags in self.findings.repeated]

    @cached_property
    def long(self) -> list[tuple[Picture, int]]:
        return [(self.pictures[number], tokens) for number, tokens in self.findings.long]


def report_on(user: User, dataset: Dataset, rules: BucketRules) -> Report:
    """`user` decides which other datasets are looked into; that the dataset itself may be seen is the caller's."""
    pictures = list(dataset.pictures.only("dataset_id", *FIELDS).order_by("pk"))
    report = Report(
        rules=rules,
        pictures=pictures,
        placed=_placed(pictures, rules),
        findings=lint.lint([picture.caption for picture in pictures], trigger_word=dataset.trigger_word),
        unreadable=[picture for picture in pictures if picture.fault],
        tiny=[picture for picture in pictures if is_tiny(picture, rules)],
        elsewhere=_elsewhere(user, dataset, pictures),
        unchecked=sum(picture.checked_at is None for picture in pictures),
    )
    groups = fingerprints.alike(tuple(picture.fingerprint for picture in pictures))
    report.alike = [report.at(group) for group in groups]
    return report


def bucket_of(size: Size, rules: BucketRules) -> str:
    """The name of the bucket for a picture of this size, as in `832x1216`."""
    placement = place(size, rules)
    return _bucket_name(placement.bucket) if placement else DROPPED


def _bucket_name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def bucket_counts(dataset: Dataset, rules: BucketRules) -> dict[str, int]:
    """How many pictures are in which bucket, the fullest first."""
    counts: Counter[str] = Counter()
    sizes = dataset.pictures.order_by().values_list("width", "height")
    for width, height, count in sizes.annotate(count=Count("pk")):
        counts[bucket_of((width, height), rules)] += count
    return dict(counts.most_common())


def is_tiny(picture: Picture, rules: BucketRules) -> bool:
    """Fewer pixels than are trained, or a side below 256 of them."""
    width, height = rules.resolution
    least = min(LEAST_SIDE, width, height)
    return picture.width * picture.height < width * height or min(picture.width, picture.height) < least


def _placed(pictures: Sequence[Picture], rules: BucketRules) -> list[Placed]:
    known: dict[Size, Placement | None] = {}
    found = []
    for picture in pictures:
        size = picture.width, picture.height
        if size not in known:
            known[size] = place(size, rules)
        found.append(Placed(picture, known[size]))
    return found


def _elsewhere(user: User, dataset: Dataset, pictures: Sequence[Picture]) -> list[tuple[Picture, list[str]]]:
    own = Dataset.objects.filter(owner=user).exclude(pk=dataset.pk).values("pk")
    same = Picture.objects.filter(dataset__in=own, sha256__in=dataset.pictures.values("sha256"))
    names: dict[str, list[str]] = defaultdict(list)
    for sha256, name in same.order_by("dataset__name").values_list("sha256", "dataset__name"):
        names[sha256].append(name)
    return [(picture, names[picture.sha256]) for picture in pictures if picture.sha256 in names]


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON values, pictures by id."""
    found = report.findings
    ids = _ids
    return {
        "resolution": report.rules.resolution[0],
        "pictures": len(report.pictures),
        "unchecked": report.unchecked,
        "counts": report.counts,
        "unreadable": [{"id": picture.pk, "fault": picture.fault} for picture in report.unreadable],
        "tiny": ids(report.tiny),
        "alike": [ids(group) for group in report.alike],
        "elsewhere": [{"id": picture.pk, "datasets": names} for picture, names in report.elsewhere],
        "without_caption": ids(report.without_caption),
        "without_trigger": ids(report.without_trigger),
        "contradictory": [{"id": picture.pk, "tags": [one, other]} for picture, one, other in report.contradictory],
        "repeated": [{"id": picture.pk, "tags": tags} for picture, tags in report.repeated],
        "long": [{"id": picture.pk, "about_tokens": tokens} for picture, tokens in report.long],
        "in_all_captions": found.in_all,
        "buckets": [
            {"width": bucket.size[0], "height": bucket.size[1], "pictures": len(bucket.placed)}
            for bucket in report.buckets
        ],
        "placements": [_placement(one) for one in report.placed],
    }


def _ids(pictures: Iterable[Picture]) -> list[int]:
    return [picture.pk for picture in pictures]


def _placement(one: Placed) -> dict[str, Any]:
    there = one.placement
    return {
        "id": one.picture.pk,
        "bucket": there and there.bucket,
        "resized": there and there.resized,
        "crop": there and there.crop,
        "scale": round(one.scale, 4),
    }
