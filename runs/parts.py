"""The parts of the installation, how each of them is, and what mends it: for the services page, the API and
`manage.py doctor`, which therefore cannot disagree.

What only a host can see (its processes, its trainers) is read from its row, where runs/lookout.py has stored it. A
database that is away, or not made yet, is a part that is down; what it would have told is then left out.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import psutil
import redis
from django.conf import settings
from django.db import Error as DatabaseAway
from django.db.models import Count, Min
from django.template.defaultfilters import filesizeformat
from django.utils import timezone
from django_q.models import OrmQ

from lorapilot import database, workspace
from lorapilot.jobs import CLUSTER as IO_CLUSTER
from lorapilot.models import User
from runs import device_history, disk, selectors
from runs.enums import DeviceKind, PartState
from runs.models import Device, DeviceSample, Host, Run, Slot
from runs.stacks.installation import TRAINERS, Installation, Problem

LATE_SECONDS = 60  # a slice takes 20, and a worker is free almost always
REPORT_SECONDS = 120  # what a host has told about itself is true for so long
REDIS_SECONDS = 1.0

PLATFORM, HOSTS, TRAINING = "Platform", "Hosts and slots", "Trainers"
START = "python manage.py up"
START_WORKER = "python manage.py worker"


@dataclass(frozen=True, slots=True)
class Detail:
    label: str
    value: str
    is_internal: bool = False  # names folders, addresses or processes: for staff


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of the list, with what can be said about it."""

    name: str  # stable, for programs
    display: str
    group: str
    state: PartState
    summary: str
    details: Sequence[Detail] = ()
    problems: Sequence[Problem] = ()
    run: Run | None = None  # that trains on this slot, for those who may see it

    @property
    def is_running(self) -> bool:
        return self.state in (PartState.OK, PartState.WARNING)


def list_parts(user: User, *, web: Part | None = None, here: Mapping[str, Installation] | None = None) -> list[Part]:
    """Everything that belongs to the installation, as `user` may see it: staff get folders and commands.

    `web`: what the caller knows of the web side, else that of this process. `here`: the trainers of this machine, when
    the caller has just looked at them.
    """
    data = database_part()
    parts = [web or this_web_process(), data]
    hosts: list[Host] = []
    if data.is_running:
        hosts = list(selectors.list_hosts(user))
        queue = _queue()
        parts += [broker_part(queue, hosts), io_part(queue, hosts)]
    parts += [redis_part(), tensorboard_part(), disk_part()]
    if data.is_running:
        parts += host_parts(hosts)
    parts += trainer_parts(hosts, here or {})
    return parts if user.is_staff else [_for_everybody(part) for part in parts]


def _for_everybody(part: Part) -> Part:
    return replace(
        part,
        details=[detail for detail in part.details if not detail.is_internal],
        problems=[replace(problem, mend="") for problem in part.problems],
    )


# --- Platform ---------------------------------------------------------------------------------------------------------
def this_web_process() -> Part:
    """It answers, so it works."""
    process = psutil.Process()
    return Part(
        name="web",
        display="Web",
        group=PLATFORM,
        state=PartState.OK,
        summary=f"It answers; started {_ago(process.create_time())}.",
        details=[
            Detail("Memory", filesizeformat(process.memory_info().rss)),
            Detail("Python", platform.python_version()),
            Detail("Process", str(os.getpid()), is_internal=True),
        ],
    )


class _Migrated:
    """Tables that are up to date stay so for as long as this code runs."""

    is_known = False


def database_part() -> Part:
    part = Part(name="database", display="Database", group=PLATFORM, state=PartState.DOWN, summary="")
    if database.is_missing():
        problem = Problem("LoRA Pilot has not been started yet: there is no database.", START)
        return replace(part, summary="There is none yet.", problems=[problem])
    try:
        kind = database.describe()
        unapplied = 0 if _Migrated.is_known else database.unapplied_migrations()
    except DatabaseAway as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = Problem("The database does not answer. Start it, or set DATABASE_URL to where it is.")
        details = [Detail("It said", said, is_internal=True)]
        return replace(part, summary="It does not answer.", details=details, problems=[problem])
    _Migrated.is_known = unapplied == 0
    if unapplied:
        problem = Problem(
            f"Its tables are not those of this version: {unapplied} step{'s' if unapplied > 1 else ''} to go.",
            "python manage.py migrate",
        )
        return replace(part, summary=f"{kind}, not up to date.", problems=[problem])
    place = Detail("Where", _database_place(), is_internal=True)
    return replace(part, state=PartState.OK, summary=f"{kind}, up to date.", details=[place])


