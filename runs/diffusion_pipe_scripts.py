"""Diffusion Pipe's documented start call: its flat fields as a run of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from django.db import transaction

from datasets.models import Dataset
from lorapilot import workspace
from lorapilot.errors import Conflict, UserError
from lorapilot.models import User
from models_registry.enums import Architecture, Role, describe_role
from models_registry.models import BaseModel
from models_registry.selectors import component_paths, find_by_path
from models_registry.services import attach_component, register_base_model
from runs import services
from runs.enums import ACTIVE, Status
from runs.models import Run
from runs.profiles import updates_per_epoch
from runs.stacks import get_stack

STACK = "diffusion_pipe"
PATHS = ("transformer_path", "vae_path", "llm_path", "clip_path")
ROLES = {"vae_path": Role.VAE, "llm_path": Role.LLM, "clip_path": Role.CLIP_L}
# Of the other paths a model of another type may have none, or others: they are then those of the registered model.
REQUIRED = ("dataset_path", "config_dir", "output_dir", "transformer_path")
ORIGINAL_TYPE = "hunyuan-video"
# model_type as the original wrote it, where it differs from ours.
MODEL_TYPES = {"hunyuan-video": "hunyuan_video", "lumina_2": "lumina2", "ltx-video": "ltx"}
MOST_STEPS = 1_000_000
MOST_CHARACTERS = 500
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Number:
    """A numeric field: its default and its bounds."""

    default: float
    least: float
    most: float
    is_whole: bool = True


NUMBERS = {
    "epochs": Number(1000, 1, 100_000),
    "batch_size": Number(1, 1, 256),
    "learning_rate": Number(2e-5, 1e-9, 1, is_whole=False),
    "save_every": Number(2, 1, 100_000),
    "eval_every": Number(1, 1, 100_000),
    "rank": Number(32, 1, 512),
    "weight_decay": Number(0.01, 0, 10, is_whole=False),
    "eps": Number(1e-8, 1e-16, 1, is_whole=False),
    "gradient_accumulation_steps": Number(4, 1, 256),
    "num_repeats": Number(10, 1, 1000),
    "min_ar": Number(0.5, 0.1, 10, is_whole=False),
    "max_ar": Number(2.0, 0.1, 10, is_whole=False),
    "num_ar_buckets": Number(7, 1, 64),
    "gradient_clipping": Number(1.0, 0, 1000, is_whole=False),
    "warmup_steps": Number(100, 0, 100_000),
    "eval_micro_batch_size_per_gpu": Number(1, 1, 256),
    "eval_gradient_accumulation_steps": Number(1, 1, 256),
    "checkpoint_every_n_minutes": Number(120, 1, 10_080),
    "caching_batch_size": Number(1, 1, 256),
    "steps_per_print": Number(1, 1, 10_000),
}
FLAGS = {
    "enable_ar_bucket": True,
    "eval_before_first_step": True,
    "activation_checkpointing": True,
    "resume_from_checkpoint": False,
    "only_double_blocks": False,
    "enable_wandb": False,
}
TEXTS = {
    "dtype": "bfloat16",
    "save_dtype": "bfloat16",
    "optimizer_type": "adamw_optimi",
    "partition_method": "parameters",
    "video_clip_mode": "single_middle",
    "model_type": ORIGINAL_TYPE,
    "wandb_run_name": "",
    "wandb_tracker_name": "",
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """A field that is a list: its default, and the bounds of its length and of each item."""

    default: list[float]
    fewest: int
    most_items: int
    item: Number


LISTS = {
    "betas": Numbers([0.9, 0.99], 2, 2, Number(0, 0, 1, is_whole=False)),
    "resolutions_input": Numbers([512], 1, 1, Number(0, 64, 4096)),
    "ar_buckets": Numbers([], 0, 64, Number(0, 0.1, 10, is_whole=False)),
    "frame_buckets": Numbers([1, 33], 1, 64, Number(0, 1, 1024)),
}
KNOWN = {*REQUIRED, *PATHS, *NUMBERS, *FLAGS, *TEXTS, *LISTS}
# What is an option of the trainer's own here.
OPTIONS = {
    "optimizer_type": "optimizer.type",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "min_ar": "dataset.min_ar",
    "max_ar": "dataset.max_ar",
    "num_ar_buckets": "dataset.num_ar_buckets",
    "ar_buckets": "dataset.ar_buckets",
    "frame_buckets": "dataset.frame_buckets",
    "checkpoint_every_n_minutes": "checkpoint_every_n_minutes",
    "caching_batch_size": "caching_batch_size",
    "partition_method": "partition_method",
    "video_clip_mode": "video_clip_mode",
    "enable_wandb": "monitoring.enable_wandb",
    "wandb_tracker_name": "monitoring.wandb_tracker_name",
    "wandb_run_name": "monitoring.wandb_run_name",
}
REFUSED = {
    "resume_from_checkpoint": "Resume the run itself: POST /api/v1/runs/<run>/resume/. A new run starts anew.",
    "only_double_blocks": "This version of Diffusion Pipe has no only_double_blocks: leave it out.",
}
# What a call may send that is not for a call.
FOREIGN = {"wandb_api_key": "A key is no setting of a run: set that of Weights & Biases on your account page."}


class Occupied(Conflict):
    """The caller has a run of Diffusion Pipe that trains or waits."""

    def __init__(self, run: Run) -> None:
        verb = "trains" if run.status in ACTIVE else "waits"
        super().__init__(f"Your run {run.pk} ({run.output_name}) {verb} already: stop it first.")
        self.run = run


@dataclass(frozen=True, slots=True)
class Order:
    """A start call, read and checked."""

    dataset_name: str
    output_name: str
    paths: Mapping[str, str]  # those that are given
    values: Mapping[str, Any]
    given: frozenset[str]  # the fields that are no defaults

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def missing_paths(given: Mapping[str, str]) -> list[dict[str, str]]:
    """Fields whose file is not in the models folder."""
    return [{"field": field, "path": path} for field, path in given.items() if not _exists(path)]


def _exists(path: str) -> bool:
    try:
        return bool(path) and workspace.inside(workspace.models(), path).exists()
    except (ValueError, OSError):
        return False


def read_order(data: Any) -> Order:
    """Raises UserError for a field that is missing, of the wrong kind, or out of bounds."""
    if not isinstance(data, Mapping):
        raise UserError("The body is a JSON object.")
    for name in data:
        if name not in KNOWN:
            raise UserError(FOREIGN.get(name, f"There is no field {name!r} in this call."), field=str(name))
    values: dict[str, Any] = {name: _number(data, name, number) for name, number in NUMBERS.items()}
    values |= {name: _flag(data, name, default) for name, default in FLAGS.items()}
    values |= {name: _text(data, name, default) for name, default in TEXTS.items()}
    values |= {name: _list(data, name, numbers) for name, numbers in LISTS.items()}
    paths = {name: _text(data, name, "") for name in (*REQUIRED, *PATHS)}
    _check(values, paths)
    return Order(
        dataset_name=_last(paths["dataset_path"]),
        output_name=_last(paths["output_dir"]),
        paths={name: paths[name] for name in PATHS if paths[name]},
        values=values,
        given=frozenset(data),
    )


def _check(values: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    needed = [*REQUIRED, *(PATHS if values["model_type"] == ORIGINAL_TYPE else ())]
    if blank := next((name for name in needed if not paths[name]), ""):
        raise UserError(f"{blank} is required.", field=blank)
    for name, sentence in REFUSED.items():
        if values[name]:
            raise UserError(sentence, field=name)
    if values["min_ar"] > values["max_ar"]:
        raise UserError("min_ar is at most max_ar.", field="min_ar")
    for name in ("dtype", "save_dtype"):
        if values[name] not in PRECISIONS:
            raise UserError(f"{name} is one of {', '.join(PRECISIONS)}.", field=name)
    for missing in missing_paths({name: paths[name] for name in PATHS if paths[name]}):
        raise UserError(f"There is no {missing['path'][:200]} in the models folder.", field=missing["field"])


def _last(path: str) -> str:
    """A path of the original's layout stands for what it names: datasets and results have no folders of their own."""
    return PurePosixPath(path.strip().rstrip("/")).name


