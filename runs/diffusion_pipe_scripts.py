"""Diffusion Pipe's documented start call: its flat fields as a run of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from datasets.models import Dataset
from lorapilot import workspace
from lorapilot.errors import UserError
from lorapilot.models import User
from models_registry.enums import Architecture, Role
from models_registry.models import BaseModel
from models_registry.selectors import component_paths, find_by_path
from models_registry.services import attach_component, register_base_model
from runs import services
from runs.models import Run

PATHS = ("transformer_path", "vae_path", "llm_path", "clip_path")
ROLES = {"vae_path": Role.VAE, "llm_path": Role.LLM, "clip_path": Role.CLIP_L}
REQUIRED = ("dataset_path", "config_dir", "output_dir", *PATHS)
# model_type as the original wrote it, where it differs from ours.
MODEL_TYPES = {"hunyuan-video": "hunyuan_video", "lumina_2": "lumina2", "ltx-video": "ltx"}
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
    "eps": Number(1e-8, 0, 1, is_whole=False),
    "gradient_accumulation_steps": Number(4, 1, 256),
    "num_repeats": Number(10, 1, 1000),
    "min_ar": Number(0.5, 0.05, 20, is_whole=False),
    "max_ar": Number(2.0, 0.05, 20, is_whole=False),
    "num_ar_buckets": Number(7, 1, 100),
    "gradient_clipping": Number(1.0, 0, 1000, is_whole=False),
    "warmup_steps": Number(100, 0, 100_000),
    "eval_micro_batch_size_per_gpu": Number(1, 1, 256),
    "eval_gradient_accumulation_steps": Number(1, 1, 256),
    "checkpoint_every_n_minutes": Number(120, 1, 100_000),
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
    "model_type": "hunyuan-video",
    "wandb_run_name": "",
    "wandb_tracker_name": "",
}
LISTS: dict[str, list[float]] = {
    "betas": [0.9, 0.99],
    "resolutions_input": [512],
    "ar_buckets": [],
    "frame_buckets": [1, 33],
}
KNOWN = {*REQUIRED, *NUMBERS, *FLAGS, *TEXTS, *LISTS}


@dataclass(frozen=True, slots=True)
class Order:
    """A start call, read and checked."""

    dataset_name: str
    output_name: str
    paths: Mapping[str, str]
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def missing_paths(given: Mapping[str, str]) -> list[dict[str, str]]:
    """Fields whose file is not in the models folder."""
    return [{"field": field, "path": path} for field, path in given.items() if not _exists(path)]


def _exists(path: str) -> bool:
    try:
        return bool(path) and workspace.inside(workspace.models(), path).exists()
    except ValueError:
        return False


def read_order(data: Any) -> Order:
    """Raises UserError for a field that is missing, of the wrong kind, or out of bounds."""
    if not isinstance(data, Mapping):
        raise UserError("The body is a JSON object.")
    for name in REQUIRED:
        if not isinstance(data.get(name), str) or not data[name].strip():
            raise UserError(f"{name} is required.", field=name)
    for name in data:
        if name not in KNOWN:
            raise UserError(f"There is no field {name!r} in this call.", field=str(name))
    values: dict[str, Any] = {name: _number(data, name, number) for name, number in NUMBERS.items()}
    values |= {name: _flag(data, name, default) for name, default in FLAGS.items()}
    values |= {name: _text(data, name, default) for name, default in TEXTS.items()}
    values |= {name: _list(data, name, default) for name, default in LISTS.items()}
    if values["enable_wandb"]:
        raise UserError("A run sends nothing to other services: leave enable_wandb out.", field="enable_wandb")
    if values["resume_from_checkpoint"]:
        raise UserError(
            "Resume the run itself: POST /api/v1/runs/<run>/resume/. A new run starts anew.",
            field="resume_from_checkpoint",
        )
    if values["only_double_blocks"]:
        raise UserError(
            "This version of Diffusion Pipe has no only_double_blocks: leave it out.", field="only_double_blocks"
        )
    paths = {name: data[name].strip() for name in PATHS}
    if missing := missing_paths(paths):
        first = missing[0]
        raise UserError(f"There is no {first['path']} in the models folder.", field=first["field"])
    return Order(_last(data["dataset_path"]), _last(data["output_dir"]), paths, values)


def _last(path: str) -> str:
    """A path of the original's layout stands for what it names: datasets and results have no folders of their own."""
    return PurePosixPath(path.strip().rstrip("/")).name


