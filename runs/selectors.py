"""Reads for a user: they take the user first, and show nothing that the user may not see."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Exists, Max, OuterRef, Prefetch, QuerySet

from lorapilot.models import User
from runs import waiting
from runs.enums import ACTIVE, DeviceKind, Ending, Status, StopIntent
from runs.models import Attempt, Device, Host, MetricPoint, Run, RunEvent, Sample
from runs.spec import DEFAULTS, OPTIONS
from runs.supervision import process

MOST_POINTS = 2000

Point = tuple[int, float | None, float | None]  # step, loss, learning rate
Change = tuple[str, Any, Any]  # a setting's label, its value before and after


def list_runs(user: Any) -> QuerySet[Run]:
    runs: QuerySet[Run] = Run.objects.visible_to(user)
    return runs.select_related("owner", "dataset_version", "base_model", "slot__host")


def active_runs(user: Any) -> QuerySet[Run]:
    """Runs that train now, the one that started last first."""
    return list_runs(user).filter(status__in=ACTIVE).order_by("-started_at", "pk")


# --- The queue --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queued run as the list shows it to somebody."""

    run: Run
    wait: waiting.Wait
    can_change: bool
    is_first: bool  # of its owner's own of the same priority; as the next one, only told to those who may change it
    is_last: bool


def queue_rows(user: User) -> list[QueueRow]:
    """The queued runs that `user` may see, in the order in which they start. Places count everybody's.

    A held run stands where it would start if it was released.
    """
    seen = {run.pk: run for run in list_runs(user).filter(status=Status.QUEUED)}
    if not seen:
        return []
    queue = waiting.Queue()
    own = _own_order(list(seen.values()))
    rows = []
    for found in queue.with_held([run for run in seen.values() if run.held_at]):
        run = seen.get(found.pk)
        if run is not None:
            siblings = own[run.owner_id, run.priority]
            rows.append(
                QueueRow(
                    run=run,
                    wait=queue.wait_of(run),
                    can_change=run.is_editable_by(user),
                    is_first=siblings[0] == run.pk,
                    is_last=siblings[-1] == run.pk,
                )
            )
    return rows


def _own_order(queued: list[Run]) -> dict[tuple[int, int], list[int]]:
    """The keys of each owner's queued runs of one priority, as the owner ordered them."""
    own: dict[tuple[int, int], list[int]] = defaultdict(list)
    for run in sorted(queued, key=lambda run: (run.place, run.pk)):
        own[run.owner_id, run.priority].append(run.pk)
    return own


# --- Hosts ------------------------------------------------------------------------------------------------------------
def list_hosts(user: User) -> QuerySet[Host]:
    """All hosts with slots, devices, and the run on each slot: `is_visible` says whether `user` may see that one."""
    seen = Run.objects.visible_to(user).filter(pk=OuterRef("pk"))
    training = Run.objects.filter(status__in=ACTIVE).select_related("owner").annotate(is_visible=Exists(seen))
    return Host.objects.prefetch_related("devices", "slots__devices", Prefetch("slots__runs", training))


def runs_on(host: Host) -> QuerySet[Run]:
    """What trains on `host` now."""
    return Run.objects.filter(slot__host=host, status__in=ACTIVE).select_related("owner", "slot__host").order_by("pk")


def host_condition(run: Run) -> str:
    """Of the host that trains it; empty for a run that does not train."""
    host = Host.objects.filter(slots=run.slot_id).first() if run.slot_id else None
    return host.condition if host else ""


# --- One run ----------------------------------------------------------------------------------------------------------
def best_device() -> DeviceKind:
    """What a run gets: a GPU if any enabled slot has one, else a CPU."""
    usable = Device.objects.filter(kind=DeviceKind.CUDA, slot__is_enabled=True, host__dead_at=None)
    has_gpu = usable.exists()
    return DeviceKind.CUDA if has_gpu else DeviceKind.CPU


def metric_points(run: Run, *, since: int = 0, most: int = MOST_POINTS) -> list[Point]:
    """The run's points after step `since`, at most `most`: lowest and highest loss of each stretch are kept."""
    rows = MetricPoint.objects.filter(run=run, step__gt=since).order_by("step")
    return decimate(list(rows.values_list("step", "loss", "learning_rate")), most)


