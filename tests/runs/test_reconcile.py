"""What reconcile does beside runs: files that nobody needs go away, but not every five seconds."""

import os
import time

from datasets import services
from runs.reconcile import CLEAN_UP_SECONDS, clean_up_hourly
from tests.factories import make_dataset


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
