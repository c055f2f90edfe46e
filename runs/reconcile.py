"""Makes the platform truthful again after anything was killed. `up` and `worker` call it at start and every 5 seconds.

Idempotent and safe in several processes at once: every step is a conditional UPDATE. django-q2 delivers work but is
never the clock: a slice that was lost with its worker is handed out again from here.
"""

from __future__ import annotations

import math
import time

from django.conf import settings
from django.db.models import Q
from django.db.models.functions import Now

from datasets.services import remove_stale_uploads, remove_unused_pictures
from lorapilot import workspace
from lorapilot.clock import ago, is_stale
from lorapilot.jobs import restart_silent_jobs
from models_registry import adapter_services
from runs import fleet, hosts, library
from runs.dispatch import dispatch, hand_out
from runs.models import Attempt
from runs.supervision.follow import LEASE_EXPIRES_AFTER

CLEAN_UP_SECONDS = 3600.0
LOOK_SECONDS = 30.0  # between looks for processes that nobody wants any more


class _LastLook:
    at = 0.0  # by the monotonic clock


_last_look = _LastLook()


def reconcile(*, is_host: bool = True, watched_seconds: float = math.inf) -> None:
    """One round. `is_host`: this machine trains. `watched_seconds`: for how long rounds have come without a gap;
    whoever could not reach the database for a while does not know who else could not."""
    if is_host:
        look_after_this_host()
    if watched_seconds > hosts.SILENT_AFTER.total_seconds():
        fleet.mark_silent_hosts()
    restart_silent_slices()
    restart_silent_jobs()
    dispatch()
    # Last, as files can fail: a folder that may not be read keeps no run from starting.
    library.catch_up()
    remove_stale_uploads()
    adapter_services.remove_stale_uploads()
    clean_up_hourly()


def look_after_this_host() -> None:
    """Its sign of life; and processes here whose attempt has ended elsewhere end before it takes runs again."""
    hosts.beat(settings.HOST_NAME)
    is_back = fleet.is_missed(settings.HOST_NAME)
    if is_back or time.monotonic() - _last_look.at > LOOK_SECONDS:
        _last_look.at = time.monotonic()
        hosts.end_orphans(settings.HOST_NAME)
    if is_back:
        fleet.welcome_back(settings.HOST_NAME)


def clean_up_hourly() -> bool:
    """What reads every version, and is not urgent. A file's age says when some host did it last."""
    stamp = workspace.cache() / "cleaned-up"
    if stamp.exists() and time.time() - stamp.stat().st_mtime < CLEAN_UP_SECONDS:
        return False
    stamp.touch()
    remove_unused_pictures()
    return True


def restart_silent_slices() -> int:
    """Hand out a slice for each attempt that nobody supervises. Returns how many."""
    unled, unsent = is_stale("lease_at", LEASE_EXPIRES_AFTER), is_stale("enqueued_at", LEASE_EXPIRES_AFTER)
    # A silent host's queue would only grow: it takes its runs up again when it is back.
    heard = Q(slot__host__heartbeat_at__gte=ago(hosts.SILENT_AFTER))
    lost = Attempt.objects.filter(unled, unsent, heard, ended_at__isnull=True)
    started = 0
    for attempt in lost.select_related("slot__host"):
        if Attempt.objects.filter(unled, unsent, pk=attempt.pk, ended_at__isnull=True).update(enqueued_at=Now()):
            hand_out(attempt)
            started += 1
    return started


def release_leases(host_name: str) -> int:
    """After a host's workers were restarted: their leases are void, and need not expire first. Returns how many."""
    held = Attempt.objects.filter(slot__host__name=host_name, ended_at__isnull=True)
    return held.update(lease=None, lease_at=None, enqueued_at=None)
