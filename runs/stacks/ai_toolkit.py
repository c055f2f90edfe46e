"""AI Toolkit: configured by YAML, asked to save and stop through a small database, proved by its last file.

Read from v0.12.26 (27a03a91): jobs/process/BaseSDTrainProcess.py, extensions_built_in/sd_trainer/DiffusionTrainer.py,
toolkit/config_modules.py, toolkit/logging_aitk.py. Where the operator put it: runs/stacks/installation.py. Its options:
runs/stacks/options/ai_toolkit.toml.

It writes into the run's folder itself and keeps its own step count: weights under their step, one `optimizer.pt` that
belongs to the last weights, `loss_log.db` with the loss of each step. A state is both together. Asked for its next
start it takes the weights whose inode changed last (ctime), whatever they are: so nothing moves or rewrites them, the
provenance goes into the file through AI Toolkit's own `meta`, and each resume first touches the state that it means.
The weights that it saves on its way at step n have seen n + 1 updates, and it repeats that one after a resume.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_trainer.safetensors_header import HeaderError, read_header
from lorapilot import workspace
from lorapilot.errors import UserError
from models_registry.enums import role_within
from runs import logfile
from runs.enums import DeviceKind, Status
from runs.spec import RunSpec
from runs.stacks import ai_toolkit_keys, ask_ai_toolkit, option_table
from runs.stacks.ai_toolkit_keys import KEEP_ALL, OPTIMIZERS, as_yaml, dataset_keys, keys_of, nested
from runs.stacks.base import (
    Cause,
    CheckpointRemoved,
    CheckpointSaved,
    Exit,
    Hopeless,
    Imported,
    LaunchPlan,
    ModelFacts,
    Noted,
    Observation,
    Outcome,
    Progress,
    Reading,
    SampleDrawn,
    Stage,
    Started,
    StateSaved,
    StopStep,
    TrainingJob,
    hub_snapshots,
    steps_between_saves,
    trainer_environment,
    without_counterpart,
    without_parts,
    wrong_architecture,
)
from runs.stacks.collecting import digest_of
from runs.stacks.console import (
    LAST_BYTES,
    Failure,
    failure,
    judge,
    log_pieces,
    pieces,
    progress_bar,
    steps_per_second,
)
from runs.stacks.installation import installation_error, program_of
from runs.stacks.staging import staged_folders


@dataclass(frozen=True, slots=True)
class Family:
    """How AI Toolkit trains models of one architecture. Of a name for `arch` that it does not know it makes SD 1.5.

    `parts`: the key of each further file that it needs, by its role; `folders`: as `parts`, where it may be left out
    and counts only as a folder. `hub`: what it takes from Hugging Face in any case; `hub_of_a_file`: for the layout
    of a single file.
    """

    arch: str
    layouts: tuple[str, ...] = ("folder",)
    parts: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)
    hub: tuple[str, ...] = ()
    hub_of_a_file: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the user's options win over it
    is_flow: bool = True  # flow matching, not noise prediction
    trains_text_encoders: bool = False


DDPM = {"train.noise_scheduler": "ddpm", "sample.sampler": "ddpm"}
FLOW = {"train.noise_scheduler": "flowmatch", "sample.sampler": "flowmatch"}
EITHER = ("folder", "file")
VAE = {"vae": "model.vae_path"}
# Not here: LTX-Video (it knows LTX-2 only), HunyuanImage, HunyuanVideo.
FAMILIES: dict[str, Family] = {
    "sd15": Family(
        "sd1", EITHER, folders=VAE, hub_of_a_file="stable-diffusion-v1-5/stable-diffusion-v1-5", fixed=DDPM,
        is_flow=False, trains_text_encoders=True,
    ),
    "sd2": Family(
        "sd2", EITHER, folders=VAE, hub_of_a_file="stabilityai/stable-diffusion-2-1", fixed=DDPM,
        is_flow=False, trains_text_encoders=True,
    ),
    "sdxl": Family(
        "sdxl", EITHER, folders=VAE, hub_of_a_file="stabilityai/stable-diffusion-xl-base-1.0", fixed=DDPM,
        is_flow=False, trains_text_encoders=True,
    ),
    "sd3": Family("sd3", fixed=FLOW),
    # Some checks of its options look at `is_flux` before `arch` has set it.
    "flux": Family("flux", folders=VAE, fixed=FLOW | {"model.is_flux": True}),
    "chroma": Family("chroma", ("file",), hub=("ostris/Flex.1-alpha",), fixed=FLOW),
    "lumina2": Family("lumina2", folders={"llm": "model.te_name_or_path"}, fixed=FLOW),
    "hidream": Family("hidream", parts={"llm": "model.model_kwargs.llama_model_path"}, fixed=FLOW),
    "omnigen2": Family("omnigen2", fixed=FLOW),
    "wan": Family("wan21", fixed=FLOW),
    "wan22": Family("wan22_14b", hub=("ai-toolkit/wan2.1-vae",), fixed=FLOW),
    "qwen_image": Family("qwen_image", fixed=FLOW),
    "z_image": Family("zimage", fixed=FLOW),
    "flux2": Family(
        "flux2", ("file",), parts=VAE, hub=("mistralai/Mistral-Small-3.1-24B-Instruct-2503",), fixed=FLOW
    ),
    "anima": Family("anima", fixed=FLOW),
}  # fmt: skip
UNUSED = ("validation_share", "save_best", "caption_tokens", "gpus")
ONLY_SD = ("min_snr_gamma", "noise_offset")  # of the diffusion loss; flow matching has neither
DATASET = "datasets."  # before the names of options that each of its datasets has
DIFFER_EACH_TIME = ("datasets.random_crop", "datasets.random_scale", "datasets.augments")
STATES_KEPT = 2  # in a run that sets no cadence
JOB = "lorapilot"
SAVE_SECONDS = 600.0  # the step under way, the samples under way, then writing
CONFIG, LOSSES, OPTIMIZER, SAMPLES = "config.yaml", "loss_log.db", "optimizer.pt", "samples"
OWN_ENTRIES = (CONFIG, LOSSES, OPTIMIZER, SAMPLES, "learnable_snr.json", "tensorboard")
# Weights with one of these anywhere in their path count as something else than a LoRA when it looks for the newest;
# brackets and the like would be patterns to it.
NEVER_IN_A_PATH = ("_LoRA", "_refiner", "_t2i", "_cn", "[", "]", "*", "?")


class AiToolkitStack:
    key = "ai_toolkit"
    name = "AI Toolkit"
    architectures = frozenset(FAMILIES)
    saves_on_stop = True
    reads_log = True

    def table(self) -> option_table.OptionTable:
        return option_table.load_table("ai_toolkit")

    def check(self) -> str:
        outputs = str(workspace.outputs().resolve())
        if wrong := next((mark for mark in NEVER_IN_A_PATH if mark in outputs), ""):
            return (
                f"The path of the workspace has {wrong} in it: AI Toolkit would not find its own checkpoints there. "
                "Move the workspace to another folder."
            )
        return installation_error("ai_toolkit")

    def refusal(self, model: ModelFacts) -> str:
        if wrong := wrong_architecture(self, model):
            return wrong
        family = FAMILIES[model.architecture]
        if model.layout not in family.layouts:
            wanted = "a diffusers folder" if "folder" in family.layouts else "a single file"
            return f"{self.name} reads models of this kind from {wanted}, and {model.name} is none."
        if lacking := without_parts(self.name, model, family.parts):
            return lacking
        wanted_repos = [*family.hub, *([family.hub_of_a_file] if model.layout == "file" else [])]
        if absent := [repo for repo in wanted_repos if repo and not _is_cached(repo)]:
            what = f"{self.name} takes {' and '.join(absent)} from Hugging Face for this model, which runs do without."
            how = "Download it into cache/huggingface of the workspace first (HF_HOME)"
            return f"{what} {how}{', or use the model as a diffusers folder' if family.hub_of_a_file else ''}."
        return ""

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        for is_wrong, field_name, sentence in _contradictions(spec, options):
            if is_wrong:
                raise UserError(sentence, field=field_name)

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        family = FAMILIES.get(architecture, FAMILIES["sdxl"])
        fields = [*UNUSED, *(ONLY_SD if family.is_flow else ()), *([] if _can_warm_up(spec) else ["warmup_steps"])]
        if spec.lr_schedule == "cosine_with_restarts":
            fields.append("lr_cycles")
        if not family.trains_text_encoders:
            fields.append("text_encoder_learning_rate")
        if spec.shuffle_caption:
            fields.append("keep_tokens")
        lost = without_counterpart(self, fields, spec)
        if family.trains_text_encoders and spec.text_encoder_learning_rate not in (0, spec.learning_rate):
            lost.append(f"{self.name} trains text encoders with the same learning rate as the rest.")
        if spec.optimizer == "Prodigy" and spec.learning_rate < 0.1:
            lost.append(f"With Prodigy {self.name} takes a learning rate below 0.1 for 1.")
        return lost

    def prepare(self, job: TrainingJob) -> None:
        """So that AI Toolkit starts from the state that is meant. Repeatable."""
        for torn in _torn(job):
            torn.unlink(missing_ok=True)
        for path in _meant(job):
            times = path.stat()
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # changes the ctime only

    def compile(self, job: TrainingJob) -> LaunchPlan:
        home, python = program_of("ai_toolkit")
        _check_name(job.name)
        _check_parts(job)
        folders, links, captions = staged_folders(job)
        config = job.attempt_folder / f"{job.name}.yaml"
        text = as_yaml(_config(job, folders))
        asking = [str(_database(job.attempt_folder)), str(job.folder / OPTIMIZER), str(job.start_step)]
        return LaunchPlan(
            files={config: text, _database(job.attempt_folder): _job_database(), **captions},
            links=links,
            config=config,
            argv=[str(python), "run.py", str(config)],
            env=trainer_environment(job, workspace.cache())
            | {"AITK_JOB_ID": JOB, "COLUMNS": "300", "TOKENIZERS_PARALLELISM": "false"},
            cwd=home,
            # No signal makes it save.
            stop=[
                StopStep("", SAVE_SECONDS, [sys.executable, "-I", ask_ai_toolkit.__file__, *asking]),
                StopStep("SIGINT", 10),
                StopStep("SIGTERM", 5),
                StopStep("SIGKILL", 5),
            ],
            not_expressed=[*self.not_expressed(job.spec, job.architecture), *_unused_parts(job)],
        )

    def report(self, reading: Reading) -> Path:
        return reading.log

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        return _Console(reading).read(chunk)

    def measure(self, reading: Reading) -> list[Observation]:
        measured: list[Observation] = list(_losses(reading))
        return [*measured, *_last_facts(reading)] if reading.is_over else measured

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        return [(save.files[0], save.step) for save in _states(folder)]

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        nan_step = _nan_step(log_pieces(reading.log, reading.log_offset), reading.name)
        outcome = judge(reading, exit_, failures=FAILURES, unfinished=_unfinished(reading), nan_step=nan_step)
        saved = _states(reading.folder)
        if outcome.status == Status.STOPPED and not exit_.signals and saved and saved[0].at >= _started_at(reading):
            return Outcome(Status.STOPPED, f"Stopped at step {saved[0].step:,}; weights and state are saved.")
        return outcome

    def read_config(self, text: str) -> Imported:
        """A YAML or JSON for AI Toolkit that somebody brings along."""
        return ai_toolkit_keys.read_config(self.table(), text)


# --- What it can and cannot -------------------------------------------------------------------------------------------
def _contradictions(spec: RunSpec, options: Mapping[str, Any]) -> Iterator[tuple[bool, str, str]]:
    """What AI Toolkit would refuse after minutes, or silently do otherwise: is it so, the field, the sentence."""
    has = options.get
    yield (
        spec.optimizer not in OPTIMIZERS and "train.optimizer" not in options,
        "optimizer",
        f"AI Toolkit has no {spec.optimizer}. Choose one of: {', '.join(OPTIMIZERS)}.",
    )
    cached = has("datasets.cache_latents") or has("datasets.cache_latents_to_disk")
    for key in DIFFER_EACH_TIME:
        sentence = (
            "Pictures that are cropped, scaled or coloured at random cannot be kept encoded: leave one of them out."
        )
        yield bool(cached and has(key)), f"options.{key}", sentence
    varies = spec.shuffle_caption or spec.caption_dropout or spec.text_encoder_learning_rate
    yield (
        bool(has("train.cache_text_embeddings") and varies),
        "options.train.cache_text_embeddings",
        "Captions that are shuffled or dropped, or whose encoders learn, cannot be kept encoded.",
    )
    yield (
        has("train.train_unet") is False and not spec.text_encoder_learning_rate,
        "options.train.train_unet",
        "Nothing would learn: set a text-encoder rate, or train the denoiser.",
    )
    stages = [has("model.model_kwargs.train_high_noise"), has("model.model_kwargs.train_low_noise")]
    yield (
        stages == [False, False],
        "options.model.model_kwargs.train_low_noise",
        "Train at least one of the two stages.",
    )
    preserves = bool(has("train.diff_output_preservation"))
    yield (
        preserves and not has("trigger_word"),
        "options.train.diff_output_preservation",
        "Preserving what the model draws without the trigger word needs a trigger word: set trigger_word.",
    )
    yield (
        preserves and bool(has("train.blank_prompt_preservation")),
        "options.train.blank_prompt_preservation",
        "Only one of diff_output_preservation and blank_prompt_preservation can be on.",
    )


def _can_warm_up(spec: RunSpec) -> bool:
    return spec.lr_schedule.startswith("constant")


def _is_cached(repo: str) -> bool:
    snapshots = hub_snapshots(workspace.cache(), repo)
    return snapshots.is_dir() and any(snapshots.iterdir())


def _check_name(name: str) -> None:
    """It takes everything in its folder that begins with the run's name for a checkpoint of it."""
    if taken := next((entry for entry in OWN_ENTRIES if entry.startswith(name)), ""):
        raise UserError(
            f"AI Toolkit writes {taken} into the run's folder and would take it for a checkpoint of {name!r}. "
            "Start the run under another name."
        )


