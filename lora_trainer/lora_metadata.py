"""The metadata of a saved LoRA: sd-scripts' `ss_*` facts, the `modelspec.*` standard and our own `lorapilot_*`.

All values are texts, as safetensors wants, and those of `ss_*` exactly as sd-scripts writes them: "None" for what is
not set, "True" and "False", JSON for tables. Paths appear by their last part only: a LoRA is made to be shared.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_trainer.buckets import Size
from lora_trainer.config import TrainingConfig
from lora_trainer.data import Dataset, Picture
from lora_trainer.plan import Plan

# the classes that sd-scripts names in ss_optimizer
OPTIMIZER_CLASSES = {
    "AdamW": "torch.optim.adamw.AdamW",
    "AdamW8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "SGD": "torch.optim.sgd.SGD",
    "SGDNesterov": "torch.optim.sgd.SGD",
    "Lion": "lion_pytorch.lion_pytorch.Lion",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.prodigy.Prodigy",
    "AdamWScheduleFree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
}


def build_metadata(
    config: TrainingConfig,
    dataset: Dataset,
    *,
    facts: Mapping[str, str],
    prediction: str,
    plan: Plan,
    step: int,
    epoch: int,
    started_at: float,
    processes: int = 1,
    validation_images: int = 0,
    base_hashes: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Everything about a checkpoint taken after `step` steps, in the `epoch`-th epoch (counted from 1).

    `facts`: of the architecture (BaseModel.facts); `prediction`: epsilon or v_prediction; `base_hashes`: see
    `base_model_hashes`. Empty with no_metadata.
    """
    if config.no_metadata:
        return {}
    found = {
        **_run_facts(config, plan, step=step, epoch=epoch, started_at=started_at),
        **_model_facts(config, base_hashes or {}),
        **_adapter_facts(config),
        **_optimisation_facts(config),
        **_noise_facts(config),
        **_dataset_facts(config, dataset, processes=processes, validation_images=validation_images),
        **{key: value for key, value in facts.items() if key.startswith("ss_")},
        **_modelspec(config, facts, prediction),
        **{f"lorapilot_{key}": value for key, value in config.metadata.items()},
    }
    return {key: str(value) for key, value in found.items()}


