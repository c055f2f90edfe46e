"""Makes the platform truthful again after anything was killed. `up` and `worker` call it at start and every 5 seconds.

Idempotent and safe in several processes at once: every step is a conditional UPDATE. django-q2 delivers work but is
never the clock: a slice that was lost with its worker is handed out again from here.
"""

from __future__ import annotations

import time

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from datasets.services import remove_stale_uploads, remove_unused_pictures
from lorapilot import workspace
from lorapilot.jobs import restart_silent_jobs
from runs import hosts
from runs.dispatch import dispatch, hand_out
from runs.models import Attempt
from runs.supervision.follow import LEASE_EXPIRES_AFTER

CLEAN_UP_SECONDS = 3600.0


def reconcile() -> None:
    hosts.beat(settings.HOST_NAME)
    restart_silent_slices()
    restart_silent_jobs()
    remove_stale_uploads()
    dispatch()
    clean_up_hourly()


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
    now = timezone.now()
    silent = now - LEASE_EXPIRES_AFTER
    unled = Q(lease_at__isnull=True) | Q(lease_at__lt=silent)
    unsent = Q(enqueued_at__isnull=True) | Q(enqueued_at__lt=silent)
    # A silent host's queue would only grow: it takes its runs up again when it is back.
    lost = Attempt.objects.filter(
        unled, unsent, ended_at__isnull=True, slot__host__heartbeat_at__gte=now - hosts.SILENT_AFTER
    )
    started = 0
    for attempt in lost.select_related("slot__host"):
        if Attempt.objects.filter(unled, unsent, pk=attempt.pk, ended_at__isnull=True).update(enqueued_at=now):
            hand_out(attempt)
            started += 1
    return started


def release_leases(host_name: str) -> int:
    """After a host's workers were restarted: their leases are void, and need not expire first. Returns how many."""
    held = Attempt.objects.filter(slot__host__name=host_name, ended_at__isnull=True)
    return held.update(lease=None, lease_at=None, enqueued_at=None)