def _check_parts(job: TrainingJob) -> None:
    if (model := job.parts.get("llm")) and model.is_file():
        raise UserError(
            f"AI Toolkit reads language models from a folder with their tokenizer, and {model.name} is a single file: "
            "attach the folder on the model's page."
        )


def _unused_parts(job: TrainingJob) -> list[str]:
    family = FAMILIES[job.architecture]
    files = [role for role in family.folders if role in job.parts and not job.parts[role].is_dir()]
    return [
        f"The {role_within(role)} file of the model is not used: AI Toolkit reads it from a diffusers folder."
        for role in files
    ]


# --- The configuration ------------------------------------------------------------------------------------------------
def _config(job: TrainingJob, folders: Mapping[int, Path]) -> dict[str, Any]:
    """The whole YAML: the settings, then the family's own values, then the user's options, then ours."""
    family = FAMILIES[job.architecture]
    options = option_table.options_outside(job.options, DATASET)
    keys = _order() | _of_spec(job, family) | dict(family.fixed) | options | _ours(job, family)
    process = nested(keys)
    process["datasets"] = _datasets(job, folders)
    config: dict[str, Any] = {"job": "extension", "config": {"name": job.name, "process": [process]}}
    return config | {"meta": dict(job.provenance)}


def _order() -> dict[str, Any]:
    """Keys that a person looks for first come first."""
    return {"type": "diffusion_trainer", "model.name_or_path": "", "model.arch": "", "network.type": "lora"}