def base_model_hashes(path: Path) -> dict[str, str]:
    """The two hashes of the base model that sd-scripts writes; empty for a folder. Reads the whole file: seconds."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(0x100000)
        old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        file.seek(0)
        return {"ss_sd_model_hash": old, "ss_new_sd_model_hash": hashlib.file_digest(file, "sha256").hexdigest()}


def _run_facts(config: TrainingConfig, plan: Plan, *, step: int, epoch: int, started_at: float) -> dict[str, Any]:
    return {
        "ss_session_id": int(started_at),
        "ss_training_started_at": started_at,
        "ss_training_finished_at": time.time(),
        "ss_output_name": config.output_name,
        "ss_steps": step,
        "ss_epoch": epoch,
        "ss_max_train_steps": plan.total_steps,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "ss_num_epochs": plan.epochs,
        "ss_seed": config.seed,
        "ss_training_comment": config.training_comment or None,
    }


def _model_facts(config: TrainingConfig, base_hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "ss_sd_model_name": Path(config.pretrained_model_name_or_path).name,
        **base_hashes,
        **({"ss_vae_name": Path(config.vae).name} if config.vae else {}),
        "ss_clip_skip": config.clip_skip or None,
        "ss_max_token_length": None if config.max_token_length == 75 else config.max_token_length,
        "ss_mixed_precision": config.mixed_precision,
        "ss_full_fp16": False,
        "ss_fp8_base": False,
        "ss_fp8_base_unet": False,
        "ss_lowram": False,
    }


def _adapter_facts(config: TrainingConfig) -> dict[str, Any]:
    arguments = dict(argument.split("=", 1) for argument in config.network_args)
    return {
        "ss_network_module": config.network_module,
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha,
        "ss_network_dropout": config.network_dropout or None,
        **({"ss_network_args": json.dumps(arguments)} if arguments else {}),
    }


def _optimisation_facts(config: TrainingConfig) -> dict[str, Any]:
    arguments = ",".join(f"{key}={value}" for key, value in config.optimizer_options.items())
    optimizer = OPTIMIZER_CLASSES[config.optimizer_type]
    rates = config.text_encoder_lr
    return {
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.unet_lr,
        "ss_text_encoder_lr": list(rates) if len(rates) > 1 else next(iter(rates), None),
        "ss_optimizer": f"{optimizer}({arguments})" if arguments else optimizer,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": bool(config.gradient_checkpointing),
        "ss_scale_weight_norms": None,
        # a key of our own, since sd-scripts has no moving average
        **({"lorapilot_ema_decay": config.ema_decay} if config.ema_decay else {}),
    }


def _noise_facts(config: TrainingConfig) -> dict[str, Any]:
    facts = {
        "ss_noise_offset": config.noise_offset or None,
        "ss_noise_offset_random_strength": config.noise_offset_random_strength,
        "ss_adaptive_noise_scale": config.adaptive_noise_scale or None,
        "ss_multires_noise_iterations": config.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.multires_noise_discount,
        "ss_ip_noise_gamma": config.ip_noise_gamma or None,
        "ss_ip_noise_gamma_random_strength": config.ip_noise_gamma_random_strength,
        "ss_zero_terminal_snr": config.zero_terminal_snr,
        "ss_loss_type": config.loss_type,
        "ss_huber_schedule": config.huber_schedule,
        "ss_huber_c": config.huber_c,
        "ss_huber_scale": config.huber_scale,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_debiased_estimation": config.debiased_estimation_loss,
        "ss_prior_loss_weight": config.prior_loss_weight,
    }
    # sd-scripts trains with these, but writes neither down
    if config.scale_v_pred_loss_like_noise_pred:
        facts["ss_scale_v_pred_loss_like_noise_pred"] = True
    if config.v_pred_like_loss:
        facts["ss_v_pred_like_loss"] = config.v_pred_like_loss
    return facts


def _dataset_facts(
    config: TrainingConfig, dataset: Dataset, *, processes: int, validation_images: int
) -> dict[str, Any]:
    pictures = [picture for picture in dataset.pictures if not picture.is_regularisation]
    return {
        "ss_num_train_images": _with_repeats(pictures),
        "ss_num_reg_images": _with_repeats(dataset.regularisation),
        "ss_num_validation_images": validation_images,
        "ss_validation_split": config.validation_split,
        "ss_validation_seed": config.validation_seed,
        "ss_validate_every_n_epochs": config.validate_every_n_epochs or None,
        "ss_validate_every_n_steps": config.validate_every_n_steps or None,
        "ss_max_validation_steps": config.max_validation_steps or None,
        "ss_dataset_dirs": json.dumps(_folders(pictures)),
        "ss_reg_dataset_dirs": json.dumps(_folders(dataset.regularisation)),
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size * processes * config.gradient_accumulation_steps,
        "ss_resolution": config.resolution,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": config.min_bucket_reso if config.enable_bucket else None,
        "ss_max_bucket_reso": config.max_bucket_reso if config.enable_bucket else None,
        "ss_bucket_info": json.dumps(_bucket_info(dataset) if config.enable_bucket else None),
        "ss_cache_latents": config.keeps_latents,
        "ss_flip_aug": config.flip_aug,
        "ss_color_aug": config.color_aug,
        "ss_random_crop": config.random_crop,
        "ss_face_crop_aug_range": None,
        "ss_resize_interpolation": None,
        "ss_shuffle_caption": config.shuffle_caption,
        "ss_keep_tokens": config.keep_tokens,
        "ss_caption_dropout_rate": config.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": config.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": config.caption_tag_dropout_rate,
        "ss_tag_frequency": json.dumps(tag_frequency([*pictures, *dataset.regularisation])),
    }


def _with_repeats(pictures: Iterable[Picture]) -> int:
    return sum(picture.repeats for picture in pictures)


def _folders(pictures: list[Picture]) -> dict[str, dict[str, int]]:
    counts = Counter(picture.group for picture in pictures)
    repeats = {picture.group: picture.repeats for picture in pictures}
    return {group: {"n_repeats": repeats[group], "img_count": count} for group, count in counts.items()}


def _bucket_info(dataset: Dataset) -> dict[str, Any]:
    """Pictures with repeats in each bucket, and how far the buckets' width / height is from the pictures' own."""
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(sorted(dataset.bucket_counts().items()))
    }
    errors = [abs(_ratio(picture.placement.bucket) - _ratio(picture.size)) for picture in dataset.pictures]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _ratio(size: Size) -> float:
    return size[0] / size[1]


def tag_frequency(pictures: Iterable[Picture]) -> dict[str, dict[str, int]]:
    """Group -> tag in small letters -> how often it stands in captions. A tag is what commas separate."""
    groups: dict[str, Counter[str]] = {}
    for picture in pictures:
        tags = (tag.strip().lower() for tag in picture.caption.split(","))
        groups.setdefault(picture.group, Counter()).update(tag for tag in tags if tag)
    return {group: dict(counts) for group, counts in groups.items()}


def _modelspec(config: TrainingConfig, facts: Mapping[str, str], prediction: str) -> dict[str, str]:
    """ModelSpec 1.0.1; modelspec.hash_sha256 is added when the file is written."""
    width, height = config.resolution
    optional = {
        "description": config.metadata_description or config.training_comment,
        "author": config.metadata_author,
        "license": config.metadata_license,
        "tags": config.metadata_tags,
        "trigger_phrase": config.metadata_trigger_phrase,
        "usage_hint": config.metadata_usage_hint,
        "encoder_layer": str(config.clip_skip or ""),
        "timestep_range": _timestep_range(config),
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        **{key: value for key, value in facts.items() if key.startswith("modelspec.")},
        "modelspec.title": config.metadata_title or config.output_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        **{f"modelspec.{key}": value for key, value in optional.items() if value},
    }


def _timestep_range(config: TrainingConfig) -> str:
    """Empty when all timesteps are trained."""
    found = config.min_timestep, config.max_timestep
    return "" if found == (0, 1000) else "{},{}".format(*found)
