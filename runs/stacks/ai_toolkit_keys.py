"""The RunSpec in AI Toolkit's key names, with dots where its YAML nests, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from lorapilot.errors import UserError
from runs.spec import RunSpec
from runs.stacks.base import Imported
from runs.stacks.importing import Reader, check_length, check_levels, flat, reader, take_keys
from runs.stacks.option_table import OptionTable

OPTIMIZERS = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw8bit",
    "Lion": "lion",
    "Adafactor": "adafactor",
    "Prodigy": "prodigy",
}
# Ours → all the names that it knows for the number format; the first is written.
NUMBERS = {
    "fp32": ("fp32", "float32", "float", "single"),
    "fp16": ("fp16", "float16", "half"),
    "bf16": ("bf16", "bfloat16"),
}
KEEP_ALL = 1_000_000  # which checkpoints stay is the platform's to say
NO_CLIPPING = 1e9  # with 0 it would clip all gradients away
# Keys that say the same as one field of the RunSpec, in the same unit.
SAME = {
    "training_seed": "seed",
    "network.linear": "rank",
    "network.linear_alpha": "alpha",
    "train.steps": "steps",
    "train.batch_size": "batch_size",
    "train.gradient_accumulation": "gradient_accumulation_steps",
    "train.gradient_checkpointing": "gradient_checkpointing",
    "train.lr": "learning_rate",
    "train.optimizer_params.weight_decay": "weight_decay",
}
SAME_OF_DATASETS = {
    "buckets": "enable_bucket",
    "flip_x": "flip",
    "shuffle_tokens": "shuffle_caption",
    "keep_tokens": "keep_tokens",
    "caption_dropout_rate": "caption_dropout",
}


def keys_of(spec: RunSpec, *, is_flow: bool, trains_text_encoders: bool) -> dict[str, Any]:
    """The settings but for data, samples and saving. Flow matching has neither an SNR nor a noise offset."""
    keys: dict[str, Any] = {key: getattr(spec, name) for key, name in SAME.items()}
    keys |= {
        "train.train_unet": True,
        "train.train_text_encoder": trains_text_encoders and spec.text_encoder_learning_rate > 0,
        "train.optimizer": OPTIMIZERS.get(spec.optimizer, ""),
        "train.max_grad_norm": spec.max_grad_norm or NO_CLIPPING,
        "train.dtype": NUMBERS[spec.precision][0],
        "save.dtype": NUMBERS[spec.save_precision][0],
    }
    if spec.conv_rank:
        keys |= {"network.conv": spec.conv_rank, "network.conv_alpha": spec.conv_alpha or float(spec.conv_rank)}
    if spec.network_dropout:
        keys["network.dropout"] = spec.network_dropout
    if spec.ema_decay:
        keys |= {"train.ema_config.use_ema": True, "train.ema_config.ema_decay": spec.ema_decay}
    if spec.min_snr_gamma and not is_flow:
        keys["train.min_snr_gamma"] = spec.min_snr_gamma
    if spec.noise_offset and not is_flow:
        keys["train.noise_offset"] = spec.noise_offset
    return keys | _schedule(spec)


def _schedule(spec: RunSpec) -> dict[str, Any]:
    """Only the constant one can warm up. Its linear one rises, unless it is told both ends."""
    if spec.lr_schedule.startswith("constant") and spec.warmup_steps:
        return {
            "train.lr_scheduler": "constant_with_warmup",
            "train.lr_scheduler_params.num_warmup_steps": spec.warmup_steps,
        }
    if spec.lr_schedule.startswith("constant"):
        return {"train.lr_scheduler": "constant"}
    if spec.lr_schedule == "linear":
        ends = {"train.lr_scheduler_params.start_factor": 1.0, "train.lr_scheduler_params.end_factor": 0.0}
        return {"train.lr_scheduler": "linear", **ends}
    return {"train.lr_scheduler": spec.lr_schedule}


def dataset_keys(spec: RunSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {key: getattr(spec, name) for key, name in SAME_OF_DATASETS.items()}
    return {"resolution": [spec.resolution], **keys}


# --- As a file --------------------------------------------------------------------------------------------------------
PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")


class _Dumper(yaml.SafeDumper):
    """Block style; every text that is more than a plain word stands in double quotes.

    AI Toolkit reads some words as numbers that YAML takes for texts, such as 1e5, so quotes are not left to YAML.
    """


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if PLAIN.fullmatch(text) else '"')


_Dumper.add_representer(str, _text)


def as_yaml(config: Mapping[str, Any]) -> str:
    """AI Toolkit puts environment variables into the text before it reads it: no `${` of a prompt may reach it."""
    text = yaml.dump(
        dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1_000_000
    )
    return text.replace("$", "\\x24")  # a dollar stands in double quotes always


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Names with dots as tables in tables."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        *folders, name = key.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = value
    return tree


# --- Read -------------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """Without references: a short text could unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.get_mark().line + 1
            raise UserError(f"Line {line}: references (*) are not read. Write the values out.", field="config")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """YAML or JSON, which AI Toolkit takes both. Raises UserError with line and column."""
    check_length(text)
    document = _parsed(text)
    check_levels(document)
    return document


def _parsed(text: str) -> Any:
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 a SafeLoader
    except json.JSONDecodeError as error:
        raise UserError(f"This is no JSON: {error}.", field="config") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UserError(f"This is no YAML: {error.problem}{where}.", field="config") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError("This is no YAML that can be read.", field="config") from None


