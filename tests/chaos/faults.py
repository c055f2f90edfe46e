"""What is done to a platform while it trains. Each fault waits for its moment, strikes, and returns when it is over."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.installation import STEPS, Installation
from tests.chaos.proxy import Proxy
from tests.serving.conftest import ROOT, wait_until

AWAY_SECONDS = 30.0
SILENT_SECONDS = 45.0  # longer than what makes a host count as lost
CLOCK_HOUR = 3600
RECONCILERS = """
import time, django; django.setup()
from runs.reconcile import reconcile
until = time.monotonic() + 10
while time.monotonic() < until:
    reconcile()
"""


@dataclass
class Scene:
    """One run under one fault."""

    installation: Installation
    run: int
    name: str
    rng: random.Random
    database: Proxy | None = None
    redis: RedisServer | None = None
    moment: str = ""
    endings: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.installation.workspace / "outputs" / self.name

    def look(self) -> dict:
        return wait_until(lambda: self.installation.look(self.run), 60)

    def record(self) -> dict:
        """Runner and trainer of the current attempt."""
        return wait_until(self._record, 60)

    def _record(self) -> dict | None:
        record = self.installation.runner_of(self.name, self.look()["attempt"])
        return record if record and "trainer_pid" in record else None

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            time.sleep(0.05)
            run = self.look()
            return run["step"] >= step or run["finished_at"] is not None

        wait_until(reached, 240)

    def random_moment(self) -> None:
        """Somewhere between the start and the end of a run."""
        kinds = {"start": self._at_start, "load": self._at_load, "step": self._at_step, "save": self._at_save}
        self.moment = self.rng.choice(list(kinds))
        self.record()
        kinds[self.moment]()

    def _at_start(self) -> None:
        time.sleep(self.rng.uniform(0, 0.5))

    def _at_load(self) -> None:
        time.sleep(self.rng.uniform(1, 5))

    def _at_step(self) -> None:
        step = self.rng.randint(3, STEPS - 15)
        self.moment = f"step {step}"
        self.wait_for_step(step)

    def _at_save(self) -> None:
        """While a state is being written."""
        self.wait_for_step(self.rng.randint(3, STEPS - 20))
        states = self.folder / "state"
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not any(states.glob(".step*.tmp")):
            time.sleep(0.001)


class RedisServer:
    """A Redis of the suite's own, which can be taken away."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", "--port", str(self.port), "--save", "", "--dir", str(self.folder)],
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


# --- killed -----------------------------------------------------------------------------------------------------------


def kill_web(scene: Scene) -> None:
    scene.random_moment()
    scene.installation.main_of("web").kill()


def kill_cluster(scene: Scene) -> None:
    scene.random_moment()
    scene.installation.main_of("worker").kill()


def kill_busy_worker(scene: Scene) -> None:
    scene.random_moment()
    scene.installation.busy_worker().kill()


def kill_runner(scene: Scene) -> None:
    scene.random_moment()
    os.kill(scene.record()["pid"], signal.SIGKILL)


def kill_trainer(scene: Scene) -> None:
    scene.random_moment()
    os.kill(scene.record()["trainer_pid"], signal.SIGKILL)


def kill_platform(scene: Scene) -> None:
    scene.random_moment()
    _restart(scene, signal.SIGKILL)


def reboot(scene: Scene) -> None:
    """Everything is killed, and the machine comes up with another boot id."""
    scene.random_moment()
    record = scene.record()
    file = scene.folder / "_attempts" / str(scene.look()["attempt"]) / "runner.json"
    scene.installation.up.process.kill()
    scene.installation.up.process.wait()
    os.kill(record["pid"], signal.SIGKILL)
    file.write_text(file.read_text().replace(record["boot_id"], "another-boot"))
    scene.installation.start()


# --- asked to end while it starts -------------------------------------------------------------------------------------


def terminate_platform_at_start(scene: Scene) -> None:
    time.sleep(scene.rng.uniform(0, 1))
    _restart(scene, signal.SIGTERM)


def _restart(scene: Scene, number: signal.Signals) -> None:
    scene.installation.up.process.send_signal(number)
    scene.installation.up.process.wait(40)
    scene.installation.start()


def terminate_runner_at_start(scene: Scene) -> None:
    pid = scene.record()["pid"]
    time.sleep(scene.rng.uniform(0, 3))
    os.kill(pid, signal.SIGTERM)


