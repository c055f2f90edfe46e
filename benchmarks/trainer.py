"""How fast is the built-in trainer beside diffusers' script and sd-scripts? Prints the table of docs/trainer.md.

    python benchmarks/trainer.py
        --diffusers-script PATH/examples/text_to_image/train_text_to_image_lora_sdxl.py --diffusers-python PYTHON
        --sd-script PATH/sd-scripts/sdxl_train_network.py --sd-python PYTHON

The script comes from github.com/huggingface/diffusers, in the version that is installed; it also needs the packages
`datasets` and `torchvision`. sd-scripts comes from github.com/kohya-ss/sd-scripts; its requirements want a virtual
environment of their own, and SDXL's widths stand as numbers in its code: for the tiny base model, `--sd-script` has to
be a script of yours that replaces them and then runs it. Either may be left out. By default everything runs on the CPU
with the tiny base model; `--base`, `--pictures`, `--resolution` and `--precision` take a real one to a GPU.

Every program trains the same modules of the same base on the same pictures with the same batch, rank, precision and
number of threads, in turn and several times, so that a busy machine slows all of them; on one that is shared, images
per second of processor time say more than images per second. diffusers' script trains the attention only, sd-scripts
every linear layer of the transformers; ours does both, and each is compared with its equal. sd-scripts runs as its
users run it where speed matters: latents and text encoder outputs cached, PyTorch's attention.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "lora_trainer" / "assets"
REPEATS = 10
"""An epoch is a few dozen steps long, as in real runs."""
LEARNING_RATE = "1e-4"
ATTENTION, LINEAR = "attention", "all linear layers"
ATTENTION_ONLY = "include_patterns=attn[12]_to_"
PROGRESS = re.compile(r"steps:[^\r\n]*?(\d+)/(\d+) \[", re.IGNORECASE)
"""tqdm's line, which both of the others print after every step."""
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
VERSIONS = f"""
from importlib.metadata import PackageNotFoundError, version
for name in {PACKAGES}:
    try: print(name, version(name), end=", ")
    except PackageNotFoundError: pass
"""
SAMPLING_SECONDS = 0.05
Moments = dict[int, float]
"""Step -> when it was finished, seconds."""
Usage = list[tuple[float, float]]
"""(when, processor time so far), seconds."""


@dataclass(frozen=True)
class Settings:
    """What all programs have in common."""

    base: Path
    pictures: Path
    resolution: int
    batch: int
    rank: int
    steps: int
    warm_up: int
    threads: int
    precision: str


@dataclass(frozen=True)
class Timing:
    """Of one run."""

    images_per_second: float
    """After the warm-up."""
    images_per_cpu_second: float
    """Likewise, by the processor time that the process got."""
    first_step_seconds: float
    """From the start of the process to the end of the first step: imports, loading, caching."""
    peak_bytes: int


@dataclass
class Program:
    """One way to train. `command`: its argument list for a folder that holds the dataset and takes everything else."""

    name: str
    modules: str
    python: str
    command: Callable[[Settings, Path], list[str]]
    timings: list[Timing] = field(default_factory=list)

    def median(self, figure: str) -> float:
        return float(median(getattr(timing, figure) for timing in self.timings))


def ours(modules: str) -> Program:
    def command(settings: Settings, folder: Path) -> list[str]:
        config = folder / "config.toml"
        config.write_text(_our_options(settings, folder, modules))
        return [sys.executable, "-P", str(ROOT / "lora_trainer" / "__main__.py"), str(config)]

    return Program("ours", modules, sys.executable, command)


def _our_options(settings: Settings, folder: Path, modules: str) -> str:
    options = {
        "pretrained_model_name_or_path": str(settings.base),
        "train_data_dir": str(folder / "kohya"),
        "output_dir": str(folder / "out"),
        "resolution": settings.resolution,
        "train_batch_size": settings.batch,
        "max_train_steps": settings.steps,
        "network_dim": settings.rank,
        "network_alpha": settings.rank,
        "network_args": [ATTENTION_ONLY] if modules == ATTENTION else [],
        "network_train_unet_only": True,
        "learning_rate": float(LEARNING_RATE),
        "mixed_precision": settings.precision,
        "gradient_checkpointing": False,
        "threads": settings.threads,
    }
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())


