"""Our own trainer, `lora_trainer`: configured by TOML with sd-scripts' key names, followed by its JSON-lines events.

The events' schema is in docs/trainer.md. The web side imports only its torch-free `config`; it is started as a program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import toml
from django.conf import settings

from lora_trainer import config as trainer_config
from lora_trainer.errors import ConfigError, DiskFullError, OutOfMemoryError
from lora_trainer.state_files import complete_states
from lorapilot import workspace
from lorapilot.errors import UserError
from runs import logfile
from runs.enums import DeviceKind, Status
from runs.spec import RunSpec
from runs.stacks.base import (
    WITHOUT_A_WORD,
    Cause,
    CheckpointRemoved,
    CheckpointSaved,
    Exit,
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
    Validated,
    accelerate_launcher,
    cause_of_death,
    trainer_environment,
    unheard,
    wrong_architecture,
)
from runs.stacks.importing import read_toml, without_sections
from runs.stacks.option_table import load_table
from runs.stacks.sd_scripts_keys import keys_of, take

TRAINER = settings.BASE_DIR / "lora_trainer" / "__main__.py"
EVENTS_FILE = "events.jsonl"
SAVE_SECONDS = 60
OWN_SCHEDULE = {"AdamWScheduleFree"}


class BuiltinStack:
    key = "builtin"
    name = "Built-in trainer"
    architectures = frozenset({"sd15", "sd2", "sdxl"})
    saves_on_stop = True
    reads_log = False

    def table(self) -> None:
        return None

    def check(self) -> str:
        return "" if TRAINER.is_file() else f"{TRAINER} is missing: install LoRA Pilot again."

    def refusal(self, model: ModelFacts) -> str:
        return wrong_architecture(self, model)

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        if options:
            name = next(iter(options))
            raise UserError(
                f"The built-in trainer has no option {name!r}: all it has are the settings.", field=f"options.{name}"
            )
        nowhere = Path("/")
        job = TrainingJob(
            name="lora",
            folder=nowhere,
            attempt_folder=nowhere,
            spec=spec,
            base_model=nowhere,
            architecture="",
            pictures=(),
            device=DeviceKind.CPU,
        )
        try:
            trainer_config.from_table(_config(job, nowhere))
        except ConfigError as error:
            raise UserError(str(error)) from None

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        if spec.optimizer in OWN_SCHEDULE and not spec.lr_schedule.startswith("constant"):
            return [
                f"{spec.optimizer} has no use for the schedule {spec.lr_schedule}: its rate stays after the warm-up."
            ]
        return []

    def prepare(self, job: TrainingJob) -> None:
        """Nothing to do: it goes on from a state that it is given."""

    def compile(self, job: TrainingJob) -> LaunchPlan:
        config = job.attempt_folder / f"{job.name}.toml"
        manifest = job.attempt_folder / "pictures.jsonl"
        pictures = "".join(
            json.dumps({"image": p.image, "caption": p.caption, "repeats": p.repeats * job.spec.repeats}) + "\n"
            for p in job.pictures
        )
        text = toml.dumps(_config(job, manifest))
        return LaunchPlan(
            files={config: text, job.folder / f"{job.name}.toml": text, manifest: pictures},
            argv=[sys.executable, "-P", *accelerate_launcher(len(job.device_uuids)), str(TRAINER), str(config)],
            env=trainer_environment(job, workspace.cache()) | LAUNCHER_ENVIRONMENT,
            cwd=job.folder,
            # The first signal saves weights and state after the step under way; large models take a while to write.
            stop=[StopStep("SIGINT", SAVE_SECONDS), StopStep("SIGTERM", 10), StopStep("SIGKILL", 5)],
            not_expressed=self.not_expressed(job.spec, job.architecture),
            config=config,
        )

    def read_config(self, text: str) -> Imported:
        """The trainer's own TOML: its keys are those of sd-scripts."""
        keys = without_sections(read_toml(text))
        table = load_table("kohya")
        taken = take(table, {key: value for key, value in keys.items() if key in table.options})
        own = {key: value for key, value in keys.items() if key in ("ema_decay", "save_best")}
        lost = [f"{name} has no counterpart in {self.name}: left out." for name in taken.options]
        return replace(taken, values=taken.values | own, options={}, notes=[*taken.notes, *lost])

    def report(self, reading: Reading) -> Path:
        return reading.attempt_folder / EVENTS_FILE

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        end = chunk.rfind(b"\n") + 1
        return [observation for record in event_records(chunk[:end]) for observation in _observe(record)], end

    def measure(self, reading: Reading) -> list[Observation]:
        return []

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        return complete_states(folder / "state")

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        last = last_events(reading.attempt_folder / EVENTS_FILE)
        if "error" in last:
            return refused(last["error"], exit_)
        if "finished" in last and (exit_.code == 0 or exit_.stop_requested):  # a stop may come when all is done
            return _finished(reading.folder, last["finished"])
        if "stopped" in last:
            return Outcome(Status.STOPPED, _stopped(last["stopped"]))
        said = logfile.last_words(reading.log, exit_.log_offset)
        cause = BY_EXIT_CODE.get(exit_.code) or cause_of_death(exit_, said)
        if exit_.stop_requested and cause in (Cause.OWN, Cause.KILLED):
            return Outcome(Status.STOPPED, _ended_hard(exit_))
        return Outcome(**WITHOUT_A_WORD[cause], cause=cause) if cause in WITHOUT_A_WORD else no_word(exit_)


# What accelerate's workers inherit: `-P`, a free port of their own, and as long to save as the stop plan gives.
LAUNCHER_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",
    "PET_STANDALONE": "1",
    "PET_SHUTDOWN_TIMEOUT": f"{SAVE_SECONDS}",
}


