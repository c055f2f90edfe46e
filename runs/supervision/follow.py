"""One slice of supervision: launch an attempt or find it again, store what it reports, stop it, and say how it ended.

Guarantee: any number of slices of one attempt may be delivered, by any worker, in any order; the lease (a conditional
UPDATE on a heartbeat) lets one work at a time. What a trainer reported is stored exactly once: the count of bytes read
moves in the same transaction. A worker that dies loses nothing: the runner trains on, and the next slice reads on.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from datasets.selectors import version_files
from lorapilot.errors import UserError
from models_registry.selectors import absolute_path
from runs import logfile, wakeup
from runs.dispatch import dispatch, hand_out
from runs.enums import ACTIVE, DeviceKind, Status
from runs.models import Attempt, Checkpoint, MetricPoint, Run, RunEvent, Sample, TrainingState, ValidationPoint
from runs.services import newest_state, requeue
from runs.spec import RunSpec
from runs.stacks import get_stack
from runs.stacks.base import (
    CheckpointRemoved,
    CheckpointSaved,
    Exit,
    LaunchPlan,
    Noted,
    Observation,
    Outcome,
    Progress,
    SampleDrawn,
    Stack,
    Stage,
    StateSaved,
    TrainingJob,
    TrainingPicture,
    Validated,
)
from runs.supervision import process
from runs.transitions import change_status

log = logging.getLogger(__name__)

SLICE_SECONDS = 6.0  # also the longest that a worker's clean stop waits
POLL_SECONDS = 0.25
BEAT_SECONDS = 2.0
LEASE_EXPIRES_AFTER = timedelta(seconds=10)
READ_BYTES = 1 << 20
MOST_INTERRUPTIONS = 3


class LeaseLost(Exception):
    """Another slice supervises this attempt now; this one must not write any more."""


def supervise_slice(attempt_id: int) -> None:
    """Supervise for SLICE_SECONDS, then hand out the next slice. Returns at once when another slice is at it."""
    lease = _take_lease(attempt_id)
    if lease is None:
        return
    attempt = Attempt.objects.select_related("run", "slot__host").get(pk=attempt_id)
    try:
        if _Slice(attempt, lease).work():
            return
    except LeaseLost:
        return
    _hand_on(attempt, lease)


def _take_lease(attempt_id: int) -> uuid.UUID | None:
    lease, now = uuid.uuid4(), timezone.now()
    free = Q(lease_at__isnull=True) | Q(lease_at__lt=now - LEASE_EXPIRES_AFTER)
    taken = Attempt.objects.filter(free, pk=attempt_id, ended_at__isnull=True).update(lease=lease, lease_at=now)
    return lease if taken else None


def _hand_on(attempt: Attempt, lease: uuid.UUID) -> None:
    released = {"lease": None, "lease_at": None, "enqueued_at": timezone.now()}
    if Attempt.objects.filter(pk=attempt.pk, lease=lease).update(**released):
        hand_out(attempt)


class _Slice:
    """The state of one slice. `run` is read again on each round: a request to stop is a field of it."""

    def __init__(self, attempt: Attempt, lease: uuid.UUID) -> None:
        self.attempt = attempt
        self.run: Run = attempt.run
        self.lease = lease
        self.folder = self.run.attempt_folder(attempt.number)
        self.stack: Stack = get_stack(self.run.stack)
        self.beaten_at = 0.0
        self.stop_sent = False

    def work(self) -> bool:
        """True when the attempt has ended."""
        until = time.monotonic() + SLICE_SECONDS
        if not process.has_started(self.folder) and self._launch():
            return True
        while time.monotonic() < until:
            self._beat()
            is_alive = process.is_alive(self.folder)  # before reading: what it wrote last is then read
            self._observe()
            if self._has_ended(is_alive=is_alive):
                return True
            self._pass_on_stop()
            time.sleep(POLL_SECONDS)
        return False

    def _beat(self) -> None:
        """Keep the lease; and read the run again."""
        if time.monotonic() - self.beaten_at >= BEAT_SECONDS:
            self.beaten_at = time.monotonic()
            if not Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease).update(lease_at=timezone.now()):
                raise LeaseLost
        self.run.refresh_from_db()
        if self.run.attempt != self.attempt.number:
            raise LeaseLost

    # --- launch -------------------------------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Start the runner. True when the attempt ended before anything ran."""
        if self.run.status == Status.STOPPING:
            return self._end(Outcome(Status.STOPPED, "Stopped before it started."), code=None)
        try:
            plan = self._compile()
            _write_files(plan)
            process.start(self.folder, _launch_record(self.run, plan))
        except Exception as error:  # whatever it was, the run must not stay "starting"
            log.exception("run %s could not be launched", self.run.pk)
            return self._end(_refusal(error), code=None)
        change_status(self.run, old=Status.STARTING, new=Status.RUNNING, message="Started.", started_at=timezone.now())
        return False

    def _compile(self) -> LaunchPlan:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run.log_path.parent.mkdir(parents=True, exist_ok=True)
        plan = self.stack.compile(self._job())
        for sentence in plan.not_expressed:
            RunEvent.objects.create(run=self.run, attempt=self.attempt.number, message=sentence)
        return plan

    def _job(self) -> TrainingJob:
        run = self.run
        devices = list(self.attempt.slot.devices.order_by("index"))
        state = newest_state(run)
        return TrainingJob(
            name=run.output_name,
            folder=run.folder,
            attempt_folder=self.folder,
            spec=RunSpec.from_values(run.spec),
            base_model=absolute_path(run.base_model),
            architecture=run.base_model.architecture,
            pictures=[TrainingPicture(**picture) for picture in version_files(run.dataset_version)],
            device=DeviceKind(devices[0].kind),
            device_uuids=[device.uuid for device in devices],
            resume_state=state[0] if state else None,
            provenance=_provenance(run),
        )

    # --- what the trainer reports -------------------------------------------------------------------------------------

    def _observe(self) -> None:
        events = self.stack.events_file(self.folder)
        while chunk := logfile.read_at(events, self.attempt.observed_bytes, READ_BYTES):
            observations, consumed = self.stack.parse(chunk)
            if not consumed:
                return
            self._store(observations, consumed)

    @transaction.atomic
    def _store(self, observations: list[Observation], consumed: int) -> None:
        mine = Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease, observed_bytes=self.attempt.observed_bytes)
        if not mine.update(observed_bytes=F("observed_bytes") + consumed):
            raise LeaseLost
        store_observations(self.run, self.attempt.number, observations)
        self.attempt.observed_bytes += consumed

    # --- the end ------------------------------------------------------------------------------------------------------

    def _pass_on_stop(self) -> None:
        if self.run.status == Status.STOPPING and not self.stop_sent:
            process.request_stop(self.folder)
            self.stop_sent = True

    def _has_ended(self, *, is_alive: bool) -> bool:
        ended = process.read_exit(self.folder)
        if ended is not None:
            self._observe()
            exit_ = Exit(code=ended["code"], stop_requested=ended["stop_requested"])
            return self._end(self.stack.outcome(self.run.folder, self.folder, exit_), code=exit_.code)
        return False if is_alive else self._interrupted()

    def _interrupted(self) -> bool:
        """The runner is gone without a word: killed, or the machine was restarted. Not the run's fault."""
        if process.read_exit(self.folder) is not None:
            return False  # it ended between our two looks; the next round sees it
        process.end_leftovers(self.folder)
        if self.run.status == Status.STOPPING:
            return self._end(Outcome(Status.STOPPED, "Stopped; its process was already gone."), code=None)
        before = self.run.attempts.filter(ended_at__isnull=False, exit_code__isnull=True).count()
        if before >= MOST_INTERRUPTIONS:
            reason = f"Its process was killed from outside {before + 1} times. Find out by what, then resume."
            return self._end(Outcome(Status.ERRORED, reason), code=None)
        state = newest_state(self.run)
        from_where = f"goes on from step {state[1]}" if state else "starts again"
        with transaction.atomic():
            self._close(code=None)
            message = f"Its process was killed from outside, or the machine restarted. It {from_where}."
            for old in (Status.RUNNING, Status.STARTING):
                if requeue(self.run, old=old, actor=None, message=message):
                    break
            transaction.on_commit(dispatch)
        return True

    def _end(self, outcome: Outcome, *, code: int | None) -> bool:
        with transaction.atomic():
            self._close(code=code)
            self.run.refresh_from_db()
            values: dict[str, Any] = {"reason": outcome.reason, "exit_code": code, "eta_seconds": None}
            for old, new in _path(Status(self.run.status), outcome.status):
                change_status(self.run, old=old, new=new, message=outcome.reason, **values)
            transaction.on_commit(dispatch)
        return True

    def _close(self, *, code: int | None) -> None:
        mine = Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease, ended_at__isnull=True)
        if not mine.update(ended_at=timezone.now(), exit_code=code, lease=None, lease_at=None):
            raise LeaseLost


