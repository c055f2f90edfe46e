"""What does the platform cost a training? Prints the tables of docs/benchmarks.md.

    python -m benchmarks.overhead            some ten minutes
    python -m benchmarks.overhead --quick    a look whether all is well
    python -m benchmarks.overhead --profile  where one slice of supervision spends its processor time, and nothing else

`manage.py up` runs in a workspace of its own and trains the bundled model on the demo's pictures, submitted through the
API and watched by one viewer. The same command line, as the platform's own launch.json has it, is then started as a
bare subprocess, with its output in a file, too. The platform's processor time is told by process: what it takes while
nothing runs is measured before, and the rest is what the training costs.

Everything runs on one machine; the trainer has it to itself but for the platform. There are no limits to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import json
import os
import pstats
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Origin

from benchmarks.live_log import ROOT, SPAWN, end_on_sigterm, environment, head, new_token, row, submit
from lorapilot.management.api_client import Client

SAMPLING_SECONDS = 0.2
START_SECONDS, RUN_SECONDS = 60.0, 1800.0
CLUSTER_BELOW = 2
"""A cluster's last two processes are its monitor and its pusher; those before are its workers."""
HOST = "benchmark"
SETTINGS = {"batch_size": 4, "rank": 8, "alpha": 8}
Usage = dict[str, float]
"""Role -> seconds of processor time."""
SUPERVISION = ("worker: main", "worker: sentinel", "worker: pusher", "worker: monitor", "worker: workers")
TRAINING_SIDE = ("runner", *SUPERVISION, "web")
"""What has to do with one training and its viewer; `up` and `io` do the same whether one runs or not."""


# --- The platform -----------------------------------------------------------------------------------------------------
class Platform:
    """`manage.py up` in `folder`; a client that is signed in."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.workspace.mkdir(parents=True)
        self.environment = environment(self.workspace, LORAPILOT_HOST_NAME=HOST)
        self.output = folder / "up.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", "0"],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        self.address = self._said(r"LoRA Pilot runs at (http://\S+)")
        password = self._said(r"as admin, password (\S+)")
        self.client = Client(self.address, new_token(self.address, password))

    def _said(self, pattern: str) -> str:
        return str(until(lambda: re.search(pattern, self.output.read_text()), START_SECONDS)[1])

    def roles(self) -> dict[str, list[psutil.Process]]:
        """Its processes, once all are there."""
        up = psutil.Process(self.process.pid)
        found: dict[str, list[psutil.Process]] = {"up": [up]}
        for child in up.children():
            line = child.cmdline()
            if "lorapilot.server" in line:
                found["web"] = [child]
            elif "lorapilot.cluster" in line:
                name = "io" if "io" in line else "worker"
                sentinel = child.children()[0]
                rest = sorted(sentinel.children(), key=lambda process: (process.create_time(), process.pid))
                found |= {f"{name}: main": [child], f"{name}: sentinel": [sentinel]}
                found |= {f"{name}: workers": rest[:-CLUSTER_BELOW]}
                found |= {f"{name}: monitor": rest[-2:-1], f"{name}: pusher": rest[-1:]}
        return found

    def submit(self, name: str, steps: int) -> dict[str, Any]:
        return submit(self.client, name=name, settings=SETTINGS | {"steps": steps})

    def attempt_folder(self, name: str) -> Path:
        return self.workspace / "outputs" / name / "_attempts" / "1"

    def stop(self) -> None:
        """And what still trains, which would go on."""
        self.client.http.close()
        self.process.terminate()
        self.process.wait(60)
        for record in (self.workspace / "outputs").glob("*/_attempts/*/runner.json"):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(json.loads(record.read_text())["pid"]).terminate()
        until(lambda: not self._trainers(), START_SECONDS)

    def _trainers(self) -> list[int]:
        folder = str(self.workspace)
        found = psutil.process_iter(["cmdline"])
        return [one.pid for one in found if any(folder in word for word in one.info["cmdline"] or [])]


def until(find: Callable[[], Any], seconds: float) -> Any:
    """The first true value of `find()`. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds:g} seconds")
        time.sleep(0.02)
    return found