@transaction.atomic
def submit(user: User, order: Order, dataset: Dataset) -> Run:
    """Queue it. Raises Occupied, also for the second of two calls at once; a refusal leaves no trace."""
    User.objects.select_for_update().get(pk=user.pk)
    own = Run.objects.filter(owner=user, stack=STACK, status__in=[*ACTIVE, Status.QUEUED])
    if (other := own.first()) is not None:
        raise Occupied(other)
    base_model = _base_model(user, order)
    return services.submit_run(
        user,
        dataset=dataset,
        base_model=base_model,
        output_name=order.output_name,
        stack=STACK,
        values=_settings(order, dataset),
        options=_options(order, base_model.architecture),
    )


def _settings(order: Order, dataset: Dataset) -> dict[str, Any]:
    """Of the RunSpec. Epochs become steps, as they are counted here."""
    per_epoch = updates_per_epoch(
        sum(dataset.pictures.values_list("repeats", flat=True)),
        repeats=order["num_repeats"],
        batch_size=order["batch_size"],
        gradient_accumulation_steps=order["gradient_accumulation_steps"],
    )
    steps = min(MOST_STEPS, order["epochs"] * per_epoch)
    return {
        "steps": steps,
        "batch_size": order["batch_size"],
        "learning_rate": order["learning_rate"],
        "save_every_steps": min(MOST_STEPS, order["save_every"] * per_epoch),
        "rank": order["rank"],
        "alpha": float(order["rank"]),
        "weight_decay": order["weight_decay"],
        "gradient_accumulation_steps": order["gradient_accumulation_steps"],
        "repeats": order["num_repeats"],
        "resolution": order["resolutions_input"][0],
        "enable_bucket": order["enable_ar_bucket"],
        "max_grad_norm": order["gradient_clipping"],
        "warmup_steps": min(order["warmup_steps"], steps - 1),
        "gradient_checkpointing": order["activation_checkpointing"],
        "precision": PRECISIONS[order["dtype"]],
        "save_precision": PRECISIONS[order["save_dtype"]],
        "lr_schedule": "constant_with_warmup" if order["warmup_steps"] else "constant",
    }


