"""Everything that a person, a script or the admin can do to runs. Pages, API, admin and commands only call these.

Submitting, stopping, resuming and retrying are safe to repeat and to race: each is one conditional UPDATE.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from datasets.destruction import missing_pictures
from datasets.models import Dataset, DatasetVersion
from datasets.services import pin_version
from lorapilot import workspace
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.models import User
from models_registry.models import BaseModel
from models_registry.selectors import missing_files
from runs import library, memory_ladder, wakeup
from runs.configs import lost_options
from runs.dispatch import dispatch
from runs.enums import ACTIVE, TERMINAL, DeviceKind, Priority, Status, StopIntent
from runs.models import OWN_OUTPUTS, Run, RunEvent, outputs_of
from runs.planning import GUIDED, plan_run, variations, why_unavailable
from runs.stacks import get_stack
from runs.trainer_secrets import secret_environment
from runs.trainpilot import base_of
from runs.transitions import change_status


def submit_run(
    owner: User,
    *,
    dataset: Dataset | DatasetVersion,
    base_model: BaseModel,
    output_name: str,
    profile: str = "",
    values: dict[str, Any] | None = None,
    stack: str = "builtin",
    options: Mapping[str, Any] | None = None,
    priority: int = Priority.NORMAL,
    retry_of: Run | None = None,
) -> Run:
    """Queue a run on the dataset as it is now, or on a version of one; it starts as soon as a slot is free.

    `values`: of the RunSpec. `options`: of the stack's own option table.
    """
    order = Order(output_name, profile, values or {}, options or {})
    return _submit(owner, [order], source=Source(dataset, base_model, stack, retry_of), priority=priority)[0]


def submit_many(
    owner: User,
    *,
    dataset: Dataset | DatasetVersion,
    base_model: BaseModel,
    output_name: str,
    varied: Mapping[str, Sequence[Any]],
    profile: str = "",
    values: dict[str, Any] | None = None,
    stack: str = "builtin",
    options: Mapping[str, Any] | None = None,
    priority: int = Priority.NORMAL,
    retry_of: Run | None = None,
) -> list[Run]:
    """Queue a run for every combination of `varied`, all on the same dataset version; all of them or none.

    Each is named `output_name` with what is its own behind it, such as `cat-r16-lr0.0001`.
    """
    found = variations(profile, values or {}, varied)
    orders = [Order(f"{output_name}{one.suffix}", one.profile, one.values, options or {}) for one in found]
    return _submit(owner, orders, source=Source(dataset, base_model, stack, retry_of), priority=priority)


@dataclass(frozen=True, slots=True)
class Order:
    """One run of a submission."""

    output_name: str
    profile: str
    values: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Source:
    """What all runs of a submission train on, and with."""

    pictures: Dataset | DatasetVersion  # a dataset is pinned as it is now
    base_model: BaseModel
    stack: str
    retry_of: Run | None = None


def _submit(owner: User, orders: list[Order], *, source: Source, priority: int) -> list[Run]:
    """All of them or none: a refusal leaves no trace."""
    check_priority(priority, owner)
    if missing := missing_files(source.base_model):
        raise UserError(f"{source.base_model.name} cannot be trained on: {' '.join(missing)}", field="base_model")
    if isinstance(source.pictures, DatasetVersion):
        _check_pictures(source.pictures)
    for order in orders:
        check_output_name(order.output_name)
    with transaction.atomic():
        pictures = source.pictures
        version = pin_version(pictures) if isinstance(pictures, Dataset) else pictures
        runs = [_create(owner, order, version, source, priority) for order in orders]
        transaction.on_commit(dispatch)
    return runs


def _create(owner: User, order: Order, version: DatasetVersion, source: Source, priority: int) -> Run:
    plan = plan_run(
        pictures=version.pictures,
        base_model=source.base_model,
        profile=order.profile,
        values=order.values,
        stack=source.stack,
        options=order.options,
        base=base_of(owner) if order.profile else None,
        trigger_word=version.trigger_word,
    )
    secret_environment(owner, get_stack(source.stack), plan.options)  # the start needs them; it refuses what is missing
    now = timezone.now()
    facts = {"needed_bytes": plan.needed_bytes, "total_steps": plan.spec.steps, "device": plan.device}
    try:
        with transaction.atomic():
            run = Run.objects.create(
                owner=owner,
                output_name=order.output_name,
                stack=source.stack,
                profile=order.profile,
                spec=plan.spec.as_values(),
                options=plan.options,
                notes=[*plan.notes, *plan.not_expressed, *order.notes],
                dataset_version=version,
                base_model=source.base_model,
                retry_of=source.retry_of,
                priority=priority,
                queued_at=now,
                place=place_at(now),
                **facts,
            )
    except IntegrityError:
        raise _name_taken(order.output_name) from None
    RunEvent.objects.create(run=run, attempt=1, new_status=Status.QUEUED, actor=owner, message="Submitted.")
    return run


def place_at(moment: datetime) -> int:
    """The place in the queue of a run that came at `moment`."""
    return int(moment.timestamp() * 1_000_000)


def check_priority(priority: int, actor: User) -> None:
    """High priority passes by everybody else's runs, so staff give it."""
    if priority not in Priority.values:
        raise UserError("Priority is -1 (low), 0 (normal) or 1 (high).", field="priority")
    if priority > Priority.NORMAL and not actor.is_staff:
        raise NotAllowed("High priority passes by the runs of others: ask staff for it.", field="priority")


