"""Configurations of trainers as text: what a run would be elsewhere, and what people bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets.selectors import version_files
from lorapilot.errors import UserError
from models_registry.models import BaseModel
from models_registry.selectors import absolute_path, component_paths, find_by_path
from runs import memory_ladder, profiles
from runs.enums import DeviceKind
from runs.models import Run, outputs_of
from runs.spec import DEFAULTS, RunSpec
from runs.stacks import get_stack
from runs.stacks.base import Imported, Stack, TrainingJob, TrainingPicture


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a stack writes for its trainer. `text` is what a person would call the configuration."""

    stack: Stack
    filename: str
    text: str
    lost: list[str]  # what the trainer has nothing for
    refusal: str = ""  # why it cannot train this base model; then there is no text


def configuration_of(run: Run, stack_key: str) -> Configuration:
    """`run` as `stack_key` would be told to train it."""
    stack = get_stack(stack_key)
    spec = memory_ladder.effective(run.spec, run.adaptations)
    own = run.options if stack_key == run.stack else {}
    pictures = [TrainingPicture(**picture) for picture in version_files(run.dataset_version)]
    found = configuration(stack, run.trained_model, spec, options=own, name=run.output_name, pictures=pictures)
    found.lost.extend(lost_options(run, stack))
    return found


def lost_options(run: Run, stack: Stack) -> list[str]:
    """Options of the run's own trainer mean nothing to another one."""
    if stack.key == run.stack:
        return []
    return [f"{key} of {get_stack(run.stack).name} has no counterpart in {stack.name}." for key in run.options]


def configuration(
    stack: Stack,
    base_model: BaseModel,
    spec: RunSpec,
    *,
    options: Mapping[str, Any],
    name: str,
    pictures: Sequence[TrainingPicture],
) -> Configuration:
    """What `stack` would write for a run called `name`."""
    from runs.planning import model_facts  # it builds on the stacks, too

    filename = f"{name}.toml"
    if refused := stack.refusal(model_facts(base_model)):
        return Configuration(stack, filename, "", [], refused)
    folder = outputs_of(stack.key) / name
    plan = stack.compile(
        TrainingJob(
            name=name,
            folder=folder,
            attempt_folder=folder / "_attempts" / "1",
            spec=spec,
            base_model=absolute_path(base_model),
            architecture=base_model.architecture,
            layout=base_model.layout,
            prediction_type=base_model.prediction_type,
            parts={str(role): path for role, path in component_paths(base_model).items()},
            options=options,
            pictures=pictures,
            device=DeviceKind.CUDA,
        )
    )
    if plan.config is None:
        raise UserError(f"{stack.name} has no configuration that could be shown.")
    return Configuration(stack, plan.config.name, str(plan.files[plan.config]), list(plan.not_expressed))


@dataclass(frozen=True, slots=True)
class Brought:
    """A configuration that somebody brought along."""

    values: dict[str, Any]
    options: dict[str, Any]
    base_model: BaseModel | None
    notes: list[str] = field(default_factory=list)


def read_configuration(stack_key: str, text: str, pictures: Sequence[Mapping[str, Any]] = ()) -> Brought:
    """What it says of the settings, the trainer's own options and the base model; and what was left out. `pictures`: of
    the dataset, by which epochs become steps.

    Raises UserError with the line, or the field.
    """
    imported = get_stack(stack_key).read_config(text)
    length, told = _length(imported, pictures)
    notes = [*imported.notes, *told]
    base_model = find_by_path(imported.model) if imported.model else None
    if imported.model and base_model is None:
        notes.append(f"It names the base model {imported.model}, which is not registered here: choose one.")
    return Brought(imported.values | length, imported.options, base_model, notes)


def _length(imported: Imported, pictures: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Epochs and a share of warm-up as steps; and what to say about them."""
    given = DEFAULTS | imported.values
    found: dict[str, Any] = {}
    told: list[str] = []
    if imported.epochs and pictures:
        steps = imported.epochs * profiles.updates_per_epoch(
            sum(int(picture["repeats"]) for picture in pictures),
            repeats=given["repeats"],
            batch_size=given["batch_size"],
            gradient_accumulation_steps=given["gradient_accumulation_steps"],
        )
        found["steps"] = min(steps, imported.values.get("steps", steps))
        told.append(f"Its {imported.epochs} epochs are {steps:,} steps with this dataset.")
    elif imported.epochs:
        told.append(f"Its {imported.epochs} epochs are left out: choose the dataset and read it again, or set Steps.")
    if imported.warmup_share and "steps" in found | imported.values:
        found["warmup_steps"] = int(imported.warmup_share * (found | imported.values)["steps"])
    elif imported.warmup_share:
        told.append(f"Its warm-up of {imported.warmup_share:.0%} of the steps is left out: set Warm-up steps.")
    return found, told
