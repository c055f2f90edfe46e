"""The order in which waiting runs start, what they wait for, and when they will probably start.

The rule, as the pages tell it: higher priority first; among equals people take turns, so that everybody's first run
comes before anybody's second (a run that trains counts as the first); each person's own runs in the order that they
gave them.
Plain data in, plain data out: dispatch and the pages ask the same functions, so they cannot disagree.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from django.db.models import Count
from django.utils import timezone

from runs import disk
from runs.enums import ACTIVE, DeviceKind, Status
from runs.models import CAPTIONER, Host, Run, Slot
from runs.spec import DEFAULTS
from runs.stacks.installation import TRAINERS, Installation

TURN_RULE = (
    "Higher priority first. Among equals people take turns: everybody's first run comes before anybody's second. "
    "Your own runs start in your order."
)
LONGEST_PAUSE = timedelta(minutes=10)  # `not_before` further ahead means that the clock was set back
SPEEDS_OF = 5  # ended runs


def in_order(waiting: Iterable[Run], training: Mapping[int, int]) -> list[Run]:
    """`waiting` as they start. `training`: how many runs each owner (by id) has on slots now."""
    turns: Counter[int] = Counter(training)
    ordered: list[tuple[tuple[int, int, int, int], Run]] = []
    for run in sorted(waiting, key=lambda run: (-run.priority, run.place, run.pk)):
        turns[run.owner_id] += 1
        ordered.append(((-run.priority, turns[run.owner_id], run.place, run.pk), run))
    return [run for _, run in sorted(ordered, key=lambda pair: pair[0])]


def queue_in_order() -> list[Run]:
    """All runs that wait and are not held, as they start."""
    return Queue().order


@dataclass(frozen=True, slots=True)
class Wait:
    """How a queued run stands."""

    place: int = 0  # 1 starts next; 0: it is held, or does not wait
    starts_at: datetime | None = None  # a forecast
    reason: str = ""  # what else than its turn keeps it


class Queue:
    """The queue at one moment. Each part is read once, and only when it is asked for."""

    @cached_property
    def training(self) -> dict[int, int]:
        """How many runs each owner (by id) has on slots."""
        counts = Run.objects.filter(status__in=ACTIVE).values("owner").annotate(count=Count("pk"))
        return {row["owner"]: row["count"] for row in counts}

    @cached_property
    def order(self) -> list[Run]:
        """The runs that wait and are not held, as they start."""
        waiting = Run.objects.filter(status=Status.QUEUED, held_at__isnull=True).select_related("base_model")
        return in_order(waiting, self.training)

    @cached_property
    def places(self) -> dict[int, int]:
        return {run.pk: place for place, run in enumerate(self.order, start=1)}

    @cached_property
    def starts(self) -> dict[int, datetime]:
        return forecast(order=self.order)

    @cached_property
    def open_places(self) -> list[Place]:
        return open_slots()

    def wait_of(self, run: Run) -> Wait:
        if run.status != Status.QUEUED or run.held_at is not None:
            return Wait()
        reason = reason_to_wait(run, open_places=self.open_places)
        return Wait(self.places.get(run.pk, 0), self.starts.get(run.pk), reason)

    def with_held(self, held: list[Run]) -> list[Run]:
        """The order, with each of these held runs in front of the one that it would start before."""
        before: dict[int, list[Run]] = defaultdict(list)
        for run in in_order(held, self.training):
            before[in_order([*self.order, run], self.training).index(run)].append(run)
        rows: list[Run] = []
        for place in range(len(self.order) + 1):
            rows += [*before[place], *self.order[place : place + 1]]
        return rows


@dataclass(frozen=True, slots=True)
class Place:
    """A slot as a run sees it."""

    slot: Slot
    kind: DeviceKind
    devices: int

    def suits(self, run: Run) -> bool:
        """A run for a GPU does not start on a CPU; one for several GPUs waits for a slot with so many."""
        is_right_kind = run.device == DeviceKind.CPU or self.kind == DeviceKind.CUDA
        return is_right_kind and self.devices == run.spec.get("gpus", 1) and has_trainer(self.slot.host, run.stack)


def places(slots: Iterable[Slot]) -> list[Place]:
    """`slots` with their devices; a slot without one is no place."""
    found = []
    for slot in slots:
        devices = list(slot.devices.all())
        if devices:
            found.append(Place(slot, DeviceKind(devices[0].kind), len(devices)))
    return found


def has_trainer(host: Host, stack: str) -> bool:
    """Whether the host has told that it can train with `stack`. Ours comes with every host."""
    if stack in ("builtin", CAPTIONER):
        return True
    known = host.trainers.get(stack)
    return known is not None and Installation.from_json(known).is_there


def is_paused(run: Run, now: datetime) -> bool:
    """It waits a while after an interruption."""
    return run.not_before is not None and now < run.not_before < now + LONGEST_PAUSE


def open_slots() -> list[Place]:
    """Every place that takes runs, now or after the run that it has."""
    takes_runs = Slot.objects.filter(
        is_enabled=True,
        host__draining_at=None,
        host__lost_at=None,
        host__dead_at=None,
        host__heartbeat_at__isnull=False,
    )
    return places(takes_runs.select_related("host").prefetch_related("devices").order_by("pk"))


def reason_to_wait(run: Run, *, open_places: Iterable[Place] | None = None) -> str:
    """Why a queued run does not start although it is not held; empty when it only waits for its turn."""
    taking = open_slots() if open_places is None else list(open_places)
    if is_paused(run, timezone.now()):
        return "It waits a moment after an interruption, then goes on by itself."
    if not taking:
        return "No host takes runs at the moment: start `manage.py worker` on one, or end a maintenance."
    if not any(has_trainer(place.slot.host, run.stack) for place in taking):
        return f"No host that takes runs has {TRAINERS[run.stack].name}. The Services page says how to install it."
    if not any(place.suits(run) for place in taking):
        gpus = run.spec.get("gpus", 1)
        wanted = f"a slot with {gpus} GPUs" if gpus > 1 else "a slot with one device of its kind"
        return f"It needs {wanted}, and no host that takes runs has one."
    return disk.lack_of_space(run)


def forecast(now: datetime | None = None, *, order: list[Run] | None = None) -> dict[int, datetime]:
    """When each waiting run will probably start: by the time left of active runs, and by how long runs like it took.

    Runs that start after one whose length nobody can tell are left out. `order`: the queue, if it was read already.
    """
    moment = now or timezone.now()
    speeds = _Speeds()
    busy = {run.slot_id: speeds.seconds_for(run) for run in Run.objects.filter(status__in=ACTIVE)}
    taking = open_slots()
    free: dict[int, float | None] = {place.slot.pk: busy.get(place.slot.pk, 0.0) for place in taking}
    starts: dict[int, datetime] = {}
    for run in queue_in_order() if order is None else order:
        known = [
            (seconds, place.slot.pk)
            for place in taking
            if place.suits(run) and (seconds := free[place.slot.pk]) is not None
        ]
        if not known or disk.lack_of_space(run):
            continue
        at, slot_id = min(known)
        starts[run.pk] = moment + timedelta(seconds=at)
        lasts = speeds.seconds_for(run)
        free[slot_id] = None if lasts is None else at + lasts
    return starts


def expected_seconds(run: Run) -> float | None:
    """How long a run like this one takes, also one that is not stored; None when none like it has ended yet."""
    return _Speeds().seconds_for(run)


class _Speeds:
    """How long runs take, from what runs of the same trainer, model and device took: those with steps of the same size
    if there are any, else all, in proportion to the pixels of a step. One query for each kind."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[Run]] = {}

    def seconds_for(self, run: Run) -> float | None:
        """What is left of a run; None when nobody can tell."""
        if run.eta_seconds is not None:
            return run.eta_seconds
        speed = run.steps_per_second or self._speed(run)  # the first is of an earlier attempt
        return (run.total_steps - run.step) / speed if speed else None

    def _speed(self, run: Run) -> float | None:
        alike = self._alike(run)
        same_size = [other for other in alike if pixels_of_a_step(other) == pixels_of_a_step(run)]
        speeds = [
            (other.steps_per_second or 0.0) * pixels_of_a_step(other) / pixels_of_a_step(run)
            for other in (same_size or alike)[:SPEEDS_OF]
        ]
        return statistics.median(speeds) if speeds else None

    def _alike(self, run: Run) -> list[Run]:
        kind = (run.stack, run.base_model_id, run.device)
        if kind not in self._known:
            ended = Run.objects.filter(status=Status.SUCCEEDED, steps_per_second__gt=0)
            ended = ended.filter(stack=run.stack, base_model=run.base_model_id, device=run.device)
            self._known[kind] = list(
                ended.order_by("-finished_at").only("spec", "adaptations", "steps_per_second")[:50]
            )
        return self._known[kind]


def pixels_of_a_step(run: Run) -> int:
    settings = DEFAULTS | run.spec | run.adaptations
    pictures = settings["batch_size"] * settings["gradient_accumulation_steps"] * settings.get("gpus", 1)
    return int(pictures * settings["resolution"] ** 2)
