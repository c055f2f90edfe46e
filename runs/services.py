"""Everything that a person, a script or the admin can do to runs. Pages, API, admin and commands only call these.

Submitting, stopping, resuming and retrying are safe to repeat and to race: each is one conditional UPDATE.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from datasets.models import Dataset, DatasetVersion
from datasets.services import pin_version
from lorapilot import workspace
from lorapilot.errors import Conflict, UserError
from lorapilot.models import User
from models_registry.models import BaseModel
from models_registry.selectors import missing_files
from runs import profiles, wakeup
from runs.dispatch import dispatch
from runs.enums import ACTIVE, TERMINAL, DeviceKind, Profile, Status
from runs.models import Run, RunEvent
from runs.selectors import best_device
from runs.spec import RunSpec
from runs.stacks import get_stack
from runs.transitions import change_status

DEFAULT_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What a submission would train: shown before the start, then stored with the run."""

    spec: RunSpec
    images: int
    updates_per_epoch: int
    device: DeviceKind
    notes: list[str] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        return self.spec.steps / self.updates_per_epoch


def plan_run(
    *,
    pictures: list[dict[str, Any]],
    base_model: BaseModel,
    profile: str,
    values: dict[str, Any],
    stack: str = "builtin",
) -> Plan:
    """The RunSpec that a profile (or none) and the user's own `values` make. Raises UserError for what cannot be."""
    trainer = get_stack(stack)
    if missing := trainer.check():
        raise UserError(missing, field="stack")
    if base_model.architecture not in trainer.architectures:
        raise UserError(
            f"{trainer.name} cannot train {base_model.name}: it is {base_model.get_architecture_display()}. "
            f"Choose a model that is {' or '.join(sorted(trainer.architectures))}.",
            field="base_model",
        )
    if base_model.layout not in trainer.layouts:
        raise UserError(
            f"{trainer.name} cannot train {base_model.name}: it reads diffusers folders, not single files. "
            "Choose a model that is a folder.",
            field="base_model",
        )
    if not pictures:
        raise UserError("This dataset has no pictures yet: add some first.", field="dataset")
    device = best_device()
    filled = _fill(profile, images=len(pictures), base_model=base_model, device=device)
    prompts = {"sample_prompts": values.get("sample_prompts") or default_prompts(pictures)}
    spec = RunSpec.from_values(filled.values | values | prompts)
    trainer.check_spec(spec)
    repeated = sum(int(picture["repeats"]) for picture in pictures) * spec.repeats
    return Plan(
        spec=spec,
        images=len(pictures),
        updates_per_epoch=profiles.updates_per_epoch(
            repeated,
            repeats=1,
            batch_size=spec.batch_size,
            gradient_accumulation_steps=spec.gradient_accumulation_steps,
        ),
        device=device,
        notes=filled.notes,
    )


def _fill(profile: str, *, images: int, base_model: BaseModel, device: DeviceKind) -> profiles.Filled:
    if not profile:
        precision = "fp32" if device == DeviceKind.CPU else "bf16"
        return profiles.Filled({"resolution": base_model.resolution, "precision": precision})
    if profile not in Profile.values:
        raise UserError(
            f"There is no profile {profile!r}. Choose one of: {', '.join(Profile.values)}, or none.", field="profile"
        )
    return profiles.fill(
        Profile(profile), images=images, resolution=base_model.resolution, device=device, model_name=base_model.name
    )


def default_prompts(pictures: list[dict[str, Any]]) -> list[str]:
    """The first different captions: what a person would try first."""
    captions = dict.fromkeys(picture["caption"].strip() for picture in pictures)
    return [caption for caption in captions if caption][:DEFAULT_PROMPTS]


def submit_run(
    owner: User,
    *,
    dataset: Dataset,
    base_model: BaseModel,
    output_name: str,
    profile: str = "",
    values: dict[str, Any] | None = None,
    stack: str = "builtin",
    retry_of: Run | None = None,
) -> Run:
    """Queue a run on the dataset as it is now; it starts as soon as a slot is free."""
    version = pin_version(dataset)
    return _submit(
        owner,
        version=version,
        base_model=base_model,
        output_name=output_name,
        profile=profile,
        values=values or {},
        stack=stack,
        retry_of=retry_of,
    )


def _submit(
    owner: User,
    *,
    version: DatasetVersion,
    base_model: BaseModel,
    output_name: str,
    profile: str,
    values: dict[str, Any],
    stack: str,
    retry_of: Run | None,
) -> Run:
    check_output_name(output_name)
    if missing := missing_files(base_model):
        raise UserError(f"{base_model.name} cannot be trained on: {' '.join(missing)}", field="base_model")
    plan = plan_run(pictures=version.pictures, base_model=base_model, profile=profile, values=values, stack=stack)
    try:
        with transaction.atomic():
            run = Run.objects.create(
                owner=owner,
                output_name=output_name,
                stack=stack,
                profile=profile,
                spec=plan.spec.as_values(),
                notes=plan.notes,
                dataset_version=version,
                base_model=base_model,
                retry_of=retry_of,
                total_steps=plan.spec.steps,
                queued_at=timezone.now(),
            )
            RunEvent.objects.create(run=run, attempt=1, new_status=Status.QUEUED, actor=owner, message="Submitted.")
            transaction.on_commit(dispatch)
    except IntegrityError:
        raise _name_taken(output_name) from None
    return run


