"""Diffusion Pipe: DeepSpeed's pipeline engine, configured by two TOML files, followed by what it prints.

Read from 8f83dbf2 (2026-08-20): train.py, utils/saver.py, utils/dataset.py, and DeepSpeed 0.18.4. Where the operator
put it: runs/stacks/installation.py. Its options: options/diffusion_pipe.toml. Models: diffusion_pipe_models.py.

Steps stay true over resumes. It writes to `<run folder>/diffusion-pipe/<time>/`: `stepN/` with the LoRA, which is taken
into the run's folder, and `global_stepN/`, a state, named by the file `latest` once it is whole. It saves a state every
few minutes and when it is asked to stop; then no LoRA is written.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toml

from lorapilot import workspace
from lorapilot.errors import UserError
from models_registry.enums import describe_architecture
from runs import logfile
from runs.enums import DeviceKind, Status
from runs.spec import OPTIONS, RunSpec, convert
from runs.stacks import option_table, save_and_quit
from runs.stacks.base import (
    Cause,
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
    Stage,
    Started,
    StateSaved,
    StopStep,
    TrainingJob,
    trainer_environment,
    without_counterpart,
    wrong_architecture,
)
from runs.stacks.collecting import collect
from runs.stacks.console import Failure, failure, judge, log_pieces, pieces
from runs.stacks.diffusion_pipe_models import FAMILIES, model_files, refusal_of
from runs.stacks.importing import Reader, as_spelled, flat, read_toml, reader, take_keys, taken_epochs
from runs.stacks.installation import installation_error, program_of
from runs.stacks.staging import staged_folders

OUTPUT = "diffusion-pipe"  # in the run's folder
DATASET = "dataset."  # before the names of options of the dataset's file
MONITORING = "monitoring"
STATE_MINUTES = 10  # what a crash loses at most; a LoRA's state is small
SAVING_SECONDS = 300  # a step of a video model takes a minute, and the save comes after it
UNUSED = (
    "flip", "keep_tokens", "caption_tokens", "validation_share", "conv_rank", "conv_alpha", "ema_decay", "seed",
    "noise_offset", "save_best",
)  # fmt: skip
PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# AdamW of optimi and AdamW8bitKahan sum up what bfloat16 rounds off; the plain ones lose it.
OPTIMIZERS = {
    "AdamW": "adamw_optimi",
    "AdamW8bit": "adamw8bitkahan",
    "Lion": "Lion",
    "Adafactor": "AdaFactor",
    "Prodigy": "Prodigy",
    "AdamWScheduleFree": "ScheduleFreeAdamW",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
}
ASPECTS = {"min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 7}
TAG_ORDERS = 10  # that are encoded for each caption when tags are shuffled
FLAGS = ("regenerate_cache",)  # read from the command line only


class DiffusionPipeStack:
    key = "diffusion_pipe"
    name = "Diffusion Pipe"
    architectures = frozenset(FAMILIES)
    saves_on_stop = True
    reads_log = True

    def table(self) -> option_table.OptionTable:
        return option_table.load_table("diffusion_pipe")

    def check(self) -> str:
        return installation_error("diffusion_pipe")

    def refusal(self, model: ModelFacts) -> str:
        return wrong_architecture(self, model) or refusal_of(model)

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        """What it would refuse after minutes of loading, or silently do otherwise."""
        stages = options.get("pipeline_stages", 1)
        if spec.gpus % stages:
            raise UserError(
                f"{stages} pipeline stages do not divide {spec.gpus} GPUs.", field="options.pipeline_stages"
            )
        if stages > 1 and options.get("blocks_to_swap"):
            raise UserError("Blocks are swapped with one pipeline stage only.", field="options.blocks_to_swap")
        if options.get("partition_method") == "manual" and len(options.get("partition_split", ())) != stages - 1:
            raise UserError("There is one cut less than pipeline stages.", field="options.partition_split")
        if options.get("optimizer.gradient_release") and spec.gpus != stages:
            raise UserError(
                "Gradient release needs as many pipeline stages as GPUs.", field="options.optimizer.gradient_release"
            )
        if {"checkpoint_every_n_minutes", "checkpoint_every_n_epochs"} <= options.keys():
            raise UserError(
                "States come every so many minutes or every so many epochs: set one of the two.",
                field="options.checkpoint_every_n_epochs",
            )

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        return [
            *_fixed_alpha(spec),
            *without_counterpart(self, _unused(architecture), spec),
            *_other_ways(spec),
        ]

    def prepare(self, job: TrainingJob) -> None:
        if job.resume_state is not None:
            _clear_leftovers(job, job.resume_state)

    def compile(self, job: TrainingJob) -> LaunchPlan:
        home, python = program_of("diffusion_pipe")
        if job.device != DeviceKind.CUDA:
            raise UserError("Diffusion Pipe trains on NVIDIA GPUs only: choose another trainer for this host.")
        _refuse_lokr(job)
        folders, links, captions = staged_folders(job)
        config = job.attempt_folder / f"{job.name}.toml"
        dataset = job.attempt_folder / "dataset.toml"
        text = toml.dumps(_config(job, dataset))
        files = {
            config: text,
            job.folder / f"{job.name}.toml": text,
            dataset: toml.dumps(_dataset(job, folders)),
            **captions,
        }
        if job.resume_state is not None:
            files[job.resume_state.parent / "latest"] = job.resume_state.name
        quiet = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return LaunchPlan(
            files=files,
            links=links,
            config=config,
            argv=[str(python), *_launcher(job, free_port()), "--config", str(config), *_flags(job)],
            env=trainer_environment(job, workspace.cache()) | quiet,
            cwd=home,
            stop=_stop_plan(job),
            not_expressed=[*self.not_expressed(job.spec, job.architecture), *_resume_notes(job)],
        )

    def report(self, reading: Reading) -> Path:
        return reading.log

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        return _Console(reading).read(chunk)

    def measure(self, reading: Reading) -> list[Observation]:
        """States that have become whole. The log says only that one is begun."""
        return list(_new_states(reading))

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        return _states(folder)

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        told = _told(reading)
        if told.has_quit and told.nan_step is None and any(step == told.step for _, step in _states(reading.folder)):
            return Outcome(Status.STOPPED, f"Stopped at step {told.step:,}; its state is saved.")
        return judge(reading, exit_, failures=FAILURES, unfinished=_unfinished(reading, told), nan_step=told.nan_step)

    def read_config(self, text: str) -> Imported:
        """Its main TOML, or that of a dataset."""
        table = read_toml(text)
        keys = {f"{DATASET}{key}": value for key, value in table.items()} if "directory" in table else flat(table)
        spelled = as_spelled(self.table(), keys, "optimizer.type")
        epochs = taken_epochs(spelled, "epochs")
        taken = take_keys(self.table(), spelled, READERS)
        if "model.unet_lr" in keys:  # it wins over the optimizer's
            taken.values["learning_rate"] = convert("learning_rate", keys["model.unet_lr"])
        if "optimizer.lr" in keys:
            taken.values.setdefault("lr_schedule", "constant")
        if keys.get("model.type") == "sdxl" and "learning_rate" in taken.values:  # at the same rate unless it says so
            taken.values.setdefault("text_encoder_learning_rate", taken.values["learning_rate"])
        return replace(taken, epochs=epochs)


# --- What has no counterpart ------------------------------------------------------------------------------------------
def _unused(architecture: str) -> list[str]:
    family = FAMILIES.get(architecture, FAMILIES["flux"])
    return [
        *UNUSED,
        *(() if family.min_snr else ("min_snr_gamma",)),
        *(() if family.trains_text_encoders else ("text_encoder_learning_rate",)),
    ]


def _fixed_alpha(spec: RunSpec) -> list[str]:
    if spec.alpha == spec.rank:
        return []
    return [f"{OPTIONS['alpha'].label} ({spec.alpha:g}) has no counterpart: it is fixed to the rank ({spec.rank})."]


def _other_ways(spec: RunSpec) -> list[str]:
    """What it does, but not as the setting says."""
    notes = {
        "Diffusion Pipe draws no sample pictures.": bool(spec.sample_prompts),
        "Schedule (cosine_with_restarts) has no counterpart: it is cosine.": spec.lr_schedule == "cosine_with_restarts",
        f"Tags are shuffled beforehand: each caption in {TAG_ORDERS} orders.": spec.shuffle_caption,
        "The schedule begins after the warm-up and is as long as the run: its end is not quite reached.": bool(
            spec.warmup_steps
        )
        and SCHEDULES[spec.lr_schedule] != "constant",
        "AdamWScheduleFree: the saved weights are those in training, not their average.": spec.optimizer
        == "AdamWScheduleFree",
    }
    return [sentence for sentence, is_so in notes.items() if is_so]


def _refuse_lokr(job: TrainingJob) -> None:
    if job.options.get("adapter.type") == "lokr" and not FAMILIES[job.architecture].has_lokr:
        raise UserError(
            f"Diffusion Pipe cannot save a LoKr of {describe_architecture(job.architecture)}: "
            "set the option adapter.type to lora."
        )


# --- The configuration ------------------------------------------------------------------------------------------------
def _config(job: TrainingJob, dataset: Path) -> dict[str, Any]:
    """The main TOML: values of the RunSpec, then the user's options, then ours."""
    config = _of_spec(job)
    for key, value in option_table.options_outside(job.options, DATASET).items():
        section, dot, name = key.partition(".")
        if section == MONITORING or key in FLAGS:
            continue
        if dot:
            config[section][name] = value
        else:
            config[key] = value
    if "checkpoint_every_n_epochs" in job.options:
        del config["checkpoint_every_n_minutes"]
    if config["adapter"]["type"] != "lora":
        config["adapter"].pop("dropout", None)
    ours = {"output_dir": str(job.folder / OUTPUT), "dataset": str(dataset), "steps_per_print": 1}
    return ours | {"eval_before_first_step": False} | config | _monitoring(job)


