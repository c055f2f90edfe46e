"""What a host notices about itself every half minute: its processes, its trainers, how busy its devices are.

Only the host can see these, and pages are shown by another machine: so they go into the database. Samples are kept for
a day; each host deletes what is older, also of hosts that are gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from django.conf import settings
from django.db.models.functions import Now

from lorapilot.clock import ago
from runs import vitals
from runs.enums import DeviceKind
from runs.models import Device, DeviceSample, Host
from runs.stacks import installation

SAMPLE_EVERY = timedelta(seconds=30)
KEPT = timedelta(hours=24)


def look_around(processes: Mapping[str, float]) -> None:
    """One look. `processes`: names of our own that run here, and since when."""
    sample_devices()
    seen = {name: since for name, since in processes.items() if name != "web"}
    host = Host.objects.filter(name=settings.HOST_NAME)
    host.update(processes={"at": time.time(), "running": seen})
    has_gpu = Device.objects.filter(host__name=settings.HOST_NAME, kind=DeviceKind.CUDA).exists()
    found = installation.look_at_all(has_gpu=has_gpu)
    host.update(trainers={key: one.as_json() for key, one in found.items()})


def sample_devices() -> int:
    """Store a sample of each device, unless there is one of the last half minute. Returns how many."""
    devices = Device.objects.filter(host__name=settings.HOST_NAME)
    if DeviceSample.objects.filter(device__in=devices, at__gt=ago(SAMPLE_EVERY)).exists():
        return 0
    readings = vitals.read_devices()
    DeviceSample.objects.filter(at__lt=ago(KEPT)).delete()
    samples = [
        DeviceSample(
            device=device,
            at=Now(),
            utilisation=reading.utilisation,
            memory_used_bytes=reading.memory_used_bytes,
            temperature=reading.temperature,
            power_watts=reading.power_watts,
        )
        for device in devices
        if (reading := readings.get(device.uuid))
    ]
    return len(DeviceSample.objects.bulk_create(samples))
