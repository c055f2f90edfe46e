"""What a submission would train: a profile and the user's own values in, a checked RunSpec with its figures out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.utils.text import get_text_list

from lorapilot.errors import Refusals, UserError
from models_registry.enums import describe_architecture
from models_registry.models import BaseModel
from models_registry.selectors import component_paths
from runs import disk, profiles
from runs.enums import DeviceKind, Profile
from runs.models import Host, Slot
from runs.selectors import best_device
from runs.spec import OPTIONS, RunSpec
from runs.stacks import get_stack
from runs.stacks.base import Imported, ModelFacts, Stack
from runs.stacks.option_table import check_options
from runs.waiting import has_trainer

DEFAULT_PROMPTS = 4
GUIDED = {"builtin", "kohya"}  # the stacks that TrainPilot's profiles are made for
MOST_VARIATIONS = 50
SHORT = {"profile": "", "rank": "r", "learning_rate": "lr", "seed": "s"}  # in names of variations


@dataclass(frozen=True, slots=True)
class Plan:
    """What a submission would train: shown before the start, then stored with the run."""

    spec: RunSpec
    images: int
    updates_per_epoch: int
    device: DeviceKind
    needed_bytes: int
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    not_expressed: list[str] = field(default_factory=list)  # settings that the trainer has nothing for

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
    options: Mapping[str, Any] | None = None,
    base: Imported | None = None,
    trigger_word: str = "",
) -> Plan:
    """The RunSpec that a profile (or none) and the user's own `values` make, and the stack's own `options`.

    `base`: the user's base configuration, which a profile fills up. `trigger_word`: of the dataset, which belongs into
    the sample prompts. Raises UserError for what cannot be.
    """
    trainer = get_stack(stack)
    if missing := why_unavailable(trainer):
        raise UserError(missing, field="stack")
    if refused := trainer.refusal(model_facts(base_model)):
        raise UserError(refused, field="base_model")
    if profile and stack not in GUIDED:
        names = get_text_list([get_stack(key).name for key in sorted(GUIDED)], "and")
        raise UserError(f"Profiles are for {names} only.", field="profile")
    if not pictures:
        raise UserError("This dataset has no pictures yet: add some first.", field="dataset")
    device = best_device()
    filled = _fill(profile, images=len(pictures), base_model=base_model, device=device, base=base)
    prompts = {"sample_prompts": values.get("sample_prompts") or default_prompts(pictures, trigger_word)}
    refusals = Refusals()
    with refusals.caught():
        spec = RunSpec.from_values(filled.values | values | prompts)
    with refusals.caught():
        own, unused = _options(trainer, filled.options, options or {}, base_model.architecture)
    refusals.raise_any()
    trainer.check_spec(spec, own)
    _check_gpus(spec)
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
        needed_bytes=disk.needed_bytes(spec, base_model, images=len(pictures)),
        notes=[*filled.notes, *unused, *_prompts_without(trigger_word, spec)],
        options=own,
        not_expressed=trainer.not_expressed(spec, base_model.architecture),
    )


def why_unavailable(trainer: Stack) -> str:
    """Empty when a host has the trainer, or this machine does; else what to do."""
    if any(has_trainer(host, trainer.key) for host in Host.objects.filter(dead_at=None)):
        return ""
    return trainer.check()


def model_facts(base_model: BaseModel) -> ModelFacts:
    parts = frozenset(str(role) for role in component_paths(base_model))
    return ModelFacts(base_model.name, base_model.architecture, base_model.layout, parts)


def _options(
    trainer: Stack, of_base: Mapping[str, Any], given: Mapping[str, Any], architecture: str
) -> tuple[dict[str, Any], list[str]]:
    """The stack's own options, checked: the user's over those of the base configuration, which are Kohya's."""
    table = trainer.table()
    if table is None:
        return dict(given), [
            f"{key} of your base configuration has no counterpart in {trainer.name}." for key in of_base
        ]
    kept = {key: value for key, value in of_base.items() if table.options[key].suits(architecture)}
    unused = [
        f"{key} of your base configuration is not for {describe_architecture(architecture)}."
        for key in of_base.keys() - kept.keys()
    ]
    return check_options(table, kept | dict(given), architecture=architecture), unused