def diffusers_script(script: Path, python: str) -> Program:
    def command(settings: Settings, folder: Path) -> list[str]:
        return [
            *(python, str(script)),
            f"--pretrained_model_name_or_path={settings.base}",
            f"--train_data_dir={folder / 'copies'}",
            f"--output_dir={folder / 'out'}",
            *("--caption_column=text", "--center_crop", f"--resolution={settings.resolution}"),
            *(f"--train_batch_size={settings.batch}", f"--max_train_steps={settings.steps}"),
            *(f"--rank={settings.rank}", f"--learning_rate={LEARNING_RATE}", f"--mixed_precision={settings.precision}"),
            *("--lr_scheduler=constant", "--lr_warmup_steps=0", "--seed=1"),
            f"--checkpointing_steps={settings.steps + 1}",
        ]

    return Program("diffusers' script", ATTENTION, python, command)


def sd_scripts(script: Path, python: str) -> Program:
    def command(settings: Settings, folder: Path) -> list[str]:
        return [
            *(python, str(script)),
            f"--pretrained_model_name_or_path={settings.base}",
            f"--train_data_dir={folder / 'kohya'}",
            *(f"--output_dir={folder / 'out'}", "--caption_extension=.txt"),
            *(f"--resolution={settings.resolution},{settings.resolution}", "--save_model_as=safetensors"),
            *(f"--train_batch_size={settings.batch}", f"--max_train_steps={settings.steps}"),
            *("--network_module=networks.lora", "--network_train_unet_only"),
            *(f"--network_dim={settings.rank}", f"--network_alpha={settings.rank}"),
            *(f"--learning_rate={LEARNING_RATE}", "--optimizer_type=AdamW", f"--mixed_precision={settings.precision}"),
            *("--cache_latents", "--cache_text_encoder_outputs", "--sdpa", "--no_half_vae", "--seed=1"),
            # what is cached in memory needs no worker processes
            "--max_data_loader_n_workers=0",
        ]

    return Program("sd-scripts", LINEAR, python, command)


