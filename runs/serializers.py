"""How the API shows runs and what it takes."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import Any

from django.conf import settings
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from datasets.models import Dataset
from models_registry.models import BaseModel
from runs import disk, waiting
from runs.enums import PartState, Priority, Profile, Status
from runs.models import Attempt, Checkpoint, Device, Host, Run, RunEvent, Sample, Slot
from runs.parts import Part
from runs.stacks import STACKS

PRIORITIES = "-1 (low), 0 (normal) or 1 (high, which staff give)."


class RunSerializer(serializers.ModelSerializer[Run]):
    owner = serializers.CharField(source="owner.username")
    dataset = serializers.CharField(source="dataset_version.name")
    dataset_version = serializers.IntegerField(source="dataset_version.number")
    dataset_digest = serializers.CharField(source="dataset_version.digest")
    base_model = serializers.CharField(source="base_model.name", allow_null=True, help_text="null: it makes captions.")
    base_model_sha256 = serializers.CharField(source="base_model.sha256", allow_null=True)
    slot = serializers.SerializerMethodField()
    host_condition = serializers.SerializerMethodField(help_text="Of the host that trains it.")
    stop_requested = serializers.SerializerMethodField()
    queue_place = serializers.SerializerMethodField(help_text="1 starts next. null: it does not wait, or is held.")
    starts_at = serializers.SerializerMethodField(help_text="A forecast. null: nobody can tell.")
    waits_for = serializers.SerializerMethodField(
        help_text='What else than its turn keeps it in the queue; "" when only that.'
    )

    class Meta:
        model = Run
        fields = (
            "id", "output_name", "owner", "stack", "profile", "spec", "options", "adaptations", "notes", "dataset",
            "dataset_version", "dataset_digest", "base_model", "base_model_sha256", "device", "needed_bytes", "status",
            "priority", "queue_place", "starts_at", "waits_for", "slot", "host_condition", "attempt", "reason",
            "exit_code", "stage", "step", "total_steps", "loss", "steps_per_second", "eta_seconds", "held_at",
            "stop_requested", "stop_intent", "created_at", "queued_at", "started_at", "finished_at",
        )  # fmt: skip

    @cached_property
    def queue(self) -> waiting.Queue:
        return self.context.get("queue") or waiting.Queue()

    def get_slot(self, run: Run) -> str | None:
        return str(run.slot) if run.slot else None

    def get_host_condition(self, run: Run) -> str | None:
        return run.slot.host.condition if run.slot else None

    def get_stop_requested(self, run: Run) -> bool:
        return run.stop_requested_at is not None

    def get_queue_place(self, run: Run) -> int | None:
        return self.queue.places.get(run.pk) if _waits(run) else None

    def get_starts_at(self, run: Run) -> datetime | None:
        return self.queue.starts.get(run.pk) if _waits(run) else None

    def get_waits_for(self, run: Run) -> str | None:
        return waiting.reason_to_wait(run, open_places=self.queue.open_places) if _waits(run) else None


def _waits(run: Run) -> bool:
    return run.status == Status.QUEUED and run.held_at is None


class QueueSerializer(serializers.Serializer[Any]):
    """`length`: how many runs wait, also those that you do not see."""

    rule = serializers.CharField()
    length = serializers.IntegerField()
    runs = RunSerializer(many=True)


class SubmitSerializer(serializers.Serializer[Any]):
    """A new run. `settings` are fields of the RunSpec; those left out take the profile's value, or the default."""

    dataset = serializers.PrimaryKeyRelatedField(queryset=Dataset.objects.all())
    base_model = serializers.PrimaryKeyRelatedField(queryset=BaseModel.objects.all())
    output_name = serializers.CharField(max_length=100)
    profile = serializers.ChoiceField(choices=Profile.choices, required=False, allow_blank=True, default="")
    stack = serializers.ChoiceField(choices=sorted(STACKS), required=False, default="builtin")
    settings = serializers.DictField(required=False, default=dict)
    options = serializers.DictField(
        required=False, default=dict, help_text="The trainer's own, by key: GET /api/v1/stacks/<stack>/."
    )
    priority = serializers.IntegerField(required=False, default=Priority.NORMAL, help_text=PRIORITIES)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        request = self.context.get("request")
        if request is not None:  # a stranger's dataset does not exist
            self.fields["dataset"].queryset = Dataset.objects.visible_to(request.user)  # type: ignore[attr-defined]