def check_output_name(name: str) -> None:
    """Raises unless `name` can be the folder and file name of a new result. Nothing is ever overwritten."""
    if not workspace.is_safe_name(name):
        raise UserError(
            "Use letters, digits, '.', '_' and '-' only, at most 100 of them, and start with a letter or digit.",
            field="output_name",
        )
    taken = {entry.name.lower() for entry in workspace.outputs().iterdir()}
    if name.lower() in taken or Run.objects.filter(output_name__iexact=name).exists():
        raise _name_taken(name)


def _name_taken(name: str) -> Conflict:
    return Conflict(
        f"There is a result called {name!r} already. Choose another name: nothing is overwritten.", field="output_name"
    )


def stop_run(run: Run, *, actor: User) -> Run:
    """Ask a run to stop. A waiting run is stopped at once; an active one saves first. Repeating it changes nothing."""
    if change_status(
        run, old=Status.QUEUED, new=Status.STOPPED, actor=actor, message="Stopped while waiting.", held_at=None
    ):
        return run
    request = {"stop_requested_at": timezone.now(), "stop_requested_by": actor}
    for old in (Status.RUNNING, Status.STARTING):
        run.refresh_from_db()
        if change_status(run, old=old, new=Status.STOPPING, actor=actor, message="Asked to stop.", **request):
            return run
    run.refresh_from_db()
    if run.status != Status.STOPPING:
        raise Conflict(f"{run.output_name} is not running: it is {run.get_status_display().lower()}.")
    return run


def resume_run(run: Run, *, actor: User) -> Run:
    """Queue a stopped or failed run again; it goes on from its newest saved state, or from the start without one."""
    if missing := missing_files(run.base_model):
        raise UserError(f"{run.base_model.name} cannot be trained on: {' '.join(missing)}")
    message = f"Goes on from step {newest_state_step(run)}." if newest_state_step(run) else "Starts again from step 0."
    for old in (Status.STOPPED, Status.FAILED, Status.ERRORED):
        with transaction.atomic():
            if requeue(run, old=old, actor=actor, message=message):
                transaction.on_commit(dispatch)
                return run
    run.refresh_from_db()
    raise Conflict(f"{run.output_name} cannot be resumed: it is {run.get_status_display().lower()}.")


def requeue(run: Run, *, old: Status, actor: User | None, message: str, **values: Any) -> bool:
    """Back to the queue as a new attempt: an attempt runs once."""
    return change_status(
        run,
        old=old,
        new=Status.QUEUED,
        actor=actor,
        message=message,
        attempt=run.attempt + 1,
        queued_at=timezone.now(),
        reason="",
        exit_code=None,
        **values,
    )


def newest_state_step(run: Run) -> int:
    """The step that a resume goes on from; 0 without a state on disk."""
    state = newest_state(run)
    return state[1] if state else 0


def newest_state(run: Run) -> tuple[Path, int] | None:
    """Folder and step of the newest saved state that is still on disk."""
    for state in run.states.order_by("-step"):
        folder = workspace.inside(run.folder, state.path)
        if folder.is_dir():
            return folder, state.step
    return None


def retry_run(run: Run, *, actor: User, output_name: str = "") -> Run:
    """A new run with the same settings, base model and dataset version, under a name of its own."""
    return _submit(
        actor,
        version=run.dataset_version,
        base_model=run.base_model,
        output_name=output_name or free_name(run.output_name),
        profile=run.profile,
        values=run.spec,
        stack=run.stack,
        retry_of=run,
    )


def free_name(name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that no result has."""
    taken = {entry.name.lower() for entry in workspace.outputs().iterdir()}
    taken |= {found.lower() for found in Run.objects.values_list("output_name", flat=True)}
    number, candidate = 2, name
    while candidate.lower() in taken:
        candidate = f"{name[:95]}-{number}"
        number += 1
    return candidate


def hold_run(run: Run, *, actor: User) -> Run:
    """Keep a waiting run from starting."""
    return _set_held(run, held=True, actor=actor)


def release_run(run: Run, *, actor: User) -> Run:
    """Let a held run start again."""
    return _set_held(run, held=False, actor=actor)


@transaction.atomic
def _set_held(run: Run, *, held: bool, actor: User) -> Run:
    waiting = Run.objects.filter(pk=run.pk, status=Status.QUEUED)
    if not waiting.update(held_at=timezone.now() if held else None, revision=F("revision") + 1):
        raise Conflict(f"{run.output_name} is not waiting in the queue.")
    message = "Held: it does not start until it is released." if held else "Released."
    RunEvent.objects.create(run=run, attempt=run.attempt, actor=actor, message=message)
    run.refresh_from_db()
    transaction.on_commit(lambda: wakeup.wake(run.pk))
    if not held:
        transaction.on_commit(dispatch)
    return run


def delete_run(run: Run) -> None:
    """Delete an ended run with its files. The caller has asked the user."""
    folder = workspace.inside(workspace.outputs(), run.output_name)
    if run.is_active or not Run.objects.filter(pk=run.pk, status__in=[*TERMINAL, Status.QUEUED]).exists():
        raise Conflict(f"{run.output_name} is running: stop it first.")
    with transaction.atomic():
        gone = Run.objects.filter(pk=run.pk).exclude(status__in=ACTIVE)
        if not gone.exists():
            raise Conflict(f"{run.output_name} has just started: stop it first.")
        gone.delete()
    shutil.rmtree(folder, ignore_errors=True)


@transaction.atomic
def share_run(run: Run, *, groups: Iterable[Group]) -> Run:
    """Let the members of these groups, and of no others, look at the run."""
    run.groups.set(groups)
    return run
