"""Tells followers in other processes that a run has news. Only a hint: without it a follower looks each second."""

from __future__ import annotations

import logging

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.conf import settings

log = logging.getLogger(__name__)


def group_name(run_id: int) -> str:
    return f"run-{run_id}"


def wake(run_id: int) -> None:
    """Never raises: a broker that is away must not stop a training run."""
    if not settings.REDIS_URL:
        return  # a layer in this process's memory reaches nobody
    try:
        async_to_sync(get_channel_layer().group_send)(group_name(run_id), {"type": "run.changed"})
    except Exception:  # noqa: BLE001 whatever the broker raises
        log.warning("could not wake the viewers of run %s", run_id)
