"""Which queued run gets which free slot: the oldest first.

Safe to call at any time in any process: a slot is claimed by a conditional UPDATE under the database's partial unique
constraint, so of many callers one wins and the others go on to the next slot.
"""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.db.models import QuerySet
from django.utils import timezone
from django_q.tasks import async_task

from runs import logfile
from runs.enums import ACTIVE, Status
from runs.hosts import SILENT_AFTER
from runs.models import Attempt, Run, Slot
from runs.transitions import change_status


def dispatch() -> int:
    """Give free slots to waiting runs; returns how many runs were started."""
    started = 0
    for slot in free_slots():
        run = next_run()
        if run is None:
            break
        started += claim(run, slot)
    return started


def free_slots() -> QuerySet[Slot]:
    """Enabled slots with a device, without an active run, on hosts that are heard of."""
    heard = timezone.now() - SILENT_AFTER
    busy = Run.objects.filter(status__in=ACTIVE).values("slot")
    return (
        Slot.objects.filter(is_enabled=True, host__heartbeat_at__gte=heard, devices__isnull=False)
        .exclude(pk__in=busy)
        .distinct()
        .order_by("pk")
    )


def next_run() -> Run | None:
    waiting: QuerySet[Run] = Run.objects.filter(status=Status.QUEUED, held_at__isnull=True)
    return waiting.order_by("queued_at", "pk").first()


def claim(run: Run, slot: Slot) -> bool:
    """Make `run` start on `slot`, or leave everything as it is when somebody else was first."""
    log_offset = logfile.size(run.log_path)
    try:
        with transaction.atomic():
            won = change_status(run, old=Status.QUEUED, new=Status.STARTING, slot=slot, message=f"Starts on {slot}.")
            if not won:
                return False
            attempt = Attempt.objects.create(
                run=run, number=run.attempt, slot=slot, log_offset=log_offset, enqueued_at=timezone.now()
            )
            transaction.on_commit(lambda: hand_out(attempt))
    except IntegrityError:
        return False
    return True


def hand_out(attempt: Attempt) -> None:
    """Give the next slice of supervision to a worker of the slot's host."""
    async_task("runs.tasks.supervise", attempt.pk, cluster=attempt.slot.host.name)
