"""Draws lost thumbnails in the background, so that a page of pictures need not wait for each of them.

An import draws them as it stores the pictures; they are lost with the cache folder, or when its disk was full. The job
is safe to start over: what is drawn stays drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from datasets.models import Picture
from datasets.pictures import ensure_thumbnail, picture_path, thumbnail_path
from lorapilot import jobs
from lorapilot.models import JOB_ENDED, Job

log = logging.getLogger(__name__)


@jobs.job
def draw_thumbnails(progress: jobs.Progress, *, dataset_id: int) -> dict[str, Any]:
    """Draw what is missing of a dataset's thumbnails. A picture that cannot be drawn is left out."""
    rows = list(Picture.objects.filter(dataset=dataset_id).order_by("pk").values_list("sha256", "extension"))
    drawn = 0
    for done, (sha256, extension) in enumerate(rows):
        progress(done, len(rows), "Drawing thumbnails")
        if _is_lost(sha256, extension):
            try:
                ensure_thumbnail(sha256, extension)
                drawn += 1
            except Exception:
                log.exception("no thumbnail of the picture %s", sha256)
    return {"drawn": drawn}


KIND = f"{draw_thumbnails.__module__}.{draw_thumbnails.__qualname__}"


def draw_lost_thumbnails(shown: Iterable[Picture]) -> None:
    """Queue the job for the dataset of these pictures when thumbnails of them are missing, and it is not queued yet."""
    lost = next((picture for picture in shown if _is_lost(picture.sha256, picture.extension)), None)
    if lost is None:
        return
    arguments = {"dataset_id": lost.dataset_id}
    if not Job.objects.filter(kind=KIND, arguments=arguments).exclude(status__in=JOB_ENDED).exists():
        jobs.enqueue(draw_thumbnails, label="Draw thumbnails", owner=lost.dataset.owner, **arguments)


def _is_lost(sha256: str, extension: str) -> bool:
    return not thumbnail_path(sha256).exists() and picture_path(sha256, extension).exists()