def check_output_name(name: str) -> None:
    """Raises unless `name` can be the folder and file name of a new result. Nothing is ever overwritten."""
    if not workspace.is_safe_name(name):
        raise UserError(
            "Use letters, digits, '.', '_' and '-' only, at most 100 of them, and start with a letter or digit.",
            field="output_name",
        )
    if name.lower() in _folders_taken() or Run.objects.filter(output_name__iexact=name).exists():
        raise _name_taken(name)


def _folders_taken() -> set[str]:
    """Names of folders in the outputs, in small letters: of all stacks, and those that stacks keep for themselves."""
    roots = [workspace.outputs(), *(workspace.outputs() / folder for folder in OWN_OUTPUTS.values())]
    found = {entry.name.lower() for root in roots if root.is_dir() for entry in root.iterdir()}
    return found | set(OWN_OUTPUTS.values())


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
    return ask_to_stop(run, intent=StopIntent.STOP, actor=actor, message="Asked to stop.")


def pause_run(run: Run, *, actor: User) -> Run:
    """Let a run save and go back to the queue, where it is held until it is released."""
    run.refresh_from_db()
    if run.status == Status.QUEUED:
        return hold_run(run, actor=actor)
    return ask_to_stop(run, intent=StopIntent.PAUSE, actor=actor, message="Asked to pause.")


STRONGER = (StopIntent.MOVE, StopIntent.PAUSE, StopIntent.STOP)


def ask_to_stop(run: Run, *, intent: StopIntent, actor: User | None, message: str) -> Run:
    """Ask an active run to save and end; `intent` says what becomes of it then. The stronger intent wins: to stop,
    then to pause, then to move."""
    request = {"stop_requested_at": timezone.now(), "stop_requested_by": actor, "stop_intent": intent}
    for old in (Status.RUNNING, Status.STARTING, Status.RUNNING):  # it may just pass from one to the other
        run.refresh_from_db()
        if change_status(run, old=old, new=Status.STOPPING, actor=actor, message=message, **request):
            return run
    run.refresh_from_db()
    if run.status != Status.STOPPING:
        raise Conflict(f"{run.output_name} is not running: it is {run.get_status_display().lower()}.")
    if STRONGER.index(intent) > STRONGER.index(StopIntent(run.stop_intent)):
        _note(run, actor=actor, message=message, stop_intent=intent, stop_requested_by=actor)
    return run


def kill_run(run: Run, *, actor: User) -> Run:
    """End a run at once, without saving: for one that does not react. It can be resumed from its last saved state."""
    stop_run(run, actor=actor)
    if run.status == Status.STOPPING and run.kill_requested_at is None:
        _note(run, actor=actor, message="To be ended at once, without saving.", kill_requested_at=timezone.now())
    return run


@transaction.atomic
def _note(run: Run, *, actor: User | None, message: str, **values: Any) -> None:
    """Change what belongs to the current status, with a line in the history. Raises Conflict when it has changed."""
    unchanged = Run.objects.filter(pk=run.pk, status=run.status, attempt=run.attempt)
    if not unchanged.update(revision=F("revision") + 1, **values):
        raise Conflict(f"{run.output_name} has just changed: look again.")
    RunEvent.objects.create(run=run, attempt=run.attempt, actor=actor, message=message)
    run.refresh_from_db()
    transaction.on_commit(partial(wakeup.wake, run.pk))