def _monitoring(job: TrainingJob) -> dict[str, Any]:
    """Curves for Weights & Biases, when the options ask for them. train.py wants a key in its configuration; with an
    empty one wandb takes WANDB_API_KEY from the environment, and writes the key nowhere."""
    if not job.options.get(f"{MONITORING}.enable_wandb"):
        return {}
    names = {"wandb_tracker_name": "lora-pilot", "wandb_run_name": job.name}
    given = {name: job.options.get(f"{MONITORING}.{name}", default) for name, default in names.items()}
    return {MONITORING: {"enable_wandb": True, "wandb_api_key": "", **given}}


def _of_spec(job: TrainingJob) -> dict[str, Any]:
    spec = job.spec
    schedule = SCHEDULES[spec.lr_schedule]
    return {
        # One pass over the dataset is the whole run (`_repeats`), so that a falling schedule, which is as long as all
        # epochs, ends with it. Where nothing falls there may be more passes, whatever was left out of the dataset.
        "epochs": spec.steps if schedule == "constant" else 1,
        "max_steps": spec.steps,
        "micro_batch_size_per_gpu": spec.batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "gradient_clipping": spec.max_grad_norm,
        "lr_scheduler": schedule,
        "warmup_steps": spec.warmup_steps,
        "uncond_fraction": spec.caption_dropout,
        "activation_checkpointing": spec.gradient_checkpointing,
        "save_every_n_steps": spec.save_every_steps or spec.steps,
        "checkpoint_every_n_minutes": STATE_MINUTES,
        "save_dtype": PRECISION[spec.save_precision],
        "model": _model(job),
        "adapter": {"type": "lora", "rank": spec.rank, "dropout": spec.network_dropout},
        "optimizer": {
            "type": OPTIMIZERS[spec.optimizer],
            "lr": spec.learning_rate,
            "weight_decay": spec.weight_decay,
        },
    }


