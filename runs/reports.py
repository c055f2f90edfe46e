"""What a trainer reports, as rows: progress, checkpoints, states, samples, and the run's own figures."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import partial
from typing import Any

from django.db import transaction
from django.db.models import F

from datasets.captioning.providers import Answer
from datasets.captioning.recording import record_caption, record_failure
from runs import wakeup
from runs.enums import ACTIVE
from runs.models import Checkpoint, MetricPoint, Run, RunEvent, Sample, TrainingState, ValidationPoint
from runs.stacks.base import (
    Captioned,
    CheckpointRemoved,
    CheckpointSaved,
    Noted,
    Observation,
    Progress,
    SampleDrawn,
    Stage,
    Started,
    StateSaved,
    Validated,
)


def store_observations(run: Run, attempt: int, observations: list[Observation]) -> None:
    """Write what an attempt reported. Called inside the transaction that moves the attempt's `observed_bytes`."""
    for observation in observations:
        if isinstance(observation, Started):
            _forget_after(run, observation.start_step, attempt)
    _store_metrics(run, attempt, [o for o in observations if isinstance(o, Progress)])
    for observation in observations:
        _store(run, attempt, observation)
    if observations:
        current = Run.objects.filter(pk=run.pk, attempt=attempt, status__in=ACTIVE)
        current.update(revision=F("revision") + 1, **_news(observations))
        transaction.on_commit(partial(wakeup.wake, run.pk))


def _store(run: Run, attempt: int, observation: Observation) -> None:
    match observation:
        case CheckpointSaved(path=path):
            Checkpoint.objects.update_or_create(run=run, path=path, defaults=_checkpoint(observation))
        case CheckpointRemoved(path=path):
            Checkpoint.objects.filter(run=run, path=path).delete()
        case StateSaved(path=path, step=step):
            TrainingState.objects.update_or_create(run=run, path=path, defaults={"step": step})
        case SampleDrawn(path=path):
            Sample.objects.update_or_create(run=run, path=path, defaults=_sample(observation))
        case Validated(step=step, loss=loss):
            measured = {"attempt": attempt, "loss": _finite(loss)}
            ValidationPoint.objects.update_or_create(run=run, step=step, defaults=measured)
        case Captioned():
            _propose(run, observation)
        case Noted(message=message):
            RunEvent.objects.create(run=run, attempt=attempt, message=message)


def _propose(run: Run, observed: Captioned) -> None:
    if run.captioning is None:  # its dataset was deleted
        return
    proposals = run.captioning.proposals.filter(picture__sha256=observed.sha256)
    if observed.caption:
        record_caption(proposals, Answer(observed.caption))
    else:
        record_failure(proposals, observed.reason)


def _forget_after(run: Run, step: int, attempt: int) -> None:
    """An attempt goes on from `step`: what earlier ones measured after it is not part of this run any more."""
    for measured in (run.metrics, run.validations):
        measured.filter(step__gt=step, attempt__lt=attempt).delete()


def _store_metrics(run: Run, attempt: int, progress: list[Progress]) -> None:
    by_step = {
        point.step: MetricPoint(
            run=run,
            step=point.step,
            attempt=attempt,
            loss=_finite(point.loss),
            learning_rate=_finite(point.learning_rate),
            at=datetime.fromtimestamp(point.at, UTC),
        )
        for point in progress
        if point.loss is not None
    }
    MetricPoint.objects.bulk_create(
        by_step.values(),
        update_conflicts=True,
        unique_fields=["run", "step"],
        update_fields=["attempt", "loss", "learning_rate", "at"],
        batch_size=500,
    )


def _news(observations: list[Observation]) -> dict[str, Any]:
    """The run's fields after the last of these observations."""
    news: dict[str, Any] = {}
    for observation in observations:
        if isinstance(observation, Stage):
            news["stage"] = observation.text[:100]
        elif isinstance(observation, Started):
            news |= {"stage": "", "step": observation.start_step, "total_steps": observation.total_steps}
        elif isinstance(observation, Progress):
            news |= {"stage": "", "step": observation.step, "total_steps": observation.total_steps}
            if observation.loss is not None:
                news["loss"] = _finite(observation.loss)
            if observation.loss is not None or observation.steps_per_second is not None:
                news |= {
                    "steps_per_second": _finite(observation.steps_per_second),
                    "eta_seconds": _finite(observation.eta_seconds),
                }
    return news


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _checkpoint(observed: CheckpointSaved) -> dict[str, Any]:
    return {
        "step": observed.step,
        "bytes": observed.bytes,
        "sha256": observed.sha256,
        "is_final": observed.is_final,
    }


def _sample(observed: SampleDrawn) -> dict[str, Any]:
    return {
        "step": observed.step,
        "index": observed.index,
        "prompt": observed.prompt,
        "negative_prompt": observed.negative_prompt,
        "seed": observed.seed,
    }
