"""Configurations of trainers as text: what a run would be elsewhere, and what people bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets.selectors import version_files
from lorapilot.errors import UserError
from models_registry.models import BaseModel
from models_registry.selectors import absolute_path, component_paths, find_by_path
from runs import memory_ladder
from runs.enums import DeviceKind
from runs.models import Run, outputs_of
from runs.spec import RunSpec
from runs.stacks import get_stack
from runs.stacks.base import Stack, TrainingJob, TrainingPicture


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


def read_configuration(stack_key: str, text: str) -> Brought:
    """What it says of the settings, the trainer's own options and the base model; and what was left out.

    Raises UserError with the line, or the field.
    """
    imported = get_stack(stack_key).read_config(text)
    notes = list(imported.notes)
    base_model = find_by_path(imported.model) if imported.model else None
    if imported.model and base_model is None:
        notes.append(f"It names the base model {imported.model}, which is not registered here: choose one.")
    return Brought(imported.values, imported.options, base_model, notes)