def decimate(points: list[Point], most: int) -> list[Point]:
    """At most `most` of `points`, so that peaks and dips of the loss stay visible; first and last are always kept."""
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[len(inner) * number // stretches : len(inner) * (number + 1) // stretches]
        low = min(stretch, key=_loss)
        high = max(stretch, key=_loss)
        kept += sorted({low, high})
    return [*kept, points[-1]]


def _loss(point: Point) -> float:
    return point[1] if point[1] is not None else 0.0


def samples_by_step(run: Run) -> list[tuple[int, list[Sample]]]:
    steps: dict[int, list[Sample]] = {}
    for sample in run.samples.order_by("step", "index"):
        steps.setdefault(sample.step, []).append(sample)
    return list(steps.items())


def settings_rows(run: Run) -> list[tuple[str, Any]]:
    """(label, value) of each setting of the run, as its page shows them."""
    rows = []
    if not run.trains:
        return [(name.replace("_", " ").capitalize(), value) for name, value in run.options.items()]
    for name, described in OPTIONS.items():
        value = run.spec.get(name)
        rows.append((described.label, "\n".join(value) if isinstance(value, list) else value))
    return rows


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The settings that differ, as people read them."""
    return [
        (described.label, before[name], after[name])
        for name, described in OPTIONS.items()
        if before[name] != after[name]
    ]


def adapted(run: Run) -> list[Change]:
    """What the run trains with now instead of what was submitted."""
    submitted = DEFAULTS | run.spec
    return differences(submitted, submitted | run.adaptations)


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One launch of a run, and which settings it changed against the launch before it."""

    attempt: Attempt
    changes: list[Change] = field(default_factory=list)


def attempt_rows(run: Run) -> list[AttemptRow]:
    """The newest first."""
    before = submitted = DEFAULTS | run.spec
    rows = []
    for attempt in run.attempts.select_related("slot__host").order_by("number"):
        is_current = attempt.ended_at is None and attempt.number == run.attempt  # its row is filled in at the launch
        after = submitted | (run.adaptations if is_current else attempt.adaptations)
        rows.append(AttemptRow(attempt, differences(before, after)))
        before = after
    return rows[::-1]


def ran_out_of_memory(run: Run) -> bool:
    """It has failed, and memory was why."""
    last = run.attempts.order_by("-number").first()
    return run.status == Status.FAILED and last is not None and last.ending == Ending.OUT_OF_MEMORY


def stop_deadline(run: Run) -> datetime | None:
    """Until when a run that was asked to stop may save, by the plan that it was launched with; then it is killed."""
    if run.status != Status.STOPPING or run.stop_requested_at is None:
        return None
    try:
        steps = json.loads((run.attempt_folder() / process.LAUNCH).read_text())["stop"]
    except (OSError, ValueError, KeyError):  # not launched yet
        return None
    return run.stop_requested_at + timedelta(seconds=sum(step["grace_seconds"] for step in steps[:-1]))


def why_it_stops(run: Run) -> RunEvent | None:
    """The line of the history that asked it to stop."""
    asked = run.events.filter(attempt=run.attempt, new_status=Status.STOPPING)
    return asked.select_related("actor").last()


def status_label(run: Run) -> str:
    """One word for the run. A held run that has trained before is paused, however it came to be held."""
    if run.status == Status.QUEUED and run.held_at is not None:
        return "Paused" if run.attempt > 1 else "Held"
    if run.status == Status.STOPPING and run.stop_intent == StopIntent.PAUSE:
        return "Pausing"
    return Status(run.status).label


def status_of(run: Run) -> dict[str, Any]:
    """The run as the websocket, the API and the page tell it. JSON values only."""
    return {
        "id": run.pk,
        "output_name": run.output_name,
        "status": run.status,
        "status_label": status_label(run),
        "stage": run.stage,
        "step": run.step,
        "total_steps": run.total_steps,
        "loss": run.loss,
        "steps_per_second": run.steps_per_second,
        "eta_seconds": run.eta_seconds,
        "attempt": run.attempt,
        "reason": run.reason,
        "exit_code": run.exit_code,
        "is_active": run.is_active,
        "is_terminal": run.is_terminal,
        "is_held": run.held_at is not None,
        "stop_requested": run.stop_requested_at is not None,
        "stop_intent": run.stop_intent,
        "kill_requested": run.kill_requested_at is not None,
        "host_condition": host_condition(run),
        "state_step": run.states.aggregate(step=Max("step"))["step"] or 0,
        "revision": run.revision,
        "checkpoints": run.checkpoints.count(),
        "samples": run.samples.count(),
        "events": run.events.count(),
        "validations": [list(point) for point in run.validations.values_list("step", "loss").order_by("step")],
    }
