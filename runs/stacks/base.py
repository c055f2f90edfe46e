"""What a trainer is to the rest of the platform. A stack is one file that implements `Stack`; runs/stacks/__init__.py
lists them. Nothing here touches the database: a stack turns values into files and bytes into observations."""

from __future__ import annotations

import enum
import os
import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from django.utils.text import get_text_list

from models_registry.enums import Architecture, describe_architecture, role_within
from runs.enums import DeviceKind, Status
from runs.spec import DEFAULTS, OPTIONS, RunSpec
from runs.stacks.option_table import OptionTable


@dataclass(frozen=True, slots=True)
class TrainingPicture:
    """One picture of the pinned dataset version. `image` is an absolute path."""

    image: str
    caption: str
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One attempt, as a stack needs to know it. All paths are absolute."""

    name: str
    folder: Path
    attempt_folder: Path
    spec: RunSpec
    base_model: Path
    architecture: str
    pictures: Sequence[TrainingPicture]
    device: DeviceKind
    device_uuids: Sequence[str] = ()
    layout: str = "file"  # of the base model: file, folder
    prediction_type: str = "epsilon"
    parts: Mapping[str, Path] = field(default_factory=dict)  # further files of the base model by role: vae, clip_l, …
    options: Mapping[str, Any] = field(default_factory=dict)  # the trainer's own, checked against its option table
    resume_state: Path | None = None
    start_step: int = 0  # of that state
    provenance: Mapping[str, str] = field(default_factory=dict)  # into the LoRA's metadata


@dataclass(frozen=True, slots=True)
class StopStep:
    """Send `signal` (a name of the signal module) to the trainer's group, then wait so long before the next step.

    Or, with a `command` instead of a signal: start it, and go on to the next step when it ends or the time is over.
    """

    signal: str
    grace_seconds: float
    command: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """Files to write (absolute path → text or bytes), files to link (absolute path → where it lies), the process to
    start.

    `config`: which of the files a person would call the run's configuration.
    """

    files: Mapping[Path, str | bytes]
    links: Mapping[Path, Path] = field(default_factory=dict)
    config: Path | None = None
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stop: Sequence[StopStep]
    not_expressed: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """What the trainer does when it is not stepping."""

    text: str


@dataclass(frozen=True, slots=True)
class Started:
    """The first step is next; what an earlier attempt measured after `start_step` is void."""

    start_step: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total_steps: int
    at: float  # Unix seconds
    loss: float | None = None
    learning_rate: float | None = None
    steps_per_second: float | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    path: str  # relative to the run's folder, as in the next two
    step: int
    bytes: int
    sha256: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class StateSaved:
    path: str
    step: int


@dataclass(frozen=True, slots=True)
class SampleDrawn:
    path: str
    step: int
    index: int
    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class CheckpointRemoved:
    path: str


@dataclass(frozen=True, slots=True)
class Validated:
    step: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class Noted:
    """Something for the run's history: a warning, or how exactly it goes on."""

    message: str


@dataclass(frozen=True, slots=True)
class Captioned:
    """A caption for the picture with this hash; or, without one, the reason."""

    sha256: str
    caption: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Hopeless:
    """Going on only wastes the device: the attempt is ended at once, and `Stack.outcome` says why."""


