"""Which queued run gets which free slot: in the order of runs/waiting.py, each to the first slot that suits it.

Safe to call at any time in any process: a slot is claimed by a conditional UPDATE under the database's partial unique
constraint, so of many callers one wins and the others go on to the next slot.
"""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.db.models import QuerySet
from django.db.models.functions import Now
from django.utils import timezone
from django_q.tasks import async_task

from lorapilot.clock import ago
from runs import disk, logfile, waiting
from runs.enums import ACTIVE, Status
from runs.hosts import SILENT_AFTER
from runs.models import Attempt, Run, Slot
from runs.transitions import change_status

MOST_LOST_RACES = 3


def dispatch() -> int:
    """Give free slots to waiting runs; returns how many runs were started."""
    started = lost = 0
    while lost < MOST_LOST_RACES and (pair := _next_pair()) is not None:
        if claim(*pair):
            started += 1
        else:
            lost += 1  # somebody else was first, and goes on, too
    return started


def _next_pair() -> tuple[Run, Slot] | None:
    """The first waiting run that can start now, and where."""
    free = waiting.places(free_slots())
    if not free:
        return None
    now = timezone.now()
    for run in waiting.queue_in_order():
        place = next((place for place in free if place.suits(run)), None)
        if place is not None and not waiting.is_paused(run, now) and not disk.lack_of_space(run):
            return run, place.slot
    return None


def free_slots() -> QuerySet[Slot]:
    """Enabled slots without an active run, on hosts that are heard of and take runs."""
    busy = Run.objects.filter(status__in=ACTIVE).values("slot")
    hosts = {"host__draining_at": None, "host__dead_at": None, "host__heartbeat_at__gte": ago(SILENT_AFTER)}
    slots: QuerySet[Slot] = Slot.objects.filter(is_enabled=True, **hosts).exclude(pk__in=busy)
    return slots.select_related("host").prefetch_related("devices").order_by("pk")


def claim(run: Run, slot: Slot) -> bool:
    """Make `run` start on `slot`, or leave everything as it is when somebody else was first."""
    log_offset = logfile.size(run.log_path)
    try:
        with transaction.atomic():
            won = change_status(
                run, old=Status.QUEUED, new=Status.STARTING, slot=slot, not_before=None, message=f"Starts on {slot}."
            )
            if not won:
                return False
            attempt = Attempt.objects.create(
                run=run, number=run.attempt, slot=slot, log_offset=log_offset, enqueued_at=Now()
            )
            transaction.on_commit(lambda: hand_out(attempt))
    except IntegrityError:
        return False
    return True


def hand_out(attempt: Attempt) -> None:
    """Give the next slice of supervision to a worker of the slot's host."""
    async_task("runs.tasks.supervise", attempt.pk, cluster=attempt.slot.host.name)