def _of_spec(job: TrainingJob, family: Family) -> dict[str, Any]:
    spec = job.spec
    keys = keys_of(spec, is_flow=family.is_flow, trains_text_encoders=family.trains_text_encoders)
    keys["sample.neg"] = ""  # without a text the text encoders fail
    keys["training_seed"] = (spec.seed + job.start_step) % 2**31  # else a resume draws the first steps' noise again
    if job.device == DeviceKind.CPU:
        keys["train.dtype"] = "fp32"
    if job.prediction_type == "v_prediction" and not family.is_flow:
        keys["model.is_v_pred"] = True
    return keys


def _ours(job: TrainingJob, family: Family) -> dict[str, Any]:
    spec = job.spec
    own_parts = {key: job.parts[role] for role, key in family.parts.items() if role in job.parts}
    own_parts |= {key: job.parts[role] for role, key in family.folders.items() if _is_folder(job, role)}
    return {
        "model.name_or_path": str(job.base_model),
        "model.arch": family.arch,
        **{key: str(path) for key, path in own_parts.items()},
        "training_folder": str(job.folder.parent),
        "sqlite_db_path": str(_database(job.attempt_folder)),
        "log_dir": str(job.folder / "tensorboard"),
        "logging.log_every": 1,
        "logging.use_ui_logger": True,
        "save.save_every": steps_between_saves(spec),
        "save.max_step_saves_to_keep": KEEP_ALL,
        "save.save_format": "safetensors",
        "train.disable_sampling": not spec.sample_prompts,
        "sample.sample_every": spec.sample_every_steps or spec.steps * 2,  # it draws at both ends in any case
        "sample.width": spec.resolution,
        "sample.height": spec.resolution,
        "sample.sample_steps": spec.sample_steps,
        "sample.guidance_scale": spec.sample_scale,
        "sample.seed": spec.sample_seed,
        "sample.format": "png",
        "sample.samples": [
            {"prompt": _without_flags(prompt), "seed": _sample_seed(spec, index)}
            for index, prompt in enumerate(spec.sample_prompts)
        ],
    }


