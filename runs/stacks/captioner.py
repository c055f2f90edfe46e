"""Captions made on a device of this installation, by `lora_trainer caption`: a run like others, with slot, log, stop.

A step is a picture. What it tells becomes proposals of the order (datasets/captioning); it trains nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorapilot import workspace
from lorapilot.errors import UserError
from runs import logfile
from runs.enums import Status
from runs.spec import RunSpec
from runs.stacks.base import (
    WITHOUT_A_WORD,
    Captioned,
    Cause,
    Exit,
    Imported,
    LaunchPlan,
    ModelFacts,
    Observation,
    Outcome,
    Progress,
    Reading,
    StopStep,
    TrainingJob,
    cause_of_death,
    trainer_environment,
)
from runs.stacks.builtin import EVENTS_FILE, OBSERVERS, TRAINER, event_records, last_events, no_word, refused

NOT_FOR_TRAINING = "The captioner trains nothing: choose a trainer."


class CaptionerStack:
    key = "captioner"
    name = "Captioner"
    architectures: frozenset[str] = frozenset()
    saves_on_stop = True  # each caption is kept as soon as it is made
    reads_log = False

    def table(self) -> None:
        return None

    def check(self) -> str:
        return "" if TRAINER.is_file() else f"{TRAINER} is missing: install LoRA Pilot again."

    def refusal(self, model: ModelFacts) -> str:
        return NOT_FOR_TRAINING

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        raise UserError(NOT_FOR_TRAINING, field="stack")

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        return []

    def prepare(self, job: TrainingJob) -> None:
        """Nothing to do: it is given the pictures that still wait."""

    def compile(self, job: TrainingJob) -> LaunchPlan:
        if not job.pictures:
            raise UserError("No picture waits for a caption any more: the dataset, or the order, was changed.")
        order = job.attempt_folder / "order.json"
        text = json.dumps(_order(job), indent=1, ensure_ascii=False)
        return LaunchPlan(
            files={order: text},
            argv=[sys.executable, "-P", str(TRAINER), "caption", str(order)],
            env=trainer_environment(job, workspace.cache()),
            cwd=job.folder,
            stop=[StopStep("SIGINT", 30), StopStep("SIGTERM", 5), StopStep("SIGKILL", 5)],
            config=order,
        )

    def read_config(self, text: str) -> Imported:
        raise UserError(NOT_FOR_TRAINING)

    def report(self, reading: Reading) -> Path:
        return reading.attempt_folder / EVENTS_FILE

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        end = chunk.rfind(b"\n") + 1
        records = [record for record in event_records(chunk[:end]) if record.get("event") in READ]
        return [READ[record["event"]](record) for record in records], end

    def measure(self, reading: Reading) -> list[Observation]:
        return []

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        """Every picture that was told of is done for good."""
        attempts = folder / "_attempts"
        done = sum(_pictures_in(path) for path in attempts.glob(f"*/{EVENTS_FILE}"))
        return [(attempts, done)] if done else []

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        last = last_events(reading.attempt_folder / EVENTS_FILE)
        if "error" in last:
            return refused(last["error"], exit_)
        if "finished" in last and exit_.code == 0:
            return _finished(last["finished"], reading)
        if "stopped" in last:
            step = last["stopped"]["step"]
            return Outcome(Status.STOPPED, f"Stopped at picture {step}; the captions so far are kept.")
        said = logfile.last_words(reading.log, exit_.log_offset)
        cause = cause_of_death(exit_, said)
        if exit_.stop_requested and cause in (Cause.OWN, Cause.KILLED):
            return Outcome(Status.STOPPED, "Stopped; the captions so far are kept.")
        return Outcome(**WITHOUT_A_WORD[cause], cause=cause) if cause in WITHOUT_A_WORD else no_word(exit_)


OF_THE_ORDER = (
    "captioner",
    "general_threshold",
    "character_threshold",
    "underscores_to_spaces",
    "exclude",
    "prompt",
    "max_tokens",
)


def _order(job: TrainingJob) -> dict[str, Any]:
    return {name: job.options[name] for name in OF_THE_ORDER if name in job.options} | {
        "model": str(job.base_model),
        "pictures": [picture.image for picture in job.pictures],
        "events_file": str(job.attempt_folder / EVENTS_FILE),
        "device": str(job.device),
        "start_step": job.start_step,
    }


def _pictures_in(events: Path) -> int:
    return sum(record.get("event") in ("captioned", "refused") for record in event_records(events.read_bytes()))


def _finished(finished: dict[str, Any], reading: Reading) -> Outcome:
    if finished["captioned"] or reading.start_step:  # what earlier attempts told
        return Outcome(Status.SUCCEEDED)
    return Outcome(Status.FAILED, "No picture got a caption. The order's page says why, picture by picture.")


READ: dict[str, Callable[[dict[str, Any]], Observation]] = {
    "stage": OBSERVERS["stage"],
    "started": OBSERVERS["started"],
    "progress": lambda r: Progress(
        r["step"],
        r["total_steps"],
        r["at"],
        steps_per_second=r.get("steps_per_second"),
        eta_seconds=r.get("eta_seconds"),
    ),
    "captioned": lambda r: Captioned(r["image"], caption=r["caption"]),
    "refused": lambda r: Captioned(r["image"], reason=r["reason"]),
}
