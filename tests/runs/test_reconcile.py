"""What reconcile does beside runs: files that nobody needs go away, but not every five seconds, and keep no run from
starting."""

import os
import time

import pytest
from django.conf import settings

from datasets import services
from runs.enums import Status
from runs.models import Host
from runs.reconcile import CLEAN_UP_SECONDS, clean_up_hourly, reconcile
from tests.factories import make_dataset, make_run, make_slot


def test_clean_up_happens_once_an_hour_and_takes_unused_pictures(workspace, alice):
    picture = make_dataset(alice, pictures=("red",)).pictures.get()
    file = services.picture_path(picture.sha256, picture.extension)
    services.delete_picture(picture)
    os.utime(file, (0, 0))
    assert clean_up_hourly() is True
    assert not file.exists()
    assert clean_up_hourly() is False
    long_ago = time.time() - CLEAN_UP_SECONDS - 1
    os.utime(workspace / "cache" / "cleaned-up", (long_ago, long_ago))
    assert clean_up_hourly() is True


def test_run_starts_although_tidying_up_fails(workspace, alice, handed_out, monkeypatch):
    def fail():
        raise PermissionError("cache/uploads")

    monkeypatch.setattr("runs.reconcile.remove_stale_uploads", fail)
    run = make_run(alice)
    slot = make_slot()
    Host.objects.update(name=settings.HOST_NAME)
    with pytest.raises(PermissionError):
        reconcile()
    run.refresh_from_db()
    assert (run.status, run.slot) == (Status.STARTING, slot)