def _is_folder(job: TrainingJob, role: str) -> bool:
    return role in job.parts and job.parts[role].is_dir()


def _sample_seed(spec: RunSpec, index: int) -> int:
    return spec.sample_seed + index


def _without_flags(prompt: str) -> str:
    """In a prompt it reads what stands behind "--" as a flag, one of which opens a file."""
    return re.sub(r"-{2,}", "–", prompt)


def _datasets(job: TrainingJob, folders: Mapping[int, Path]) -> list[dict[str, Any]]:
    own = option_table.options_within(job.options, DATASET)
    caches = not any(job.options.get(key) for key in DIFFER_EACH_TIME)
    return [
        {
            "folder_path": str(folder),
            "num_repeats": repeats,
            "caption_ext": "txt",
            **dataset_keys(job.spec),
            "cache_latents_to_disk": caches,
            **own,
        }
        for repeats, folder in folders.items()
    ]


def _database(attempt_folder: Path) -> Path:
    return attempt_folder / "job.sqlite3"


def _job_database() -> bytes:
    """The one table that it reads requests from and tells its step to, with this job in it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(
            "CREATE TABLE Job (id TEXT PRIMARY KEY, status TEXT, info TEXT, step INTEGER, speed_string TEXT, "
            "stop INTEGER DEFAULT 0, return_to_queue INTEGER DEFAULT 0, save_now INTEGER DEFAULT 0, "
            "sample_now INTEGER DEFAULT 0)"
        )
        connection.execute("INSERT INTO Job (id) VALUES (?)", (JOB,))
        connection.commit()
        return connection.serialize()


# --- Weights and states -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Save:
    """What it saved at once: one file, or two for models of two stages. `step`: as it would go on from it."""

    files: tuple[Path, ...]
    step: int
    at: float  # Unix seconds
    is_final: bool


def _weights(folder: Path, name: str) -> dict[str, list[Path]]:
    """The weights in a run's folder by what they are called without their stage, whole or not."""
    called = re.compile(rf"({re.escape(name)}(?:_\d{{9}})?)(?:_high_noise|_low_noise)?\.safetensors")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (match := called.fullmatch(path.name)) and path.is_file():
            found.setdefault(match[1], []).append(path)
    return found


