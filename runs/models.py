"""Hosts with their devices and slots; runs with their attempts, events, metrics, checkpoints and samples.

The database holds the invariants: one active run a slot, active ⇔ slot, ended ⇔ finished_at.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from datasets.models import Captioning, DatasetVersion
from lorapilot import workspace
from lorapilot.access import Shared, SharedQuerySet
from lorapilot.errors import UserError
from models_registry.models import BaseModel
from runs.enums import ACTIVE, TERMINAL, DeviceKind, Ending, Priority, Profile, Status, StopIntent

CAPTIONER = "captioner"  # the stack of runs that make captions: they have no base model, and train nothing
# AI Toolkit names the folder of a job by the job, and goes on with what it finds there.
OWN_OUTPUTS = {"ai_toolkit": "ai-toolkit"}


def outputs_of(stack: str) -> Path:
    """Where runs of a stack have their folders."""
    return workspace.outputs() / OWN_OUTPUTS.get(stack, "")


ACTIVE_VALUES = sorted(ACTIVE)
TERMINAL_VALUES = sorted(TERMINAL)


class Host(models.Model):
    """A machine with a worker. Its django-q2 cluster has its name."""

    name = models.CharField(max_length=255, unique=True)
    boot_id = models.CharField(max_length=64, blank=True, help_text="Changes when the machine restarts.")
    heartbeat_at = models.DateTimeField(null=True, blank=True, help_text="By the database's clock.")
    draining_at = models.DateTimeField(null=True, blank=True, help_text="While set, it takes no more runs.")
    lost_at = models.DateTimeField(null=True, blank=True, help_text="Set while nothing is heard of it.")
    dead_at = models.DateTimeField(null=True, blank=True, help_text="Staff said that it does not come back.")
    processes = models.JSONField(default=dict, help_text="Which of its processes run, and when it looked.")
    trainers = models.JSONField(default=dict, help_text="By key: what is installed there, and what is missing.")

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def condition(self) -> str:
        """One word for pages and the API: dead, lost, draining or online."""
        if self.dead_at:
            return "dead"
        if self.lost_at or not self.heartbeat_at:
            return "lost"
        return "draining" if self.draining_at else "online"


class Slot(models.Model):
    """The devices on which one run trains at a time."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="slots")
    name = models.CharField(max_length=100)
    is_enabled = models.BooleanField(default=True, help_text="A disabled slot finishes its run and takes no other.")

    class Meta:
        ordering: ClassVar = ["host__name", "name"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["host", "name"], name="slot_name_unique_per_host")]

    def __str__(self) -> str:
        return f"{self.host.name}/{self.name}"


class Device(models.Model):
    """A GPU by its NVML uuid, or a host's CPU. It belongs to at most one slot."""

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="devices")
    slot = models.ForeignKey(Slot, null=True, blank=True, on_delete=models.SET_NULL, related_name="devices")
    kind = models.CharField(max_length=4, choices=DeviceKind.choices)
    uuid = models.CharField(max_length=100, help_text="NVML uuid, or `cpu`.")
    index = models.PositiveSmallIntegerField(default=0)
    name = models.CharField(max_length=200)
    memory_bytes = models.PositiveBigIntegerField(default=0)

    class Meta:
        ordering: ClassVar = ["host__name", "kind", "index"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["host", "uuid"], name="device_once_per_host"),
            models.CheckConstraint(name="device_kind_valid", condition=Q(kind__in=DeviceKind.values)),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.uuid})"


class DeviceSample(models.Model):
    """How busy a device was at a moment. Kept for a day; what the device does not tell is null."""

    device = models.ForeignKey(Device, on_delete=models.CASCADE, related_name="samples")
    at = models.DateTimeField(db_index=True, help_text="By the database's clock.")
    utilisation = models.FloatField(null=True, help_text="Percent.")
    memory_used_bytes = models.PositiveBigIntegerField(null=True)
    temperature = models.FloatField(null=True, help_text="Degrees Celsius.")
    power_watts = models.FloatField(null=True)

    class Meta:
        ordering: ClassVar = ["device", "at"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["device", "at"], name="device_sample_once_per_moment")]

    def __str__(self) -> str:
        return f"{self.device} at {self.at}"


