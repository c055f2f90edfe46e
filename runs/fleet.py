"""What staff do to hosts, and what reconcile notices about them: maintenance, silence, the end of a machine.

A silent host may still be training, so nothing is taken from it until somebody says that it is dead, or it comes back
with another boot id. From then on results of its attempts are refused, and its runners end by themselves.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from django.db import transaction
from django.db.models import F, Q
from django.db.models.functions import Coalesce, Now
from django.utils import timezone

from lorapilot.clock import is_stale
from lorapilot.errors import Conflict
from lorapilot.models import User
from runs import services, wakeup
from runs.dispatch import dispatch
from runs.enums import ACTIVE, Ending, Status, StopIntent
from runs.hosts import SILENT_AFTER
from runs.models import Attempt, Host, Run, RunEvent, Slot

STAFF_ONLY = "Only staff can change hosts and their slots. Ask whoever runs this installation."
SILENT = (
    "Nothing is heard of {host}. The run may still be training there; it is followed again as soon as the host is back."
)


def drain_host(host: Host, *, actor: User, move_runs: bool = False) -> Host:
    """Let a host take no more runs; with `move_runs` its runs save and go back to the queue, else they end there."""
    Host.objects.filter(pk=host.pk, draining_at=None).update(draining_at=Now())
    if move_runs:
        for run in Run.objects.filter(slot__host=host, status__in=[Status.RUNNING, Status.STARTING]):
            message = f"{host} is taken out for maintenance: it saves, and goes on elsewhere."
            with suppress(Conflict):  # it has just ended
                services.ask_to_stop(run, intent=StopIntent.MOVE, actor=actor, message=message)
    host.refresh_from_db()
    return host


def undrain_host(host: Host) -> Host:
    """End the maintenance: the host takes runs again."""
    Host.objects.filter(pk=host.pk).update(draining_at=None)
    dispatch()
    host.refresh_from_db()
    return host


def declare_dead(host: Host, *, actor: User) -> list[Run]:
    """Take all runs from a host that does not come back; they go on elsewhere from their newest state.

    Returns those runs. Raises Conflict for a host that is heard of: it would train them twice.
    """
    silent = Host.objects.filter(pk=host.pk).filter(is_stale("heartbeat_at", SILENT_AFTER))
    if not silent.update(dead_at=Now(), lost_at=Coalesce("lost_at", Now())):
        raise Conflict(f"{host} is heard of. Drain it instead, or stop its worker and wait half a minute.")
    open_attempts = Attempt.objects.filter(slot__host=host, ended_at=None).select_related("run", "slot__host")
    moved = [
        attempt.run for attempt in open_attempts if _take_away(attempt, actor, services.newest_state_step(attempt.run))
    ]
    dispatch()
    host.refresh_from_db()
    return moved


@transaction.atomic
def _take_away(attempt: Attempt, actor: User, saved_step: int) -> bool:
    open_ = Attempt.objects.filter(pk=attempt.pk, ended_at=None)
    if not open_.update(ended_at=timezone.now(), ending=Ending.MOVED, lease=None, lease_at=None):
        return False
    run = Run.objects.get(pk=attempt.run_id)
    host = f"{attempt.slot.host} was declared dead"
    if run.status == Status.STOPPING and run.stop_intent == StopIntent.STOP:
        return services.end(run, Status.STOPPED, reason=f"{host} before it could save.", actor=actor)
    return services.requeue(
        run,
        old=Status(run.status),
        actor=actor,
        message=f"{host}. {services.where_it_goes_on(saved_step)}",
        held_at=timezone.now() if run.stop_intent == StopIntent.PAUSE else None,
    )


def set_slot_enabled(slot: Slot, *, is_enabled: bool) -> Slot:
    """A disabled slot finishes its run and takes no other."""
    Slot.objects.filter(pk=slot.pk).update(is_enabled=is_enabled)
    if is_enabled:
        dispatch()
    slot.refresh_from_db()
    return slot


def mark_silent_hosts() -> int:
    """Mark hosts that nothing is heard of, and say so on the pages of their runs. Returns how many."""
    marked = 0
    for host in Host.objects.filter(lost_at=None).filter(is_stale("heartbeat_at", SILENT_AFTER)):
        silent = Host.objects.filter(pk=host.pk, lost_at=None).filter(is_stale("heartbeat_at", SILENT_AFTER))
        if silent.update(lost_at=Now()):
            marked += 1
            _tell_runs(host, SILENT.format(host=host))
    return marked


def is_missed(host_name: str) -> bool:
    """Whether it was marked lost, or declared dead."""
    return Host.objects.filter(Q(lost_at__isnull=False) | Q(dead_at__isnull=False), name=host_name).exists()


def welcome_back(host_name: str) -> None:
    """A host that was missed takes part again. Before, `hosts.end_orphans` has ended what it should not train."""
    host = Host.objects.get(name=host_name)
    Host.objects.filter(pk=host.pk).update(lost_at=None, dead_at=None)
    _tell_runs(host, f"{host} is heard of again.")


def _tell_runs(host: Host, message: str) -> None:
    for run in Run.objects.filter(slot__host=host, status__in=ACTIVE):
        RunEvent.objects.create(run=run, attempt=run.attempt, message=message)
        Run.objects.filter(pk=run.pk).update(revision=F("revision") + 1)
        transaction.on_commit(partial(wakeup.wake, run.pk))
