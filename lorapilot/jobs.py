"""Background work that is not training: hashing, imports, thumbnails.

Guarantee: a job that was committed runs at least once to its end, and never in two processes at a time: `run_job`
claims it by a conditional UPDATE and beats every few seconds; `restart_silent_jobs` (called by reconcile) hands a
job without a heartbeat to a worker again. So the work must be safe to start over. A restart loses no job.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from django.utils.module_loading import import_string
from django_q.tasks import async_task

from lorapilot.errors import UserError
from lorapilot.models import JOB_ENDED, Job, JobStatus, User

log = logging.getLogger(__name__)

CLUSTER = "io"
BEAT_SECONDS = 2.0
SILENT_AFTER = timedelta(seconds=30)

Work = Callable[..., dict[str, Any]]


class JobCancelled(Exception):
    """Raised inside the work by `Progress` once somebody asked to cancel."""


class JobPostponed(Exception):
    """Raised by work that cannot go on yet: it is handed out again when another of its kind ends, at the latest in half
    a minute. The message says what it waits for."""


def job(function: Work) -> Work:
    """Marks a function `work(progress, **arguments) -> result` as one that a Job may name."""
    function.is_job = True  # type: ignore[attr-defined]  # the mark itself
    return function


class Progress:
    """The work's handle on its row. Call it often: it writes at most every 2 seconds, and raises JobCancelled."""

    def __init__(self, job_id: uuid.UUID, lease: uuid.UUID) -> None:
        self.job_id = job_id
        self.lease = lease
        self._written = 0.0

    def __call__(self, done: int, total: int = 0, message: str = "") -> None:
        if time.monotonic() - self._written < BEAT_SECONDS:
            return
        self._written = time.monotonic()
        row = Job.objects.filter(pk=self.job_id, lease=self.lease, status=JobStatus.RUNNING)
        if row.filter(cancel_requested_at__isnull=False).exists():
            raise JobCancelled
        if not row.update(done=done, total=total, message=message, heartbeat_at=timezone.now()):
            raise JobCancelled


def enqueue(work: Work, *, label: str, owner: User | None, **arguments: Any) -> Job:
    """Queue `work(progress, **arguments)`; it starts after the surrounding transaction commits."""
    created = Job.objects.create(
        kind=f"{work.__module__}.{work.__qualname__}", label=label, owner=owner, arguments=arguments
    )
    transaction.on_commit(lambda: _hand_out(created.pk))
    return created


def _hand_out(job_id: uuid.UUID) -> None:
    async_task("lorapilot.jobs.run_job", str(job_id), cluster=CLUSTER)


def cancel(job_: Job) -> None:
    """Ask a job to stop; one that has not started ends at once."""
    now = timezone.now()
    queued = Job.objects.filter(pk=job_.pk, status=JobStatus.QUEUED)
    if not queued.update(status=JobStatus.CANCELLED, finished_at=now, message="Cancelled."):
        Job.objects.filter(pk=job_.pk, status=JobStatus.RUNNING).update(cancel_requested_at=now)


def run_job(job_id: str) -> None:
    """The django-q2 task. A second delivery of a living job returns at once."""
    lease = uuid.uuid4()
    now = timezone.now()
    claimable = Q(status=JobStatus.QUEUED) | Q(status=JobStatus.RUNNING, heartbeat_at__lt=now - SILENT_AFTER)
    claimed = Job.objects.filter(claimable, pk=job_id).update(
        status=JobStatus.RUNNING, lease=lease, heartbeat_at=now, message=""
    )
    if not claimed:
        return
    row = Job.objects.get(pk=job_id)
    try:
        work = import_string(row.kind)
        if not getattr(work, "is_job", False):
            raise ValueError(f"{row.kind} is not a job.")  # noqa: TRY301 told like every other fault of ours
        result = work(Progress(row.pk, lease), **row.arguments)
    except JobPostponed as postponed:
        later = {"status": JobStatus.QUEUED, "lease": None, "heartbeat_at": timezone.now(), "message": str(postponed)}
        Job.objects.filter(pk=row.pk, lease=lease).update(**later)
    except JobCancelled:
        _end(row, lease, JobStatus.CANCELLED, message="Cancelled.")
    except UserError as error:
        _end(row, lease, JobStatus.FAILED, message=error.message)
    except Exception:
        log.exception("job %s (%s) failed", row.pk, row.kind)
        _end(
            row, lease, JobStatus.FAILED, message="Something went wrong on our side. The server's log has the details."
        )
    else:
        _end(row, lease, JobStatus.SUCCEEDED, message="", result=result)


def _end(row: Job, lease: uuid.UUID, status: JobStatus, **values: Any) -> None:
    """Those of its kind that were postponed may have waited for it: they look again at once."""
    Job.objects.filter(pk=row.pk, lease=lease).update(status=status, finished_at=timezone.now(), **values)
    postponed = Job.objects.filter(kind=row.kind, status=JobStatus.QUEUED, heartbeat_at__isnull=False)
    for job_id in postponed.order_by("created_at").values_list("pk", flat=True):
        _hand_out(job_id)


def restart_silent_jobs() -> int:
    """Hand out jobs again whose worker is gone, or whose task was lost. Returns how many."""
    silent = timezone.now() - SILENT_AFTER
    lost = Q(status=JobStatus.RUNNING, heartbeat_at__lt=silent) | Q(status=JobStatus.QUEUED, created_at__lt=silent)
    due = Job.objects.filter(lost).filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=silent))
    # The handing out itself counts as a sign of life, so that reconcile does not pile up tasks; without its lease a
    # worker that was only slow notices at its next Progress.
    again = {"status": JobStatus.QUEUED, "lease": None, "heartbeat_at": timezone.now()}
    found = [job_id for job_id in due.values_list("pk", flat=True) if due.filter(pk=job_id).update(**again)]
    for job_id in found:
        _hand_out(job_id)
    return len(found)


def visible_jobs(user: User) -> QuerySet[Job]:
    """The jobs a user may see: their own; staff see all."""
    return Job.objects.all() if user.is_staff else Job.objects.filter(owner=user)


__all__ = [
    "JOB_ENDED",
    "JobCancelled",
    "JobPostponed",
    "Progress",
    "cancel",
    "enqueue",
    "job",
    "restart_silent_jobs",
    "run_job",
]