class Run(Shared):
    """One training run from form to LoRA. Only runs/transitions.py changes `status` and `slot`."""

    output_name = models.CharField(max_length=100, help_text="Folder and file name of the result; unique here.")
    stack = models.CharField(max_length=30, help_text="Which trainer: a key of runs.stacks.")
    profile = models.CharField(max_length=20, choices=Profile.choices, blank=True)
    spec = models.JSONField(help_text="The validated RunSpec.")
    options = models.JSONField(default=dict, help_text="The trainer's own, beside the RunSpec; checked.")
    notes = models.JSONField(default=list, help_text="What was adapted to the base model and the device, in sentences.")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="runs")
    base_model = models.ForeignKey(BaseModel, null=True, blank=True, on_delete=models.PROTECT, related_name="runs")
    captioning = models.ForeignKey(
        Captioning,
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="runs",
        help_text="The order that it makes captions for; gone with the dataset.",
    )
    device = models.CharField(
        max_length=4,
        choices=DeviceKind.choices,
        default=DeviceKind.CPU,
        help_text="What it was planned for: a run for a GPU does not start on a CPU.",
    )
    needed_bytes = models.PositiveBigIntegerField(default=0, help_text="What it will write at most, estimated.")
    adaptations = models.JSONField(
        default=dict, help_text="Settings of later attempts that differ from `spec`, since memory ran out."
    )
    retry_of = models.ForeignKey("self", null=True, blank=True, on_delete=models.SET_NULL, related_name="retries")

    status = models.CharField(max_length=9, choices=Status.choices, default=Status.QUEUED)
    slot = models.ForeignKey(Slot, null=True, blank=True, on_delete=models.PROTECT, related_name="runs")
    attempt = models.PositiveIntegerField(default=1)
    priority = models.SmallIntegerField(choices=Priority.choices, default=Priority.NORMAL)
    place = models.BigIntegerField(
        default=0, help_text="Orders its owner's waiting runs: when it was queued, in microseconds, until it is moved."
    )
    held_at = models.DateTimeField(
        null=True, blank=True, help_text="While set, the run keeps its place but does not start."
    )
    not_before = models.DateTimeField(null=True, blank=True, help_text="A pause after an interruption.")
    stop_intent = models.CharField(max_length=5, choices=StopIntent.choices, blank=True)
    kill_requested_at = models.DateTimeField(null=True, blank=True, help_text="End at once, without saving.")
    stop_requested_at = models.DateTimeField(null=True, blank=True)
    stop_requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    reason = models.TextField(blank=True, help_text="Why it ended so, and what to do.")
    exit_code = models.IntegerField(null=True, blank=True)

    stage = models.CharField(max_length=100, blank=True, help_text="What it does before the first step.")
    step = models.PositiveIntegerField(default=0)
    total_steps = models.PositiveIntegerField(default=0)
    loss = models.FloatField(null=True, blank=True)
    steps_per_second = models.FloatField(null=True, blank=True)
    eta_seconds = models.FloatField(null=True, blank=True)

    created_at = models.DateTimeField(auto_now_add=True)
    queued_at = models.DateTimeField()
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    # Counts every visible change, so that a follower sees with one number that there is news.
    revision = models.PositiveBigIntegerField(default=0)

    objects = SharedQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["-pk"]
        indexes: ClassVar = [models.Index(fields=["status", "queued_at"], name="run_queue")]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["slot"], condition=Q(status__in=ACTIVE_VALUES), name="one_active_run_per_slot"
            ),
            models.UniqueConstraint(Lower("output_name"), name="run_output_name_unique"),
            models.CheckConstraint(name="run_status_valid", condition=Q(status__in=Status.values)),
            models.CheckConstraint(
                name="run_captions_iff_no_base_model",
                condition=Q(stack=CAPTIONER, base_model__isnull=True)
                | (~Q(stack=CAPTIONER) & Q(base_model__isnull=False)),
            ),
            models.CheckConstraint(name="run_priority_valid", condition=Q(priority__in=Priority.values)),
            models.CheckConstraint(
                name="run_active_iff_slot",
                condition=Q(status__in=ACTIVE_VALUES, slot__isnull=False)
                | (~Q(status__in=ACTIVE_VALUES) & Q(slot__isnull=True)),
            ),
            models.CheckConstraint(
                name="run_terminal_iff_finished_at",
                condition=Q(status__in=TERMINAL_VALUES, finished_at__isnull=False)
                | (~Q(status__in=TERMINAL_VALUES) & Q(finished_at__isnull=True)),
            ),
        ]

    def __str__(self) -> str:
        return self.output_name

    @property
    def is_active(self) -> bool:
        return self.status in ACTIVE

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def trains(self) -> bool:
        return self.stack != CAPTIONER

    @property
    def trained_model(self) -> BaseModel:
        """Raises UserError for a run that makes captions."""
        if self.base_model is None:
            raise UserError(f"{self.output_name} makes captions: this is for runs that train.")
        return self.base_model

    @property
    def base_model_sha256(self) -> str:
        return self.base_model.sha256 if self.base_model is not None else ""

    @property
    def works_with(self) -> str:
        """The base model, or the captioner's model, as pages name it."""
        return str(self.base_model) if self.base_model is not None else str(self.options.get("model", ""))

    @property
    def folder(self) -> Path:
        return outputs_of(self.stack) / self.output_name

    @property
    def log_path(self) -> Path:
        return self.folder / "_logs" / "train.log"

    def attempt_folder(self, number: int | None = None) -> Path:
        return self.folder / "_attempts" / str(number or self.attempt)


