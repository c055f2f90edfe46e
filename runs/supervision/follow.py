"""One slice of supervision: launch an attempt or find it again, store what it reports, stop it, and say how it ended.

Guarantee: any number of slices of one attempt may be delivered, by any worker, in any order; the lease (a conditional
UPDATE on a heartbeat) lets one work at a time. What a trainer reported is stored exactly once: the count of bytes read
moves in the same transaction. A worker that dies loses nothing: the runner trains on, and the next slice reads on.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now
from django.template.defaultfilters import filesizeformat
from django.utils import timezone

from datasets.captioning.selectors import waiting_files
from datasets.selectors import version_files
from lorapilot import workspace
from lorapilot.clock import is_stale
from lorapilot.errors import UserError
from models_registry.selectors import absolute_path, attached_components, component_paths
from runs import disk, library, logfile, memory_ladder, services
from runs.dispatch import dispatch, hand_out
from runs.endings import End, conclude, ending_of
from runs.enums import DeviceKind, Status, StopIntent
from runs.models import Attempt, Run, RunEvent
from runs.reports import store_observations
from runs.retention import remove_surplus
from runs.stacks import get_stack
from runs.stacks.base import (
    Cause,
    CheckpointSaved,
    Exit,
    Hopeless,
    LaunchPlan,
    Observation,
    Outcome,
    Progress,
    Reading,
    Stack,
    TrainingJob,
    TrainingPicture,
)
from runs.supervision import process
from runs.trainer_secrets import secret_environment
from runs.transitions import change_status

log = logging.getLogger(__name__)

SLICE_SECONDS = 6.0  # also the longest that a worker's clean stop waits
POLL_SECONDS = 0.25
ROW_SECONDS = OBSERVE_SECONDS = 1.0  # a transaction each; pages look as often
BEAT_SECONDS = 2.0
LEASE_EXPIRES_AFTER = timedelta(seconds=10)
READ_BYTES = 1 << 20
GUARD_SECONDS = 5.0  # between looks at the disk


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
    lease = uuid.uuid4()
    free = is_stale("lease_at", LEASE_EXPIRES_AFTER)
    taken = Attempt.objects.filter(free, pk=attempt_id, ended_at__isnull=True).update(lease=lease, lease_at=Now())
    return lease if taken else None


def _hand_on(attempt: Attempt, lease: uuid.UUID) -> None:
    released = {"lease": None, "lease_at": None, "enqueued_at": Now()}
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
        self.beaten_at = self.read_at = self.observed_at = self.guarded_at = 0.0
        self.stop_sent = self.kill_sent = self.is_hopeless = False
        self.steps: dict[int, int] = {}  # the last step that was reported, by attempt

    def work(self) -> bool:
        """True when the attempt has ended."""
        until = time.monotonic() + SLICE_SECONDS
        if not process.has_started(self.folder):
            if self._launch():
                return True
            if not process.has_started(self.folder):
                return False  # an earlier attempt's process is still about to end
        if self.run.status == Status.STARTING:
            now = timezone.now()
            change_status(self.run, old=Status.STARTING, new=Status.RUNNING, message="Started.", started_at=now)
        while time.monotonic() < until:
            self._beat()
            is_alive = process.is_alive(self.folder)  # before reading: what it wrote last is then read
            if not is_alive or time.monotonic() - self.observed_at >= OBSERVE_SECONDS:
                self.observed_at = time.monotonic()
                self._observe()
            if self._has_ended(is_alive=is_alive):
                return True
            self._pass_on_stop()
            self._guard_disk()
            time.sleep(POLL_SECONDS)
        return False

    def _beat(self) -> None:
        """Keep the lease; and read again what the run's row asks for."""
        now = time.monotonic()
        if now - self.beaten_at >= BEAT_SECONDS:
            self.beaten_at = now
            if not Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease).update(lease_at=Now()):
                raise LeaseLost
        if now - self.read_at >= ROW_SECONDS:
            self.read_at = now
            self.run.refresh_from_db(fields=["status", "attempt", "kill_requested_at"])
            if self.run.attempt != self.attempt.number:
                raise LeaseLost

    # --- launch -------------------------------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Start the runner. True when the attempt ended before anything ran."""
        if self.run.status == Status.STOPPING:
            return self._end(Outcome(Status.STOPPED, "Stopped before it started."), code=None)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # ends the runner of an earlier attempt, wherever it is
            if process.is_free(_lock_of(self.run)):
                self._catch_up()
                _remove_drafts(self.run.folder)
                secrets = secret_environment(self.run.owner, self.stack, self.run.options)
                plan = self._compile()
                _write_files(plan, self.run.folder)
                process.start(self.folder, _launch_record(self.run, plan, secrets), secrets)
        except LeaseLost:
            raise
        except Exception as error:  # whatever it was, the run must not stay "starting"
            log.exception("run %s could not be launched", self.run.pk)
            return self._end(_refusal(error), code=None)
        return False

    def _catch_up(self) -> None:
        """Read what earlier attempts reported when nobody listened: it led to the state that this one goes on from."""
        for earlier in self.run.attempts.filter(number__lt=self.attempt.number, ended_at__isnull=False):
            self._read_reports(earlier, is_over=True)

    def _compile(self) -> LaunchPlan:
        if missing := self.stack.check():
            raise UserError(missing)
        self.run.log_path.parent.mkdir(parents=True, exist_ok=True)
        job = self._job()
        self.stack.prepare(job)
        plan = self.stack.compile(job)
        for sentence in plan.not_expressed:
            RunEvent.objects.create(run=self.run, attempt=self.attempt.number, message=sentence)
        return plan

    def _job(self) -> TrainingJob:
        run = self.run
        devices = list(self.attempt.slot.devices.order_by("index"))
        state = services.newest_state(run)
        self.attempt.start_step = state[1] if state else 0
        facts = {"start_step": self.attempt.start_step, "adaptations": run.adaptations}
        facts["log_offset"] = self.attempt.log_offset = logfile.size(run.log_path)
        Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease).update(**facts)
        return TrainingJob(
            name=run.output_name,
            folder=run.folder,
            attempt_folder=self.folder,
            spec=memory_ladder.effective(run.spec, run.adaptations),
            **_model_of(run),
            options=run.options,
            start_step=self.attempt.start_step,
            pictures=[TrainingPicture(**picture) for picture in _files_of(run)],
            device=DeviceKind(devices[0].kind),
            device_uuids=[device.uuid for device in devices],
            resume_state=state[0] if state else None,
            provenance=_provenance(run),
        )

    # --- what the trainer reports -------------------------------------------------------------------------------------

    def _observe(self, *, is_over: bool = False) -> None:
        self._read_reports(self.attempt, is_over=is_over)
        if measured := self.stack.measure(self._reading(self.attempt, is_over=is_over)):
            self._store(self.attempt, measured, 0)

    def _read_reports(self, attempt: Attempt, *, is_over: bool = False) -> None:
        reading = self._reading(attempt, is_over=is_over)
        report = self.stack.report(reading)
        begin = attempt.log_offset if self.stack.reads_log else 0
        while chunk := logfile.read_at(report, begin + attempt.observed_bytes, self._most_bytes(attempt)):
            reading = dataclasses.replace(reading, step=self.steps[attempt.number])
            observations, consumed = self.stack.parse(chunk, reading)
            if not consumed:
                return
            self._store(attempt, observations, consumed)

    def _most_bytes(self, attempt: Attempt) -> int:
        """Of the report to read at once. In a log that all attempts share, the next one begins where this one ends."""
        following = self.run.attempts.filter(number=attempt.number + 1) if self.stack.reads_log else None
        if attempt.number == self.attempt.number or following is None:
            return READ_BYTES
        end = following.values_list("log_offset", flat=True).first()
        return READ_BYTES if not end else min(READ_BYTES, end - attempt.log_offset - attempt.observed_bytes)

    def _reading(self, attempt: Attempt, *, is_over: bool = False) -> Reading:
        run = self.run
        if attempt.number not in self.steps:
            last = run.metrics.filter(attempt=attempt.number).order_by("-step").values_list("step", flat=True).first()
            self.steps[attempt.number] = attempt.start_step if last is None else last
        return Reading(
            name=run.output_name,
            folder=run.folder,
            attempt_folder=run.attempt_folder(attempt.number),
            spec=memory_ladder.effective(run.spec, attempt.adaptations),
            log_offset=attempt.log_offset,
            start_step=attempt.start_step,
            step=self.steps[attempt.number],
            is_over=is_over,
            provenance=_provenance(run),
        )

    @transaction.atomic
    def _store(self, attempt: Attempt, observations: list[Observation], consumed: int) -> None:
        if not Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease).exists():
            raise LeaseLost
        unread = Attempt.objects.filter(pk=attempt.pk, observed_bytes=attempt.observed_bytes)
        if not unread.update(observed_bytes=F("observed_bytes") + consumed):
            raise LeaseLost
        store_observations(self.run, attempt.number, observations)
        attempt.observed_bytes += consumed
        reached = [observation.step for observation in observations if isinstance(observation, Progress)]
        self.steps[attempt.number] = reached[-1] if reached else self.steps[attempt.number]
        self.is_hopeless |= any(isinstance(observation, Hopeless) for observation in observations)
        if any(isinstance(observation, CheckpointSaved) for observation in observations):
            transaction.on_commit(partial(remove_surplus, self.run))
            transaction.on_commit(library.catch_up)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _pass_on_stop(self) -> None:
        if self.run.status == Status.STOPPING and not self.stop_sent:
            process.request_stop(self.folder)
            self.stop_sent = True
        if (self.run.kill_requested_at is not None or self.is_hopeless) and not self.kill_sent:
            process.request_stop(self.folder, now=True)
            self.kill_sent = True

    def _guard_disk(self) -> None:
        """Below the floor a run saves and waits, as long as there is still space to save to."""
        if time.monotonic() - self.guarded_at < GUARD_SECONDS:
            return
        self.guarded_at = time.monotonic()
        if self.run.status != Status.RUNNING or not disk.is_below_floor():
            return
        if not self.stack.saves_on_stop and services.newest_state_step(self.run) <= self.attempt.start_step:
            return  # it would lose all that it did
        free = filesizeformat(disk.free_bytes())
        how = "it saves" if self.stack.saves_on_stop else "it goes back to its last saved state"
        message = f"Only {free} are free on the disk: {how}, and goes on by itself when there is space."
        services.ask_to_stop(self.run, intent=StopIntent.MOVE, actor=None, message=message)

    def _has_ended(self, *, is_alive: bool) -> bool:
        ended = process.read_exit(self.folder)
        if ended is None:
            return False if is_alive else self._interrupted()
        self._observe(is_over=True)
        exit_ = Exit(**{name: ended[name] for name in Exit.__slots__ if name in ended})
        reading = self._reading(self.attempt, is_over=True)
        outcome = self._while_leased(lambda: self.stack.outcome(reading, exit_))
        return self._end(outcome, code=exit_.code)

    def _while_leased(self, judge: Callable[[], Outcome]) -> Outcome:
        """What `judge` says. The proof may be in a log of hours, which takes longer to read than a lease lasts."""
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(judge)
            while wait([outcome], timeout=BEAT_SECONDS).not_done:
                self._beat()
        return outcome.result()

    def _interrupted(self) -> bool:
        """The runner is gone without a word: killed, or the machine was restarted. Not the run's fault."""
        if process.read_exit(self.folder) is not None:
            return False  # it ended between our two looks; the next round sees it
        process.end_leftovers(self.folder)
        return self._end(Outcome(Status.ERRORED, "Its process was already gone.", Cause.KILLED), code=None)

    def _end(self, outcome: Outcome, *, code: int | None) -> bool:
        end = End(outcome, code, services.newest_state_step(self.run))
        with transaction.atomic():
            self.run.refresh_from_db()
            self.attempt.ending = ending_of(self.run, outcome)
            self._close(code=code)
            conclude(self.run, self.attempt, end)
            transaction.on_commit(dispatch)
        return True

    def _close(self, *, code: int | None) -> None:
        mine = Attempt.objects.filter(pk=self.attempt.pk, lease=self.lease, ended_at__isnull=True)
        ended = {"ended_at": timezone.now(), "exit_code": code, "ending": self.attempt.ending}
        if not mine.update(**ended, lease=None, lease_at=None):
            raise LeaseLost