def resume_run(run: Run, *, actor: User, less_memory: bool = False) -> Run:
    """Queue a stopped or failed run again; it goes on from its newest saved state, or from the start without one.

    `less_memory` takes the next step down the memory ladder first.
    """
    if run.base_model is not None and (missing := missing_files(run.base_model)):
        raise UserError(f"{run.base_model.name} cannot be trained on: {' '.join(missing)}")
    if unavailable := why_unavailable(get_stack(run.stack)):
        raise UserError(unavailable)
    _check_pictures(run.dataset_version)
    changes: dict[str, Any] = {"queued_at": timezone.now(), "place": place_at(timezone.now()), "held_at": None}
    message = where_it_goes_on(newest_state_step(run))
    if less_memory:
        spec = memory_ladder.effective(run.spec, run.adaptations)
        rung = memory_ladder.next_rung(spec, device_of(run), stack=run.stack) if run.trains else None
        if rung is None:
            raise Conflict("There is nothing left to save memory with. Use a smaller model or resolution in a new run.")
        changes["adaptations"] = run.adaptations | rung.changes
        message = f"{rung.sentence} {message}"
    for old in (Status.STOPPED, Status.FAILED, Status.ERRORED):
        with transaction.atomic():
            if requeue(run, old=old, actor=actor, message=message, **changes):
                transaction.on_commit(dispatch)
                return run
    run.refresh_from_db()
    raise Conflict(f"{run.output_name} cannot be resumed: it is {run.get_status_display().lower()}.")


def _check_pictures(version: DatasetVersion) -> None:
    """Raises UserError when pictures of the version were deleted for good."""
    if gone := missing_pictures(version):
        names = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
        raise UserError(
            f"{version} cannot be trained on again: {names} of it {'was' if len(gone) == 1 else 'were'} deleted for "
            "good. Start a new run on the dataset as it is now.",
            field="dataset",
        )


def requeue(run: Run, *, old: Status, actor: User | None, message: str, **values: Any) -> bool:
    """Back to the queue as a new attempt: an attempt runs once. It keeps its place unless `values` give another."""
    kept = {"reason": message, "exit_code": None} | values
    return change_status(run, old=old, new=Status.QUEUED, actor=actor, message=message, attempt=run.attempt + 1, **kept)


def end(run: Run, status: Status, *, reason: str = "", code: int | None = None, actor: User | None = None) -> bool:
    """Give an active run its last status. One that ends so quickly that it was never seen running takes two edges."""
    done = False
    for old, new in _path(Status(run.status), status):
        done = change_status(run, old=old, new=new, actor=actor, message=reason, reason=reason, exit_code=code)
    return done


def _path(old: Status, new: Status) -> list[tuple[Status, Status]]:
    if old == Status.STARTING and new == Status.SUCCEEDED:
        return [(old, Status.RUNNING), (Status.RUNNING, new)]
    if old in (Status.STARTING, Status.RUNNING) and new == Status.STOPPED:
        return [(old, Status.STOPPING), (Status.STOPPING, new)]
    return [(old, new)]


def device_of(run: Run) -> DeviceKind:
    """What its newest attempt trained on, or what it was planned for."""
    attempt = run.attempts.order_by("-number").first()
    device = attempt.slot.devices.first() if attempt else None
    return DeviceKind(device.kind if device else run.device)


def newest_state(run: Run) -> tuple[Path, int] | None:
    """Path and step of the newest complete state on the disk."""
    states = get_stack(run.stack).states(run.folder)
    return states[0] if states else None


def newest_state_step(run: Run) -> int:
    """The step that a resume goes on from; 0 without a state."""
    state = newest_state(run)
    return state[1] if state else 0


def where_it_goes_on(step: int) -> str:
    """In words; `step` is that of the newest state."""
    return f"It goes on from step {step}." if step else "It starts again from step 0."


