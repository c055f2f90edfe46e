"""The metadata of a saved LoRA: sd-scripts' `ss_*` facts, the `modelspec.*` standard and our own `lorapilot_*`.

All values are texts, as safetensors wants. Paths appear by their last part only: a LoRA is made to be shared.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lora_trainer.config import TrainingConfig
from lora_trainer.data import Dataset

BASE_MODEL_VERSION = "sdxl_base_v1-0"


def build_metadata(
    config: TrainingConfig, dataset: Dataset, *, step: int, epoch: int, started_at: float, prediction: str, batches: int
) -> dict[str, str]:
    """Everything about a checkpoint taken after `step` steps, in the `epoch`-th epoch (counted from 1)."""
    facts = {
        **_training_facts(config, step=step, epoch=epoch, batches=batches),
        **_dataset_facts(config, dataset),
        "ss_training_started_at": started_at,
        "ss_training_finished_at": time.time(),
        "ss_session_id": int(started_at),
        **_modelspec(config, prediction),
        **{f"lorapilot_{key}": value for key, value in config.metadata.items()},
    }
    return {key: _text(value) for key, value in facts.items() if value is not None}


def _training_facts(config: TrainingConfig, *, step: int, epoch: int, batches: int) -> dict[str, Any]:
    network_args = dict(argument.split("=", 1) for argument in config.network_args)
    optimizer_args = ",".join(config.optimizer_args)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.network_dim,
        "ss_network_alpha": config.network_alpha,
        "ss_network_args": network_args or None,
        "ss_network_dropout": config.network_dropout or None,
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_sd_model_name": Path(config.pretrained_model_name_or_path).name,
        "ss_v2": False,
        "ss_output_name": config.output_name,
        "ss_steps": step,
        "ss_epoch": epoch,
        "ss_max_train_steps": config.max_train_steps,
        "ss_num_batches_per_epoch": batches,
        "ss_num_epochs": -(-config.max_train_steps * config.gradient_accumulation_steps // batches),
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_optimizer": f"torch.optim.adamw.AdamW({optimizer_args})",
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_noise_offset": config.noise_offset or None,
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": config.seed,
        "ss_training_comment": config.training_comment or None,
    }


def _dataset_facts(config: TrainingConfig, dataset: Dataset) -> dict[str, Any]:
    buckets = sorted(dataset.bucket_counts().items())
    return {
        "ss_resolution": str(config.resolution),
        "ss_num_train_images": dataset.images_per_epoch,
        "ss_num_reg_images": 0,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": config.train_batch_size,
        "ss_enable_bucket": config.enable_bucket,
        "ss_bucket_no_upscale": config.bucket_no_upscale,
        "ss_min_bucket_reso": config.min_bucket_reso if config.enable_bucket else None,
        "ss_max_bucket_reso": config.max_bucket_reso if config.enable_bucket else None,
        "ss_bucket_info": {
            "buckets": {str(i): {"resolution": list(size), "count": count} for i, (size, count) in enumerate(buckets)}
        },
        "ss_shuffle_caption": config.shuffle_caption,
        "ss_keep_tokens": config.keep_tokens,
        "ss_caption_dropout_rate": config.caption_dropout_rate,
        "ss_flip_aug": config.flip_aug,
        "ss_cache_latents": config.cache_latents,
        "ss_tag_frequency": tag_frequency(dataset),
        "ss_dataset_dirs": _dataset_dirs(dataset),
    }


def tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Group -> tag -> in how many pictures it stands. A tag is what commas separate."""
    groups: dict[str, Counter[str]] = {}
    for picture in dataset.pictures:
        tags = (tag.strip() for tag in picture.caption.split(","))
        groups.setdefault(picture.group, Counter()).update(tag for tag in tags if tag)
    return {group: dict(counts) for group, counts in groups.items()}


def _dataset_dirs(dataset: Dataset) -> dict[str, dict[str, int]]:
    counts = Counter(picture.group for picture in dataset.pictures)
    repeats = {picture.group: picture.repeats for picture in dataset.pictures}
    return {group: {"n_repeats": repeats[group], "img_count": count} for group, count in counts.items()}


def _modelspec(config: TrainingConfig, prediction: str) -> dict[str, Any]:
    width, height = config.resolution
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": config.output_name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.description": config.training_comment or None,
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
