"""The life of a run: its statuses and the only allowed ways between them."""

from __future__ import annotations

from django.db import models


class Status(models.TextChoices):
    QUEUED = "queued", "Queued"
    STARTING = "starting", "Starting"
    RUNNING = "running", "Running"
    STOPPING = "stopping", "Stopping"
    STOPPED = "stopped", "Stopped"
    SUCCEEDED = "succeeded", "Succeeded"
    FAILED = "failed", "Failed"  # the trainer or its input said no: a sentence the user can act on
    ERRORED = "errored", "Error"  # our own fault: the traceback is in the server's log


ACTIVE = frozenset({Status.STARTING, Status.RUNNING, Status.STOPPING})
TERMINAL = frozenset({Status.STOPPED, Status.SUCCEEDED, Status.FAILED, Status.ERRORED})

EDGES: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.STARTING, Status.STOPPED}),
    Status.STARTING: frozenset({Status.RUNNING, Status.QUEUED, Status.STOPPING, Status.FAILED, Status.ERRORED}),
    Status.RUNNING: frozenset({Status.STOPPING, Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.ERRORED}),
    Status.STOPPING: frozenset({Status.STOPPED, Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.ERRORED}),
    Status.STOPPED: frozenset({Status.QUEUED}),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.ERRORED: frozenset({Status.QUEUED}),
    Status.SUCCEEDED: frozenset(),
}


class StopIntent(models.TextChoices):
    """What becomes of a run that is asked to stop."""

    STOP = "stop", "Stop"
    PAUSE = "pause", "Pause"  # back to the queue, held until somebody releases it
    MOVE = "move", "Move"  # back to the queue, and on as soon as it can: a drained host, a full disk


class Ending(models.TextChoices):
    """How one attempt ended, for the history and for what to do next."""

    SUCCEEDED = "succeeded", "Succeeded"
    STOPPED = "stopped", "Stopped"
    FAILED = "failed", "Failed"
    ERRORED = "errored", "Error"
    INTERRUPTED = "interrupted", "Interrupted"  # killed from outside, or with its machine
    OUT_OF_MEMORY = "out_of_memory", "Out of memory"
    DISK_FULL = "disk_full", "Disk full"
    MOVED = "moved", "Moved"  # its host was declared dead; whatever it still does is refused


class Priority(models.IntegerChoices):
    LOW = -1, "Low"
    NORMAL = 0, "Normal"
    HIGH = 1, "High"


class DeviceKind(models.TextChoices):
    CPU = "cpu", "CPU"
    CUDA = "cuda", "NVIDIA GPU"


class PartState(models.TextChoices):
    """How a part of the installation is, for the services page and `manage.py doctor`."""

    OK = "ok", "OK"
    WARNING = "warning", "Warning"  # it works; something is to be seen to
    DOWN = "down", "Down"  # it ought to work and does not
    OFF = "off", "Off"  # not used here


class Profile(models.TextChoices):
    """TrainPilot's guided profiles; empty: the user's own values."""

    QUICK_TEST = "quick_test", "Quick test"
    REGULAR = "regular", "Regular"
    HIGH_QUALITY = "high_quality", "High quality"
