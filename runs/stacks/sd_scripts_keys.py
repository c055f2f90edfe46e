"""The RunSpec in sd-scripts' key names, and back: what the built-in trainer and Kohya's configurations share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_trainer.buckets import rules_in_proportion
from lorapilot.errors import UserError
from runs.spec import RunSpec
from runs.stacks.base import Imported
from runs.stacks.importing import Reader, as_spelled, reader, take_keys, taken_epochs
from runs.stacks.option_table import OptionTable

SIZE = re.compile(r"(\d{1,5})(?:\s*,\s*(\d{1,5}))?", re.ASCII)
PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
SAVE_PRECISION = {"fp32": "float", "fp16": "fp16", "bf16": "bf16"}
# Keys that say the same as one field of the RunSpec, in the same unit.
SAME = {
    "enable_bucket": "enable_bucket",
    "flip_aug": "flip",
    "shuffle_caption": "shuffle_caption",
    "keep_tokens": "keep_tokens",
    "caption_dropout_rate": "caption_dropout",
    "validation_split": "validation_share",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "network_dropout": "network_dropout",
    "learning_rate": "learning_rate",
    "optimizer_type": "optimizer",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_num_cycles": "lr_cycles",
    "lr_warmup_steps": "warmup_steps",
    "min_snr_gamma": "min_snr_gamma",
    "noise_offset": "noise_offset",
    "save_every_n_steps": "save_every_steps",
    "sample_every_n_steps": "sample_every_steps",
}


def keys_of(spec: RunSpec) -> dict[str, Any]:
    """The keys that both trainers take; what is off by 0 in the RunSpec is there as 0."""
    keys: dict[str, Any] = {key: getattr(spec, name) for key, name in SAME.items()}
    buckets = rules_in_proportion(spec.resolution)
    keys |= {
        "resolution": spec.resolution,
        "min_bucket_reso": buckets.minimum,
        "max_bucket_reso": buckets.maximum,
        "bucket_reso_steps": buckets.step,
        "mixed_precision": PRECISION[spec.precision],
        "save_precision": SAVE_PRECISION[spec.save_precision],
        "max_token_length": spec.caption_tokens,
        "optimizer_args": [f"weight_decay={spec.weight_decay}"],
        "network_train_unet_only": spec.text_encoder_learning_rate == 0,
    }
    if spec.text_encoder_learning_rate:
        keys["text_encoder_lr"] = spec.text_encoder_learning_rate
    if spec.conv_rank:
        alpha = spec.conv_alpha or spec.conv_rank
        keys["network_args"] = [f"conv_dim={spec.conv_rank}", f"conv_alpha={alpha:g}"]
    return keys


def _resolution(value: Any) -> dict[str, Any]:
    """`1024`, `"1024"` or `"1024,1024"`. A rectangle becomes the square with its area."""
    found = SIZE.fullmatch(str(value).strip("[]() "))
    if found is None:
        raise UserError(f"resolution: {value!r} is no size in pixels.", field="resolution")
    width, height = int(found[1]), int(found[2] or found[1])
    return {"resolution": width if width == height else round((width * height) ** 0.5 / 8) * 8}


def _precision(value: Any) -> dict[str, Any]:
    return {"precision": _inverse(PRECISION, "mixed_precision", value)}


def _save_precision(value: Any) -> dict[str, Any]:
    return {"save_precision": _inverse(SAVE_PRECISION, "save_precision", value)}


def _inverse(names: Mapping[str, str], key: str, value: Any) -> str:
    for ours, theirs in names.items():
        if value in (ours, theirs):
            return ours
    raise UserError(f"{key}: {value!r} is none of {', '.join(names.values())}.", field=key)


def _text_encoder_lr(value: Any) -> dict[str, Any]:
    return {"text_encoder_learning_rate": value[0] if isinstance(value, list) and value else value}


def named(arguments: Any) -> dict[str, str]:
    """A list of `name=value` as a dict; what is none is passed over."""
    given = arguments if isinstance(arguments, list) else str(arguments).split()
    pairs = (str(argument).partition("=") for argument in given)
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _network_args(value: Any) -> dict[str, Any]:
    given = named(value)
    names = {"conv_dim": "conv_rank", "conv_alpha": "conv_alpha"}
    return {ours: given[theirs] for theirs, ours in names.items() if theirs in given}


def _optimizer_args(value: Any) -> dict[str, Any]:
    given = named(value)
    return {"weight_decay": given["weight_decay"]} if "weight_decay" in given else {}


def take(table: OptionTable, keys: Mapping[str, Any]) -> Imported:
    """A configuration in these keys. Raises UserError."""
    given = as_spelled(table, keys, "optimizer_type")
    epochs = taken_epochs(given, "max_train_epochs")
    if epochs:
        given.pop("max_train_steps", None)  # they win
    warmup = given.get("lr_warmup_steps")
    share = given.pop("lr_warmup_steps") if isinstance(warmup, float) and 0 < warmup < 1 else 0.0
    return replace(take_keys(table, given, READERS), epochs=epochs, warmup_share=share)


READERS: dict[str, Reader] = {key: reader(field) for key, field in SAME.items()} | {
    "resolution": _resolution,
    "mixed_precision": _precision,
    "save_precision": _save_precision,
    "max_token_length": reader("caption_tokens"),
    "text_encoder_lr": _text_encoder_lr,
    "network_args": _network_args,
    "optimizer_args": _optimizer_args,
    "unet_lr": reader("learning_rate"),
    "dataset_repeats": reader("repeats"),
    "network_train_unet_only": lambda value: {"text_encoder_learning_rate": 0.0} if value else {},
    "use_8bit_adam": lambda value: {"optimizer": "AdamW8bit"} if value else {},
    "use_lion_optimizer": lambda value: {"optimizer": "Lion"} if value else {},
}