Observation = (
    Stage
    | Started
    | Progress
    | Validated
    | CheckpointSaved
    | CheckpointRemoved
    | StateSaved
    | SampleDrawn
    | Captioned
    | Noted
    | Hopeless
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An attempt whose report is read. Steps count over all attempts of the run."""

    name: str
    folder: Path
    attempt_folder: Path
    spec: RunSpec
    log_offset: int = 0  # where its own output begins
    start_step: int = 0
    step: int = 0  # the last one that was reported before these bytes
    is_over: bool = False  # nothing follows: what is there is complete
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "_logs" / "train.log"


@dataclass(frozen=True, slots=True)
class Exit:
    """How the trainer's process ended, as the runner saw it. A negative code is a signal's number."""

    code: int
    stop_requested: bool
    signals: Sequence[str] = ()  # that the stop took, in order
    oom_kills: int = 0  # by the kernel, anywhere on the machine, while it ran
    log_offset: int = 0  # where its own output begins


class Cause(enum.Enum):
    """Why an attempt ended early, where that decides what becomes of the run."""

    OWN = enum.auto()  # it said no, it finished, it was asked to stop
    KILLED = enum.auto()  # from outside
    OUT_OF_MEMORY = enum.auto()
    DISK_FULL = enum.auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What really happened: a terminal status and, unless it succeeded, a sentence that says what to do."""

    status: Status
    reason: str = ""
    cause: Cause = Cause.OWN


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a stack needs to know of a base model to tell whether it can train it."""

    name: str
    architecture: str
    layout: str  # file, folder
    parts: frozenset[str] = frozenset()  # roles of its further files


@dataclass(frozen=True, slots=True)
class Imported:
    """A configuration of the trainer's own, in our words. `model`: what it names as its base model."""

    values: dict[str, Any]  # of the RunSpec
    options: dict[str, Any]
    model: str = ""
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    epochs: int = 0  # how long it trains, where it says that instead of steps: those depend on the dataset
    warmup_share: float = 0.0  # of the steps, where it says that


class Stack(Protocol):
    key: str
    name: str
    architectures: frozenset[str]
    saves_on_stop: bool  # weights and state, so that a stop or a pause loses nothing
    reads_log: bool  # `parse` reads the attempt's part of the log, not a file of the trainer's own

    def table(self) -> OptionTable | None:
        """The trainer's own options; None when the settings of the form are all it has."""

    def check(self) -> str:
        """Empty when the trainer can be used here, else what is missing and how to get it."""

    def refusal(self, model: ModelFacts) -> str:
        """Why it cannot train this base model, and what to do; empty when it can."""

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        """Raises UserError for settings that this trainer would refuse, before the run is queued."""

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        """A sentence for each setting that this trainer has nothing for."""

    def prepare(self, job: TrainingJob) -> None:
        """Called before each launch, by the one that launches: tidies what an earlier attempt left in the run's folder.

        Raises UserError when the trainer cannot go on from what is there.
        """

    def compile(self, job: TrainingJob) -> LaunchPlan:
        """What to write and to start. Changes nothing itself, so that a configuration can also be shown.

        Raises UserError for what this trainer cannot do.
        """

    def read_config(self, text: str) -> Imported:
        """A configuration of this trainer that somebody brings along. Raises UserError, with the line."""

    def report(self, reading: Reading) -> Path:
        """What `parse` reads while an attempt runs: the log, or a file of the trainer's own."""

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        """Whole records at the start of `chunk`, and how many bytes they took; a torn last record is left.

        Called again with the same bytes when the observations could not be stored: what it does to files is repeatable.
        """

    def measure(self, reading: Reading) -> list[Observation]:
        """What the trainer tells elsewhere than in its report; safe to repeat."""

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        """Folder (or file) and step of each complete state on the disk, newest first."""

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        """Proof of how an attempt ended. Exit code 0 alone is never success."""


# What CUDA, ROCm, cuDNN, cuBLAS, PyTorch's own allocator and fork say.
OUT_OF_MEMORY = re.compile(
    rb"out of memory|OutOfMemoryError|CU(?:BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    rb"|can't allocate memory|not enough memory|Cannot allocate memory",
    re.IGNORECASE,
)
NO_SPACE = re.compile(rb"No space left on device|Disk quota exceeded|os error 28\b", re.IGNORECASE)
FORCED = {-signal.SIGKILL, 128 + signal.SIGKILL}
INTERRUPTING = FORCED | {-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT, -signal.SIGHUP}


def cause_of_death(exit_: Exit, last_words: bytes) -> Cause:
    """Why a trainer that told nothing itself is gone: by its exit code, the kernel's count, and the end of its log.

    The kernel counts the processes that it kills for memory. A SIGKILL without such a count came from somebody else.
    """
    if exit_.code in FORCED and "SIGKILL" not in exit_.signals:
        return Cause.OUT_OF_MEMORY if exit_.oom_kills else Cause.KILLED
    if exit_.code in INTERRUPTING:
        return Cause.KILLED
    if exit_.code and OUT_OF_MEMORY.search(last_words):
        return Cause.OUT_OF_MEMORY
    if exit_.code and NO_SPACE.search(last_words):
        return Cause.DISK_FULL
    return Cause.OWN


WITHOUT_A_WORD: dict[Cause, dict[str, Any]] = {
    Cause.OUT_OF_MEMORY: {
        "status": Status.FAILED,
        "reason": "Memory ran out, and the trainer was ended. "
        "Use a smaller batch or resolution, or end other programs, then resume.",
    },
    Cause.KILLED: {"status": Status.ERRORED, "reason": "The trainer was killed from outside."},
    Cause.DISK_FULL: {"status": Status.FAILED, "reason": "The disk is full: free some space, then resume."},
}


def wrong_architecture(stack: Stack, model: ModelFacts) -> str:
    """A sentence when `stack` does not train models of this kind."""
    if model.architecture in stack.architectures:
        return ""
    kind = describe_architecture(model.architecture)
    own = "it is of no known kind" if model.architecture == Architecture.UNKNOWN else f"its kind is {kind}"
    trained = get_text_list([describe_architecture(one) for one in sorted(stack.architectures)], "or")
    return f"{stack.name} cannot train {model.name}: {own}. Choose a model of {trained}."


ATTACH = "under “Other files it is trained with” on its page"


def without_parts(stack_name: str, model: ModelFacts, wanted: Iterable[str]) -> str:
    """A sentence when `model` lacks files of these roles."""
    if missing := sorted(set(wanted) - model.parts):
        titles = get_text_list([role_within(role) for role in missing], "or")
        files = "the files" if len(missing) > 1 else "the file"
        return f"{model.name} has no {titles} for {stack_name}: add {files} {ATTACH}."
    return ""


def without_counterpart(stack: Stack, fields: Iterable[str], spec: RunSpec) -> list[str]:
    """A sentence for each of `fields` that `spec` sets to something else than the default."""
    return [
        f"{OPTIONS[name].label} ({_shown(getattr(spec, name))}) has no counterpart in {stack.name}."
        for name in fields
        if getattr(spec, name) != DEFAULTS[name]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


STATES = 10  # in a run that sets no cadence


def steps_between_saves(spec: RunSpec) -> int:
    """For a trainer that cannot save when it is stopped, or loses what came after its last save in a crash."""
    return spec.save_every_steps or max(1, spec.steps // STATES)


def unheard(exit_: Exit) -> str:
    """A sentence when a stop took more than its first signal; with a space in front of it."""
    if len(exit_.signals) < 2:
        return ""
    return f" It did not react to {' and '.join(exit_.signals[:-1])}, and was killed."


def accelerate_launcher(processes: int, *further: str) -> list[str]:
    """What stands before the script: several devices train in one process each, which accelerate starts.

    CUDA_VISIBLE_DEVICES says on which. Every flag is given: a default_config.yaml in somebody's home would decide
    otherwise. `further`: flags of the trainer's own.
    """
    if processes <= 1:
        return []
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *further,
    ]


PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME")
HUB_HOME = "huggingface"  # in the cache


def trainer_environment(job: TrainingJob, cache: Path) -> dict[str, str]:
    """A trainer's environment, built from nothing: none of the web server's secrets is in it."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    devices = ",".join(job.device_uuids) if job.device == DeviceKind.CUDA else ""
    return passed_on | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": devices,
        "HF_HOME": str(cache / HUB_HOME),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def hub_snapshots(cache: Path, repository: str) -> Path:
    """Where trainers find what Hugging Face's client took of a repository: a folder of it for each version."""
    return cache / HUB_HOME / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots"