def _saves(folder: Path, name: str) -> list[Save]:
    """All that is whole, newest first."""
    saves = [_save(files, is_final=stem == name) for stem, files in _weights(folder, name).items()]
    return sorted((save for save in saves if save), key=lambda save: (save.step, save.at), reverse=True)


def _save(files: list[Path], *, is_final: bool) -> Save | None:
    steps = [_step_of(path) for path in files]
    if None in steps:
        return None
    at = max(path.stat().st_mtime for path in files)
    return Save(tuple(files), min(step for step in steps if step is not None), at, is_final)


def _step_of(path: Path) -> int | None:
    """As its metadata says; None for a file that is not whole, or none of AI Toolkit's."""
    try:
        return int(json.loads(read_header(path).metadata["training_info"])["step"])
    except (HeaderError, OSError, KeyError, ValueError, TypeError):
        return None


def _states(folder: Path) -> list[Save]:
    """Newest first. Weights that are newer than the optimizer's file were saved by somebody who was killed before he
    had written that, too: with older ones at hand they do not count."""
    saves = _saves(folder, folder.name)
    try:
        optimizer_at = (folder / OPTIMIZER).stat().st_mtime
    except FileNotFoundError:
        return saves
    return [save for save in saves if save.at <= optimizer_at] or saves


def _torn(job: TrainingJob) -> list[Path]:
    """Weights from which it would start for ever, and fail."""
    return [path for files in _weights(job.folder, job.name).values() for path in files if _step_of(path) is None]


def _meant(job: TrainingJob) -> list[Path]:
    """The weights of the state that it is to go on from."""
    saves = [save for save in _saves(job.folder, job.name) if job.resume_state in save.files]
    return [path for save in saves for path in save.files]


