"""Automatic captions as their pages and their API see them: asked of a provider by a job, or made on a device by a run.

The proposals and their review are the datasets' (datasets/captioning); what needs the queue is here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.text import slugify

from datasets.caption_edits import lock_dataset
from datasets.captioning import services
from datasets.captioning.enums import REMOTE, Captioner, Proposal
from datasets.captioning.selectors import has_job
from datasets.captioning.services import Order, checked_captioner
from datasets.models import Captioning, Dataset
from datasets.services import pin_version
from lorapilot import workspace
from lorapilot.errors import Conflict, UserError
from lorapilot.models import JobStatus, User
from runs.dispatch import dispatch
from runs.enums import Priority, Status
from runs.models import CAPTIONER, Run, RunEvent
from runs.selectors import best_device
from runs.services import free_name, place_at, resume_run, stop_run

BYTES_A_PICTURE = 4096  # an event, a line of the log
DEEPEST = 3  # folders below the models folder
FILES: dict[Captioner, tuple[str, ...]] = {
    Captioner.TAGGER: ("model.onnx", "selected_tags.csv"),
    Captioner.SENTENCES: ("config.json", "preprocessor_config.json", "tokenizer_config.json"),
}
SENTENCE_MODELS = {"blip"}


# --- Models on this installation --------------------------------------------------------------------------------------
def local_models(captioner: Captioner) -> list[str]:
    """Folders below the models folder that hold a model of this captioner, by their paths there."""
    root = workspace.models()
    first = FILES[captioner][0]
    found = {path.parent for depth in range(1, DEEPEST + 1) for path in root.glob(f"{'*/' * depth}{first}")}
    return sorted(folder.relative_to(root).as_posix() for folder in found if _is_model(captioner, folder))


def _is_model(captioner: Captioner, folder: Path) -> bool:
    if not all((folder / name).is_file() for name in FILES[captioner]):
        return False
    return captioner == Captioner.TAGGER or _model_type(folder) in SENTENCE_MODELS


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""


def check_local_model(captioner: Captioner, name: str) -> None:
    """Raises UserError unless `name` is a folder below the models folder that holds such a model."""
    try:
        folder = workspace.inside(workspace.models(), name)
    except (ValueError, OSError):
        folder = None
    if not name.strip() or folder is None or not _is_model(captioner, folder):
        wanted = ", ".join(FILES[captioner])
        kind = "" if captioner == Captioner.TAGGER else f" of the kind {' or '.join(sorted(SENTENCE_MODELS))}"
        raise UserError(f"There is no such model{kind} below the models folder: it needs {wanted}.", field="model")


# --- Orders -----------------------------------------------------------------------------------------------------------
def start(user: User, dataset: Dataset, order: Order) -> Captioning:
    """Begin to caption, in the background or in the queue. Raises UserError."""
    captioner = checked_captioner(order.captioner)
    if captioner in REMOTE:
        return services.start_remote(user, dataset, order)
    check_local_model(captioner, order.model)
    with transaction.atomic():
        captioning = services.create_captioning(user, dataset, order)
        _queue(captioning)
    return captioning


def _queue(captioning: Captioning) -> Run:
    """A new run for what waits."""
    now = timezone.now()
    waiting = captioning.proposals.filter(state=Proposal.WAITING).count()
    name = free_name(f"captions-{slugify(captioning.dataset.name)[:80]}".rstrip("-"))
    version = pin_version(captioning.dataset)
    try:
        with transaction.atomic():
            run = Run.objects.create(
                owner=captioning.owner,
                output_name=name,
                stack=CAPTIONER,
                spec={},
                options={"captioner": captioning.captioner, "model": captioning.model} | captioning.options,
                dataset_version=version,
                captioning=captioning,
                device=best_device(),
                needed_bytes=waiting * BYTES_A_PICTURE,
                total_steps=waiting,
                priority=Priority.NORMAL,
                queued_at=now,
                place=place_at(now),
            )
    except IntegrityError:
        raise Conflict(f"Somebody has just begun another run called {name}. Try again.") from None
    RunEvent.objects.create(
        run=run, attempt=1, new_status=Status.QUEUED, actor=captioning.owner, message=f"Captions {waiting} pictures."
    )
    transaction.on_commit(dispatch)
    return run


def go_on(captioning: Captioning, *, actor: User) -> None:
    """Do what still waits, and what failed, again. Raises Conflict while it is at work, or when nothing is left."""
    if captioning.is_remote:
        services.go_on(captioning)
        return
    run = newest_run(captioning)
    if run is not None and not run.is_terminal:
        raise Conflict("It is at work already.")
    with transaction.atomic():
        lock_dataset(captioning.dataset_id)
        services.try_failed_again(captioning)
        if run is None or run.status == Status.SUCCEEDED:
            _queue(captioning)
            return
        resume_run(run, actor=actor)


def cancel(captioning: Captioning, *, actor: User) -> None:
    """What has been proposed stays. Raises Conflict when it has ended."""
    if captioning.is_remote:
        services.cancel(captioning)
        return
    run = newest_run(captioning)
    if run is None or run.is_terminal:
        raise Conflict("It has ended already.")
    stop_run(run, actor=actor)


def newest_run(captioning: Captioning) -> Run | None:
    return next(iter(captioning.runs.all()), None)  # a list has read them for all its rows


@dataclass(frozen=True, slots=True)
class Activity:
    """How an order stands, whoever does it."""

    status: str  # as of a run: queued, running, succeeded, failed, stopped
    label: str
    is_active: bool
    message: str = ""
    run: Run | None = None


STATUS_OF_JOB = {JobStatus.CANCELLED: ("stopped", "Cancelled")}


def activity_of(captioning: Captioning) -> Activity:
    """For a page or the API; `captioning` has its job."""
    if not captioning.is_remote:
        run = newest_run(captioning)
        if run is None:
            return Activity("stopped", "Its run was deleted", is_active=False)
        return Activity(run.status, run.get_status_display(), not run.is_terminal, run.reason, run)
    job = captioning.job
    if job is None:
        return Activity("stopped", "Ended", is_active=False)
    if job.cancel_requested_at and has_job(captioning):
        return Activity("stopping", "Stopping", is_active=True)
    status, label = STATUS_OF_JOB.get(JobStatus(job.status), (job.status, job.get_status_display()))
    return Activity(status, label, has_job(captioning), job.message)


def as_json(captioning: Any) -> dict[str, Any]:
    """What of the activity the API shows."""
    activity = activity_of(captioning)
    return {
        "status": activity.status,
        "is_active": activity.is_active,
        "message": activity.message,
        "run": activity.run.pk if activity.run else None,
        "job": str(captioning.job_id) if captioning.job_id else None,
    }
