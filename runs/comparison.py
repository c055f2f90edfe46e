"""Two to six runs beside each other: what they were made from, how they went, and what they drew.

Each of these asks the database as often for six runs as for two.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import QuerySet
from django.http import Http404
from django.utils import timezone

from lorapilot.access import is_number
from lorapilot.errors import UserError
from lorapilot.models import User
from runs import selectors
from runs.models import CAPTIONER, Attempt, MetricPoint, Run, Sample, ValidationPoint
from runs.spec import DEFAULTS, OPTIONS
from runs.stacks import STACKS

LEAST, MOST = 2, 6
MOST_CHOICES = 50  # runs that are offered at a time
LAST_SHARE = 0.1  # of a run's steps, for its mean loss at the end


# --- Which runs -------------------------------------------------------------------------------------------------------
def run_ids(texts: Iterable[str]) -> list[int]:
    """The ids in `texts`, each once. Raises UserError for what is none."""
    found = list(dict.fromkeys(texts))
    if not all(map(is_number, found)):
        raise UserError("Name runs by their ids: run=1&run=2.", field="run")
    return list(dict.fromkeys(map(int, found)))


def check_count(ids: Sequence[int]) -> None:
    if not LEAST <= len(ids) <= MOST:
        raise UserError(f"Choose {LEAST} to {MOST} runs: these are {len(ids)}.", field="run")


def find_runs(user: User, ids: Sequence[int]) -> list[Run]:
    """In the order of `ids`. Raises Http404 when one of them does not exist for `user`."""
    found = selectors.list_runs(user).in_bulk(ids)
    if len(found) != len(ids):
        raise Http404
    return [found[pk] for pk in ids]


def choices(user: User, *, chosen: Sequence[int], name: str = "") -> list[Run]:
    """What `user` can compare: the chosen runs, then the newest others that have trained, with `name` in them."""
    trained: QuerySet[Run] = (
        selectors.list_runs(user).exclude(started_at=None).exclude(stack=CAPTIONER).exclude(pk__in=chosen)
    )
    return [*find_runs(user, chosen), *trained.filter(output_name__icontains=name)[:MOST_CHOICES]]


# --- What they were made from -----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Row:
    """One setting or fact of the runs; `values` are in their order."""

    name: str
    label: str
    values: list[Any]

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)

    @property
    def is_list(self) -> bool:
        return any(isinstance(value, list) for value in self.values)


def rows(runs: Sequence[Run]) -> list[Row]:
    """All that a person chose, or that was adapted, and of what bytes: facts first, then the settings as trained."""
    facts = [
        Row("stack", "Trainer", [run.stack for run in runs]),
        Row("profile", "Profile", [run.profile for run in runs]),
        Row("dataset", "Dataset", [str(run.dataset_version) for run in runs]),
        Row("dataset_digest", "Dataset's digest", [run.dataset_version.digest for run in runs]),
        Row("base_model", "Base model", [run.works_with for run in runs]),
        Row(
            "base_model_sha256",
            "Base model's digest",
            [run.base_model_sha256 for run in runs],
        ),
        Row("notes", "Notes", [run.notes for run in runs]),
    ]
    trained = [DEFAULTS | run.spec | run.adaptations for run in runs]
    settings = [
        Row(name, described.label, [_plain(values[name]) for values in trained]) for name, described in OPTIONS.items()
    ]
    return facts + settings + _option_rows(runs)


def differences(runs: Sequence[Run]) -> list[Row]:
    return [row for row in rows(runs) if row.differs]


def _option_rows(runs: Sequence[Run]) -> list[Row]:
    """The trainers' own options; None for a run that leaves one to its trainer."""
    labels: dict[str, str] = {}
    for run in runs:
        table = STACKS[run.stack].table() if run.stack in STACKS else None
        for key in run.options:
            described = table.options.get(key) if table else None
            labels.setdefault(key, (described.label if described else "") or key)
    return [Row(f"options.{key}", label, [run.options.get(key) for run in runs]) for key, label in labels.items()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- How they went ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Figures:
    """None: not measured. `best_…`: the lowest, and the step at which it was measured first."""

    loss: float | None = None
    mean_loss: float | None = None  # over the last tenth of the steps so far
    best_loss: float | None = None
    best_loss_step: int | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_validation_step: int | None = None
    seconds: float | None = None  # of all its attempts, loading included
    steps_per_second: float | None = None  # on average, while it stepped


@dataclass(slots=True)
class Course:
    """How one run went. `curve`: (step, loss, seconds of stepping up to it), at most 2,000 points."""

    figures: Figures
    curve: list[selectors.Point]


Measured = tuple[int, int, float | None, datetime]  # step, attempt, loss, when


def courses(runs: Sequence[Run]) -> list[Course]:
    """In the order of `runs`."""
    points: dict[int, list[Measured]] = defaultdict(list)
    found = MetricPoint.objects.filter(run__in=runs).order_by("run", "step")
    for pk, step, attempt_number, loss, moment in found.values_list("run", "step", "attempt", "loss", "at"):
        points[pk].append((step, attempt_number, loss, moment))
    validations: dict[int, list[ValidationPoint]] = defaultdict(list)
    for validation in ValidationPoint.objects.filter(run__in=runs).order_by("run", "step"):
        validations[validation.run_id].append(validation)
    attempts: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in Attempt.objects.filter(run__in=runs):
        attempts[attempt.run_id].append(attempt)
    return [_course(run, points[run.pk], validations[run.pk], attempts[run.pk]) for run in runs]


def _course(run: Run, points: list[Measured], validated: list[ValidationPoint], attempts: list[Attempt]) -> Course:
    curve, steps_per_second = _clocked(points)
    losses = [(loss, step) for step, loss, _ in curve if loss is not None]
    late = [loss for loss, step in losses if step > curve[-1][0] * (1 - LAST_SHARE)]
    best, best_step = min(losses, default=(None, None))
    checked = [(point.loss, point.step) for point in validated if point.loss is not None]
    best_checked, best_checked_step = min(checked, default=(None, None))
    figures = Figures(
        loss=run.loss,
        mean_loss=sum(late) / len(late) if late else None,
        best_loss=best,
        best_loss_step=best_step,
        validation_loss=checked[-1][0] if checked else None,
        best_validation_loss=best_checked,
        best_validation_step=best_checked_step,
        seconds=_seconds(run, attempts),
        steps_per_second=steps_per_second,
    )
    return Course(figures, selectors.decimate(curve, selectors.MOST_POINTS))


def _clocked(points: list[Measured]) -> tuple[list[selectors.Point], float | None]:
    """The points with the seconds of stepping up to each, and the steps per second. What lies between two attempts (a
    pause, a queue, loading) does not count."""
    curve: list[selectors.Point] = []
    seconds, stepped = 0.0, 0
    before: Measured | None = None
    for point in points:
        step, attempt, loss, at = point
        if before is not None and before[1] == attempt:
            seconds += max(0.0, (at - before[3]).total_seconds())
            stepped += step - before[0]
        curve.append((step, loss, round(seconds, 2)))
        before = point
    return curve, stepped / seconds if seconds else None


def _seconds(run: Run, attempts: list[Attempt]) -> float | None:
    ends = [(attempt.created_at, attempt.ended_at or timezone.now()) for attempt in attempts]
    if not ends and run.started_at and run.finished_at:
        ends = [(run.started_at, run.finished_at)]
    return sum((end - start).total_seconds() for start, end in ends) if ends else None


# --- What they drew ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SampleRow:
    """One prompt with one seed: of each run, in their order, its samples by rising step."""

    prompt: str
    negative_prompt: str
    seed: int
    samples: list[list[Sample]]

    def at(self, step: int) -> list[Sample | None]:
        """Of each run the newest sample at or before `step`."""
        return [next((drawn for drawn in reversed(own) if drawn.step <= step), None) for own in self.samples]


@dataclass(frozen=True, slots=True)
class Samples:
    rows: list[SampleRow] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # at which any run drew, rising


def samples(runs: Sequence[Run]) -> Samples:
    """Prompts that most of the runs drew come first."""
    column = {run.pk: number for number, run in enumerate(runs)}
    found: dict[tuple[str, str, int], SampleRow] = {}
    steps = set()
    drawn = sorted(Sample.objects.filter(run__in=runs), key=lambda one: (column[one.run_id], one.step, one.index))
    for one in drawn:
        key = (one.prompt, one.negative_prompt, one.seed)
        row = found.setdefault(key, SampleRow(*key, samples=[[] for _ in runs]))
        row.samples[column[one.run_id]].append(one)
        steps.add(one.step)
    return Samples(sorted(found.values(), key=lambda row: row.samples.count([])), sorted(steps))


def curves_json(runs: Sequence[Run], went: Sequence[Course]) -> str:
    """For the page's chart: [{"name", "points": [[step, loss, seconds], …]}, …]."""
    return json.dumps(
        [{"name": run.output_name, "points": one.curve} for run, one in zip(runs, went, strict=True)],
        separators=(",", ":"),
    )
