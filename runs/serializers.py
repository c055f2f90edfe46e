"""How the API shows runs and what it takes."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from datasets.models import Dataset
from models_registry.models import BaseModel
from runs.enums import Profile
from runs.models import Checkpoint, Run, RunEvent, Sample
from runs.stacks import STACKS


class RunSerializer(serializers.ModelSerializer[Run]):
    owner = serializers.CharField(source="owner.username")
    dataset = serializers.CharField(source="dataset_version.name")
    dataset_version = serializers.IntegerField(source="dataset_version.number")
    dataset_digest = serializers.CharField(source="dataset_version.digest")
    base_model = serializers.CharField(source="base_model.name")
    base_model_sha256 = serializers.CharField(source="base_model.sha256")
    slot = serializers.SerializerMethodField()
    stop_requested = serializers.SerializerMethodField()

    class Meta:
        model = Run
        fields = (
            "id", "output_name", "owner", "stack", "profile", "spec", "notes", "dataset", "dataset_version",
            "dataset_digest", "base_model", "base_model_sha256", "status", "slot", "attempt", "reason", "exit_code",
            "stage", "step", "total_steps", "loss", "steps_per_second", "eta_seconds", "held_at", "stop_requested",
            "created_at", "queued_at", "started_at", "finished_at",
        )  # fmt: skip

    def get_slot(self, run: Run) -> str | None:
        return str(run.slot) if run.slot else None

    def get_stop_requested(self, run: Run) -> bool:
        return run.stop_requested_at is not None


class SubmitSerializer(serializers.Serializer[Any]):
    """A new run. `settings` are fields of the RunSpec; those left out take the profile's value, or the default."""

    dataset = serializers.PrimaryKeyRelatedField(queryset=Dataset.objects.all())
    base_model = serializers.PrimaryKeyRelatedField(queryset=BaseModel.objects.all())
    output_name = serializers.CharField(max_length=100)
    profile = serializers.ChoiceField(choices=Profile.choices, required=False, allow_blank=True, default="")
    stack = serializers.ChoiceField(choices=sorted(STACKS), required=False, default="builtin")
    settings = serializers.DictField(required=False, default=dict)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        request = self.context.get("request")
        if request is not None:  # a stranger's dataset does not exist
            self.fields["dataset"].queryset = Dataset.objects.visible_to(request.user)  # type: ignore[attr-defined]


class RetrySerializer(serializers.Serializer[Any]):
    output_name = serializers.CharField(max_length=100, required=False, default="", allow_blank=True)


class CheckpointSerializer(serializers.ModelSerializer[Checkpoint]):
    class Meta:
        model = Checkpoint
        fields = ("id", "step", "path", "bytes", "sha256", "is_final", "created_at")


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


class MetricsSerializer(serializers.Serializer[Any]):
    """`points`: [[step, loss, learning_rate], …], at most 2,000; lowest and highest loss of each stretch are kept."""

    points = serializers.ListField(child=serializers.ListField(child=serializers.FloatField(allow_null=True)))