class RunCheckSerializer(SubmitSerializer):
    """The same, before it is submitted: it needs no name yet."""

    output_name = serializers.CharField(max_length=100, required=False, default="", allow_blank=True)


class RemedySerializer(serializers.Serializer[Any]):
    name = serializers.CharField(help_text="Of the manifest: POST /api/v1/models/manifest/<name>/pull/ brings it.")
    role = serializers.CharField()
    title = serializers.CharField()
    path = serializers.CharField(help_text="Where it goes, or is, in the models folder.")
    is_here = serializers.BooleanField(help_text="Then it only has to be added to the base model.")


class RunPlanSerializer(serializers.Serializer[Any]):
    spec = serializers.DictField(help_text="Every setting, as it would be trained.")
    steps = serializers.IntegerField()
    epochs = serializers.FloatField()
    updates_per_epoch = serializers.IntegerField()
    images = serializers.IntegerField()
    repeats = serializers.IntegerField()
    device = serializers.CharField()
    expected_seconds = serializers.FloatField(allow_null=True, help_text="null: no run like it has been measured yet.")
    memory_bytes = serializers.IntegerField(allow_null=True, help_text="Of the device, about; null: not known.")
    needed_bytes = serializers.IntegerField(help_text="On the disk, at most.")
    free_bytes = serializers.IntegerField(help_text="On the disk, above its floor.")
    notes = serializers.ListField(child=serializers.CharField())
    not_expressed = serializers.ListField(
        child=serializers.CharField(), help_text="A sentence for each setting that the trainer has nothing for."
    )


class RunCheckedSerializer(serializers.Serializer[Any]):
    refusal = serializers.CharField(help_text="Why the trainer cannot train this base model; empty: it can.")
    missing = RemedySerializer(many=True, help_text="Models of the manifest that would bring what it lacks.")
    plan = RunPlanSerializer(allow_null=True)


