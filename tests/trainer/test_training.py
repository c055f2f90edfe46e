"""What a finished run leaves behind."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from lora_trainer.export import legacy_hash, model_hash

ASSETS = Path(__file__).resolve().parents[2] / "lora_trainer" / "assets"


@pytest.fixture(scope="module")
def lora(short_run):
    with safe_open(short_run.output / "face.safetensors", framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no dict


def test_files_have_the_promised_names(short_run):
    names = sorted(
        path.relative_to(short_run.output).as_posix() for path in short_run.output.rglob("*") if path.is_file()
    )
    states = [
        f"state/step0000000{n}/{f}"
        for n in (4, 6)
        for f in ("COMPLETE", "lora.safetensors", "state.json", "training.pt")
    ]
    assert names == sorted(
        [
            "events.jsonl",
            "face-step00000002.safetensors",
            "face-step00000004.safetensors",
            "face.safetensors",
            "samples/face_00000006_00.png",
            *states,
        ]
    )
    assert len(list((short_run.folder / "curves").glob("events.out.tfevents.*"))) == 1


def test_log_is_readable_and_ends_with_a_summary(short_run):
    lines = short_run.log.replace("\r", "\n").splitlines()
    assert lines[0] == "Pictures: 5 (5 an epoch with repeats)"
    assert any(line.startswith("steps: 100%|██████████| 6/6 [") for line in lines)
    assert lines[-1].startswith("Finished: 6 steps in 00:")
    assert short_run.log.endswith("\n")


def test_events_tell_the_story_in_order(short_run):
    events = short_run.events()
    assert all(list(event)[:3] == ["v", "event", "at"] and event["v"] == 1 for event in events)
    story = [event["event"] for event in events if event["event"] != "stage"]
    one_save = ["checkpoint", "state"]
    assert story == (
        ["started"] + (["progress"] * 2 + one_save) * 2 + ["progress"] * 2 + one_save + ["sample", "finished"]
    )
    assert [event["stage"] for event in events if event["event"] == "stage" and event["done"] == event["total"]] == [
        "loading model",
        "caching latents",
        "caching text",
        "sampling",
    ]


def test_events_have_the_promised_fields(short_run):
    fields = {event["event"]: set(event) - {"v", "event", "at"} for event in short_run.events()}
    assert fields == {
        "stage": {"stage", "done", "total"},
        "started": {
            "total_steps", "start_step", "resume", "images", "validation_images", "batches_per_epoch", "device",
            "processes", "precision", "batch_size", "parameters",
        },
        "progress": {
            "step", "total_steps", "epoch", "loss", "lr", "grad_norm", "steps_per_second", "images_per_second",
            "eta_seconds", "memory_bytes",
        },
        "checkpoint": {"path", "step", "bytes", "sha256", "final"},
        "state": {"path", "step"},
        "sample": {"path", "step", "index", "prompt", "negative_prompt", "seed", "width", "height"},
        "finished": {"step", "checkpoint", "sha256", "early"},
    }  # fmt: skip
    assert [(event["step"], event["epoch"]) for event in short_run.named("progress")] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip


def test_checkpoint_event_matches_the_file(short_run):
    for event in short_run.named("checkpoint"):
        content = (short_run.output / event["path"]).read_bytes()
        assert (event["bytes"], event["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [event["final"] for event in short_run.named("checkpoint")] == [False, False, True]


def test_keys_are_kohyas_with_the_real_alpha(lora):
    tensors, _ = lora
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha"] == 2
    assert tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"].shape == (4, 64)
    assert tensors["lora_unet_input_blocks_3_0_op.alpha"] == 4
    assert tensors["lora_unet_input_blocks_3_0_op.lora_down.weight"].shape == (2, 32, 3, 3)
    assert tensors["lora_unet_output_blocks_2_2_conv.lora_up.weight"].shape == (80, 2, 1, 1)
    assert tensors["lora_unet_middle_block_1_proj_in.alpha"] == 2
    assert tensors["lora_unet_input_blocks_1_0_emb_layers_1.lora_up.weight"].shape == (32, 4)


def test_metadata_says_how_it_was_made(lora):
    _, metadata = lora
    expected = {
        "ss_steps": "6", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_output_name": "face", "ss_learning_rate": "0.004",
        "ss_seed": "42",
        "ss_sd_model_name": "pilot-tiny", "ss_training_comment": "a test", "ss_epoch": "2", "ss_num_epochs": "2",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.title": "face",
        "modelspec.prediction_type": "epsilon", "lorapilot_run": "7", "lorapilot_dataset": "abc",
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "4"}
    assert json.loads(metadata["ss_tag_frequency"])["dataset"]["sks face on a green background"] == 1
    about_paths = {key: value for key, value in metadata.items() if not key.startswith("modelspec.")}
    assert [key for key, value in about_paths.items() if "/" in value] == []


def test_hashes_cover_the_weights_and_not_the_metadata(short_run, lora):
    _, metadata = lora
    content = (short_run.output / "face.safetensors").read_bytes()
    assert metadata["sshs_model_hash"] == model_hash(content)
    assert len(metadata["sshs_legacy_hash"]) == len(legacy_hash(content)) == 8


def test_saved_lora_draws_the_same_picture_in_diffusers(short_run, lora, tmp_path):
    (sample,) = short_run.named("sample")
    picture = tmp_path / "again.png"
    script = Path(__file__).with_name("reload_pipeline.py")
    file = short_run.output / "face.safetensors"
    arguments = [ASSETS / "pilot-tiny", file, picture, sample["prompt"], 3, 64, 4, 4.0]
    done = subprocess.run(
        [sys.executable, "-P", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tensors, _ = lora
    assert found["layers"] == sum(key.endswith(".alpha") for key in tensors)
    assert found["scales"] == [[2, 2.0], [4, 0.5]]
    ours = np.asarray(Image.open(short_run.output / sample["path"]))
    assert np.array_equal(ours, np.asarray(Image.open(picture)))