def _refusal(error: Exception) -> Outcome:
    """Why a launch failed, for the user."""
    if isinstance(error, UserError):
        return Outcome(Status.FAILED, error.message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Outcome(Status.FAILED, "The disk is full: free some space in the workspace, then resume.")
    return Outcome(Status.ERRORED, "The trainer could not be started. The server's log says why.")


def _path(old: Status, new: Status) -> list[tuple[Status, Status]]:
    """The edges from `old` to `new`: a run that ends so quickly that it was never seen running takes two."""
    if old == Status.STARTING and new == Status.SUCCEEDED:
        return [(old, Status.RUNNING), (Status.RUNNING, new)]
    if old in (Status.STARTING, Status.RUNNING) and new == Status.STOPPED:
        return [(old, Status.STOPPING), (Status.STOPPING, new)]
    return [(old, new)]


def _write_files(plan: LaunchPlan) -> None:
    for path, text in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _launch_record(run: Run, plan: LaunchPlan) -> process.Launch:
    return process.Launch(
        argv=list(plan.argv),
        env=dict(plan.env),
        cwd=str(plan.cwd),
        log=str(run.log_path),
        lock=str(run.folder / "_attempts" / "lock"),
        stop=[dataclasses.asdict(step) for step in plan.stop],
    )


def _provenance(run: Run) -> dict[str, str]:
    """What the LoRA's metadata says of where it comes from."""
    return {
        "run": str(run.pk),
        "dataset": str(run.dataset_version),
        "dataset_digest": run.dataset_version.digest,
        "base_model": run.base_model.name,
        "base_model_sha256": run.base_model.sha256,
        "trigger_word": run.dataset_version.trigger_word,
    }


def store_observations(run: Run, attempt: int, observations: list[Observation]) -> None:
    """Write what an attempt reported. Called inside the transaction that moves the attempt's `observed_bytes`."""
    progress = [o for o in observations if isinstance(o, Progress)]
    _store_metrics(run, attempt, progress)
    for observation in observations:
        if isinstance(observation, CheckpointSaved):
            Checkpoint.objects.update_or_create(run=run, path=observation.path, defaults=_checkpoint(observation))
        elif isinstance(observation, StateSaved):
            TrainingState.objects.update_or_create(run=run, path=observation.path, defaults={"step": observation.step})
        elif isinstance(observation, SampleDrawn):
            Sample.objects.update_or_create(run=run, path=observation.path, defaults=_sample(observation))
        elif isinstance(observation, CheckpointRemoved):
            Checkpoint.objects.filter(run=run, path=observation.path).delete()
        elif isinstance(observation, Validated):
            measured = {"attempt": attempt, "loss": _finite(observation.loss)}
            ValidationPoint.objects.update_or_create(run=run, step=observation.step, defaults=measured)
        elif isinstance(observation, Noted):
            RunEvent.objects.create(run=run, attempt=attempt, message=observation.message)
    news = _news(observations)
    if news or observations:
        current = Run.objects.filter(pk=run.pk, attempt=attempt, status__in=ACTIVE)
        current.update(revision=F("revision") + 1, **news)
        transaction.on_commit(lambda: wakeup.wake(run.pk))


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
        elif isinstance(observation, Progress):
            news |= {"stage": "", "step": observation.step, "total_steps": observation.total_steps}
            if observation.loss is not None:
                news |= {
                    "loss": _finite(observation.loss),
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
