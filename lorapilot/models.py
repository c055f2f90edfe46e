"""People and invitations, their API tokens, secrets and socket tickets, background jobs, and the audit trail."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.conf import settings
from django.contrib.auth.models import AbstractUser, Group
from django.db import models
from django.db.models import Q
from django.utils import timezone
from knox.models import AbstractAuthToken, AuthTokenManager


class User(AbstractUser):
    """Our own user model from the first migration on, since Django cannot change it later."""

    def __str__(self) -> str:
        return self.username


class Invitation(models.Model):
    """Lets one person make an account while sign-up is closed. The link's secret is stored as a hash."""

    digest = models.CharField(max_length=64, unique=True)
    note = models.CharField(max_length=100, blank=True, help_text="For whom it is; only staff read it.")
    groups = models.ManyToManyField(Group, blank=True, related_name="+", help_text="Of the new account.")
    invited_by = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)
    used_at = models.DateTimeField(null=True, blank=True)
    used_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )

    class Meta:
        ordering: ClassVar = ["-created_at", "-pk"]
        constraints: ClassVar = [
            models.CheckConstraint(name="invitation_used_or_revoked", condition=Q(used_at=None) | Q(revoked_at=None)),
        ]

    def __str__(self) -> str:
        return f"{self.note or 'no name'} (invitation {self.pk})"

    @property
    def state(self) -> str:
        """One word for pages and the API: used, revoked, expired or open."""
        if self.used_at or self.revoked_at:
            return "used" if self.used_at else "revoked"
        return "open" if self.expires_at > timezone.now() else "expired"


class TokenScope(models.TextChoices):
    READ = "read", "Read"
    WRITE = "write", "Read and write"


class ApiTokenManager(AuthTokenManager, models.Manager["ApiToken"]):
    """knox's manager, whose `create` returns (row, token). The token itself exists only there: the row has its hash."""


class ApiToken(AbstractAuthToken, models.Model):  # Model again, since knox has no types
    """A knox token (stored as a hash) with a name for its owner and a scope."""

    name = models.CharField(max_length=100)
    scope = models.CharField(max_length=5, choices=TokenScope.choices, default=TokenScope.WRITE)
    last_used_at = models.DateTimeField(null=True, blank=True)

    objects: ClassVar[ApiTokenManager] = ApiTokenManager()

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(name="token_scope_valid", condition=Q(scope__in=TokenScope.values)),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.token_key}…)"


class SecretName(models.TextChoices):
    """The services whose keys a person may leave here."""

    HUGGINGFACE = "huggingface", "Hugging Face"
    CIVITAI = "civitai", "Civitai"
    WANDB = "wandb", "Weights & Biases"
    OPENAI = "openai", "OpenAI, or a server like it"
    GEMINI = "gemini", "Google Gemini"
    XAI = "xai", "xAI"


class Secret(models.Model):
    """A person's key of another service. Encrypted, and never shown again: see lorapilot/vault.py."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    name = models.CharField(max_length=20, choices=SecretName.choices)
    value = models.TextField(help_text="Encrypted with a key that is derived from SECRET_KEY.")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["owner", "name"], name="secret_once_per_owner"),
            models.CheckConstraint(name="secret_name_valid", condition=Q(name__in=SecretName.values)),
        ]

    def __str__(self) -> str:
        return f"{self.get_name_display()} of {self.owner}"


class SocketTicket(models.Model):
    """Lets an API client open one websocket: single use, 30 seconds, stored as a hash."""

    digest = models.CharField(max_length=64, primary_key=True)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    expires_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.user} until {self.expires_at:%H:%M:%S}"


class JobStatus(models.TextChoices):
    QUEUED = "queued", "Queued"
    RUNNING = "running", "Running"
    SUCCEEDED = "succeeded", "Succeeded"
    FAILED = "failed", "Failed"
    CANCELLED = "cancelled", "Cancelled"


JOB_ENDED = [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED]


class Job(models.Model):
    """Background work that is not training. See lorapilot/jobs.py for what it guarantees."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    kind = models.CharField(max_length=200, help_text="Dotted path of the function that does the work.")
    label = models.CharField(max_length=200, help_text="What a person calls it.")
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.CASCADE, related_name="jobs"
    )
    arguments = models.JSONField(default=dict)
    status = models.CharField(max_length=9, choices=JobStatus.choices, default=JobStatus.QUEUED)
    done = models.BigIntegerField(default=0)
    total = models.BigIntegerField(default=0, help_text="0 while unknown.")
    message = models.TextField(blank=True, help_text="What it is doing, or why it failed.")
    result = models.JSONField(default=dict, help_text="What the work reports when it ends.")
    cancel_requested_at = models.DateTimeField(null=True, blank=True)
    heartbeat_at = models.DateTimeField(null=True, blank=True)
    lease = models.UUIDField(null=True, blank=True, help_text="Which worker process has it.")
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-created_at"]
        constraints: ClassVar = [
            models.CheckConstraint(name="job_status_valid", condition=Q(status__in=JobStatus.values)),
            models.CheckConstraint(
                name="job_ended_iff_finished_at",
                condition=Q(status__in=JOB_ENDED, finished_at__isnull=False)
                | (~Q(status__in=JOB_ENDED) & Q(finished_at__isnull=True)),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.label} ({self.status})"


class ChunkedUpload(models.Model):
    """One file on its way in, in chunks: `offset` bytes have arrived. When all are there, a job works on it.

    See lorapilot/uploads.py."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    filename = models.CharField(max_length=255, help_text="As named by the client; shown only, never used as a path.")
    size = models.PositiveBigIntegerField(help_text="Bytes of the whole file.")
    offset = models.PositiveBigIntegerField(default=0, help_text="Bytes that have arrived.")
    sha256 = models.CharField(max_length=64, blank=True, help_text="Expected checksum, if the client gave one.")
    job = models.ForeignKey(Job, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.filename} ({self.offset} of {self.size} bytes)"


class AuditEntry(models.Model):
    """Who did what: sign-ins, tokens, deletions, sharing. Rows are only ever added."""

    at = models.DateTimeField(auto_now_add=True, db_index=True)
    actor = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    action = models.CharField(max_length=60)
    subject = models.CharField(max_length=200)
    address = models.GenericIPAddressField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-at"]
        verbose_name_plural = "audit entries"

    def __str__(self) -> str:
        return f"{self.at:%Y-%m-%d %H:%M} {self.actor}: {self.action} {self.subject}"
