"""What a trainer is to the rest of the platform. A stack is one file that implements `Stack`; runs/stacks/__init__.py
lists them. Nothing here touches the database: a stack turns values into files and bytes into observations."""

from __future__ import annotations

import enum
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runs.enums import DeviceKind, Status
from runs.spec import RunSpec


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
    resume_state: Path | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)  # into the LoRA's metadata


@dataclass(frozen=True, slots=True)
class StopStep:
    """Send `signal` (a name of the signal module) to the trainer's group, then wait so long before the next step."""

    signal: str
    grace_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """Files to write (absolute path → text), and the process to start."""

    files: Mapping[Path, str]
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


Observation = (
    Stage | Started | Progress | Validated | CheckpointSaved | CheckpointRemoved | StateSaved | SampleDrawn | Noted
)


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


class Stack(Protocol):
    key: str
    name: str
    architectures: frozenset[str]
    layouts: frozenset[str]  # of base models: folder, file
    saves_on_stop: bool  # weights and state, so that a stop or a pause loses nothing

    def check(self) -> str:
        """Empty when the trainer can be used here, else what is missing and how to get it."""

    def check_spec(self, spec: RunSpec) -> None:
        """Raises UserError for settings that this trainer would refuse, before the run is queued."""

    def compile(self, job: TrainingJob) -> LaunchPlan:
        """What to write and to start. Raises UserError for what this trainer cannot do."""

    def events_file(self, attempt_folder: Path) -> Path:
        """What `parse` reads while an attempt runs: the log, or a file of the trainer's own."""

    def parse(self, chunk: bytes) -> tuple[list[Observation], int]:
        """Whole records at the start of `chunk`, and how many bytes they took; a torn last record is left."""

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        """Folder (or file) and step of each complete state on the disk, newest first."""

    def outcome(self, folder: Path, attempt_folder: Path, exit_: Exit) -> Outcome:
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


PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME")


def trainer_environment(job: TrainingJob, cache: Path) -> dict[str, str]:
    """A trainer's environment, built from nothing: none of the web server's secrets is in it."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    devices = ",".join(job.device_uuids) if job.device == DeviceKind.CUDA else ""
    return passed_on | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": devices,
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