@contextmanager
def viewer(platform: Platform, run: int) -> Iterator[Watch]:
    """One viewer of a run, in a thread."""
    watch = Watch(platform, run)
    watch.thread.start()
    try:
        yield watch
    finally:
        watch.thread.join()


@dataclass
class Watch:
    """Reads until the run has ended."""

    platform: Platform
    run: int
    first_byte_at: float = 0.0
    status: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        address = f"{self.platform.address.replace('http', 'ws', 1)}/ws/runs/{self.run}/?offset=0"
        with connect(address, origin=Origin(self.platform.address)) as socket, contextlib.suppress(ConnectionClosed):
            ticket = self.platform.client.call("POST", "/tickets/")["ticket"]
            socket.send(json.dumps({"type": "ticket", "ticket": ticket}))
            for frame in socket:
                self._take(frame)
                if self.status.get("is_terminal"):
                    return

    def _take(self, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            self.first_byte_at = self.first_byte_at or time.time()
        elif (message := json.loads(frame))["type"] == "status":
            self.status = message["run"]


# --- Processor time ---------------------------------------------------------------------------------------------------
class Meter:
    """Samples the processor time of processes by role, also of those that come later."""

    def __init__(self, roles: dict[str, list[psutil.Process]]) -> None:
        self.roles = dict(roles)
        self.samples: list[tuple[float, Usage]] = [(time.time(), {})]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            usage = dict(self.samples[-1][1])  # one that has ended keeps its last figure
            for role, processes in list(self.roles.items()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    usage[role] = sum(_cpu_seconds(process, role) for process in processes)
            self.samples.append((time.time(), usage))
            if self._is_over.wait(SAMPLING_SECONDS):
                return

    def at(self, moment: float) -> Usage:
        return min(self.samples[1:], key=lambda sample: abs(sample[0] - moment))[1]

    def between(self, start: float, end: float) -> Usage:
        before, after = self.at(start), self.at(end)
        return {role: used - before.get(role, 0.0) for role, used in after.items()}


def _cpu_seconds(process: psutil.Process, role: str) -> float:
    """A worker waits for the short process that starts a runner; `up` for orphans, which are no cost of its own."""
    times = process.cpu_times()
    own = times.user + times.system
    return float(own + times.children_user + times.children_system if role.endswith("workers") else own)


# --- One training -----------------------------------------------------------------------------------------------------
@dataclass
class Training:
    """What was seen of one training. Moments are seconds since 1970."""

    asked_at: float
    first_byte_at: float
    moments: dict[int, float]
    """Step -> when it was finished."""
    usage: Usage
    """Between the first step and the last."""
    whole: Usage
    """Between asking for it and its end."""
    started_at: float = 0.0
    """When the trainer's process was there."""

    @property
    def seconds(self) -> float:
        return max(self.moments.values()) - min(self.moments.values())

    @property
    def steps(self) -> int:
        return len(self.moments) - 1


def train(platform: Platform, name: str, steps: int) -> Training:
    """By the platform, with one viewer."""
    folder = platform.attempt_folder(name)
    with Meter(platform.roles()) as meter:
        asked_at = time.time()
        run = platform.submit(name, steps)
        with viewer(platform, run["id"]) as watch:
            record = until(lambda: _runner(folder), START_SECONDS)
            started_at = (folder / "runner.json").stat().st_mtime
            for role, key in (("runner", "pid"), ("trainer", "trainer_pid")):
                with contextlib.suppress(psutil.NoSuchProcess):
                    meter.roles[role] = [psutil.Process(record[key])]
        if watch.status["status"] != "succeeded":
            raise RuntimeError(f"The run ended as {watch.status['status']}: {watch.status['reason']}")
    return _training(meter, folder, asked_at, watch.first_byte_at, started_at)


def _runner(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / "runner.json").read_text())
    except FileNotFoundError:
        return {}
    return record if "trainer_pid" in record else {}


def train_bare(platform: Platform, name: str, folder: Path) -> Training:
    """The command line of the platform's run `name` once more, in `folder`, without the platform."""
    ours = platform.workspace / "outputs" / name
    launch = json.loads(_moved((platform.attempt_folder(name) / "launch.json").read_text(), ours, folder))
    attempt = folder / "_attempts" / "1"
    attempt.mkdir(parents=True)
    for path in platform.attempt_folder(name).iterdir():
        if path.suffix in (".toml", ".jsonl", ".txt") and path.name != "events.jsonl":
            (attempt / path.name).write_text(_moved(path.read_text(), ours, folder))
    log = folder / "train.log"
    with log.open("wb") as output:
        asked_at = time.time()
        process = subprocess.Popen(
            launch["argv"],
            cwd=launch["cwd"],
            env=launch["env"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with Meter({"trainer": [psutil.Process(process.pid)]}) as meter:
            while not log.stat().st_size and process.poll() is None:
                time.sleep(0.002)
            first_byte_at = time.time()
            if process.wait():
                raise RuntimeError(log.read_text()[-2000:])
    return _training(meter, attempt, asked_at, first_byte_at, asked_at)


def _moved(text: str, old: Path, new: Path) -> str:
    return text.replace(str(old), str(new))


def _training(meter: Meter, folder: Path, asked_at: float, first_byte_at: float, started_at: float) -> Training:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    moments = {row["step"]: row["at"] for row in rows if row["event"] == "progress"}
    usage = meter.between(min(moments.values()), max(moments.values()))
    whole = meter.between(asked_at, meter.samples[-1][0])
    return Training(asked_at, first_byte_at, moments, usage, whole, started_at)


# --- Where a slice spends its time ------------------------------------------------------------------------------------
def profile(platform: Platform, steps: int) -> str:
    """A training is under way; the platform is stopped, and a process of ours supervises one slice in its place."""
    run = platform.submit("profiled", steps)
    until(lambda: platform.client.call("GET", f"/runs/{run['id']}/")["step"] > 0, START_SECONDS)
    platform.process.terminate()
    platform.process.wait(60)
    pipe, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_profile_slice, args=(platform.environment, theirs), daemon=True)
    process.start()
    table: str = pipe.recv()
    process.join()
    return table


def _profile_slice(variables: dict[str, str], pipe: Any) -> None:
    os.environ.clear()
    os.environ.update(variables)
    import django

    django.setup()
    from runs.models import Attempt
    from runs.reconcile import release_leases
    from runs.supervision.follow import supervise_slice

    release_leases(HOST)
    attempt = Attempt.objects.get(ended_at__isnull=True)
    profiler = cProfile.Profile(time.process_time)
    before, started = time.process_time(), time.monotonic()
    profiler.runcall(supervise_slice, attempt.pk)
    used, passed = time.process_time() - before, time.monotonic() - started
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(r"/(runs|lorapilot|django)/", 45)
    pipe.send(f"{used:.3f} s of processor time in {passed:.1f} s, the profiler's own included\n{text.getvalue()}")


# --- What is printed --------------------------------------------------------------------------------------------------
def facts(options: argparse.Namespace) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    what = f"pilot-tiny, {options.steps} steps of batch {SETTINGS['batch_size']}"
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, load {load} before; {what}"


def print_usage(idle: Usage, idle_seconds: float, trainings: list[Training]) -> None:
    """In % of a core: idle, while it trains, and the difference; seconds for the start and the end of a run."""
    print(head("process", "idle, % of a core", "training, %", "the training's own, %", "start and end of a run, CPU s"))
    total = [0.0, 0.0, 0.0, 0.0]
    for role in sorted({*idle, *trainings[0].usage} - {"trainer"}):
        quiet = 100 * idle.get(role, 0.0) / idle_seconds
        busy = median(100 * training.usage[role] / training.seconds for training in trainings)
        once = median(training.whole[role] - training.usage[role] for training in trainings)
        figures = [quiet, busy, busy - quiet, once]
        print(row(role, *(f"{figure:.2f}" for figure in figures)))
        if role in TRAINING_SIDE:
            total = [one + figure for one, figure in zip(total, figures, strict=True)]
    print(row("**runner, supervision and web together**", *(f"{figure:.2f}" for figure in total)), flush=True)


def print_speed(ours: list[Training], bare: list[Training]) -> None:
    print(f"\n{head('trainer', 'steps/s', 'each round', 'CPU ms a step', 'each round')}")
    speeds, costs = [], []
    for name, trainings in (("with the platform", ours), ("bare subprocess", bare)):
        speed = [training.steps / training.seconds for training in trainings]
        cost = [1000 * training.usage["trainer"] / training.steps for training in trainings]
        speeds.append(median(speed))
        costs.append(median(cost))
        rounds = [", ".join(f"{figure:.2f}" for figure in figures) for figures in (speed, cost)]
        print(row(name, f"{speeds[-1]:.2f}", rounds[0], f"{costs[-1]:.1f}", rounds[1]))
    print(row("ratio", f"{speeds[0] / speeds[1]:.3f}", "", f"{costs[0] / costs[1]:.3f}", ""), flush=True)


def print_latency(ours: list[Training], bare: list[Training]) -> None:
    print(f"\n{head('from … to …, seconds', 'median', 'most')}")
    spans = {
        "POST /runs/ → the trainer's process is there": [one.started_at - one.asked_at for one in ours],
        "that → the first byte of the log at the viewer": [one.first_byte_at - one.started_at for one in ours],
        "POST /runs/ → the first byte at the viewer": [one.first_byte_at - one.asked_at for one in ours],
        "bare subprocess → the first byte in its file": [one.first_byte_at - one.asked_at for one in bare],
    }
    for name, seconds in spans.items():
        print(row(name, f"{median(seconds):.2f}", f"{max(seconds):.2f}"))


def main() -> None:
    options = _options()
    end_on_sigterm()
    print(facts(options), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        platform = Platform(Path(name))
        try:
            until(lambda: _is_whole(platform), START_SECONDS)
            if options.profile:
                print(profile(platform, options.steps))
            else:
                _measure(platform, options, Path(name))
        finally:
            platform.stop()


def _is_whole(platform: Platform) -> bool:
    """All processes of both clusters are there."""
    try:
        roles = platform.roles()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return {"web", *SUPERVISION, "io: pusher"} <= {role for role, processes in roles.items() if processes}


def _measure(platform: Platform, options: argparse.Namespace, folder: Path) -> None:
    run = platform.submit("warm-up", 1)  # files and bytecode come from the disk once
    until(lambda: platform.client.call("GET", f"/runs/{run['id']}/")["status"] == "succeeded", RUN_SECONDS)
    time.sleep(5)
    with Meter(platform.roles()) as meter:
        time.sleep(options.idle_seconds)
    start, end = meter.samples[1][0], meter.samples[-1][0]
    idle = meter.between(start, end)
    ours, bare = [], []
    for number in range(options.rounds):
        ours.append(train(platform, f"round-{number}", options.steps))
        bare.append(train_bare(platform, f"round-{number}", folder / f"bare-{number}"))
    print_usage(idle, end - start, ours)
    print_speed(ours, bare)
    ours, bare = [], []
    for number in range(options.submissions):
        ours.append(train(platform, f"first-{number}", 2))
        bare.append(train_bare(platform, f"first-{number}", folder / f"first-bare-{number}"))
    if ours:
        print_latency(ours, bare)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="one short training, one submission")
    parser.add_argument("--profile", action="store_true", help="profile one slice of supervision instead")
    parser.add_argument("--steps", type=int, help="of each training; default 300")
    parser.add_argument("--rounds", type=int, help="trainings with and without the platform, in turn; default 3")
    parser.add_argument("--submissions", type=int, help="short runs, for the time to the first log; default 5")
    parser.add_argument("--idle-seconds", type=float, help="default 60")
    options = parser.parse_args()
    defaults = {"steps": 300, "rounds": 3, "submissions": 5, "idle_seconds": 60.0}
    quick = {"steps": 40, "rounds": 1, "submissions": 1, "idle_seconds": 10.0}
    for option, value in (quick if options.quick else defaults).items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    return options


if __name__ == "__main__":
    main()
