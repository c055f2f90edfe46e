"""Every way to end badly has its exit status, its event and its sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def refusal(trainer, done, code):
    """The last line, which must also be the error event's message."""
    (error,) = trainer.named("error")
    last = done.stdout.splitlines()[-1]
    assert (error["code"], last) == (code, f"Error: {error['message']}")
    assert "Traceback" not in done.stdout + done.stderr
    return error["message"]


def test_missing_model_exits_with_2(trainer):
    done = trainer.run(pretrained_model_name_or_path="/nowhere")
    assert done.returncode == 2
    assert refusal(trainer, done, "model") == (
        "The base model /nowhere does not exist. "
        "Choose an SD 1.5, SD 2 or SDXL model: a folder in diffusers' layout or one .safetensors file."
    )


def test_damaged_model_exits_with_2(trainer):
    folder = trainer.folder / "model"
    shutil.copytree(REPOSITORY / "lora_trainer" / "assets" / "pilot-tiny", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = trainer.run(pretrained_model_name_or_path=str(folder))
    assert done.returncode == 2
    assert "has only 4 bytes: it is no .safetensors file" in refusal(trainer, done, "model")


def test_bad_configuration_exits_with_2_and_still_tells_the_event_file(trainer):
    done = trainer.run(learning_rat=1)
    assert done.returncode == 2
    assert refusal(trainer, done, "config") == "Unknown option 'learning_rat'. Did you mean 'learning_rate'?"


def test_full_disk_exits_with_5(trainer):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = trainer.run(events_file="/dev/full")
    assert done.returncode == 5
    assert done.stdout.splitlines()[-1].startswith("Error: The disk is full")


def test_exploding_loss_exits_with_4_and_names_the_steps(trainer):
    done = trainer.run(learning_rate=1e30, lr_scheduler="constant", max_grad_norm=0, max_train_steps=50)
    assert done.returncode == 4
    assert "The loss was not a finite number from step" in refusal(trainer, done, "nan")
    assert trainer.named("progress")[-1]["loss"] is None


def test_dry_run_reports_and_writes_nothing(trainer):
    done = trainer.run("--dry-run", max_train_steps=9)
    assert done.returncode == 0
    *facts, memory, duration = done.stdout.splitlines()
    assert facts == [
        "Pictures: 5 (5 an epoch with repeats)",
        "  bucket 64x64: 5",
        "Dropped pictures: 0",
        f"Base model: {REPOSITORY}/lora_trainer/assets/pilot-tiny",
        "Steps: 9, 3 an epoch, 3.0 epochs",
    ]
    assert re.fullmatch(r"Memory for the UNet and its LoRA: about \d+ MB, \d+ MB with gradient_checkpointing", memory)
    assert re.fullmatch(
        r"Time: about [\d:]+, [\d.e-]+ s a step: [\d.e-]+ TFLOP at 35% of the [\d.]+ TFLOP/s measured on the CPU",
        duration,
    )
    assert not trainer.output.exists()


def test_print_config_is_complete_toml(trainer):
    done = trainer.run("--print-config")
    assert done.returncode == 0
    assert 'output_name = "face"' in done.stdout.splitlines()
    assert "max_grad_norm = 1.0" in done.stdout.splitlines()


def test_module_start_from_the_repository_works(trainer):
    done = subprocess.run(
        [sys.executable, "-m", "lora_trainer", str(trainer.write()), "--print-config"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


PROBE = """
import importlib.util, json, runpy, sys
main = importlib.util.spec_from_file_location("start", sys.argv[1])
start = importlib.util.module_from_spec(main)
main.loader.exec_module(start)
start.register_package()
start.hide_neighbours()
import lora_trainer.config
from transformers.utils import import_utils
print(json.dumps([importlib.util.find_spec("datasets") is None, "django" in sys.modules, "torch" in sys.modules]))
print(import_utils.is_datasets_available())
"""


@pytest.mark.parametrize("exposed", [False, True])
def test_our_datasets_app_never_passes_for_hugging_faces(trainer, exposed):
    environment = os.environ | ({"PYTHONPATH": str(REPOSITORY)} if exposed else {})
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(REPOSITORY / "lora_trainer" / "__main__.py")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts, available = done.stdout.splitlines()
    assert json.loads(facts)[:2] == [True, False]
    assert available == "False"


def test_configuration_half_needs_no_torch():
    code = "import sys, lora_trainer.command, lora_trainer.config, lora_trainer.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