def _database_place() -> str:
    """Without the password."""
    found = settings.DATABASES["default"]
    host = f"{found['HOST']}:{found['PORT'] or 5432}/" if found.get("HOST") else ""
    return f"{host}{found['NAME']}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """The tasks of one cluster that nobody has taken yet."""

    tasks: int
    oldest_seconds: float


def _queue() -> dict[str, Waiting]:
    """By cluster: a host's name, or `io`. A task that is being worked on is locked until later."""
    now = timezone.now()
    rows = OrmQ.objects.filter(lock__lte=now).values("key").annotate(tasks=Count("pk"), oldest=Min("lock")).order_by()
    return {row["key"]: Waiting(row["tasks"], (now - row["oldest"]).total_seconds()) for row in rows}


def broker_part(queue: Mapping[str, Waiting], hosts: Sequence[Host]) -> Part:
    """The task queue, which goes through the database."""
    tasks = sum(waiting.tasks for waiting in queue.values())
    oldest = max((waiting.oldest_seconds for waiting in queue.values()), default=0.0)
    known = {host.name for host in hosts} | {IO_CLUSTER}
    problems = [
        Problem(
            f"{_tasks(waiting.tasks)} for {name}, {_duration(waiting.oldest_seconds)} by now: nobody takes them.",
            START_WORKER if name in known else "",
            is_warning=True,
        )
        for name, waiting in sorted(queue.items())
        if waiting.oldest_seconds > LATE_SECONDS
    ]
    summary = f"{_tasks(tasks)}, the oldest for {_duration(oldest)}." if tasks else "No task waits."
    state = PartState.WARNING if problems else PartState.OK
    return Part(name="broker", display="Task queue", group=PLATFORM, state=state, summary=summary, problems=problems)


def _tasks(number: int) -> str:
    return f"{number} task waits" if number == 1 else f"{number} tasks wait"


def io_part(queue: Mapping[str, Waiting], hosts: Sequence[Host]) -> Part:
    """The cluster `io`, which imports, hashes and downloads: every host that is heard of runs one."""
    heard = [host for host in hosts if host.condition in ("online", "draining")]
    reported = [host for host in heard if _running(host) is not None]
    alive = [host for host in reported if IO_CLUSTER in (_running(host) or {})]
    part = Part(name="io", display="Background work", group=PLATFORM, state=PartState.OK, summary="")
    waits = f" {_tasks(queue[IO_CLUSTER].tasks)}." if IO_CLUSTER in queue else ""
    if not heard:
        problem = Problem("Imports, checksums and downloads wait until a host runs.", START)
        return replace(part, state=PartState.DOWN, summary=f"No host runs it.{waits}", problems=[problem])
    gone = [host.name for host in reported if host not in alive]
    problems = [Problem(f"Its process on {name} is gone; it is started again.", is_warning=True) for name in gone]
    if reported and not alive:
        return replace(part, state=PartState.DOWN, summary=f"It does not run.{waits}", problems=problems)
    names = ", ".join(host.name for host in alive or heard)
    state = PartState.WARNING if problems else PartState.OK
    return replace(part, state=state, summary=f"Runs on {names}.{waits}", problems=problems)


def redis_part() -> Part:
    """The channel layer and the cache. Without Redis both are each process's own."""
    part = Part(name="redis", display="Redis", group=PLATFORM, state=PartState.OFF, summary="")
    if not settings.REDIS_URL:
        return replace(part, summary="Not used: pages look for news each second.")
    try:
        client = redis.Redis.from_url(
            settings.REDIS_URL, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
        )
        with client:
            version = client.info("server")["redis_version"]
    except (redis.RedisError, OSError):
        problem = Problem("Redis does not answer: pages look for news each second. Start it, or unset REDIS_URL.")
        return replace(part, state=PartState.WARNING, summary="It does not answer.", problems=[problem])
    return replace(part, state=PartState.OK, summary=f"Redis {version}: pages hear of news at once.")


