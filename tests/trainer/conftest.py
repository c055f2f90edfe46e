"""Real short trainings of the tiny base model that ships with the trainer; nothing here needs Django."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "lora_trainer"
ASSETS = PACKAGE / "assets"
TIMEOUT_SECONDS = 240


class Trainer:
    """Starts the trainer the way that LoRA Pilot does: by the path of its `__main__.py`, from a foreign folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.started: list[subprocess.Popen] = []

    def options(self, **changes) -> dict:
        base = {
            "pretrained_model_name_or_path": str(ASSETS / "pilot-tiny"),
            "dataset_manifest": str(self.manifest()),
            "output_dir": str(self.output),
            "output_name": "face",
            "resolution": 64,
            "network_train_unet_only": True,
            "network_dim": 4,
            "network_alpha": 2,
            "network_args": ["conv_dim=2", "conv_alpha=4"],
            "network_dropout": 0.1,
            "learning_rate": 4e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 1,
            "train_batch_size": 2,
            "max_train_steps": 6,
            "min_snr_gamma": 5,
            "noise_offset": 0.05,
            "caption_dropout_rate": 0.2,
            "flip_aug": True,
            "save_every_n_steps": 2,
            "save_precision": "float",
            "threads": 1,
        }
        return {key: value for key, value in (base | changes).items() if value is not None}

    def manifest(self) -> Path:
        path = self.folder / "manifest.jsonl"
        pictures = sorted((ASSETS / "demo-dataset").glob("*.png"))[:5]
        rows = [{"image": str(one), "caption": one.with_suffix(".txt").read_text(), "repeats": 1} for one in pictures]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    def write(self, **changes) -> Path:
        path = self.folder / "config.toml"
        path.write_text(toml(self.options(**changes)))
        return path

    def command(self, config: Path, *flags: str, processes: int = 1) -> list[str]:
        started = [str(PACKAGE / "__main__.py"), str(config), *flags]
        if processes == 1:
            return [sys.executable, "-P", *started]
        launch = f"-m torch.distributed.run --nproc_per_node {processes} --master_port {free_port()} --no-python"
        return [sys.executable, "-P", *launch.split(), sys.executable, "-P", *started]

    def run(self, *flags: str, processes: int = 1, **changes) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(self.write(**changes), *flags, processes=processes),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def start(self, environment=None, **changes) -> subprocess.Popen:
        config = self.write(**changes)
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                self.command(config), cwd=self.folder, stdout=log, stderr=log, env=os.environ | (environment or {})
            )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Leave no process behind, whatever the test came to."""
        for process in self.started:
            process.kill()
            process.wait()

    def events(self) -> list[dict]:
        path = self.output / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def named(self, event: str) -> list[dict]:
        return [one for one in self.events() if one["event"] == event]

    def signal_at_step(self, process: subprocess.Popen, step: int, number: signal.Signals) -> int:
        """Wait for a finished step, send the signal and return the exit status."""
        self.wait_for_step(process, step)
        os.kill(process.pid, number)
        return process.wait(TIMEOUT_SECONDS)

    def wait_for_step(self, process: subprocess.Popen, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any(one["step"] >= step for one in self.named("progress")):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail((self.folder / "log").read_text())
            time.sleep(0.02)


def run_script(script: Path, *arguments: object) -> str:
    """Run a script that may import the trainer, out of reach of the repository's app `datasets`; returns its output."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lora_trainer").symlink_to(PACKAGE)
        done = subprocess.run(
            [sys.executable, "-P", str(script), *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def weights(path: Path) -> dict:
    """A file's tensors."""
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict


def differing(one: dict, other: dict) -> list[str]:
    """Names of the tensors that are not equal, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


def toml(options: dict) -> str:
    """Enough TOML for the tests: JSON is the same for texts, numbers, booleans and lists of them."""
    tables = {key: value for key, value in options.items() if isinstance(value, dict)}
    prompts = options.get("sample_prompts", [])
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items() if key not in {*tables, "sample_prompts"}]
    for key, value in [*tables.items(), *(("[sample_prompts]", prompt) for prompt in prompts)]:
        lines += [f"[{key}]", *(f"{name} = {json.dumps(one)}" for name, one in value.items())]
    return "\n".join(lines)


@pytest.fixture
def trainer(tmp_path):
    made = Trainer(tmp_path)
    yield made
    made.end()


@pytest.fixture
def trainer_in(tmp_path):
    """trainer_in("name"): another trainer, in a folder of its own."""

    def made(name):
        (tmp_path / name).mkdir()
        return Trainer(tmp_path / name)

    return made


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """Six steps, finished: the reference for every test that only looks at what a run leaves behind."""
    trainer = Trainer(tmp_path_factory.mktemp("short_run"))
    prompt = {"prompt": "sks face on a green background", "seed": 3, "steps": 4, "scale": 4.0}
    done = trainer.run(
        sample_prompts=[prompt],
        logging_dir=str(trainer.folder / "curves"),
        training_comment="a test",
        metadata={"run": "7", "dataset": "abc"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trainer.log = done.stdout
    return trainer
