"""Reads for a user: they take the user first, and show nothing that the user may not see."""

from __future__ import annotations

from typing import Any

from django.db.models import F, Q, QuerySet

from runs.enums import ACTIVE, DeviceKind, Status
from runs.models import Device, MetricPoint, Run, Sample
from runs.spec import OPTIONS

MOST_POINTS = 2000

Point = tuple[int, float | None, float | None]  # step, loss, learning rate


def list_runs(user: Any) -> QuerySet[Run]:
    runs: QuerySet[Run] = Run.objects.visible_to(user)
    return runs.select_related("owner", "dataset_version", "base_model", "slot__host")


def queue(user: Any) -> QuerySet[Run]:
    """Active runs first, then the waiting ones in the order in which they start."""
    return (
        list_runs(user)
        .filter(status__in=[*ACTIVE, Status.QUEUED])
        .order_by(F("started_at").desc(nulls_last=True), "queued_at", "pk")
    )


def best_device() -> DeviceKind:
    """What a run gets: a GPU if any enabled slot has one, else a CPU."""
    has_gpu = Device.objects.filter(kind=DeviceKind.CUDA, slot__is_enabled=True).exists()
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
    for name, described in OPTIONS.items():
        value = run.spec.get(name)
        rows.append((described.label, "\n".join(value) if isinstance(value, list) else value))
    return rows


def status_of(run: Run) -> dict[str, Any]:
    """The run as the websocket, the API and the page tell it. JSON values only."""
    return {
        "id": run.pk,
        "output_name": run.output_name,
        "status": run.status,
        "status_label": Status(run.status).label,
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
        "revision": run.revision,
        "checkpoints": run.checkpoints.count(),
        "samples": run.samples.count(),
        "events": run.events.count(),
        "validations": [list(point) for point in run.validations.values_list("step", "loss").order_by("step")],
    }


def queue_place(run: Run) -> int:
    """1 for the run that starts next; 0 for one that does not wait."""
    if run.status != Status.QUEUED or run.held_at is not None:
        return 0
    before = Q(queued_at__lt=run.queued_at) | Q(queued_at=run.queued_at, pk__lt=run.pk)
    return 1 + Run.objects.filter(before, status=Status.QUEUED, held_at__isnull=True).count()