def tensorboard_part() -> Part:
    """Whether the package is there: not imported, since it takes seconds and much memory."""
    part = Part(name="tensorboard", display="TensorBoard", group=PLATFORM, state=PartState.OK, summary="Installed.")
    if find_spec("tensorboard") is None:
        mend = "python -m pip install -r requirements.txt"
        problem = Problem("Curves are then shown on the runs' pages only.", mend, is_warning=True)
        return replace(part, state=PartState.OFF, summary="Not installed here.", problems=[problem])
    return part


def disk_part() -> Part:
    floor = settings.DISK_FLOOR_BYTES
    free, total = disk.free_bytes(), filesizeformat(shutil.disk_usage(workspace.outputs()).total)
    part = Part(
        name="disk",
        display="Disk",
        group=PLATFORM,
        state=PartState.OK,
        summary=f"{filesizeformat(free)} of {total} free; runs leave {filesizeformat(floor)} alone.",
        details=[Detail("Workspace", str(settings.WORKSPACE), is_internal=True)],
    )
    if free >= floor:
        return part
    what = "Less is free than the floor: runs save and wait. Delete runs, datasets and models that are not needed."
    mend = f"du -xsh {settings.WORKSPACE}/*/* | sort -rh | head -20"
    return replace(part, state=PartState.DOWN, problems=[Problem(what, mend)])


# --- Hosts and slots --------------------------------------------------------------------------------------------------
def host_parts(hosts: Sequence[Host]) -> list[Part]:
    """Each host, followed by its slots."""
    if not hosts:
        problem = Problem("Nothing trains until a host runs.", START)
        summary = "No machine trains yet."
        return [
            Part(name="worker", display="Hosts", group=HOSTS, state=PartState.DOWN, summary=summary, problems=[problem])
        ]
    samples = device_history.current_samples()
    parts: list[Part] = []
    for host in hosts:
        parts += [_host_part(host, samples), *(_slot_part(host, slot) for slot in host.slots.all())]
    return parts


HOST_STATES = {
    "online": PartState.OK,
    "draining": PartState.WARNING,
    "lost": PartState.DOWN,
    "dead": PartState.OFF,
}
HOST_SUMMARIES = {
    "online": "It trains.",
    "draining": "In maintenance: it takes no more runs.",
    "lost": "It is silent.",
    "dead": "Declared dead.",
}


def _host_part(host: Host, samples: Mapping[int, DeviceSample]) -> Part:
    condition = host.condition
    heard = f"Last heard of {_ago(host.heartbeat_at.timestamp())}." if host.heartbeat_at else "Never heard of."
    state = HOST_STATES[condition]
    problems = []
    if condition == "lost":
        what = "Its runs may still be training. Start its worker again, or declare the host dead on the hosts page."
        problems = [Problem(what, START_WORKER)]
    running = _running(host)
    if condition in ("online", "draining") and running is not None and host.name not in running:
        state = PartState.DOWN
        problems = [Problem("Its worker process is gone; it is started again. Its log says why it ended.")]
    devices = [Detail(_device_label(device), _busyness(samples.get(device.pk))) for device in host.devices.all()]
    processes = [
        Detail("Process", f"{name}, started {_ago(since)}", is_internal=True) for name, since in (running or {}).items()
    ]
    return Part(
        name=f"worker:{host.name}",
        display=host.name,
        group=HOSTS,
        state=state,
        summary=f"{HOST_SUMMARIES[condition]} {heard}",
        details=[*devices, *processes],
        problems=problems,
    )


def _device_label(device: Device) -> str:
    return device.name if device.kind == DeviceKind.CPU else f"GPU {device.index}, {device.name}"


def _running(host: Host) -> dict[str, float] | None:
    """Names of its processes and since when; None when it has not told lately."""
    told = host.processes
    is_current = abs(time.time() - told.get("at", 0)) < REPORT_SECONDS
    return dict(told.get("running", {})) if is_current else None


def _busyness(sample: DeviceSample | None) -> str:
    if sample is None:
        return "no measurement of the last two minutes"
    figures = [
        None if sample.utilisation is None else f"{sample.utilisation:.0f} % busy",
        None if sample.memory_used_bytes is None else f"{filesizeformat(sample.memory_used_bytes)} in use",
        None if sample.temperature is None else f"{sample.temperature:.0f} °C",
        None if sample.power_watts is None else f"{sample.power_watts:.0f} W",
    ]
    return ", ".join(figure for figure in figures if figure) or "it tells nothing"


