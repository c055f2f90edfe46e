"""Runs in the admin: everything is shown, the services do the writing. No status can be edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from lorapilot.admin import ServiceOwnedAdmin
from lorapilot.errors import UserError
from runs import services
from runs.models import (
    Attempt,
    Checkpoint,
    Device,
    Host,
    MetricPoint,
    Run,
    RunEvent,
    Sample,
    Slot,
    TrainingState,
    ValidationPoint,
)


def _do_all(request: HttpRequest, runs: QuerySet[Run], act: Callable[..., Run], done: str) -> None:
    """Call a service for each run; one that refuses does not keep the others from it."""
    for run in runs:
        try:
            changed = act(run, actor=request.user)
        except UserError as error:
            messages.error(request, error.message)
        else:
            messages.success(request, f"{changed.output_name} {done}.")


class RunEventInline(admin.TabularInline[RunEvent, Run]):
    model = RunEvent
    fields = readonly_fields = ("at", "attempt", "old_status", "new_status", "actor", "message")
    extra = 0
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Run)
class RunAdmin(ServiceOwnedAdmin[Run]):
    """The change page shows the live log (templates/admin/runs/run/change_form.html)."""

    list_display = (
        "output_name",
        "status",
        "owner",
        "stack",
        "profile",
        "slot",
        "step",
        "total_steps",
        "loss",
        "created_at",
    )
    list_filter = ("status", "stack", "profile", "slot")
    search_fields = ("output_name", "owner__username")
    list_select_related = ("owner", "slot__host")
    actions = ("stop_runs", "requeue_runs", "retry_runs")
    inlines = (RunEventInline,)

    @admin.action(description="Stop (saves first)", permissions=["operate"])
    def stop_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.stop_run, "is asked to stop")

    @admin.action(description="Re-queue (goes on from the last saved state)", permissions=["operate"])
    def requeue_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.resume_run, "is in the queue again")

    @admin.action(description="Retry as a new run", permissions=["operate"])
    def retry_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.retry_run, "is in the queue")


class SlotInline(admin.TabularInline[Slot, Host]):
    model = Slot
    fields = ("name", "is_enabled")
    extra = 0


@admin.register(Host)
class HostAdmin(admin.ModelAdmin[Host]):
    list_display = ("name", "heartbeat_at", "boot_id")
    readonly_fields = ("name", "boot_id", "heartbeat_at")
    inlines = (SlotInline,)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False  # a worker registers its host


@admin.register(Device)
class DeviceAdmin(admin.ModelAdmin[Device]):
    """Staff group devices into slots here."""

    list_display = ("name", "host", "kind", "index", "uuid", "slot")
    readonly_fields = ("host", "kind", "uuid", "index", "name", "memory_bytes")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False


@admin.register(Slot)
class SlotAdmin(admin.ModelAdmin[Slot]):
    list_display = ("name", "host", "is_enabled")
    list_filter = ("is_enabled",)


@admin.register(Attempt)
class AttemptAdmin(ServiceOwnedAdmin[Attempt]):
    list_display = ("run", "number", "slot", "created_at", "ended_at", "exit_code", "lease_at")
    list_select_related = ("run", "slot__host")


@admin.register(RunEvent)
class RunEventAdmin(ServiceOwnedAdmin[RunEvent]):
    list_display = ("at", "run", "attempt", "old_status", "new_status", "actor", "message")
    list_select_related = ("run", "actor")
    search_fields = ("run__output_name", "message")


@admin.register(Checkpoint)
class CheckpointAdmin(ServiceOwnedAdmin[Checkpoint]):
    list_display = ("path", "run", "step", "bytes", "is_final", "sha256")
    list_select_related = ("run",)


@admin.register(TrainingState)
class TrainingStateAdmin(ServiceOwnedAdmin[TrainingState]):
    list_display = ("path", "run", "step", "created_at")
    list_select_related = ("run",)


@admin.register(Sample)
class SampleAdmin(ServiceOwnedAdmin[Sample]):
    list_display = ("path", "run", "step", "index", "seed", "prompt")
    list_select_related = ("run",)


@admin.register(MetricPoint)
class MetricPointAdmin(ServiceOwnedAdmin[MetricPoint]):
    list_display = ("run", "step", "attempt", "loss", "learning_rate", "at")
    list_select_related = ("run",)
    show_full_result_count = False


@admin.register(ValidationPoint)
class ValidationPointAdmin(ServiceOwnedAdmin[ValidationPoint]):
    list_display = ("run", "step", "attempt", "loss")
    list_select_related = ("run",)
