"""This machine as a host: its devices by NVML, one slot a GPU, or one CPU slot."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from runs.enums import DeviceKind
from runs.models import Device, Host, Slot

log = logging.getLogger(__name__)

SILENT_AFTER = timedelta(seconds=30)
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
    return find_gpus()[: settings.GPU_SLOTS_AT_MOST or None] or [cpu]


def register_host() -> Host:
    """Store this machine, its devices and a slot for each new device. Slots that staff arranged stay as they are."""
    found = find_devices()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with transaction.atomic():
        host, _ = Host.objects.update_or_create(
            name=settings.HOST_NAME, defaults={"boot_id": boot_id, "heartbeat_at": timezone.now()}
        )
        for device in found:
            _register_device(host, device)
        gone = host.devices.exclude(uuid__in=[device.uuid for device in found])
        for slot in Slot.objects.filter(devices__in=gone, is_enabled=True):
            log.warning("slot %s is disabled: its device is no longer there", slot)
            Slot.objects.filter(pk=slot.pk).update(is_enabled=False)
        gone.delete()
    return host


def _register_device(host: Host, found: Found) -> None:
    facts = {"kind": found.kind, "index": found.index, "name": found.name, "memory_bytes": found.memory_bytes}
    device, is_new = Device.objects.update_or_create(host=host, uuid=found.uuid, defaults=facts)
    if is_new:
        name = CPU_UUID if found.kind == DeviceKind.CPU else f"gpu{found.index}"
        device.slot, _ = Slot.objects.get_or_create(host=host, name=name, defaults={"is_enabled": True})
        Slot.objects.filter(pk=device.slot.pk).update(is_enabled=True)
        device.save(update_fields=["slot"])


def beat(host_name: str) -> None:
    """The host's sign of life; a silent host gets no runs."""
    Host.objects.filter(name=host_name).update(heartbeat_at=timezone.now())