def _started_at(reading: Reading) -> float:
    """When this attempt was launched; 0 when that cannot be told."""
    try:
        return (reading.attempt_folder / "launch.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


# --- What it prints ---------------------------------------------------------------------------------------------------
SAVED = re.compile(r"Saved checkpoint to (.+\.safetensors)$")
OPTIMIZER_SAVED = re.compile(r"Saved optimizer to .+")
DRAWN = re.compile(r"Generating Images: +\d+%\|[^|]*\| *(\d+)/(\d+) ")
SAMPLE = re.compile(r"(\d+)__(\d{9})_(\d+)\.(?:png|jpg|webp)")
NAN = "loss is nan"
NANS = 3  # steps in a row: it goes on after a single one without harm, since it throws that step away
SKIPPED = "# OOM during training step, skipping batch"
STAGES = {
    "Running  1 process": "Loading the model",
    "Loading from": "Loading the last state",
    "Loading optimizer": "Loading the last state",
    "Loading ": "Loading the model",
    "Quantizing": "Quantising the model",
    "create LoRA network": "Preparing the network",
    "Caching latents": "Encoding the pictures",
    "Caching text embeddings": "Encoding the captions",
    "Generating baseline samples": "Drawing samples",
    "Generating Images": "Drawing samples",
    "Saving at step": "Saving",
}
NOTES = {
    "Failed to load optimizer state": "AI Toolkit could not read the optimizer's state: its averages start afresh.",
    "Could not save optimizer": "AI Toolkit could not save the optimizer's state. The log says why.",
}


def _bar(name: str) -> re.Pattern[str]:
    return progress_bar(name, r"lr: (?P<lr>\S+) loss: (?P<loss>[^\s\]]+)[^\]]*")


class _Console:
    """Reads pieces in order. Weights are taken when the next piece is there: then they are whole.

    The bar says the number before a step first, with that step's loss, and then the number after it. It is read for
    the first step of an attempt, which loss_log.db does not have, and for all when there is no such file.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.bar = _bar(reading.name)
        self.step = reading.step
        self.seen: int | None = None  # on the bar, in this chunk
        self.saved: Save | None = None
        self.has_losses = (reading.folder / LOSSES).exists()

    def read(self, chunk: bytes) -> tuple[list[Observation], int]:
        found: list[Observation] = []
        consumed = 0
        pending: re.Match[str] | None = None
        has_nan = False
        for piece in pieces(chunk, is_over=self.reading.is_over):
            text = piece.text.strip()
            if pending and text:
                found += self._checkpoint(Path(pending[1]).stem)
                pending = None
            if bar := self.bar.match(text):
                text = text[bar.end() :].strip()  # what is printed next may follow without a line's end
            pending = pending or SAVED.match(text)
            if bar and pending is None:
                found += self._progress(bar)
            if pending is None:
                found += self._observe(text)
                consumed = piece.end
            has_nan = has_nan or text == NAN
        if pending and self.reading.is_over:
            found += self._checkpoint(Path(pending[1]).stem)
            consumed = len(chunk)
        if has_nan and self._is_hopeless():
            found.append(Hopeless())
        return found, consumed

    def _observe(self, text: str) -> Iterator[Observation]:
        if OPTIMIZER_SAVED.match(text) and self.saved and not self.saved.is_final:
            yield StateSaved(self.saved.files[0].name, self.saved.step)
        elif drawn := DRAWN.match(text):
            yield Stage(STAGES["Generating Images"])
            if drawn[1] == drawn[2]:
                yield from self._samples()
        elif note := next((note for mark, note in NOTES.items() if text.startswith(mark)), ""):
            yield Noted(note)
        elif stage := next((stage for mark, stage in STAGES.items() if text.startswith(mark)), ""):
            yield Stage(stage)

    def _progress(self, bar: re.Match[str]) -> Iterator[Observation]:
        count = int(bar["steps"])
        total = max(self.reading.spec.steps, count)
        self.seen = count
        if bar["loss"] is None and bar["rate"] == "?":
            yield from self._begin(count, total)
        elif bar["loss"] and self.has_losses and count == self.reading.start_step and count >= self.step:
            yield self._told(bar, count + 1, total)
        elif bar["loss"] and not self.has_losses and count > self.step:
            yield self._told(bar, count, total)

    def _told(self, bar: re.Match[str], step: int, total: int) -> Progress:
        self.step = step
        speed = steps_per_second(bar)
        eta = (total - step) / speed if speed else None
        return Progress(step, total, time.time(), float(bar["loss"]), float(bar["lr"]), speed, eta)

    def _begin(self, count: int, total: int) -> Iterator[Observation]:
        """The first bar, which says from where it really starts."""
        self.step = count
        yield Started(count, total)
        if count != self.reading.start_step:
            yield Noted(f"AI Toolkit goes on from step {count:,}, not from step {self.reading.start_step:,}.")

    def _checkpoint(self, stem: str) -> Iterator[Observation]:
        reading = self.reading
        files = _weights(reading.folder, reading.name).get(stem, [])
        self.saved = _save(files, is_final=stem == reading.name) if files else None
        for path in self.saved.files if self.saved else ():
            if self.saved and (whole := digest_of(path)):
                yield CheckpointSaved(path.name, self.saved.step, whole.bytes, whole.sha256, self.saved.is_final)
        if self.saved and not reading.spec.save_every_steps:
            yield from self._drop_states(0 if self.saved.is_final else STATES_KEPT)

    def _drop_states(self, most: int) -> Iterator[Observation]:
        """For a user who wants the last one only, those on the way are states and no more."""
        on_the_way = [save for save in _saves(self.reading.folder, self.reading.name) if not save.is_final]
        for path in [path for save in on_the_way[most:] for path in save.files]:
            path.unlink(missing_ok=True)
            yield CheckpointRemoved(path.name)

    def _samples(self) -> Iterator[Observation]:
        """The files are named by the step that the bar says while they are drawn."""
        spec = self.reading.spec
        found = list(self._drawn())
        newest = max((sample.step for sample in found), default=0)
        step = self.seen if self.seen in {sample.step for sample in found} else newest
        for sample in {sample.index: sample for sample in found if sample.step == step}.values():
            if sample.index < len(spec.sample_prompts):
                prompt, seed = spec.sample_prompts[sample.index], _sample_seed(spec, sample.index)
                yield SampleDrawn(f"{SAMPLES}/{sample.path.name}", step, sample.index, prompt, "", seed)

    def _drawn(self) -> Iterator[Drawn]:
        """By this attempt, oldest first."""
        folder = self.reading.folder / SAMPLES
        since = int(_started_at(self.reading) * 1000)
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            called = SAMPLE.fullmatch(path.name)
            if called and int(called[1]) >= since:
                yield Drawn(path, int(called[2]), int(called[3]))

    def _is_hopeless(self) -> bool:
        said = logfile.last_words(self.reading.log, self.reading.log_offset, LAST_BYTES)
        return _nan_step((piece.text for piece in pieces(said, is_over=True)), self.reading.name) is not None


@dataclass(frozen=True, slots=True)
class Drawn:
    path: Path
    step: int
    index: int


def _nan_step(texts: Iterable[str], name: str) -> int | None:
    """The first of those steps without a loss, at least NANS in a row, with which the log ends."""
    bar = _bar(name)
    count, first, last = 0, 0, 0
    for piece in texts:
        text = piece.strip()
        if shown := bar.match(text):
            count, text = int(shown["steps"]), text[shown.end() :].strip()
        if text == NAN:
            first, last = (first if last and count + 1 <= last + 2 else count + 1), count + 1
    return first if last and last - first + 1 >= NANS and last >= count - 1 else None


# --- What it measures -------------------------------------------------------------------------------------------------
MOST_ROWS = 2000  # a call
LOOK_BACK = 20  # steps, for the speed
QUERY = """
SELECT steps.step, steps.wall_time,
       MAX(CASE WHEN key = 'loss/loss' THEN value_real END), MAX(CASE WHEN key = 'learning_rate' THEN value_real END)
FROM steps JOIN metrics ON metrics.step = steps.step
WHERE steps.step >= ? AND steps.wall_time >= ? GROUP BY steps.step ORDER BY steps.step LIMIT ?
"""


def _read(database: Path, query: str, values: tuple[float, ...] = ()) -> list[tuple[Any, ...]]:
    """Nothing when the trainer has not made it, or holds it just now."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", timeout=1, uri=True)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error:
        return []