def _options(order: Order, architecture: str) -> dict[str, Any]:
    """The trainer's own. Defaults are those of HunyuanVideo and its optimizer: left out where they mean nothing."""
    table = get_stack(STACK).table()
    known = table.options if table else {}
    found = {}
    for name, key in OPTIONS.items():
        is_others = key.startswith("optimizer.") and order["optimizer_type"] != TEXTS["optimizer_type"]
        is_wanted = name in order.given or (known[key].suits(architecture) and not is_others)
        if is_wanted and order[name] not in ("", [], False):
            found[key] = order[name]
    return found


def _base_model(user: User, order: Order) -> BaseModel:
    """The registered model that lies at transformer_path. Staff get it, and the files that it lacks, registered by the
    call; a file that it has is never replaced, for others train with it."""
    wanted = MODEL_TYPES.get(order["model_type"], order["model_type"])
    if wanted not in Architecture.values:
        raise UserError(f"There is no model_type {order['model_type']!r}.", field="model_type")
    model = find_by_path(order.paths["transformer_path"])
    if model is None:
        model = register_base_model(path=order.paths["transformer_path"], registered_by=user)
    if model.architecture != wanted:
        raise UserError(
            f"{model.name} is {model.get_architecture_display()}, not {order['model_type']}.", field="model_type"
        )
    has = component_paths(model)
    for field, role in ROLES.items():
        if field in order.paths:
            _take_part(model, role, _part_file(order.paths[field], role), has.get(role), field=field, user=user)
    return model


def _part_file(path: str, role: Role) -> Path:
    """The original names the folder of the CLIP; here it is the file in it."""
    found = workspace.inside(workspace.models(), path)
    return found / "model.safetensors" if role == Role.CLIP_L and found.is_dir() else found


def _take_part(model: BaseModel, role: Role, path: Path, has: Path | None, *, field: str, user: User) -> None:
    if has is None:
        attach_component(model, role=role, path=str(path), by=user)
    elif has.resolve() != path:
        raise UserError(
            f"{model.name} is trained with {has.name} as its {describe_role(role)}: name that file, or ask staff to "
            "change it on the model's page.",
            field=field,
        )


# --- Fields -----------------------------------------------------------------------------------------------------------
def _number(data: Mapping[str, Any], name: str, number: Number) -> int | float:
    return _bounded(data.get(name, number.default), name, number)


def _bounded(value: Any, name: str, number: Number) -> int | float:
    kind = "a whole number" if number.is_whole else "a number"
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {kind}.", field=name) from None
    if not math.isfinite(found) or (number.is_whole and not found.is_integer()):
        raise UserError(f"{name} is {kind}.", field=name)
    if not number.least <= found <= number.most:
        raise UserError(f"{name} is {number.least:g} to {number.most:g}.", field=name)
    return int(found) if number.is_whole else found


def _flag(data: Mapping[str, Any], name: str, default: bool) -> bool:  # noqa: FBT001 a table calls it
    value = data.get(name, default)
    if isinstance(value, str) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise UserError(f"{name} is true or false.", field=name)
    return value


def _text(data: Mapping[str, Any], name: str, default: str) -> str:
    value = data.get(name, default)
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        raise UserError(f"{name} is a text of at most {MOST_CHARACTERS} characters.", field=name)
    return value.strip()


def _list(data: Mapping[str, Any], name: str, numbers: Numbers) -> list[int | float]:
    """A list of numbers, or the same as a JSON text; an empty text is the empty list."""
    value = data.get(name, numbers.default)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise UserError(f"{name} is a list of numbers.", field=name) from None
    if not isinstance(value, list):
        raise UserError(f"{name} is a list of numbers.", field=name)
    if not numbers.fewest <= len(value) <= numbers.most_items:
        how_many = " to ".join(str(one) for one in dict.fromkeys((numbers.fewest, numbers.most_items)))
        raise UserError(f"{name} has {how_many} {'item' if how_many == '1' else 'items'}.", field=name)
    return [_bounded(one, name, numbers.item) for one in value]