def terminate_trainer_at_start(scene: Scene) -> None:
    pid = scene.record()["trainer_pid"]
    time.sleep(scene.rng.uniform(0, 3))
    os.kill(pid, signal.SIGTERM)


# --- taken away for a while -------------------------------------------------------------------------------------------


def database_away(scene: Scene) -> None:
    scene.random_moment()
    if scene.database is None:
        return _lock_sqlite(scene.installation.workspace / "lorapilot.sqlite3")
    scene.database.cut()
    time.sleep(AWAY_SECONDS)
    return scene.database.mend()


def _lock_sqlite(file: Path) -> None:
    """Somebody else writes for half a minute: nobody else can."""
    with sqlite3.connect(file, timeout=30, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(AWAY_SECONDS)
        other.execute("ROLLBACK")


def redis_away(scene: Scene) -> None:
    assert scene.redis is not None
    scene.random_moment()
    scene.redis.stop()
    time.sleep(AWAY_SECONDS)
    scene.redis.start()


def disk_full(scene: Scene) -> None:
    """The file system of the outputs, which is a small one of its own, has no byte left for a while."""
    scene.random_moment()
    ballast = scene.folder.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * (1 << 16))
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0")
    time.sleep(scene.rng.uniform(4, 12))
    ballast.unlink()


def clock_jump(scene: Scene) -> None:
    """An hour ahead, and after a while back."""
    scene.random_moment()
    clock = scene.installation.folder / "clock"
    set_clock(clock, CLOCK_HOUR)
    time.sleep(12)
    set_clock(clock, 0)


def set_clock(clock: Path, seconds: int) -> None:
    """So many seconds ahead; the file is mapped by the processes, so it is written in place."""
    with clock.open("r+b" if clock.exists() else "wb") as file:
        file.write(struct.pack("=q", seconds))


# --- at the same time -------------------------------------------------------------------------------------------------


def two_reconcilers(scene: Scene) -> None:
    environment = os.environ | scene.installation.environment | {"DJANGO_SETTINGS_MODULE": "lorapilot.settings"}
    argv = [sys.executable, "-c", RECONCILERS]
    others = [subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    for other in others:
        other.wait(60)


# --- hosts ------------------------------------------------------------------------------------------------------------


def _host_of(scene: Scene) -> str:
    return str(wait_until(lambda: scene.look()["slot"], 60)).split("/")[0]


def host_lost_and_back(scene: Scene) -> None:
    """Its worker's processes stand still, as if the network were cut; the trainer goes on."""
    scene.random_moment()
    family = scene.installation.family(_host_of(scene))
    _signal_all(family, signal.SIGSTOP)
    time.sleep(SILENT_SECONDS)
    _signal_all(family, signal.SIGCONT)


def host_dead(scene: Scene) -> None:
    """As before, but staff declare it dead: the run moves. Then the host comes back."""
    scene.random_moment()
    host = _host_of(scene)
    family = scene.installation.family(host)
    _signal_all(family, signal.SIGSTOP)
    client = scene.installation.client
    wait_until(lambda: client.call("GET", f"/hosts/{host}/")["condition"] == "lost", SILENT_SECONDS + 20)
    if scene.look()["finished_at"] is None:
        client.call("POST", f"/hosts/{host}/declare-dead/")
        scene.endings.add("moved")
    time.sleep(scene.rng.uniform(0, 10))
    _signal_all(family, signal.SIGCONT)


def _signal_all(family: list[psutil.Process], number: signal.Signals) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@dataclass(frozen=True)
class Fault:
    """`needs`: what the installation has to have."""

    name: str
    strike: Callable[[Scene], None]
    needs: frozenset[str] = frozenset()


def fault(strike: Callable[[Scene], None], *needs: str) -> Fault:
    return Fault(strike.__name__.replace("_", " "), strike, frozenset(needs))


FAULTS = [
    fault(kill_web),
    fault(kill_cluster),
    fault(kill_busy_worker),
    fault(kill_runner),
    fault(kill_trainer),
    fault(kill_platform),
    fault(reboot),
    fault(terminate_platform_at_start),
    fault(terminate_runner_at_start),
    fault(terminate_trainer_at_start),
    fault(two_reconcilers),
    fault(database_away),
    fault(redis_away, "redis"),
    fault(disk_full, "small disk"),
    fault(clock_jump, "clock"),
    fault(host_lost_and_back, "fleet"),
    fault(host_dead, "fleet"),
]
