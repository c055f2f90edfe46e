"""Runs and hosts in the admin: everything is shown, the services do the writing. No status can be edited."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from lorapilot.access import signed_in
from lorapilot.admin import ServiceOwnedAdmin
from lorapilot.errors import UserError
from lorapilot.services import record
from runs import fleet, services
from runs.enums import ACTIVE, Priority
from runs.models import (
    Attempt,
    Checkpoint,
    Device,
    DeviceSample,
    Host,
    MetricPoint,
    Run,
    RunEvent,
    Sample,
    Slot,
    TrainingState,
    TrainPilotBase,
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


def _do_all_recorded(request: HttpRequest, rows: QuerySet[Any], act: Callable[[Any], object], done: str) -> None:
    """As `_do_all`, for hosts and slots, which have no history of their own: it goes into the audit trail."""
    for row in rows:
        try:
            act(row)
        except UserError as error:
            messages.error(request, error.message)
        else:
            record(signed_in(request), done, row, request)
            messages.success(request, f"{row}: {done}.")


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
        "priority",
        "slot",
        "step",
        "total_steps",
        "loss",
        "created_at",
    )
    list_filter = ("status", "priority", "stack", "profile", "slot")
    search_fields = ("output_name", "owner__username")
    list_select_related = ("owner", "slot__host")
    actions = (
        "stop_runs",
        "pause_runs",
        "kill_runs",
        "hold_runs",
        "release_runs",
        "give_high_priority",
        "give_normal_priority",
        "give_low_priority",
        "requeue_runs",
        "requeue_runs_with_less_memory",
        "retry_runs",
    )
    inlines = (RunEventInline,)

    @admin.action(description="Stop (saves first)", permissions=["operate"])
    def stop_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.stop_run, "is asked to stop")

    @admin.action(description="Pause (saves, then is held in the queue)", permissions=["operate"])
    def pause_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.pause_run, "is asked to pause")

    @admin.action(description="End now, without saving", permissions=["operate"])
    def kill_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.kill_run, "ends now")

    @admin.action(description="Hold in the queue", permissions=["operate"])
    def hold_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.hold_run, "is held")

    @admin.action(description="Release", permissions=["operate"])
    def release_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.release_run, "is released")

    @admin.action(description="Priority: high", permissions=["operate"])
    def give_high_priority(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _set_priority(request, queryset, Priority.HIGH)

    @admin.action(description="Priority: normal", permissions=["operate"])
    def give_normal_priority(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _set_priority(request, queryset, Priority.NORMAL)

    @admin.action(description="Priority: low", permissions=["operate"])
    def give_low_priority(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _set_priority(request, queryset, Priority.LOW)

    @admin.action(description="Re-queue (goes on from the last saved state)", permissions=["operate"])
    def requeue_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.resume_run, "is in the queue again")

    @admin.action(description="Re-queue with less memory", permissions=["operate"])
    def requeue_runs_with_less_memory(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        with_less = partial(services.resume_run, less_memory=True)
        _do_all(request, queryset, with_less, "is in the queue again, with less memory")

    @admin.action(description="Retry as a new run", permissions=["operate"])
    def retry_runs(self, request: HttpRequest, queryset: QuerySet[Run]) -> None:
        _do_all(request, queryset, services.retry_run, "is in the queue")


def _set_priority(request: HttpRequest, runs: QuerySet[Run], priority: Priority) -> None:
    _do_all(request, runs, partial(services.set_priority, priority=priority), f"has {priority.label.lower()} priority")


# --- Hosts ------------------------------------------------------------------------------------------------------------
class SlotInline(admin.TabularInline[Slot, Host]):
    model = Slot
    fields = readonly_fields = ("name", "is_enabled", "device_names")
    extra = 0
    can_delete = False
    show_change_link = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[Slot]:
        return super().get_queryset(request).prefetch_related("devices")

    @admin.display(description="devices")
    def device_names(self, slot: Slot) -> str:
        return ", ".join(device.name for device in slot.devices.all())

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Host)
class HostAdmin(ServiceOwnedAdmin[Host]):
    """A worker registers its host."""

    is_deletable = True  # one that never trained
    list_display = (
        "name",
        "condition",
        "heartbeat_at",
        "draining_at",
        "lost_at",
        "dead_at",
        "slot_names",
    )
    readonly_fields = ("condition",)
    actions = ("drain", "drain_and_move_runs", "end_maintenance", "declare_dead")
    inlines = (SlotInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Host]:
        return super().get_queryset(request).prefetch_related("slots")

    @admin.display(description="slots")
    def slot_names(self, host: Host) -> str:
        return ", ".join(slot.name if slot.is_enabled else f"{slot.name} (disabled)" for slot in host.slots.all())

    @admin.action(description="Drain (takes no more runs)", permissions=["operate"])
    def drain(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        _do_all_recorded(request, queryset, partial(fleet.drain_host, actor=signed_in(request)), "host drained")

    @admin.action(description="Drain and move its runs", permissions=["operate"])
    def drain_and_move_runs(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        move = partial(fleet.drain_host, actor=signed_in(request), move_runs=True)
        _do_all_recorded(request, queryset, move, "host drained, runs moved")

    @admin.action(description="End maintenance", permissions=["operate"])
    def end_maintenance(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        _do_all_recorded(request, queryset, fleet.undrain_host, "host undrained")

    @admin.action(description="Declare dead (lost hosts only: their runs go on elsewhere)", permissions=["operate"])
    def declare_dead(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        declare = partial(fleet.declare_dead, actor=signed_in(request))
        _do_all_recorded(request, queryset, declare, "host declared dead")


def _is_training(slot: Slot | None) -> bool:
    return slot is not None and Run.objects.filter(slot=slot, status__in=ACTIVE).exists()


class DeviceForm(forms.ModelForm[Device]):
    """Which slot a device belongs to: one of its host, with devices of its kind, and not while either slot trains."""

    class Meta:
        model = Device
        fields = ("slot",)

    def clean_slot(self) -> Slot | None:
        wanted: Slot | None = self.cleaned_data["slot"]
        device: Device = self.instance
        if wanted == device.slot:
            return wanted
        for slot in (device.slot, wanted):
            if _is_training(slot):
                raise forms.ValidationError(f"{slot} trains now: disable it, and wait until its run has ended.")
        if wanted is not None and wanted.host_id != device.host_id:
            raise forms.ValidationError(f"A slot has devices of one host. Choose a slot of {device.host}.")
        if wanted is not None and wanted.devices.exclude(kind=device.kind).exists():
            raise forms.ValidationError(f"A slot has devices of one kind, and {wanted} has others.")
        return wanted


@admin.register(Device)
class DeviceAdmin(ServiceOwnedAdmin[Device]):
    """Staff group devices into slots here."""

    editable = ("slot",)
    is_deletable = True  # with its host
    form = DeviceForm
    list_display = ("name", "host", "kind", "index", "uuid", "slot")
    list_select_related = ("host", "slot__host")

    def has_delete_permission(self, request: HttpRequest, obj: Device | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and _is_training(obj.slot))


class SlotForm(forms.ModelForm[Slot]):
    """A slot's host is chosen once, so Django leaves the check of both together to us."""

    class Meta:
        model = Slot
        fields = ("host", "name")

    def clean_name(self) -> str:
        name: str = self.cleaned_data["name"]
        others = Slot.objects.filter(host=self.instance.host_id, name=name).exclude(pk=self.instance.pk)
        if self.instance.pk and others.exists():
            raise forms.ValidationError("This host has a slot of that name already.")
        return name