def _slot_part(host: Host, slot: Slot) -> Part:
    part = Part(name=f"slot:{slot}", display=str(slot), group=HOSTS, state=PartState.OFF, summary="")
    run = next(iter(slot.runs.all()), None)
    if run is not None:
        is_visible = getattr(run, "is_visible", False)
        state = PartState.OK if host.condition in ("online", "draining") else PartState.WARNING
        summary = f"It trains {run.output_name}." if is_visible else "It trains a run of another user."
        return replace(part, state=state, summary=summary, run=run if is_visible else None)
    if host.condition != "online":
        return replace(part, summary="Its host takes no runs.")
    if not slot.is_enabled:
        return replace(part, summary="Disabled: it takes no runs.")
    if not slot.devices.all():
        problem = Problem("It has no device. Give it one in the admin, or disable it.", is_warning=True)
        return replace(part, state=PartState.WARNING, summary="It takes no runs.", problems=[problem])
    return replace(part, state=PartState.OK, summary="Free.")


# --- Trainers ---------------------------------------------------------------------------------------------------------
def trainer_parts(hosts: Sequence[Host], here: Mapping[str, Installation]) -> list[Part]:
    """Each trainer over all hosts that may come back."""
    found: dict[str, Mapping[str, Installation]] = {
        host.name: {key: Installation.from_json(kept) for key, kept in host.trainers.items()}
        for host in hosts
        if not host.dead_at
    }
    if here:
        found[settings.HOST_NAME] = here
    return [
        _trainer_part(key, {name: trainers[key] for name, trainers in found.items() if key in trainers})
        for key in TRAINERS
    ]


def _trainer_part(key: str, found: Mapping[str, Installation]) -> Part:
    installed = {name: one for name, one in found.items() if one.home}
    part = Part(name=key, display=TRAINERS[key].name, group=TRAINING, state=PartState.OFF, summary="")
    if not found:
        return replace(part, summary="No host has told yet.")
    if not installed:
        first = next(iter(found.values()))
        return replace(part, summary="Not installed.", problems=[replace(p, is_warning=True) for p in first.problems])
    usable = [one for one in installed.values() if one.is_usable]
    problems = [
        replace(problem, what=f"On {name}: {problem.what}" if len(found) > 1 else problem.what)
        for name, one in installed.items()
        for problem in one.problems
    ]
    state = PartState.DOWN if not usable else PartState.WARNING if problems else PartState.OK
    details = [detail for name, one in installed.items() for detail in _installation_details(name, one)]
    return replace(
        part, state=state, summary=_trainer_summary(installed, len(usable)), details=details, problems=problems
    )


def _trainer_summary(installed: Mapping[str, Installation], usable: int) -> str:
    versions = sorted({version for one in installed.values() if (version := _version(one))})
    said = ", ".join(versions) or "Installed"
    if not usable:
        return f"{said}: it cannot be used."
    if usable < len(installed):
        return f"{said}: it works on {usable} of {len(installed)} hosts."
    return f"{said}, on {', '.join(installed)}."


def _version(one: Installation) -> str:
    commit = one.commit[:8]
    return f"{one.version} ({commit})" if one.version and commit else one.version or commit


def _installation_details(name: str, one: Installation) -> list[Detail]:
    figures = [
        f"Python {one.python_version}" if one.python_version else "",
        f"PyTorch {one.torch}" if one.torch else "",
        f"CUDA {one.cuda}" if one.cuda else "",
        f"{one.gpus} GPU{'s' if one.gpus > 1 else ''}" if one.gpus else "",
        f"looked at {_ago(one.looked_at)}" if one.looked_at else "",
    ]
    details = [Detail(name, " · ".join(filter(None, figures)))]
    details += [Detail("Folder", one.home, is_internal=True)]
    details += [Detail("Python", one.python, is_internal=True)] if one.python else []
    return details + ([Detail("It said", one.error, is_internal=True)] if one.error else [])


# --- Times ------------------------------------------------------------------------------------------------------------
def _ago(moment: float) -> str:
    """`moment` in Unix seconds."""
    return f"{_duration(time.time() - moment)} ago"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