class BatchSerializer(SubmitSerializer):
    """Several new runs: one for each combination of the values in `varied`, named `output_name` and what is its own."""

    varied = serializers.DictField(
        child=serializers.ListField(), help_text='Lists of values by setting, or by "profile".'
    )

    def validate_varied(self, varied: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if any(isinstance(value, dict | list) for values in varied.values() for value in values):
            raise serializers.ValidationError("Vary numbers, texts, true and false, not lists or objects.")
        return varied


class RetrySerializer(serializers.Serializer[Any]):
    """`settings` are those that change; all others stay as they are."""

    settings = serializers.DictField(required=False, default=dict)
    output_name = serializers.CharField(max_length=100, required=False, default="", allow_blank=True)
    stack = serializers.ChoiceField(
        choices=sorted(STACKS), required=False, default="", allow_blank=True, help_text="Another trainer."
    )


class ResumeSerializer(serializers.Serializer[Any]):
    less_memory = serializers.BooleanField(
        required=False, default=False, help_text="First take the next step towards less memory."
    )


class PrioritySerializer(serializers.Serializer[Any]):
    priority = serializers.IntegerField(help_text=PRIORITIES)


class MoveSerializer(serializers.Serializer[Any]):
    to = serializers.CharField(help_text="up, down, first or last.")


class CheckpointSerializer(serializers.ModelSerializer[Checkpoint]):
    published = serializers.SerializerMethodField(help_text="Path in the models folder. null: it is not published.")

    class Meta:
        model = Checkpoint
        fields = ("id", "step", "path", "bytes", "sha256", "is_final", "published", "created_at")

    def get_published(self, checkpoint: Checkpoint) -> str | None:
        found = self.context["published"].get((checkpoint.path, checkpoint.sha256))
        return found.path if found else None


class PublishSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(
        required=False, allow_blank=True, default="", help_text="Of the file. Left out: the run's, and the step."
    )


class PublishedSerializer(serializers.Serializer[Any]):
    """Paths in the models folder."""

    path = serializers.CharField()
    sidecar = serializers.CharField()
    sha256 = serializers.CharField()


class SampleSerializer(serializers.ModelSerializer[Sample]):
    class Meta:
        model = Sample
        fields = ("id", "step", "index", "path", "prompt", "negative_prompt", "seed", "created_at")


class RunEventSerializer(serializers.ModelSerializer[RunEvent]):
    actor = serializers.SerializerMethodField()

    class Meta:
        model = RunEvent
        fields = ("at", "attempt", "old_status", "new_status", "actor", "message")

    @extend_schema_field(serializers.CharField(allow_null=True))
    def get_actor(self, event: RunEvent) -> str | None:
        return event.actor.username if event.actor else None


class AttemptSerializer(serializers.ModelSerializer[Attempt]):
    slot = serializers.CharField()

    class Meta:
        model = Attempt
        fields = (
            "number", "slot", "created_at", "ended_at", "ending", "exit_code", "start_step", "adaptations",
            "log_offset",
        )  # fmt: skip


class MetricsSerializer(serializers.Serializer[Any]):
    """`points`: [[step, loss, learning_rate], …], at most 2,000; lowest and highest loss of each stretch are kept."""

    points = serializers.ListField(child=serializers.ListField(child=serializers.FloatField(allow_null=True)))


class FiguresSerializer(serializers.Serializer[Any]):
    """null: not measured. `mean_loss`: over the last tenth of the steps so far. `seconds`: of all attempts."""

    loss = serializers.FloatField(allow_null=True)
    mean_loss = serializers.FloatField(allow_null=True)
    best_loss = serializers.FloatField(allow_null=True)
    best_loss_step = serializers.IntegerField(allow_null=True)
    validation_loss = serializers.FloatField(allow_null=True)
    best_validation_loss = serializers.FloatField(allow_null=True)
    best_validation_step = serializers.IntegerField(allow_null=True)
    seconds = serializers.FloatField(allow_null=True)
    steps_per_second = serializers.FloatField(allow_null=True)


class ComparedRunSerializer(serializers.Serializer[Any]):
    run = RunSerializer()
    figures = FiguresSerializer()


class DifferenceSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    label = serializers.CharField()  # type: ignore[assignment]  # a field of ours, not the serializer's own label
    values = serializers.ListField(child=serializers.JSONField(), help_text="In the order of the runs.")


class DrawnSerializer(serializers.ModelSerializer[Sample]):
    class Meta:
        model = Sample
        fields = ("id", "run", "step")


class SampleRowSerializer(serializers.Serializer[Any]):
    prompt = serializers.CharField()
    negative_prompt = serializers.CharField()
    seed = serializers.IntegerField()
    samples = serializers.ListField(
        child=DrawnSerializer(many=True), help_text="Of each run, in their order, by rising step."
    )


class ComparisonSerializer(serializers.Serializer[Any]):
    """`runs` are in the order in which they were asked for."""

    runs = ComparedRunSerializer(many=True)
    differences = DifferenceSerializer(many=True)
    samples = SampleRowSerializer(many=True)


# --- Hosts ------------------------------------------------------------------------------------------------------------
class DeviceSerializer(serializers.ModelSerializer[Device]):
    kind = serializers.CharField(help_text="cpu or cuda.")

    class Meta:
        model = Device
        fields = ("kind", "uuid", "index", "name", "memory_bytes")


class SlotSerializer(serializers.ModelSerializer[Slot]):
    """Of a host that comes with the runs of its slots, each with `is_visible`."""

    devices = DeviceSerializer(many=True)
    is_busy = serializers.SerializerMethodField(help_text="A run trains here, also one that you do not see.")
    run = serializers.SerializerMethodField(help_text="The id of that run, when you see it.")

    class Meta:
        model = Slot
        fields = ("id", "name", "is_enabled", "is_busy", "run", "devices")

    def get_is_busy(self, slot: Slot) -> bool:
        return bool(slot.runs.all())

    def get_run(self, slot: Slot) -> int | None:
        return next((run.pk for run in slot.runs.all() if getattr(run, "is_visible", False)), None)


class DiskSerializer(serializers.Serializer[Any]):
    free_bytes = serializers.IntegerField()
    floor_bytes = serializers.IntegerField()


class HostSerializer(serializers.ModelSerializer[Host]):
    condition = serializers.CharField(help_text="online, draining, lost or dead.")
    slots = SlotSerializer(many=True)
    disk = serializers.SerializerMethodField(help_text="The workspace's, which all hosts share.")

    class Meta:
        model = Host
        fields = ("name", "condition", "heartbeat_at", "draining_at", "lost_at", "dead_at", "slots", "disk")

    @extend_schema_field(DiskSerializer)
    def get_disk(self, host: Host) -> dict[str, int]:
        return {"free_bytes": disk.free_bytes(), "floor_bytes": settings.DISK_FLOOR_BYTES}


class DeviceHistorySerializer(serializers.Serializer[Any]):
    device = DeviceSerializer()
    points = serializers.ListField(
        child=serializers.ListField(child=serializers.FloatField(allow_null=True)),
        help_text="[Unix seconds, utilisation %, memory bytes, °C, watts], oldest first. null: not told.",
    )


class DrainSerializer(serializers.Serializer[Any]):
    move_runs = serializers.BooleanField(
        required=False, default=False, help_text="Its runs save and go on elsewhere, instead of ending there."
    )


# --- Parts of the installation ----------------------------------------------------------------------------------------
class PartDetailSerializer(serializers.Serializer[Any]):
    label = serializers.CharField()  # type: ignore[assignment]  # a field, not the serializer's own label
    value = serializers.CharField()


class PartProblemSerializer(serializers.Serializer[Any]):
    what = serializers.CharField()
    mend = serializers.CharField(help_text="The shell command that mends it, for staff; may be empty.")
    is_warning = serializers.BooleanField(help_text="It can be used all the same.")


class PartSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(help_text="web, database, broker, io, worker:<host>, slot:<host>/<slot>, kohya, …")
    display = serializers.CharField()
    group = serializers.CharField()
    state = serializers.ChoiceField(choices=PartState.choices)
    summary = serializers.CharField()
    details = PartDetailSerializer(many=True)
    problems = PartProblemSerializer(many=True)
    run = serializers.SerializerMethodField(help_text="The id of the run on this slot, when you see it.")

    def get_run(self, part: Part) -> int | None:
        return part.run.pk if part.run else None


# --- Trainers ---------------------------------------------------------------------------------------------------------
class StackSerializer(serializers.Serializer[Any]):
    key = serializers.CharField()
    name = serializers.CharField()
    unavailable = serializers.CharField(help_text='Why no host can train with it, and what to do; "" when one can.')
    architectures = serializers.ListField(child=serializers.CharField())
    saves_on_stop = serializers.BooleanField()
    has_profiles = serializers.BooleanField()


class OptionSerializer(serializers.Serializer[Any]):
    """One key of a trainer. `closed`: why it is no option of yours, and what sets it."""

    key = serializers.CharField()
    group = serializers.CharField()
    type = serializers.CharField()
    label = serializers.CharField()  # type: ignore[assignment]  # a field of that name, which the metaclass takes
    help = serializers.CharField()
    choices = serializers.ListField(child=serializers.CharField())
    least = serializers.FloatField(allow_null=True)
    most = serializers.FloatField(allow_null=True)
    above = serializers.FloatField(allow_null=True)
    default = serializers.JSONField(allow_null=True)
    architectures = serializers.ListField(child=serializers.CharField(), help_text="Empty: all of the trainer's.")
    closed = serializers.CharField()


class ConfigTextSerializer(serializers.Serializer[Any]):
    config = serializers.CharField(trim_whitespace=False, allow_blank=True)
    dataset = serializers.IntegerField(required=False, help_text="By its pictures, epochs become steps.")


class BroughtSerializer(serializers.Serializer[Any]):
    """What a configuration says: hand it on to POST /api/v1/runs/."""

    settings = serializers.DictField(source="values")
    options = serializers.DictField()
    base_model = serializers.IntegerField(allow_null=True)
    notes = serializers.ListField(child=serializers.CharField(), help_text="What was left out, and why.")


class ConfigurationSerializer(serializers.Serializer[Any]):
    filename = serializers.CharField()
    text = serializers.CharField()
    lost = serializers.ListField(child=serializers.CharField(), help_text="What the trainer cannot express.")
    refusal = serializers.CharField(help_text='Why it cannot train this base model; "" when it can.')