def _losses(reading: Reading) -> Iterator[Progress]:
    """Steps after `reading.step`, from rows of this attempt. A row's step is the number of those before it."""
    values = (max(0, reading.step - LOOK_BACK), _started_at(reading), MOST_ROWS + LOOK_BACK)
    rows = _read(reading.folder / LOSSES, QUERY, values)
    for number, (index, at, loss, rate) in enumerate(rows):
        done, total = index + 1, max(reading.spec.steps, index + 1)
        if done <= reading.step:
            continue
        back_index, back_at, *_ = rows[max(0, number - LOOK_BACK)]
        speed = (index - back_index) / (at - back_at) if at > back_at else None
        is_nan = not loss  # it writes 0 where there was none
        yield Progress(
            done,
            total,
            at,
            loss=math.nan if is_nan else loss,
            learning_rate=rate,
            steps_per_second=speed,
            eta_seconds=(total - done) / speed if speed else None,
        )


def _last_facts(reading: Reading) -> Iterator[Observation]:
    """Once, at the end: the step that it came to, or saved at when it was stopped; what it left out."""
    for (step,) in _read(_database(reading.attempt_folder), "SELECT step FROM Job WHERE step IS NOT NULL"):
        if step > reading.start_step:
            yield Progress(step, max(reading.spec.steps, step), time.time())
    skipped = sum(text.startswith(SKIPPED) for text in log_pieces(reading.log, reading.log_offset))
    if skipped:
        yield Noted(
            f"Memory ran out in {skipped:,} steps, which AI Toolkit left out and counted all the same. "
            "Use a smaller batch or resolution, or turn gradient checkpointing on."
        )