def retry_run(
    run: Run, *, actor: User, output_name: str = "", stack: str = "", settings: Mapping[str, Any] | None = None
) -> Run:
    """A new run with the same base model, dataset version and settings, but for those in `settings`, under a name of
    its own.

    With another `stack`, what that trainer has nothing for is told in the new run's notes.
    """
    trainer = get_stack(stack or run.stack)
    profile = run.profile if trainer.key in GUIDED else ""
    options = run.options if trainer.key == run.stack else {}
    values = run.spec | run.adaptations | dict(settings or {})
    order = Order(output_name or free_name(run.output_name), profile, values, options)
    order.notes.extend(lost_options(run, trainer))
    source = Source(run.dataset_version, run.trained_model, trainer.key, retry_of=run)
    return _submit(actor, [order], source=source, priority=Priority.NORMAL)[0]


def free_name(name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that no result has."""
    taken = _folders_taken() | {found.lower() for found in Run.objects.values_list("output_name", flat=True)}
    number, candidate = 2, name
    while candidate.lower() in taken:
        candidate = f"{name[:95]}-{number}"
        number += 1
    return candidate


def hold_run(run: Run, *, actor: User) -> Run:
    """Keep a waiting run from starting. Repeating it changes nothing."""
    return _set_held(run, held=True, actor=actor)


def release_run(run: Run, *, actor: User) -> Run:
    """Let a held run start again."""
    return _set_held(run, held=False, actor=actor)


@transaction.atomic
def _set_held(run: Run, *, held: bool, actor: User) -> Run:
    run.refresh_from_db()
    if run.status != Status.QUEUED:
        raise Conflict(f"{run.output_name} is not waiting in the queue.")
    if held and run.held_at is not None:
        return run
    message = "Held: it does not start until it is released." if held else "Released."
    values = {"held_at": timezone.now()} if held else {"held_at": None, "not_before": None, "reason": ""}
    _note(run, actor=actor, message=message, **values)
    if not held:
        transaction.on_commit(dispatch)
    return run


def set_priority(run: Run, *, actor: User, priority: int) -> Run:
    """Before or after the runs of others."""
    check_priority(priority, actor)
    run.refresh_from_db()
    if run.status != Status.QUEUED:
        raise Conflict(f"{run.output_name} is not waiting in the queue.")
    _note(run, actor=actor, message=f"Priority: {Priority(priority).label.lower()}.", priority=priority)
    return run


@transaction.atomic
def reorder_run(run: Run, *, actor: User, to: str) -> Run:
    """Move a waiting run among its owner's own of the same priority: `up`, `down`, `first` or `last`.

    The places are only dealt out anew among these runs, so nobody else's run waits longer.
    """
    own = list(
        Run.objects.select_for_update()
        .filter(owner=run.owner_id, status=Status.QUEUED, priority=run.priority)
        .order_by("place", "pk")
    )
    if run not in own:
        raise Conflict(f"{run.output_name} is not waiting in the queue.")
    at = own.index(run)
    targets = {"up": max(0, at - 1), "down": at + 1, "first": 0, "last": len(own)}
    if to not in targets:
        raise UserError("Move it up, down, first or last.", field="to")
    places = [waiting.place for waiting in own]
    own.insert(targets[to], own.pop(at))
    if own.index(run) == at:
        return run
    for waiting, place in zip(own, places, strict=True):
        Run.objects.filter(pk=waiting.pk, status=Status.QUEUED).update(place=place, revision=F("revision") + 1)
    RunEvent.objects.create(run=run, attempt=run.attempt, actor=actor, message=f"Moved in the queue: {to}.")
    run.refresh_from_db()
    return run


def delete_run(run: Run) -> None:
    """Delete an ended run with its files. The caller has asked the user."""
    folder = workspace.inside(outputs_of(run.stack), run.output_name)
    if run.is_active or not Run.objects.filter(pk=run.pk, status__in=[*TERMINAL, Status.QUEUED]).exists():
        raise Conflict(f"{run.output_name} is running: stop it first.")
    with transaction.atomic():
        gone = Run.objects.select_for_update().filter(pk=run.pk).exclude(status__in=ACTIVE)
        if not list(gone):  # locked from here on: it does not start
            raise Conflict(f"{run.output_name} has just started: stop it first.")
        library.forget_run(run)
        gone.delete()
    shutil.rmtree(folder, ignore_errors=True)


@transaction.atomic
def share_run(run: Run, *, groups: Iterable[Group]) -> Run:
    """Let the members of these groups, and of no others, look at the run and at its LoRA."""
    before, after = set(run.groups.all()), set(groups)
    run.groups.set(after)
    library.share_along(run, before=before, after=after)
    return run
