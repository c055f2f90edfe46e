"""Several processes train one LoRA: here two on the CPU, elsewhere one a GPU."""

import os
import subprocess
from pathlib import Path

from tests.trainer.conftest import REPOSITORY, differing, weights

OPTIONS = {"max_train_steps": 4, "train_batch_size": 1, "network_dropout": 0.2, "cache_dir": "cache"}


def test_two_processes_train_together_and_resume_to_the_same_bits(trainer):
    done = trainer.run(**OPTIONS, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (started,) = trainer.named("started")
    # five pictures for two processes: the first comes again in the second's turn
    assert (started["processes"], started["batches_per_epoch"], started["device"][:5]) == (2, 3, "2 x c")
    assert [event["step"] for event in trainer.named("progress")] == [1, 2, 3, 4]
    assert [event["event"] for event in trainer.events()].count("finished") == 1
    whole = weights(trainer.output / "face.safetensors")

    done = trainer.run(**OPTIONS, resume=str(trainer.output / "state" / "step00000002"), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (trainer.named("started")[-1]["start_step"], trainer.named("started")[-1]["resume"]) == (2, "exact")
    assert differing(whole, weights(trainer.output / "face.safetensors")) == []

    done = trainer.run(**OPTIONS, resume=str(trainer.output / "state" / "step00000004"))
    assert done.returncode == 2
    assert trainer.named("error")[-1]["message"] == "'resume': this state is of 2 processes; start as many."


def test_gradients_are_averaged_over_processes(trainer):
    script = Path(__file__).with_name("average_gradients.py")
    command = trainer.command(script, processes=2)
    command[command.index(str(REPOSITORY / "lora_trainer" / "__main__.py"))] = str(script)
    environment = os.environ | {"PYTHONPATH": str(hidden_neighbours(trainer.folder))}
    done = subprocess.run(
        command[:-1], capture_output=True, text=True, check=False, env=environment, cwd=trainer.folder, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["0 [[1.5], [1.5]]", "1 [[1.5], [1.5]]"]


def hidden_neighbours(folder):
    """A path with the trainer's package alone: the app `datasets` beside it must not pass for Hugging Face's."""
    path = folder / "path"
    path.mkdir()
    (path / "lora_trainer").symlink_to(REPOSITORY / "lora_trainer")
    return path