@admin.register(Slot)
class SlotAdmin(ServiceOwnedAdmin[Slot]):
    """Staff add a slot here, then give it devices."""

    editable = ("name",)
    is_deletable = True  # one that never trained
    form = SlotForm
    list_display = ("name", "host", "is_enabled")
    list_filter = ("is_enabled",)
    list_select_related = ("host",)
    actions = ("enable", "disable")

    def get_readonly_fields(self, request: HttpRequest, obj: Slot | None = None) -> list[str]:
        return super().get_readonly_fields(request, obj) if obj else ["is_enabled"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return admin.ModelAdmin.has_add_permission(self, request)

    @admin.action(description="Enable", permissions=["operate"])
    def enable(self, request: HttpRequest, queryset: QuerySet[Slot]) -> None:
        _do_all_recorded(request, queryset, partial(fleet.set_slot_enabled, is_enabled=True), "slot enabled")

    @admin.action(description="Disable (finishes its run)", permissions=["operate"])
    def disable(self, request: HttpRequest, queryset: QuerySet[Slot]) -> None:
        _do_all_recorded(request, queryset, partial(fleet.set_slot_enabled, is_enabled=False), "slot disabled")


@admin.register(DeviceSample)
class DeviceSampleAdmin(ServiceOwnedAdmin[DeviceSample]):
    """A host stores one of each device every few seconds, and drops them after a day."""

    list_display = ("device", "at", "utilisation", "memory_used_bytes", "temperature", "power_watts")
    list_select_related = ("device__host",)
    show_full_result_count = False


@admin.register(Attempt)
class AttemptAdmin(ServiceOwnedAdmin[Attempt]):
    list_display = (
        "run",
        "number",
        "slot",
        "created_at",
        "ended_at",
        "ending",
        "exit_code",
        "start_step",
        "adaptations",
        "lease_at",
    )
    list_filter = ("ending",)
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


@admin.register(TrainPilotBase)
class TrainPilotBaseAdmin(ServiceOwnedAdmin[TrainPilotBase]):
    """What its owner's guided runs build on; the owner changes it."""

    list_display = ("owner", "updated_at")
    list_select_related = ("owner",)
    search_fields = ("owner__username",)