def submit(user: User, order: Order, dataset: Dataset) -> Run:
    """Queue it. Epochs become steps, as they are counted here."""
    base_model = _base_model(user, order)
    images = sum(dataset.pictures.values_list("repeats", flat=True)) * order["num_repeats"]
    per_epoch = math.ceil(math.ceil(images / order["batch_size"]) / order["gradient_accumulation_steps"])
    steps = min(1_000_000, order["epochs"] * per_epoch)
    values = {
        "steps": steps,
        "batch_size": order["batch_size"],
        "learning_rate": order["learning_rate"],
        "save_every_steps": min(1_000_000, order["save_every"] * per_epoch),
        "rank": order["rank"],
        "alpha": float(order["rank"]),
        "weight_decay": order["weight_decay"],
        "gradient_accumulation_steps": order["gradient_accumulation_steps"],
        "repeats": order["num_repeats"],
        "resolution": int(order["resolutions_input"][0]),
        "enable_bucket": order["enable_ar_bucket"],
        "max_grad_norm": order["gradient_clipping"],
        "warmup_steps": min(order["warmup_steps"], steps - 1),
        "gradient_checkpointing": order["activation_checkpointing"],
        "precision": _precision(order, "dtype"),
        "save_precision": _precision(order, "save_dtype"),
        "lr_schedule": "constant_with_warmup" if order["warmup_steps"] else "constant",
    }
    options = {
        "optimizer.type": order["optimizer_type"],
        "optimizer.betas": order["betas"],
        "optimizer.eps": order["eps"],
        "dataset.min_ar": order["min_ar"],
        "dataset.max_ar": order["max_ar"],
        "dataset.num_ar_buckets": order["num_ar_buckets"],
        "dataset.frame_buckets": [int(one) for one in order["frame_buckets"]],
        "checkpoint_every_n_minutes": order["checkpoint_every_n_minutes"],
        "caching_batch_size": order["caching_batch_size"],
        "partition_method": order["partition_method"],
        "video_clip_mode": order["video_clip_mode"],
    }
    if order["ar_buckets"]:
        options["dataset.ar_buckets"] = order["ar_buckets"]
    return services.submit_run(
        user,
        dataset=dataset,
        base_model=base_model,
        output_name=order.output_name,
        stack="diffusion_pipe",
        values=values,
        options=options,
    )


def _precision(order: Order, name: str) -> str:
    if order[name] not in PRECISIONS:
        raise UserError(f"{name} is one of {', '.join(PRECISIONS)}.", field=name)
    return PRECISIONS[order[name]]


def _base_model(user: User, order: Order) -> BaseModel:
    """The registered model that lies at transformer_path and has these files; staff get it registered by the call."""
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
        path = workspace.inside(workspace.models(), order.paths[field])
        if has.get(role) != path:
            attach_component(model, role=role, path=order.paths[field], by=user)
    return model


# --- Fields -----------------------------------------------------------------------------------------------------------
def _number(data: Mapping[str, Any], name: str, number: Number) -> int | float:
    value = data.get(name, number.default)
    kind = "a whole number" if number.is_whole else "a number"
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
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
    if not isinstance(value, str) or len(value) > 200:
        raise UserError(f"{name} is a text.", field=name)
    return value


def _list(data: Mapping[str, Any], name: str, default: list[float]) -> list[float]:
    """A list of numbers, or the same as a JSON text; an empty text is the empty list."""
    value = data.get(name, default)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            raise UserError(f"{name} is a list of numbers.", field=name) from None
    is_list = isinstance(value, list) and len(value) <= 64
    if not is_list or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
        raise UserError(f"{name} is a list of numbers.", field=name)
    if name == "resolutions_input" and not value:
        raise UserError("resolutions_input names at least one resolution.", field=name)
    return list(value)