def _model(job: TrainingJob) -> dict[str, Any]:
    family, spec = FAMILIES[job.architecture], job.spec
    keys = {"type": family.type, "dtype": PRECISION[spec.precision], **model_files(job), **family.fixed}
    if family.trains_text_encoders:  # they always learn: a rate of 0 leaves them as they are
        keys |= {"unet_lr": spec.learning_rate}
        keys |= {f"text_encoder_{number}_lr": spec.text_encoder_learning_rate for number in (1, 2)}
    if family.min_snr and spec.min_snr_gamma:
        keys["min_snr_gamma"] = spec.min_snr_gamma
    if job.architecture == "sdxl" and job.prediction_type == "v_prediction":
        keys["v_pred"] = True
    return keys


def _dataset(job: TrainingJob, folders: Mapping[int, Path]) -> dict[str, Any]:
    spec = job.spec
    table: dict[str, Any] = {"resolutions": [spec.resolution], "enable_ar_bucket": spec.enable_bucket}
    if spec.enable_bucket:
        table |= ASPECTS
    if spec.shuffle_caption:
        table |= {"shuffle_tags": True, "cache_shuffle_num": TAG_ORDERS}
    table |= option_table.options_within(job.options, DATASET)
    times = _repeats(job, table, len(folders))
    directories = [{"path": str(path), "num_repeats": round(count * times, 6)} for count, path in folders.items()]
    return table | {"directory": directories}