def write_dataset(settings: Settings, folder: Path) -> None:
    """The same pictures in both layouts, their number a multiple of the batch so that no batch is smaller."""
    pictures = sorted(path for path in settings.pictures.iterdir() if path.suffix in (".png", ".jpg", ".webp"))
    whole = len(pictures) // settings.batch * settings.batch
    if not whole:
        raise SystemExit(f"{settings.pictures} has fewer pictures than a batch.")
    kohya, copies = folder / "kohya" / f"{REPEATS}_pictures", folder / "copies"
    kohya.mkdir(parents=True)
    copies.mkdir()
    rows = []
    for picture in pictures[:whole]:
        caption = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
        (kohya / picture.name).write_bytes(picture.read_bytes())
        (kohya / picture.name).with_suffix(".txt").write_text(caption, encoding="utf-8")
        for number in range(REPEATS):
            copy = copies / f"{number}-{picture.name}"
            copy.write_bytes(picture.read_bytes())
            rows.append(json.dumps({"file_name": copy.name, "text": caption}))
    (copies / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def measure(program: Program, settings: Settings) -> Timing:
    """Train once, in a process and a folder of its own. Raises RuntimeError with the program's last words."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(settings, folder)
        command = program.command(settings, folder)
        threads = str(settings.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        started = time.time()
        run = _run(command, folder, environment, settings.steps)
        moments = _moments_of_ours(folder / "out" / "events.jsonl") or run.moments
    if settings.steps not in moments:
        raise RuntimeError(f"{program.name} did not train {settings.steps} steps:\n{run.last_words}")
    start, end = moments[settings.warm_up], moments[settings.steps]
    images = settings.batch * (settings.steps - settings.warm_up)
    processor_seconds = run.processor_time(end) - run.processor_time(start)
    return Timing(images / (end - start), images / processor_seconds, moments[1] - started, run.peak_bytes)


@dataclass
class Run:
    """What is seen of a program from outside."""

    moments: Moments = field(default_factory=dict)
    """By its progress lines."""
    usage: Usage = field(default_factory=list)
    peak_bytes: int = 0
    """Largest resident size."""
    last_words: str = ""

    def processor_time(self, moment: float) -> float:
        return min(self.usage, key=lambda sample: abs(sample[0] - moment))[1]


def _run(command: list[str], folder: Path, environment: dict[str, str], steps: int) -> Run:
    run = Run()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    watched = psutil.Process(process.pid)
    pipe = process.stdout.fileno()  # type: ignore[union-attr]  # it is a pipe
    while True:
        is_readable = select.select([pipe], [], [], SAMPLING_SECONDS)[0]
        now, used = time.time(), watched.cpu_times()
        run.usage.append((now, used.user + used.system))
        if not is_readable:
            continue
        if not (chunk := os.read(pipe, 1 << 16)):
            break
        run.last_words = run.last_words[-4000:] + chunk.decode(errors="replace")
        for step, total in PROGRESS.findall(run.last_words):
            if int(total) == steps:
                run.moments.setdefault(int(step), now)
    largest = os.wait4(process.pid, 0)[2].ru_maxrss
    process.returncode = 0  # waited for already; what it did is judged by its steps
    run.peak_bytes = largest if sys.platform == "darwin" else largest * 1024
    return run


def _moments_of_ours(events: Path) -> Moments:
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["at"] for row in rows if row["event"] == "progress"}


def table(programs: list[Program]) -> str:
    lines = [
        "| program | trained | images/s | ours is | images per CPU second | ours is | first step, s | memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    equals = {program.modules: program for program in programs if program.name == "ours"}
    for program in programs:
        cells = [program.name, program.modules]
        for figure in ("images_per_second", "images_per_cpu_second"):
            speed, our_speed = program.median(figure), equals[program.modules].median(figure)
            rounds = ", ".join(f"{getattr(timing, figure):.1f}" for timing in program.timings)
            is_ours = program.name == "ours"
            cells += [f"{speed:.1f} ({rounds})", "" if is_ours else f"{our_speed / speed:.2f} times as fast"]
        cells += [f"{program.median('first_step_seconds'):.1f}", f"{program.median('peak_bytes') / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def facts(programs: list[Program], settings: Settings) -> str:
    """What somebody needs who wants to get the same figures."""
    lines = [f"{settings.base.name}, {settings.resolution} px, batch {settings.batch}, rank {settings.rank}, AdamW"]
    lines[0] += f", precision {settings.precision}, {settings.threads} threads"
    lines[0] += f", {settings.steps} steps of which {settings.warm_up} warm up"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines.append(f"{os.cpu_count()} CPUs, load {load} before the first run")
    for name, python in {program.name: program.python for program in programs}.items():
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
        lines.append(f"{name}: {versions.strip(', ')}")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--diffusers-script", type=Path, help="train_text_to_image_lora_sdxl.py")
    parser.add_argument("--diffusers-python", default=sys.executable, help="Python that has what it needs")
    parser.add_argument("--sd-script", type=Path, help="sdxl_train_network.py of sd-scripts, or what starts it")
    parser.add_argument("--sd-python", default=sys.executable, help="Python that has what it needs")
    parser.add_argument("--base", type=Path, default=ASSETS / "pilot-tiny", help="SDXL model, diffusers' layout")
    parser.add_argument("--pictures", type=Path, default=ASSETS / "demo-dataset", help="pictures beside .txt captions")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10, help="steps at the start that do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = _options()
    settings = Settings(
        options.base.resolve(),
        options.pictures.resolve(),
        options.resolution,
        options.batch,
        options.rank,
        options.steps,
        options.warm_up,
        options.threads,
        options.precision,
    )
    programs = []
    if options.diffusers_script:
        script = options.diffusers_script.resolve()
        programs += [ours(ATTENTION), diffusers_script(script, options.diffusers_python)]
    programs.append(ours(LINEAR))
    if options.sd_script:
        programs.append(sd_scripts(options.sd_script.resolve(), options.sd_python))
    print(facts(programs, settings))
    for _ in range(options.rounds):
        for program in programs:
            program.timings.append(measure(program, settings))
            print(f"{program.name}, {program.modules}: {program.timings[-1]}", file=sys.stderr)
    print(table(programs))


if __name__ == "__main__":
    main()
