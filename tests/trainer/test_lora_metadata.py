"""What a saved LoRA says about itself, against what sd-scripts writes for the same run."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from lora_trainer.buckets import Placement
from lora_trainer.config import from_table
from lora_trainer.data import Dataset, Picture
from lora_trainer.lora_metadata import base_model_hashes, build_metadata, tag_frequency
from lora_trainer.plan import make_plan

SD15 = {
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "diffusers",
}
# a run of sd-scripts on four pictures, three times each; left out: what it says about itself and its clock
SD_SCRIPTS = {
    "ss_adaptive_noise_scale": "None", "ss_base_model_version": "sd_v1", "ss_batch_size_per_device": "1",
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [128, 128], "count": 12}}, "mean_img_ar_error": 0.25}',
    "ss_bucket_no_upscale": "False", "ss_cache_latents": "True", "ss_caption_dropout_every_n_epochs": "0",
    "ss_caption_dropout_rate": "0.0", "ss_caption_tag_dropout_rate": "0.0", "ss_clip_skip": "None",
    "ss_color_aug": "False", "ss_dataset_dirs": '{"3_blob": {"n_repeats": 3, "img_count": 4}}',
    "ss_debiased_estimation": "False", "ss_enable_bucket": "True", "ss_epoch": "2", "ss_face_crop_aug_range": "None",
    "ss_flip_aug": "False", "ss_fp8_base": "False", "ss_fp8_base_unet": "False", "ss_full_fp16": "False",
    "ss_gradient_accumulation_steps": "1", "ss_gradient_checkpointing": "False", "ss_huber_c": "0.1",
    "ss_huber_scale": "1.0", "ss_huber_schedule": "snr", "ss_ip_noise_gamma": "None",
    "ss_ip_noise_gamma_random_strength": "False", "ss_keep_tokens": "0", "ss_learning_rate": "0.0001",
    "ss_loss_type": "l2", "ss_lowram": "False", "ss_lr_scheduler": "constant", "ss_lr_warmup_steps": "0",
    "ss_max_bucket_reso": "256", "ss_max_grad_norm": "1.0", "ss_max_token_length": "None", "ss_max_train_steps": "24",
    "ss_max_validation_steps": "None", "ss_min_bucket_reso": "64", "ss_min_snr_gamma": "None",
    "ss_mixed_precision": "no", "ss_multires_noise_discount": "0.3", "ss_multires_noise_iterations": "None",
    "ss_network_alpha": "2.0", "ss_network_dim": "4", "ss_network_dropout": "None",
    "ss_network_module": "networks.lora", "ss_noise_offset": "None", "ss_noise_offset_random_strength": "False",
    "ss_num_batches_per_epoch": "12", "ss_num_epochs": "2", "ss_num_reg_images": "0", "ss_num_train_images": "12",
    "ss_num_validation_images": "0", "ss_optimizer": "torch.optim.adamw.AdamW", "ss_output_name": "blob",
    "ss_prior_loss_weight": "1.0", "ss_random_crop": "False", "ss_reg_dataset_dirs": "{}",
    "ss_resize_interpolation": "None", "ss_resolution": "(128, 128)", "ss_scale_weight_norms": "None",
    "ss_sd_model_name": "rand_sd15.safetensors", "ss_seed": "42", "ss_shuffle_caption": "False", "ss_steps": "24",
    "ss_tag_frequency":
        '{"3_blob": {"blob": 4, "number 0": 1, "number 1": 1, "number 2": 1, "number 3": 1}}',
    "ss_text_encoder_lr": "None", "ss_total_batch_size": "1", "ss_training_comment": "None", "ss_unet_lr": "0.0001",
    "ss_v2": "False", "ss_validate_every_n_epochs": "None", "ss_validate_every_n_steps": "None",
    "ss_validation_seed": "None", "ss_validation_split": "0.0", "ss_zero_terminal_snr": "False",
    "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
    "modelspec.prediction_type": "epsilon", "modelspec.resolution": "128x128", "modelspec.sai_model_spec": "1.0.1",
    "modelspec.title": "blob",
}  # fmt: skip
OF_THE_MOMENT = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def config(**changes):
    options = {
        "pretrained_model_name_or_path": "/models/rand_sd15.safetensors",
        "train_data_dir": "/secret/pictures",
        "output_dir": "/secret/output",
        "output_name": "blob",
        "resolution": 128,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 256,
        "network_dim": 4,
        "network_alpha": 2,
        "unet_lr": 1e-4,
        "max_train_steps": 24,
    }
    return from_table(options | changes)


def picture(number=0, **changes):
    facts = {
        "path": Path(f"/secret/pictures/3_blob/{number}.png"),
        "caption": f"Blob, number {number}",
        "repeats": 3,
        "group": "3_blob",
        "size": (160, 128),
        "placement": Placement((128, 128), (160, 128), (16, 0)),
    }
    return Picture(**(facts | changes))


@pytest.fixture
def dataset():
    return Dataset(pictures=[picture(number) for number in range(4)])


def build(dataset, facts=SD15, prediction="epsilon", step=24, epoch=2, more=None, **changes):
    settings = config(**changes)
    return build_metadata(
        settings,
        dataset,
        facts=facts,
        prediction=prediction,
        plan=make_plan(settings, 12),
        step=step,
        epoch=epoch,
        started_at=1795457534.75,
        **(more or {}),
    )


def test_metadata_is_what_sd_scripts_writes(dataset):
    metadata = build(dataset)
    assert {key: value for key, value in metadata.items() if key not in OF_THE_MOMENT} == SD_SCRIPTS
    assert set(metadata) - set(SD_SCRIPTS) == OF_THE_MOMENT
    assert (metadata["ss_session_id"], metadata["ss_training_started_at"]) == ("1795457534", "1795457534.75")
    assert float(metadata["ss_training_finished_at"]) > 1.7e9
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", metadata["modelspec.date"])


def test_metadata_names_files_without_their_folders(dataset):
    metadata = build(dataset, vae="/secret/vae/kl.safetensors")
    assert metadata["ss_vae_name"] == "kl.safetensors"
    assert [key for key, value in metadata.items() if "secret" in value or "/models" in value] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clip_skip": 2}, {"ss_clip_skip": "2", "modelspec.encoder_layer": "2"}),
        ({"max_token_length": 225}, {"ss_max_token_length": "225"}),
        ({"text_encoder_lr": 5e-5}, {"ss_text_encoder_lr": "5e-05"}),
        ({"text_encoder_lr": [5e-5, 1e-5]}, {"ss_text_encoder_lr": "[5e-05, 1e-05]"}),
        ({"noise_offset": 0.05, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.01},
         {"ss_noise_offset": "0.05", "ss_noise_offset_random_strength": "True", "ss_adaptive_noise_scale": "0.01"}),
        ({"multires_noise_iterations": 6, "multires_noise_discount": 0.2},
         {"ss_multires_noise_iterations": "6", "ss_multires_noise_discount": "0.2"}),
        ({"ip_noise_gamma": 0.1}, {"ss_ip_noise_gamma": "0.1"}),
        ({"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 2.0},
         {"ss_loss_type": "huber", "ss_huber_schedule": "constant", "ss_huber_c": "0.2", "ss_huber_scale": "2.0"}),
        ({"zero_terminal_snr": True, "debiased_estimation_loss": True, "min_snr_gamma": 5},
         {"ss_zero_terminal_snr": "True", "ss_debiased_estimation": "True", "ss_min_snr_gamma": "5.0"}),
        ({"caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 0.1},
         {"ss_caption_dropout_every_n_epochs": "2", "ss_caption_tag_dropout_rate": "0.1"}),
        ({"color_aug": True, "random_crop": True},
         {"ss_color_aug": "True", "ss_random_crop": "True", "ss_cache_latents": "False"}),
        ({"optimizer_args": ["weight_decay=0.01", "betas=0.9,0.99"]},
         {"ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"}),
        ({"network_args": ["conv_dim=8", "conv_alpha=4"]},
         {"ss_network_args": '{"conv_dim": "8", "conv_alpha": "4"}'}),
        ({"v_pred_like_loss": 0.5}, {"ss_v_pred_like_loss": "0.5"}),
        ({"scale_v_pred_loss_like_noise_pred": True}, {"ss_scale_v_pred_loss_like_noise_pred": "True"}),
        ({"min_timestep": 100, "max_timestep": 900}, {"modelspec.timestep_range": "100,900"}),
        ({"ema_decay": 0.99}, {"lorapilot_ema_decay": "0.99"}),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 3},
         {"ss_batch_size_per_device": "2", "ss_total_batch_size": "6"}),
        ({"enable_bucket": False},
         {"ss_bucket_info": "null", "ss_min_bucket_reso": "None", "ss_max_bucket_reso": "None"}),
        ({"resolution": [192, 128]}, {"ss_resolution": "(192, 128)", "modelspec.resolution": "192x128"}),
        ({"validation_split": 0.25, "validation_seed": 7, "validate_every_n_steps": 10},
         {"ss_validation_split": "0.25", "ss_validation_seed": "7", "ss_validate_every_n_steps": "10"}),
        ({"metadata": {"run": "7"}}, {"lorapilot_run": "7"}),
    ],
)  # fmt: skip
def test_metadata_of_an_option(dataset, changes, expected):
    metadata = build(dataset, **changes)
    assert {key: metadata.get(key) for key in expected} == expected


def test_metadata_of_the_author_fills_modelspec(dataset):
    words = {
        "title": "My blob", "author": "Ada", "description": "A blob.", "license": "MIT", "tags": "blob, round",
        "trigger_phrase": "blob", "usage_hint": "Write blob.",
    }  # fmt: skip
    metadata = build(dataset, **{f"metadata_{key}": value for key, value in words.items()})
    assert {key: metadata[f"modelspec.{key}"] for key in words} == words
    assert build(dataset, training_comment="short")["modelspec.description"] == "short"


def test_metadata_of_a_velocity_model(dataset):
    facts = SD15 | {"ss_v2": "True", "modelspec.architecture": "stable-diffusion-v2-768-v/lora"}
    metadata = build(dataset, facts=facts, prediction="v_prediction")
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["ss_v2"] == "True"


def test_metadata_counts_regularisation_apart(dataset):
    folder = [picture(number, group="1_circle", caption="circle", repeats=1) for number in range(2)]
    dataset.regularisation = folder
    dataset.pictures += [picture(0, group="1_circle", caption="circle", repeats=6, is_regularisation=True)]
    metadata = build(dataset, prior_loss_weight=0.5)
    assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"]) == ("12", "2")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"3_blob": {"n_repeats": 3, "img_count": 4}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_circle": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(metadata["ss_tag_frequency"])["1_circle"] == {"circle": 2}
    assert metadata["ss_prior_loss_weight"] == "0.5"


def test_metadata_of_several_processes_and_held_back_pictures(dataset):
    metadata = build(dataset, more={"processes": 2, "validation_images": 3})
    assert (metadata["ss_total_batch_size"], metadata["ss_num_validation_images"]) == ("2", "3")


def test_metadata_is_empty_when_unwanted(dataset):
    assert build(dataset, no_metadata=True, metadata={"run": "7"}) == {}


def test_tag_frequency_counts_captions_not_repeats():
    pictures = [picture(caption="A, b,, a "), picture(caption="b"), picture(caption="", group="2_other")]
    assert tag_frequency(pictures) == {"3_blob": {"a": 2, "b": 2}, "2_other": {}}


def test_base_model_hashes_are_of_the_file(tmp_path, dataset):
    content = bytes(range(256)) * 5000
    path = tmp_path / "base.safetensors"
    path.write_bytes(content)
    expected = {
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
    }
    assert base_model_hashes(path) == expected
    assert expected.items() <= build(dataset, more={"base_hashes": expected}).items()
    assert base_model_hashes(tmp_path) == {}
