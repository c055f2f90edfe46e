"""Several processes train one LoRA: here two on the CPU, elsewhere one a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_trainer.state_files import complete_states
from tests.trainer.conftest import PACKAGE, REPOSITORY, TIMEOUT_SECONDS, Trainer, differing, free_port, weights

OPTIONS = {
    "max_train_steps": 12,
    "train_batch_size": 1,
    "network_dropout": 0.2,
    "cache_dir": "cache",
    "save_every_n_steps": 6,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes, finished."""
    trainer = Trainer(tmp_path_factory.mktemp("whole"))
    done = trainer.run(**OPTIONS, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return trainer


def test_two_processes_train_together(whole):
    (started,) = whole.named("started")
    # five pictures for two processes: the first comes again in the second's turn
    assert (started["processes"], started["batches_per_epoch"], started["device"][:5]) == (2, 3, "2 x c")
    assert [event["step"] for event in whole.named("progress")] == list(range(1, 13))
    assert [event["event"] for event in whole.events()].count("finished") == 1


def test_run_under_accelerate_launch_is_stopped_and_resumes_to_the_same_bits(trainer, whole):
    process = start_with_accelerate(trainer, **OPTIONS)
    trainer.wait_for_step(process, 1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # to all of them, as a terminal does it, and LoRA Pilot; the launcher sends each of the others one more, which may
    # come so soon that it is one with the first: hence a third
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    for worker in workers:
        os.kill(int(worker), signal.SIGINT)
    assert process.wait(TIMEOUT_SECONDS) == 1  # the launcher's word for everything but success
    stopped = trainer.events()[-1]
    assert stopped["event"] == "stopped"
    assert trainer.named("error") == []
    assert 0 < stopped["step"] < OPTIONS["max_train_steps"]
    state = trainer.output / stopped["state"]
    assert complete_states(trainer.output / "state")[0] == (state, stopped["step"])
    assert len(workers) == 2
    log = (trainer.folder / "log").read_text()
    assert log.count("Stopping after this step") == 2
    assert f"Stopped after step {stopped['step']}; resume from {state}" in log.splitlines()

    done = trainer.run(**OPTIONS, resume=str(state), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    started = trainer.named("started")[-1]
    assert (started["start_step"], started["resume"]) == (stopped["step"], "exact")
    final = "face.safetensors"
    assert differing(weights(whole.output / final), weights(trainer.output / final)) == []


def start_with_accelerate(trainer, **options):
    """As docs/trainer.md says it, in a process group of its own."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    environment = {"PYTHONSAFEPATH": "1", "PET_STANDALONE": "1", "PET_SHUTDOWN_TIMEOUT": "60"}
    with (trainer.folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*launch, str(PACKAGE / "__main__.py"), str(trainer.write(**options))],
            cwd=trainer.folder,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,
        )
    trainer.started.append(process)
    return process


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


@pytest.mark.parametrize(
    ("how", "statuses", "code", "sentences"),
    [
        ("memory", [1, 3], "out_of_memory", ["", "Error: This machine ran out of memory."]),
        ("killed", [1, -signal.SIGKILL], "process_lost", ["Error: Another process of this run is gone:", ""]),
    ],
)
def test_loss_of_one_process_is_told_once_and_with_its_cause(trainer, how, statuses, code, sentences):
    path = trainer.folder / "events.jsonl"
    processes = [start_one_of_two(trainer, rank, port, how, path) for port in [free_port()] for rank in (0, 1)]
    said = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == statuses
    assert all(map(str.startswith, said, sentences)), said
    assert said.count("") == 1
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event.get("code")) for event in events] == [("exchanged", None), ("error", code)]


def start_one_of_two(trainer, rank, port, *arguments):
    places = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in places.items()}
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("lose_a_process.py")), *map(str, arguments)],
        env=os.environ | environment | {"PYTHONPATH": str(hidden_neighbours(trainer.folder))},
        stdout=subprocess.PIPE,
        text=True,
    )
    trainer.started.append(process)
    return process


def hidden_neighbours(folder):
    """A path with the trainer's package alone: the app `datasets` beside it must not pass for Hugging Face's."""
    path = folder / "path"
    if not path.exists():
        path.mkdir()
        (path / "lora_trainer").symlink_to(REPOSITORY / "lora_trainer")
    return path
