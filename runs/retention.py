"""Which checkpoints of a run are removed while it trains, by its settings `keep_last` and `keep_every_steps`.

Guarantee: the final one, the newest one and the one with the lowest validation loss always stay; so does every file
that the run does not know as its own checkpoint.
"""

from __future__ import annotations

import logging

from lorapilot import workspace
from runs.models import Checkpoint, Run

log = logging.getLogger(__name__)


def remove_surplus(run: Run) -> list[str]:
    """Remove what the settings do not keep. Returns the paths. No open transaction: files are deleted here."""
    removed = []
    for checkpoint in surplus(run):
        path = workspace.inside(run.folder, checkpoint.path)
        try:
            path.unlink(missing_ok=True)
        except OSError:
            log.warning("%s cannot be removed", path)
            continue
        checkpoint.delete()
        removed.append(checkpoint.path)
    return removed


def surplus(run: Run) -> list[Checkpoint]:
    """The checkpoints that are not kept, oldest first."""
    most, every = run.spec.get("keep_last", 0), run.spec.get("keep_every_steps", 0)
    if not most:
        return []
    saved = list(run.checkpoints.filter(is_final=False).order_by("step", "pk"))
    best = best_step(run)
    return [
        checkpoint
        for checkpoint in saved[:-most]
        if checkpoint.step != best and not (every and checkpoint.step % every == 0)
    ]


def best_step(run: Run) -> int | None:
    """The step with the lowest validation loss, of those that have a checkpoint; None without validation."""
    saved = run.checkpoints.values("step")
    best = run.validations.filter(loss__isnull=False, step__in=saved).order_by("loss", "step").first()
    return best.step if best else None
