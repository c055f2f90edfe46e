"""How busy this machine is now: GPUs by NVML, the CPU where there is none. No Django import.

What a device or its driver does not tell (a MIG slice has no utilisation, some boards no power) is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

CPU_UUID = "cpu"


@dataclass(frozen=True, slots=True)
class Reading:
    utilisation: float | None  # percent
    memory_used_bytes: int | None
    temperature: float | None = None  # degrees Celsius
    power_watts: float | None = None


def read_devices() -> dict[str, Reading]:
    """A reading of each device by its uuid."""
    return read_gpus() or {CPU_UUID: read_cpu()}


class _Cpu:
    times: Any = None  # of all cores together, at the last reading


def read_cpu() -> Reading:
    """All cores together, since the last reading; the first one has nothing to compare with."""
    before, _Cpu.times = _Cpu.times, psutil.cpu_times()
    memory = psutil.virtual_memory()
    return Reading(before and _busy_percent(before, _Cpu.times), memory.total - memory.available)


def _busy_percent(before: Any, after: Any) -> float:
    """As `top` reckons: what is neither idle nor waiting for a disk. Guests are counted in `user` already."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields if "guest" not in name}
    idle = spent["idle"] + spent.get("iowait", 0.0)
    total = sum(spent.values())
    return round(100 * max(0.0, total - idle) / total, 1) if total > 0 else 0.0


def read_gpus() -> dict[str, Reading]:
    """Each NVIDIA GPU; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {_text(pynvml.nvmlDeviceGetUUID(handle)): _read_gpu(pynvml, handle) for handle in handles}
    except pynvml.NVMLError:  # a driver that is just being replaced, a GPU that has fallen off the bus
        return {}
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(nvml: Any, handle: Any) -> Reading:
    def told(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except nvml.NVMLError:
            return None

    milliwatts = told(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return Reading(
        utilisation=told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        memory_used_bytes=told(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        temperature=told(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@dataclass(frozen=True, slots=True)
class Machine:
    load: tuple[float, float, float]  # over 1, 5 and 15 minutes
    cpu_count: int
    memory_total_bytes: int
    memory_used_bytes: int


def read_machine() -> Machine:
    memory = psutil.virtual_memory()
    return Machine(os.getloadavg(), os.cpu_count() or 1, memory.total, memory.total - memory.available)