# On a full disk there may be no event.
BY_EXIT_CODE = {OutOfMemoryError.exit_status: Cause.OUT_OF_MEMORY, DiskFullError.exit_status: Cause.DISK_FULL}


def no_word(exit_: Exit) -> Outcome:
    return Outcome(
        Status.ERRORED,
        f"The trainer ended with exit code {exit_.code} and no word of why. The end of the log may tell.",
    )


def _ended_hard(exit_: Exit) -> str:
    how = unheard(exit_)
    return f"Stopped before anything could be saved.{how} Resume goes on from the last saved state, if there is one."


def _config(job: TrainingJob, manifest: Path) -> dict[str, Any]:
    """The trainer's TOML. Keys are sd-scripts' where it has them."""
    spec = job.spec
    config: dict[str, Any] = keys_of(spec) | {
        "pretrained_model_name_or_path": str(job.base_model),
        "dataset_manifest": str(manifest),
        "output_dir": str(job.folder),
        "output_name": job.name,
        "events_file": str(job.attempt_folder / EVENTS_FILE),
        "logging_dir": str(job.folder / "tensorboard"),
        "cache_dir": str(workspace.cache() / "encoded"),
        "save_best": spec.save_best,
        "ema_decay": spec.ema_decay,
        "lr_scheduler": "constant_with_warmup" if spec.optimizer in OWN_SCHEDULE else spec.lr_schedule,
        "save_state": True,
        "sample_at_first": True,
        "sample_prompts": [_sample_prompt(prompt, index, job) for index, prompt in enumerate(spec.sample_prompts)],
        "metadata": dict(job.provenance),
    }
    if not spec.gradient_checkpointing:
        del config["gradient_checkpointing"]  # then the trainer decides by the device's memory
    if job.resume_state is not None:
        config["resume"] = str(job.resume_state)
    return config


def _sample_prompt(prompt: str, index: int, job: TrainingJob) -> dict[str, Any]:
    spec = job.spec
    return {
        "prompt": prompt,
        "negative_prompt": "",
        "seed": spec.sample_seed + index,
        "width": spec.resolution,
        "height": spec.resolution,
        "steps": spec.sample_steps,
        "scale": spec.sample_scale,
    }


def event_records(data: bytes) -> Iterator[dict[str, Any]]:
    """The events in `data`; a line that is none (a disk that filled up tore it) is passed over."""
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("v") == 1:
            yield record


def _observe(record: dict[str, Any]) -> Iterator[Observation]:
    make = OBSERVERS.get(record.get("event", ""))
    if make:
        yield make(record)
    if record.get("resume"):
        how = {"exact": "exact, bit for bit", "close": "from the saved state; its arithmetic may differ a little"}
        yield Noted(f"Goes on after step {record['start_step']}: {how[record['resume']]}.")


def _stage(record: dict[str, Any]) -> Stage:
    text = str(record["stage"])
    return Stage(f"{text} {record['done']}/{record['total']}" if record.get("total") else text)


OBSERVERS: dict[str, Callable[[dict[str, Any]], Observation]] = {
    "stage": _stage,
    "started": lambda r: Started(r["start_step"], r["total_steps"]),
    "progress": lambda r: Progress(
        r["step"],
        r["total_steps"],
        r["at"],
        loss=r.get("loss"),
        learning_rate=r.get("lr"),
        steps_per_second=r.get("steps_per_second"),
        eta_seconds=r.get("eta_seconds"),
    ),
    "checkpoint": lambda r: CheckpointSaved(r["path"], r["step"], r["bytes"], r["sha256"], is_final=r["final"]),
    "state": lambda r: StateSaved(r["path"], r["step"]),
    "sample": lambda r: SampleDrawn(
        r["path"], r["step"], r["index"], r["prompt"], r.get("negative_prompt") or "", r["seed"]
    ),
    "validation": lambda r: Validated(r["step"], r["loss"]),
    "checkpoint_removed": lambda r: CheckpointRemoved(r["path"]),
    "warning": lambda r: Noted(r["message"]),
}


def last_events(events: Path) -> dict[str, dict[str, Any]]:
    """The attempt's last `finished`, `stopped` and `error` events."""
    if not events.is_file():
        return {}
    wanted = {"finished", "stopped", "error"}
    return {record["event"]: record for record in event_records(events.read_bytes()) if record.get("event") in wanted}


CAUSES = {
    "out_of_memory": Cause.OUT_OF_MEMORY,
    "disk_full": Cause.DISK_FULL,
    "process_lost": Cause.KILLED,  # one of several that train together
}


def refused(error: dict[str, Any], exit_: Exit) -> Outcome:
    ours = error["code"] == "internal"
    cause = CAUSES.get(error["code"], Cause.OWN)
    if cause == Cause.KILLED and exit_.oom_kills:
        cause = Cause.OUT_OF_MEMORY
    return Outcome(Status.ERRORED if ours else Status.FAILED, error["message"], cause)


def _finished(folder: Path, finished: dict[str, Any]) -> Outcome:
    if (folder / finished["checkpoint"]).is_file():
        return Outcome(Status.SUCCEEDED)
    return Outcome(
        Status.FAILED, f"The trainer finished, but {finished['checkpoint']} is gone. Was it moved or deleted?"
    )


def _stopped(stopped: dict[str, Any]) -> str:
    if stopped["state"] is None:
        return "Stopped before the first step: there was nothing to save."
    return f"Stopped at step {stopped['step']}; weights and state are saved."