# --- The end ----------------------------------------------------------------------------------------------------------
def _unfinished(reading: Reading) -> str:
    """Why the attempt did not finish; empty when it proved that it did."""
    files = _weights(reading.folder, reading.name).get(reading.name, [])
    if not files or max(path.stat().st_mtime for path in files) < _started_at(reading):
        return "AI Toolkit ended without saving the LoRA."
    save = _save(files, is_final=True)
    if save is None:
        return f"AI Toolkit ended, but {files[0].name} is not whole."
    if save.step < reading.spec.steps:
        return f"AI Toolkit ended after {save.step:,} of {reading.spec.steps:,} steps."
    return ""


FAILURES = (
    failure(
        r"OOM during training step \d+ times in a row",
        "The GPU ran out of memory in several steps in a row. Turn gradient checkpointing on, quantise the model, or "
        "use a smaller batch or resolution, then resume.",
        Cause.OUT_OF_MEMORY,
    ),
    failure(
        r"no images found in (?:.+)",
        "AI Toolkit found no picture that it can read: it takes JPEG, PNG and WebP. Check the dataset's pictures.",
    ),
    failure(
        r"pretrained_model_name_or_path \"[^\"]+\" is neither a valid local path nor a valid repo id"
        r"|Model path .+ does not exist",
        "AI Toolkit found no base model at its path. Check the model on the Models page.",
    ),
    failure(
        r"Error no file named ([\w.]+)",
        "The base model's folder has no {0}: it is no whole diffusers folder. Check it on the Models page.",
    ),
    failure(
        r"Unknown process type: diffusion_trainer|no such column|config file is invalid",
        "This version of AI Toolkit does not read what LoRA Pilot writes: it is tested with v0.12.26.",
    ),
    failure(
        r"[Nn]o module named 'bitsandbytes'",
        "This optimizer needs bitsandbytes in the trainer's Python: install it there, or choose another optimizer.",
    ),
    failure(
        r"Please install lion_pytorch|[Nn]o module named '(?:lion_pytorch|prodigyopt|dadaptation)'",
        "This optimizer needs a package that the trainer's Python does not have: install it there (lion-pytorch, "
        "prodigyopt or dadaptation), or choose another optimizer.",
    ),
    failure(
        r"operator torchvision::\w+ does not exist|libtorchaudio|undefined symbol",
        "torch, torchvision and torchaudio in the trainer's Python are not of one release: install all three again.",
    ),
    failure(
        r"Error\(s\) in loading state_dict|size mismatch for",
        "The saved weights, or the model's files, do not fit the settings. Start a new run.",
    ),
    failure(
        r"database is locked|Database locked after",
        "AI Toolkit could not use its job's database. Put the workspace on a disk that can lock files.",
    ),
    Failure(
        re.compile(r"^(?:Exception: )?Job (?:stopped|returning to queue)$", re.MULTILINE),
        "AI Toolkit was interrupted from outside.",
        Cause.KILLED,
        Status.ERRORED,
    ),
)