class TrainPilotBase(models.Model):
    """A user's base configuration for TrainPilot's profiles, in sd-scripts' keys."""

    owner = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="trainpilot_base")
    content = models.TextField(help_text="TOML.")
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"Base configuration of {self.owner}"


class Attempt(models.Model):
    """One launch of a run's trainer: where its log starts, and who supervises it now."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="attempts")
    number = models.PositiveIntegerField()
    slot = models.ForeignKey(Slot, on_delete=models.PROTECT, related_name="+")
    log_offset = models.PositiveBigIntegerField(default=0, help_text="Bytes of the log before this attempt.")
    observed_bytes = models.PositiveBigIntegerField(
        default=0, help_text="Bytes of the trainer's events already stored."
    )
    lease = models.UUIDField(null=True, blank=True, help_text="The supervising slice.")
    lease_at = models.DateTimeField(null=True, blank=True, help_text="Its heartbeat.")
    enqueued_at = models.DateTimeField(null=True, blank=True, help_text="When a slice was last handed out.")
    created_at = models.DateTimeField(auto_now_add=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    ending = models.CharField(max_length=13, choices=Ending.choices, blank=True)
    start_step = models.PositiveIntegerField(default=0, help_text="The step of the state that it went on from.")
    adaptations = models.JSONField(default=dict, help_text="The run's adaptations when it was launched.")

    class Meta:
        ordering: ClassVar = ["run", "number"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "number"], name="attempt_number_unique_per_run"),
            models.CheckConstraint(name="attempt_ending_valid", condition=Q(ending__in=["", *Ending.values])),
        ]

    def __str__(self) -> str:
        return f"{self.run} attempt {self.number}"


class RunEvent(models.Model):
    """Every change of status, and what else a person wants to find again: who and why."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="events")
    at = models.DateTimeField(auto_now_add=True)
    attempt = models.PositiveIntegerField()
    old_status = models.CharField(max_length=9, blank=True)
    new_status = models.CharField(max_length=9, blank=True)
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    message = models.TextField(blank=True)

    class Meta:
        ordering: ClassVar = ["pk"]

    def __str__(self) -> str:
        return f"{self.old_status} → {self.new_status}" if self.new_status else self.message


class MetricPoint(models.Model):
    """What the trainer measured at one step; a later attempt's value replaces an earlier one's."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="metrics")
    step = models.PositiveIntegerField()
    attempt = models.PositiveIntegerField()
    loss = models.FloatField(null=True)
    learning_rate = models.FloatField(null=True)
    at = models.DateTimeField()

    class Meta:
        ordering: ClassVar = ["run", "step"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "step"], name="metric_once_per_step")]

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss}"


class ValidationPoint(models.Model):
    """The loss on pictures that are not trained, after a step; a later attempt's value replaces an earlier one's."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="validations")
    step = models.PositiveIntegerField()
    attempt = models.PositiveIntegerField()
    loss = models.FloatField(null=True)

    class Meta:
        ordering: ClassVar = ["run", "step"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "step"], name="validation_once_per_step")]

    def __str__(self) -> str:
        return f"step {self.step}: validation loss {self.loss}"


class Checkpoint(models.Model):
    """LoRA weights that a run saved."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="checkpoints")
    step = models.PositiveIntegerField()
    path = models.CharField(max_length=300, help_text="Relative to the run's folder.")
    bytes = models.PositiveBigIntegerField()
    sha256 = models.CharField(max_length=64)
    is_final = models.BooleanField(default=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["run", "step", "path"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "path"], name="checkpoint_once_per_path")]

    def __str__(self) -> str:
        return self.path


class TrainingState(models.Model):
    """What a trainer needs to go on from a step: weights, optimizer, random states."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="states")
    step = models.PositiveIntegerField()
    path = models.CharField(max_length=300, help_text="Relative to the run's folder.")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["run", "step"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "path"], name="state_once_per_path")]

    def __str__(self) -> str:
        return self.path


class Sample(models.Model):
    """A picture that the trainer drew at a step, to watch the LoRA learn."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="samples")
    step = models.PositiveIntegerField()
    index = models.PositiveSmallIntegerField(help_text="Which of the run's sample prompts.")
    path = models.CharField(max_length=300, help_text="Relative to the run's folder.")
    prompt = models.TextField()
    negative_prompt = models.TextField(blank=True)
    seed = models.BigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["run", "step", "index"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "path"], name="sample_once_per_path")]

    def __str__(self) -> str:
        return f"step {self.step}, prompt {self.index}"