def _repeats(job: TrainingJob, table: Mapping[str, Any], folders: int) -> float:
    """How often the pictures come so that one pass over them has as many updates as the run, or a few more.

    It cuts each bucket to whole updates: with few repeats it would leave small buckets out. So each bucket loses less
    than one update, and less than a picture of each folder by rounding; a share of the pictures less than one.
    """
    spec = job.spec
    parallel = max(1, len(job.device_uuids) // job.options.get("pipeline_stages", 1))
    update = spec.batch_size * spec.gradient_accumulation_steps * parallel
    orders = max(1, table.get("cache_shuffle_num", 0))
    pictures = max(1, sum(picture.repeats for picture in job.pictures) * spec.repeats * orders)
    shapes = len(table.get("ar_buckets", ())) or table["num_ar_buckets"] if table["enable_ar_bucket"] else 1
    buckets = min(shapes * len({1, *table.get("frame_buckets", ())}), len(job.pictures))
    spare = buckets * (1 + math.ceil(folders / update)) + 1
    share: float = table.get("subsample_ratio", 1.0)
    epochs: float = (spec.steps + spare) * update / pictures / share
    return epochs


# --- The process ------------------------------------------------------------------------------------------------------
def _launcher(job: TrainingJob, port: int) -> list[str]:
    """DeepSpeed's inner launcher, which the `deepspeed` command starts after it has chosen devices.

    That command takes indexes only, and takes CUDA_VISIBLE_DEVICES apart as such: a UUID is an error, and an index may
    be another device's after a driver's restart. The inner one hands what it is given to the workers as
    CUDA_VISIBLE_DEVICES, so UUIDs pin them, MIG instances too. It also passes on that it was killed; the outer exits
    with 0 then.
    """
    world = json.dumps({"localhost": list(job.device_uuids)}).encode()
    return [
        *("-m", "deepspeed.launcher.launch", f"--world_info={base64.urlsafe_b64encode(world).decode()}"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", "train.py", "--deepspeed"),
        *("--master_port", str(port)),  # train.py overwrites the launcher's with its own, 29500 by default
    ]


def free_port() -> int:
    """One that nobody listens on now. Another program could take it before the trainer does, seconds later: then the
    trainer says so, and the run goes back to the queue and gets another port (FAILURES)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _flags(job: TrainingJob) -> list[str]:
    flags = [f"--{name}" for name in FLAGS if job.options.get(name)]
    if job.resume_state is not None:
        flags += ["--resume_from_checkpoint", job.resume_state.parent.name]
        flags += ["--reset_optimizer"] if _has_another_optimizer(job) else []
    return flags


def _has_another_optimizer(job: TrainingJob) -> bool:
    """The state is of another one, as when memory ran out: its memory cannot be loaded."""
    return job.resume_state is not None and _optimizer_of(job.resume_state) not in {"", job.spec.optimizer}


def _stop_plan(job: TrainingJob) -> list[StopStep]:
    log = job.folder / "_logs" / "train.log"
    ask = [sys.executable, "-I", str(Path(save_and_quit.__file__).resolve()), str(job.folder / OUTPUT), str(log)]
    return [
        StopStep("", SAVING_SECONDS, [*ask, str(logfile.size(log))]),
        StopStep("SIGTERM", 15),
        StopStep("SIGKILL", 5),
    ]


def _resume_notes(job: TrainingJob) -> list[str]:
    if not _has_another_optimizer(job):
        return []
    return ["With another optimizer Diffusion Pipe begins the schedule of the learning rate anew."]


def _clear_leftovers(job: TrainingJob, state: Path) -> None:
    """What a killed trainer left in the folder that it goes on in: half a save stops the next one of that step, and an
    unheard request to stop would end it after one step."""
    run = state.parent
    if run.parent != job.folder / OUTPUT:
        raise UserError(f"{state.name} is no state of this run.")
    for name in ("save", "save_quit"):
        (run / name).unlink(missing_ok=True)
    whole = {path for path, _ in _states(job.folder)}
    for half in [*run.glob("*/tmp"), *(set(run.glob("global_step*")) - whole)]:
        shutil.rmtree(half)


# --- What it prints ---------------------------------------------------------------------------------------------------
STEP = re.compile(
    r"\bsteps: (\d+) loss: (-?[\d.]+|nan|-?inf) (?:[^:]+: \S+ )*?iter time \(s\): ([\d.]+) samples/sec: \S"
)
RATE = re.compile(r"\bstep=[1-9]\d*, skipped=\d+, lr=\[?([\d.]+(?:e-?\d+)?)")  # the line before that of the step
SAVING = re.compile(r"Saving model to directory ((?:step|epoch)(\d+))\s*$")
RESUMING = re.compile(r"Resuming training from checkpoint\. Resuming at epoch: \d+, step: (\d+)")
READY = re.compile(r"Global batch size = \d+")
COMPLETE = "TRAINING COMPLETE!"
QUIT = "Manually quitting"
# The main process goes on: what it was saving is saved.
GOES_ON = re.compile(
    rf"{STEP.pattern}|{SAVING.pattern}|Started new epoch: |Saving model checkpoint: |{COMPLETE}|{QUIT}"
    r"|exits successfully|exits with return code"
)
DROPPED = re.compile(r"size bucket (.+?) is being completely dropped")
STAGES = {
    "Caching ungrouped metadata": "Reading the pictures",
    "caching latents": "Encoding the pictures",
    "caching text embeddings": "Encoding the captions",
    "Loading pipeline components": "Loading the model",
    "Loading checkpoint shards": "Loading the model",
    "Overriding transformer": "Loading the model",
}
WEIGHTS = ("adapter_model.safetensors", "lora.safetensors", "pytorch_lora_weights.safetensors")


class _Console:
    """Reads pieces in order. A LoRA is taken when the main process has gone on after it, a rate with its step."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.step = reading.step
        self.rate: float | None = None

    def read(self, chunk: bytes) -> tuple[list[Observation], int]:
        found: list[Observation] = []
        consumed = 0
        saving: re.Match[str] | None = None
        for piece in pieces(chunk, is_over=self.reading.is_over):
            text = piece.text.strip()
            if saving and GOES_ON.search(text):
                found += self._checkpoint(saving)
                saving = None
            if saving is None:
                saving = SAVING.search(text)
                found += () if saving else self._observe(text)
                consumed = consumed if saving or self.rate is not None else piece.end
        if not self.reading.is_over:
            return found, consumed
        return found + (list(self._checkpoint(saving)) if saving else []), len(chunk)

    def _observe(self, text: str) -> Iterator[Observation]:
        if step := STEP.search(text):
            yield from self._progress(step)
        elif rate := RATE.search(text):
            self.rate = float(rate[1])
        elif resuming := RESUMING.search(text):
            yield from self._resumed(int(resuming[1]) - 1)
        elif READY.search(text) and not self.reading.start_step:
            yield Started(0, self.reading.spec.steps)
        elif stage := next((name for mark, name in STAGES.items() if text.startswith(mark)), ""):
            yield Stage(stage)
        elif dropped := DROPPED.search(text):
            yield Noted(f"Pictures of the size {dropped[1]} are left out: there are too few for one update.")

    def _progress(self, told: re.Match[str]) -> Iterator[Observation]:
        self.step, loss, seconds = int(told[1]), float(told[2]), float(told[3])
        total = max(self.reading.spec.steps, self.step)
        yield Progress(
            self.step,
            total,
            time.time(),
            loss=loss,
            learning_rate=self.rate,
            steps_per_second=1 / seconds if seconds else None,
            eta_seconds=(total - self.step) * seconds,
        )
        self.rate = None
        if math.isnan(loss):
            yield Hopeless()

    def _resumed(self, step: int) -> Iterator[Observation]:
        wanted = self.reading.start_step
        if step != wanted:
            yield Noted(f"It goes on from step {step:,}, although the newest state here is of step {wanted:,}.")
        yield Started(step, max(self.reading.spec.steps, step))

    def _checkpoint(self, saving: re.Match[str]) -> Iterator[Observation]:
        """`stepN` counts steps; `epochN` comes once, when the epochs are over, after the step that was told last."""
        reading = self.reading
        step = int(saving[2]) if saving[1].startswith("step") else self.step
        is_final = step >= reading.spec.steps
        name = f"{reading.name}.safetensors" if is_final else f"{reading.name}-step{step:08d}.safetensors"
        folder = _newest_folder(reading.folder, saving[1])
        source = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
        facts = {**reading.provenance, "lorapilot_step": str(step)}
        is_half = (folder / "tmp").exists()
        collected = None if is_half else collect(source, reading.folder / name, facts)
        if collected is None:
            yield Noted(f"The LoRA of step {step:,} was announced, but is no complete file.")
            return
        shutil.rmtree(folder, ignore_errors=True)  # a copy of the configuration is left in it
        yield CheckpointSaved(name, step, collected.bytes, collected.sha256, is_final)


def _newest_folder(run_folder: Path, name: str) -> Path:
    """Of this name in the trainer's folders, which are named by the time of their start."""
    return max((run_folder / OUTPUT).glob(f"*/{name}"), default=run_folder / OUTPUT / "-" / name)


# --- States and the end -----------------------------------------------------------------------------------------------
WHOLE = "lorapilot.json"  # in a state that `latest` named once: it is whole, whatever comes later
STATES_KEPT = 2
STATE = re.compile(r"global_step(\d+)")


def _states(folder: Path) -> list[tuple[Path, int]]:
    """Newest first. `latest` is written after all files of the state that it names."""
    found = []
    for state in (folder / OUTPUT).glob("*/global_step*"):
        number = STATE.fullmatch(state.name)
        if number and ((state / WHOLE).is_file() or _latest(state.parent) == state.name):
            found.append((state, int(number[1])))
    return sorted(found, key=lambda found: (found[1], found[0].parent.name), reverse=True)


def _latest(run: Path) -> str:
    """The state that DeepSpeed would go on from; empty when there is none, or while the file is being written."""
    try:
        return (run / "latest").read_text().strip()
    except OSError:
        return ""


def _new_states(reading: Reading) -> Iterator[Observation]:
    found = [(state, step) for state, step in _states(reading.folder) if not (state / WHOLE).is_file()]
    for state, step in found:
        (state / WHOLE).write_text(json.dumps({"step": step, "optimizer": reading.spec.optimizer}))
        yield StateSaved(state.relative_to(reading.folder).as_posix(), step)
    if found:
        _drop_old_states(reading.folder)


def _optimizer_of(state: Path) -> str:
    """As the RunSpec calls it; empty when that was not written down."""
    try:
        return str(json.loads((state / WHOLE).read_text())["optimizer"])
    except (OSError, ValueError, KeyError):
        return ""


def _drop_old_states(folder: Path) -> None:
    for state, _ in _states(folder)[STATES_KEPT:]:
        shutil.rmtree(state, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Told:
    """What the attempt's part of the log says. `step`: the last one."""

    step: int
    nan_step: int | None = None
    is_complete: bool = False
    has_quit: bool = False


def _told(reading: Reading) -> Told:
    step, nan_step, is_complete, has_quit = reading.start_step, None, False, False
    for text in log_pieces(reading.log, reading.log_offset):
        if told := STEP.search(text):
            step = int(told[1])
            nan_step = step if nan_step is None and told[2] == "nan" else nan_step
        is_complete = is_complete or COMPLETE in text
        has_quit = has_quit or QUIT in text
    return Told(step, nan_step, is_complete, has_quit)


def _unfinished(reading: Reading, told: Told) -> str:
    """Why the attempt did not finish; empty when it proved that it did."""
    wanted = reading.spec.steps
    if not told.is_complete:
        return f"Diffusion Pipe ended after {told.step:,} of {wanted:,} steps without saying that it finished."
    if told.step < wanted:
        return f"Diffusion Pipe ended after {told.step:,} of {wanted:,} steps."
    if not (reading.folder / f"{reading.name}.safetensors").is_file():
        return f"Diffusion Pipe finished, but {reading.name}.safetensors is not there. Was it moved or deleted?"
    return ""


FAILURES = (
    failure(
        r"EADDRINUSE|[Aa]ddress already in use",
        "Another program took the port of this run's processes. Resume: it gets another one.",
        Cause.KILLED,
    ),
    failure(
        r"wandb(?:\.\w+)*\.(?:AuthenticationError|CommError|UsageError)\b",
        "Weights & Biases did not take your key, or the host does not reach it. Check the key on your account page, or "
        "leave monitoring.enable_wandb out, in a new run.",
    ),
    Failure(
        re.compile(r"Main process received SIG(?:TERM|INT), exiting|exits with return code = -(?:2|15)\b"),
        "The trainer was ended from outside.",
        Cause.KILLED,
        Status.ERRORED,
    ),
    failure(
        r"No module named '(comfy|comfy_api|hyvideo|hyimage|ltx_video|cosmos1|hi_diffusers|omnigen2)[.']",
        "Diffusion Pipe's submodule with {0} is not there: in its folder, git submodule update --init --recursive.",
    ),
    failure(
        r"_cuda_setDevice|Torch not compiled with CUDA enabled|No CUDA GPUs are available|Found no NVIDIA driver",
        "The trainer's PyTorch sees no GPU. Diffusion Pipe trains on NVIDIA GPUs only: `manage.py doctor` says more.",
    ),
    failure(
        r"had no images/videos!", "Diffusion Pipe found no picture that it can read. Check the dataset's pictures."
    ),
    failure(
        r"RuntimeError: Invalid path: (.+)", "The folder with the pictures is gone: {0}. Start the run anew."
    ),
    failure(
        r"Processed dataset was empty",
        "The dataset has not enough pictures for one update. Use a smaller batch or less gradient accumulation.",
    ),
    failure(
        r"WebP videos are not supported", "A picture of the dataset is an animation: replace it by a still picture."
    ),
    failure(
        r"fp8_scaled weights are not supported",
        "A model file has scaled fp8 weights, which Diffusion Pipe cannot train with: get the bf16 file.",
    ),
    failure(
        r"Could not autodetect|size mismatch for|Error\(s\) in loading state_dict|does not have a parameter or a buffer"
        r"|mat1 and mat2 shapes cannot be multiplied",
        "A model file does not fit the others: check which VAE and text encoders this model is made for.",
    ),
    failure(
        r"Model type (\S+) is not implemented",
        "This version of Diffusion Pipe does not know {0}: update it. LoRA Pilot is tested with 8f83dbf2.",
    ),
    failure(
        r"__init__\(\) got an unexpected keyword argument '(\w+)'",
        "The optimizer does not take {0}: leave the option optimizer.{0} out, or choose another optimizer.",
    ),
    failure(
        r"module 'pytorch_optimizer' has no attribute '(\w+)'",
        "The pytorch_optimizer in the trainer's Python has no {0}: update it, or choose another optimizer.",
    ),
    failure(
        r"FileExistsError: .+/tmp'", "A save that was broken off is in the way. Resume: that clears it away."
    ),
    failure(
        r"assert load_path is not None|Unable to find latest file",
        "The state to go on from could not be loaded. Start a new run from the last checkpoint.",
    ),
    failure(
        r"NCCL error|nccl(?:System|Unhandled|Internal|Remote)\w*Error",
        "The GPUs could not talk to each other. Resume; if it happens again, use one GPU.",
    ),
)  # fmt: skip


# --- Configurations that people bring ---------------------------------------------------------------------------------
def _rank(value: Any) -> dict[str, Any]:
    return {"rank": value, "alpha": value}


def _batch(value: Any) -> dict[str, Any]:
    """`2`, or a list of [resolution, batch size], of which the first is the trainer's default."""
    return {"batch_size": value[0][-1] if isinstance(value, list) and value and isinstance(value[0], list) else value}


def _resolutions(value: Any) -> dict[str, Any]:
    """The largest; a [width, height] becomes the square with its area."""
    try:
        areas = [math.prod(size) if isinstance(size, list) else size * size for size in value]
        return {"resolution": round(max(areas) ** 0.5 / 8) * 8}
    except (TypeError, ValueError):
        raise UserError(f"resolutions: {value!r} is no list of sizes in pixels.", field="config") from None


def _precision(field: str) -> Reader:
    names = {theirs: ours for ours, theirs in PRECISION.items()}
    return lambda value: {field: names.get(value, value)}


def _optimizer(value: Any) -> dict[str, Any]:
    ours = {theirs.lower(): name for name, theirs in OPTIMIZERS.items()}
    return {"optimizer": ours[str(value).lower()]} if str(value).lower() in ours else {}


READERS: dict[str, Reader] = {
    "max_steps": reader("steps"),
    "micro_batch_size_per_gpu": _batch,
    "gradient_accumulation_steps": reader("gradient_accumulation_steps"),
    "gradient_clipping": reader("max_grad_norm"),
    "warmup_steps": reader("warmup_steps"),
    "lr_scheduler": reader("lr_schedule"),
    "uncond_fraction": reader("caption_dropout"),
    "activation_checkpointing": reader("gradient_checkpointing"),
    "save_every_n_steps": reader("save_every_steps"),
    "save_dtype": _precision("save_precision"),
    "adapter.rank": _rank,
    "adapter.dropout": reader("network_dropout"),
    "optimizer.type": _optimizer,
    "optimizer.lr": reader("learning_rate"),
    "optimizer.weight_decay": reader("weight_decay"),
    "model.dtype": _precision("precision"),
    "model.min_snr_gamma": reader("min_snr_gamma"),
    "model.unet_lr": reader("learning_rate"),
    "model.text_encoder_1_lr": reader("text_encoder_learning_rate"),
    "model.text_encoder_2_lr": reader("text_encoder_learning_rate"),
    "dataset.resolutions": _resolutions,
    "dataset.enable_ar_bucket": reader("enable_bucket"),
    "dataset.shuffle_tags": reader("shuffle_caption"),
    "dataset.num_repeats": reader("repeats"),
}