def read_config(table: OptionTable, text: str) -> Imported:
    """What a configuration for AI Toolkit means here. Raises UserError."""
    process, notes = _process(read_yaml(text))
    keys = flat(process)
    datasets, samples = keys.pop("datasets", None), keys.pop("sample.samples", None)
    keys |= _first_dataset(datasets, notes)
    keys |= _prompts(samples, notes)
    taken = take_keys(table, {key: value for key, value in keys.items() if value != ""}, READERS)
    taken.notes[:0] = notes
    if not keys.get("train.ema_config.use_ema"):
        taken.values.pop("ema_decay", None)
    if keys.get("train.lr_scheduler") != "constant_with_warmup":
        taken.values.pop("warmup_steps", None)
    if keys.get("train.train_text_encoder") and "learning_rate" in taken.values:
        taken.values["text_encoder_learning_rate"] = taken.values["learning_rate"]
    if keys.get("train.lr_scheduler") and "lr_schedule" not in taken.values:
        taken.notes.append(f"The schedule {keys['train.lr_scheduler']} is left out: choose another one.")
    return taken


def _process(config: Any) -> tuple[dict[str, Any], list[str]]:
    """The first process of a job, or what somebody copied out of it."""
    if not isinstance(config, Mapping):
        raise UserError("This is no configuration for AI Toolkit: it has no keys.", field="config")
    inner = config.get("config", config)
    found = inner.get("process", inner) if isinstance(inner, Mapping) else None
    processes = found if isinstance(found, list) else [found]
    if not processes or not isinstance(processes[0], Mapping):
        raise UserError("This is no configuration for AI Toolkit: config.process is no list of keys.", field="config")
    process = {str(key): value for key, value in processes[0].items()}
    left_out = len(processes) - 1
    return process, [f"Only the first of {left_out + 1} processes is read."] if left_out else []


def _first_dataset(datasets: Any, notes: list[str]) -> dict[str, Any]:
    if not isinstance(datasets, list) or not datasets or not isinstance(datasets[0], Mapping):
        return {}
    if len(datasets) > 1:
        notes.append(f"Settings of the first of {len(datasets)} datasets are read: here they are for all pictures.")
    keys = {f"datasets.{key}": value for key, value in datasets[0].items()}
    resolutions = keys.get("datasets.resolution")
    if isinstance(resolutions, list) and len(resolutions) > 1:
        notes.append("Of several resolutions the largest is read: here a run has one.")
    return keys


def _prompts(samples: Any, notes: list[str]) -> dict[str, Any]:
    if not isinstance(samples, list):
        return {}
    found = [sample for sample in samples if isinstance(sample, Mapping) and isinstance(sample.get("prompt"), str)]
    if any(len(sample) > 1 for sample in found):
        notes.append("Samples of their own size, seed or guidance are drawn with those of all samples.")
    return {"sample.prompts": [sample["prompt"] for sample in found]}


def _number_format(field: str) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        ours = next((ours for ours, names in NUMBERS.items() if value in names), None)
        if ours is None:
            raise UserError(f"{value!r} is no number format: use fp32, fp16 or bf16.", field=field)
        return {field: ours}

    return read


def _optimizer(value: Any) -> dict[str, Any]:
    """Names that are none of ours stay as they are: they are options of the trainer's own."""
    name = str(value).lower()
    return {"optimizer": next((ours for ours, theirs in OPTIMIZERS.items() if theirs == name), name)}


def _lr_schedule(value: Any) -> dict[str, Any]:
    known = {"constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"}
    return {"lr_schedule": value} if value in known else {}


def _resolution(value: Any) -> dict[str, Any]:
    sides = value if isinstance(value, list) else [value]
    if not sides or not all(isinstance(side, int) for side in sides):
        raise UserError(f"resolution: {value!r} is no size in pixels.", field="resolution")
    return {"resolution": max(sides)}


def _max_grad_norm(value: Any) -> dict[str, Any]:
    return {"max_grad_norm": 0 if value == NO_CLIPPING else value}


def _keep_last(value: Any) -> dict[str, Any]:
    return {"keep_last": 0 if value == KEEP_ALL else value}


READERS: dict[str, Reader] = (
    {key: reader(field) for key, field in SAME.items()}
    | {f"datasets.{key}": reader(field) for key, field in SAME_OF_DATASETS.items()}
    | {
        "network.rank": reader("rank"),
        "network.alpha": reader("alpha"),
        "network.conv": reader("conv_rank"),
        "network.conv_alpha": reader("conv_alpha"),
        "network.dropout": reader("network_dropout"),
        "train.gradient_accumulation_steps": reader("gradient_accumulation_steps"),
        "train.optimizer": _optimizer,
        "train.lr_scheduler": _lr_schedule,
        "train.lr_scheduler_params.num_warmup_steps": reader("warmup_steps"),
        "train.max_grad_norm": _max_grad_norm,
        "train.min_snr_gamma": reader("min_snr_gamma"),
        "train.noise_offset": reader("noise_offset"),
        "train.ema_config.use_ema": lambda _: {},
        "train.ema_config.ema_decay": reader("ema_decay"),
        "train.dtype": _number_format("precision"),
        "train.train_text_encoder": lambda _: {},
        "model.dtype": lambda _: {},  # AI Toolkit itself replaces it by that of the training
        "save.dtype": _number_format("save_precision"),
        "save.save_every": reader("save_every_steps"),
        "save.max_step_saves_to_keep": _keep_last,
        "datasets.resolution": _resolution,
        "datasets.num_repeats": reader("repeats"),
        "sample.prompts": reader("sample_prompts"),
        "sample.sample_every": reader("sample_every_steps"),
        "sample.seed": reader("sample_seed"),
        "sample.guidance_scale": reader("sample_scale"),
        "sample.sample_steps": reader("sample_steps"),
        "sample.width": lambda _: {},  # samples have the size of the training
        "sample.height": lambda _: {},
    }
)