def _refusal(error: Exception) -> Outcome:
    """Why a launch failed, for the user."""
    if isinstance(error, UserError):
        return Outcome(Status.FAILED, error.message)
    if isinstance(error, process.NotStarted):
        return Outcome(Status.ERRORED, "Its process was killed before it had started.", Cause.KILLED)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Outcome(Status.FAILED, "The disk is full.", Cause.DISK_FULL)
    return Outcome(Status.ERRORED, "The trainer could not be started. The server's log says why.")


def _write_files(plan: LaunchPlan, folder: Path) -> None:
    for path, content in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for target, source in plan.links.items():
        _link(workspace.inside(folder, target.relative_to(folder)), source)


def _link(target: Path, source: Path) -> None:
    """`target` as a hard link to `source`, or a copy where that cannot be. One that is there stays."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        draft = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, draft)
        draft.replace(target)


def _remove_drafts(folder: Path) -> None:
    """What killed trainers left half-written: files that never got their name."""
    for draft in [*folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")]:
        if draft.is_file():
            draft.unlink(missing_ok=True)


def _lock_of(run: Run) -> Path:
    return run.folder / "_attempts" / "lock"


def _launch_record(run: Run, plan: LaunchPlan, secrets: Iterable[str]) -> process.Launch:
    return process.Launch(
        argv=list(plan.argv),
        env=dict(plan.env),
        cwd=str(plan.cwd),
        log=str(run.log_path),
        lock=str(_lock_of(run)),
        stop=[dataclasses.asdict(step) for step in plan.stop],
        secrets=sorted(secrets),
    )


def _files_of(run: Run) -> list[dict[str, Any]]:
    """What it trains on; or what still waits for a caption."""
    return version_files(run.dataset_version) if run.trains else waiting_files(run.captioning)


def _model_of(run: Run) -> dict[str, Any]:
    """Of a TrainingJob: the base model with its parts; or the folder of the captioner's model."""
    base = run.base_model
    if base is None:
        return {"base_model": workspace.inside(workspace.models(), run.options["model"]), "architecture": ""}
    return {
        "base_model": absolute_path(base),
        "architecture": base.architecture,
        "layout": base.layout,
        "prediction_type": base.prediction_type,
        "parts": {str(role): path for role, path in component_paths(base).items()},
    }


def _provenance(run: Run) -> dict[str, str]:
    """What the LoRA's metadata says of where it comes from; nothing for a run that makes none."""
    if run.base_model is None:
        return {}
    return {
        "run": str(run.pk),
        "dataset": str(run.dataset_version),
        "dataset_digest": run.dataset_version.digest,
        "base_model": run.base_model.name,
        "base_model_sha256": run.base_model.sha256,
        "trigger_word": run.dataset_version.trigger_word,
    } | {f"base_model_{part.role}_sha256": part.sha256 for part in attached_components(run.base_model)}
