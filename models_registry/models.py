"""Base models: what a LoRA is trained on. Visible to everybody who is signed in; staff register and remove them.
Adapters: LoRAs that runs made or people brought. Each has an owner, who may share it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from lorapilot.access import SharedQuerySet, SharedToEdit, Viewer
from lorapilot.models import JOB_ENDED, ChunkedUpload, Job
from models_registry.enums import Architecture, Layout, Role


class BaseModelQuerySet(models.QuerySet[Any]):
    def visible_to(self, user: Viewer) -> Self:
        return self if user.is_authenticated and user.is_active else self.none()


class BaseModel(models.Model):
    """One trainable model: a diffusers folder or a single .safetensors file inside the models root."""

    name = models.CharField(max_length=100)
    path = models.CharField(max_length=500, unique=True, help_text="Relative to the models root.")
    layout = models.CharField(max_length=6, choices=Layout.choices)
    architecture = models.CharField(max_length=20, choices=Architecture.choices)
    resolution = models.PositiveIntegerField(help_text="Native side length in pixels, from the model's configuration.")
    prediction_type = models.CharField(max_length=20, default="epsilon")
    bytes = models.PositiveBigIntegerField(default=0)
    sha256 = models.CharField(
        max_length=64,
        blank=True,
        help_text="Of the file; of a folder: of its sorted component digests. Empty while hashing.",
    )
    registered_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    hashing = models.ForeignKey(Job, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    objects = BaseModelQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            models.UniqueConstraint(Lower("name"), name="base_model_name_unique"),
            models.CheckConstraint(
                name="base_model_architecture_valid", condition=Q(architecture__in=Architecture.values)
            ),
            models.CheckConstraint(name="base_model_layout_valid", condition=Q(layout__in=Layout.values)),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_hashing(self) -> bool:
        return self.hashing is not None and self.hashing.status not in JOB_ENDED

    @property
    def precision(self) -> str:
        """The type of most of the numbers of its largest own file, e.g. F16."""
        own = (component for component in self.components.all() if not component.is_attached)
        largest = max(own, key=lambda component: component.bytes, default=None)
        return largest.dtype if largest else ""


class ModelComponent(models.Model):
    """One file of a base model: its own, or one that staff attached (then also a folder, as a whole)."""

    base_model = models.ForeignKey(BaseModel, on_delete=models.CASCADE, related_name="components")
    role = models.CharField(max_length=20, choices=Role.choices)
    path = models.CharField(max_length=500, help_text="Relative to the models root.")
    bytes = models.PositiveBigIntegerField()
    sha256 = models.CharField(max_length=64, blank=True)
    dtype = models.CharField(
        max_length=20, blank=True, help_text="Of most of its tensors, e.g. F16; empty for configs."
    )
    parameters = models.PositiveBigIntegerField(default=0, help_text="Numbers in its tensors, from the header.")
    is_attached = models.BooleanField(
        default=False, help_text="A file of its own, anywhere in the models root, that the model is trained with."
    )

    class Meta:
        ordering: ClassVar = ["role", "path"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["base_model", "path"], name="component_once_per_model"),
            models.UniqueConstraint(
                fields=["base_model", "role"], condition=Q(is_attached=True), name="component_attached_once_per_role"
            ),
            models.CheckConstraint(name="component_role_valid", condition=Q(role__in=Role.values)),
        ]

    def __str__(self) -> str:
        return self.path


class Pull(models.Model):
    """The last pull of a model of the manifest: where it went, who asked, and the job that does it."""

    name = models.CharField(max_length=100, unique=True, help_text="In the manifest.")
    subdir = models.CharField(max_length=400, blank=True, help_text="Instead of the manifest's folder.")
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    job = models.ForeignKey(Job, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    files = models.JSONField(
        default=list, help_text="[path in the models folder, bytes] of each; empty until it is done."
    )
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def is_active(self) -> bool:
        return self.job is not None and self.job.status not in JOB_ENDED


class Adapter(SharedToEdit):
    """A LoRA: the final one of a run, or a file that somebody uploaded."""

    name = models.CharField(max_length=100)
    path = models.CharField(max_length=500, unique=True, help_text="Of the file, relative to the workspace.")
    # No foreign key: runs know this app, not the other way. runs/library.py keeps the two together.
    checkpoint = models.PositiveBigIntegerField(
        null=True, blank=True, unique=True, help_text="Key of the run's checkpoint that it is; empty: uploaded."
    )
    bytes = models.PositiveBigIntegerField()
    sha256 = models.CharField(max_length=64, db_index=True)
    architecture = models.CharField(max_length=20, choices=Architecture.choices, help_text="Of its base model.")
    style = models.CharField(max_length=12, blank=True, help_text="How its tensors are named: kohya, peft, …")
    algorithm = models.CharField(max_length=20, blank=True, help_text="LoRA, LoHa, LoKr, …")
    rank = models.PositiveIntegerField(default=0, help_text="Of most of its modules; 0: it has none.")
    alpha = models.FloatField(null=True, blank=True, help_text="Of most of its modules; empty: it does not say.")
    dtype = models.CharField(max_length=20, blank=True)
    parameters = models.PositiveBigIntegerField(default=0)
    trigger_word = models.CharField(max_length=100, blank=True)
    base_model = models.ForeignKey(
        BaseModel, null=True, blank=True, on_delete=models.SET_NULL, related_name="adapters", help_text="If it is here."
    )
    base_model_name = models.CharField(max_length=200, blank=True, help_text="As the run or the file calls it.")
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    objects = SharedQuerySet.as_manager()

    class Meta:
        ordering: ClassVar = ["-created_at", "-pk"]
        verbose_name = "LoRA"
        constraints: ClassVar = [
            models.CheckConstraint(
                name="adapter_architecture_valid", condition=Q(architecture__in=Architecture.values)
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_produced(self) -> bool:
        return self.checkpoint is not None


class AdapterTag(models.Model):
    """A word that its people put on a LoRA, to find it again."""

    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="tags")
    word = models.CharField(max_length=40)

    class Meta:
        ordering: ClassVar = ["word"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["adapter", "word"], name="adapter_tag_once")]

    def __str__(self) -> str:
        return self.word


class AdapterUpload(ChunkedUpload):
    """A LoRA file on its way in."""

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(name="adapter_upload_offset_within_size", condition=Q(offset__lte=models.F("size"))),
        ]