def _fill(
    profile: str, *, images: int, base_model: BaseModel, device: DeviceKind, base: Imported | None
) -> profiles.Filled:
    if not profile:
        precision = "fp32" if device == DeviceKind.CPU else "bf16"
        return profiles.Filled({"resolution": base_model.resolution, "precision": precision})
    if profile not in Profile.values:
        raise UserError(
            f"There is no profile {profile!r}. Choose one of: {', '.join(Profile.values)}, or none.", field="profile"
        )
    return profiles.fill(
        Profile(profile),
        images=images,
        resolution=base_model.resolution,
        device=device,
        model_name=base_model.name,
        base=base,
    )


def _check_gpus(spec: RunSpec) -> None:
    sizes = {len(slot.devices.all()) for slot in Slot.objects.filter(is_enabled=True).prefetch_related("devices")}
    if spec.gpus > 1 and spec.gpus not in sizes:
        raise UserError(
            f"No slot has {spec.gpus} GPUs. Staff join GPUs with LORAPILOT_SLOTS, such as 0+1.", field="gpus"
        )


def default_prompts(pictures: list[dict[str, Any]], trigger_word: str = "") -> list[str]:
    """The first different captions: what a person would try first. The trigger word leads where it is missing."""
    captions = dict.fromkeys(picture["caption"].strip() for picture in pictures)
    first = [caption for caption in captions if caption][:DEFAULT_PROMPTS]
    return [caption if trigger_word in caption else f"{trigger_word}, {caption}" for caption in first]


def _prompts_without(trigger_word: str, spec: RunSpec) -> list[str]:
    """A sentence when sample pictures would not show what is trained."""
    without = sum(trigger_word not in prompt for prompt in spec.sample_prompts)
    if not without:
        return []
    return [f"The trigger word {trigger_word} is missing in {without} of {len(spec.sample_prompts)} sample prompts."]


@dataclass(frozen=True, slots=True)
class Variation:
    """One of several runs that are submitted at once: what is its own."""

    suffix: str  # for its name
    profile: str
    values: dict[str, Any]


def variations(profile: str, values: dict[str, Any], varied: Mapping[str, Sequence[Any]]) -> list[Variation]:
    """Every combination of the values in `varied`: `profile`, or settings by name. At most MOST_VARIATIONS."""
    axes = {name: list(dict.fromkeys(given)) for name, given in varied.items() if len(given)}
    for name in axes:
        if name != "profile" and name not in OPTIONS:
            raise UserError(f"There is no setting {name!r} to vary.", field=name)
    combinations = list(itertools.islice(itertools.product(*axes.values()), MOST_VARIATIONS + 1))
    if len(combinations) > MOST_VARIATIONS:
        raise UserError(f"That makes more than {MOST_VARIATIONS} runs. Vary less at a time.", field="varied")
    return [_variation(profile, values, dict(zip(axes, chosen, strict=True))) for chosen in combinations]


def _variation(profile: str, values: dict[str, Any], chosen: dict[str, Any]) -> Variation:
    suffix = "".join(f"-{SHORT.get(name, name)}{_in_a_name(value)}" for name, value in chosen.items())
    own = {name: value for name, value in chosen.items() if name != "profile"}
    return Variation(suffix, str(chosen.get("profile", profile)), values | own)


def _in_a_name(value: Any) -> str:
    """`value` in letters, digits, dots and dashes."""
    text = f"{value:g}" if isinstance(value, float) else str(value) or "own"
    return "".join(character if character.isalnum() or character in ".-" else "-" for character in text)
