"""This machine as a host: its devices by NVML, its slots, and the processes that train on it."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from datetime import timedelta

import psutil
from django.conf import settings
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from lorapilot import workspace
from lorapilot.clock import ago
from lorapilot.errors import UserError
from runs.enums import ACTIVE, DeviceKind, Ending
from runs.models import Attempt, Device, Host, Run, Slot
from runs.supervision import process, runner

log = logging.getLogger(__name__)

SILENT_AFTER = timedelta(seconds=30)
ENDS_WITHIN = timedelta(seconds=30)  # a runner clears away after its attempt's end is known
CPU_UUID = "cpu"


@dataclass(frozen=True, slots=True)
class Found:
    """One device of this machine."""

    kind: DeviceKind
    uuid: str
    index: int
    name: str
    memory_bytes: int


def find_gpus() -> list[Found]:
    """The NVIDIA GPUs that the driver reports; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Found(
                DeviceKind.CUDA,
                _text(pynvml.nvmlDeviceGetUUID(handle)),
                index,
                _text(pynvml.nvmlDeviceGetName(handle)),
                pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            )
            for index, handle in enumerate(handles)
        ]
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def find_devices() -> list[Found]:
    """GPUs, or the CPU where there is none."""
    cpu = Found(DeviceKind.CPU, CPU_UUID, 0, platform.processor() or "CPU", psutil.virtual_memory().total)
    return find_gpus() or [cpu]


def register_host() -> Host:
    """Store this machine with its devices, and arrange its slots. Repeating it changes nothing.

    Raises UserError when another machine trains on the same SQLite file: it is no database for two.
    """
    found = find_devices()
    boot_id = runner.boot_id()
    _refuse_second_machine(boot_id)
    with transaction.atomic():
        host, _ = Host.objects.update_or_create(
            name=settings.HOST_NAME, defaults={"boot_id": boot_id, "heartbeat_at": Now()}
        )
        gone = host.devices.exclude(uuid__in=[device.uuid for device in found])
        for slot in Slot.objects.filter(devices__in=gone, is_enabled=True).distinct():
            log.warning("slot %s is disabled: a device of it is no longer there", slot)
            Slot.objects.filter(pk=slot.pk).update(is_enabled=False)
        gone.delete()
        for device in found:
            facts = {"kind": device.kind, "index": device.index, "name": device.name}
            facts |= {"memory_bytes": device.memory_bytes}
            Device.objects.update_or_create(host=host, uuid=device.uuid, defaults=facts)
        _arrange_slots(host)
    return host


def _refuse_second_machine(boot_id: str) -> None:
    if connection.vendor != "sqlite":
        return
    heard = Host.objects.exclude(boot_id=boot_id).exclude(name=settings.HOST_NAME)
    if other := heard.filter(heartbeat_at__gte=ago(SILENT_AFTER)).first():
        raise UserError(
            f"{other.name} trains with this SQLite database, and this is another machine. "
            "Several hosts need PostgreSQL: set DATABASE_URL on all of them."
        )


def _arrange_slots(host: Host) -> None:
    """One slot for each device, or as LORAPILOT_SLOTS says; without that, what staff arranged stays.

    A slot that trains keeps its devices; its neighbours wait for the next call.
    """
    devices = {device.index: device for device in host.devices.exclude(kind=DeviceKind.CPU)}
    layout = [[int(number) for number in slot.split("+")] for slot in settings.SLOT_LAYOUT] if devices else []
    if not layout:
        for device in host.devices.filter(slot=None):
            _give(host, CPU_UUID if device.kind == DeviceKind.CPU else f"gpu{device.index}", [device])
        return
    busy = set(Run.objects.filter(status__in=ACTIVE, slot__host=host).values_list("slot", flat=True))
    wanted = {"gpu" + "+".join(map(str, numbers)): numbers for numbers in layout}
    for slot in host.slots.filter(is_enabled=True).exclude(name__in=wanted):
        Slot.objects.filter(pk=slot.pk).update(is_enabled=False)
    for name, numbers in wanted.items():
        members = [devices[number] for number in numbers if number in devices]
        if len(members) < len(numbers):
            log.warning("slot %s of LORAPILOT_SLOTS is left out: this machine has GPUs %s", name, sorted(devices))
        elif not any(member.slot_id in busy and member.slot and member.slot.name != name for member in members):
            _give(host, name, members)


def _give(host: Host, name: str, devices: list[Device]) -> None:
    slot, _ = Slot.objects.get_or_create(host=host, name=name)
    held = {device.pk for device in slot.devices.all()}
    if held != {device.pk for device in devices}:
        Device.objects.filter(slot=slot).update(slot=None)
        Device.objects.filter(pk__in=[device.pk for device in devices]).update(slot=slot)
        Slot.objects.filter(pk=slot.pk).update(is_enabled=True)


def beat(host_name: str) -> None:
    """The host's sign of life; a silent host gets no runs."""
    Host.objects.filter(name=host_name).update(heartbeat_at=Now())


def end_orphans(host_name: str) -> int:
    """End runners here whose attempt is over: moved elsewhere, or of a run that is gone. Returns how many."""
    ended = 0
    for folder in process.attempts_running_here(workspace.outputs()):
        attempts = Attempt.objects.select_related("slot__host")
        attempt = attempts.filter(run__output_name=folder.parents[1].name, number=int(folder.name)).first()
        if attempt is not None and (attempt.slot.host.name != host_name or not _is_over(attempt)):
            continue
        log.warning("ending the processes of %s: that attempt is over", folder)
        process.end_all(folder)
        ended += 1
    return ended


def _is_over(attempt: Attempt) -> bool:
    """Ended a while ago, as a runner still clears away then; a moved one is over at once."""
    is_old = attempt.ended_at is not None and attempt.ended_at < timezone.now() - ENDS_WITHIN
    return is_old or attempt.ending == Ending.MOVED
