"""How busy devices are and were, from the samples that hosts store (runs/lookout.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

from lorapilot import workspace
from lorapilot.clock import ago
from lorapilot.models import User
from runs import vitals
from runs.enums import DeviceKind
from runs.models import Device, DeviceSample, Host

MOST_POINTS = 500
MOST_HOURS = 24
CURRENT_FOR = timedelta(minutes=2)

# Unix seconds, utilisation in percent, memory in bytes, temperature in degrees Celsius, power in watts.
Point = tuple[float, float | None, int | None, float | None, float | None]
VALUES = ("at", "utilisation", "memory_used_bytes", "temperature", "power_watts")


@dataclass(frozen=True, slots=True)
class DeviceHistory:
    device: Device
    points: list[Point]


def history_of(host: Host, *, hours: int = MOST_HOURS) -> list[DeviceHistory]:
    """Each device of `host` with its samples of the last `hours`, oldest first, at most 500 a device."""
    samples = DeviceSample.objects.filter(device__host=host, at__gt=ago(timedelta(hours=hours))).order_by("at")
    found: dict[int, list[Point]] = {}
    for device_id, at, *values in samples.values_list("device_id", *VALUES):
        found.setdefault(device_id, []).append((at.timestamp(), *values))
    return [DeviceHistory(device, thin_out(found.get(device.pk, []), MOST_POINTS)) for device in host.devices.all()]


def thin_out(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: each stands for a stretch of them, with its last moment, the mean of the utilisation, and
    the highest of everything else, so that no peak of memory is hidden."""
    if len(points) <= most:
        return list(points)
    cuts = [len(points) * number // most for number in range(most + 1)]
    return [_summary(points[start:end]) for start, end in pairwise(cuts)]


def _summary(stretch: Sequence[Point]) -> Point:
    moments, utilisation, memory, temperature, power = zip(*stretch, strict=True)
    return max(moments), _of(_mean, utilisation), _of(max, memory), _of(max, temperature), _of(max, power)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 1)


def _of(take: Callable[[list[Any]], Any], values: Iterable[Any]) -> Any:
    """Of the values that there are; None when there are none."""
    known = [value for value in values if value is not None]
    return take(known) if known else None


def current_samples() -> dict[int, DeviceSample]:
    """By device: its newest sample, of the last two minutes."""
    samples = DeviceSample.objects.filter(at__gt=ago(CURRENT_FOR)).order_by("at")
    return {sample.device_id: sample for sample in samples}


def telemetry(user: User) -> dict[str, Any]:
    """How busy the web side's machine is, and every host's GPUs. JSON values only; bytes, percent.

    Values of a GPU that its host has not told lately are null. Only staff learn where the workspace lies.
    """
    machine = vitals.read_machine()
    disk = shutil.disk_usage(workspace.outputs())
    return {
        "load": list(machine.load),
        "cpu_count": machine.cpu_count,
        "memory": {"total": machine.memory_total_bytes, "used": machine.memory_used_bytes},
        "disks": [
            {
                "path": str(workspace.outputs()) if user.is_staff else "workspace",
                "total": disk.total,
                "free": disk.free,
            }
        ],
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, Any]]:
    samples = current_samples()
    gpus = Device.objects.filter(kind=DeviceKind.CUDA).select_related("host")
    return [
        {
            "index": gpu.index,
            "name": gpu.name,
            "host": gpu.host.name,
            "util": sample.utilisation if (sample := samples.get(gpu.pk)) else None,
            "mem_used": sample.memory_used_bytes if sample else None,
            "mem_total": gpu.memory_bytes,
        }
        for gpu in gpus
    ]
