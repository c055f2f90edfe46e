"""An installation of its own for the fault suite: the platform's processes, and a witness of what they tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from lorapilot.management.api_client import ApiError, Client
from tests.serving.conftest import ROOT, Running, wait_until

STEPS = 60
SETTINGS = {
    "steps": STEPS,
    "batch_size": 2,
    "rank": 4,
    "alpha": 4,
    "learning_rate": 1e-3,
    "save_every_steps": 5,
    "keep_last": 2,
    "sample_prompts": ["a red circle"],
    "sample_steps": 1,
    "seed": 7,
}
PREPARE = """
import django; django.setup()
from lorapilot.models import ApiToken, User
from tests.factories import make_dataset
admin = User.objects.get(username="admin")
print(make_dataset(admin).pk, ApiToken.objects.create(user=admin, name="chaos", scope="write")[1])
"""
FACTS = """
import json, sys, django; django.setup()
from django.db.models import Count
from runs.enums import ACTIVE
from runs.models import Attempt, Run
run = Run.objects.get(pk=int(sys.argv[1]))
print(json.dumps({
    "crowded": list(Run.objects.filter(status__in=ACTIVE).values("slot").annotate(n=Count("pk")).filter(n__gt=1)),
    "unfinished": list(Run.objects.exclude(status__in=("succeeded", "stopped")).values_list("output_name", "status")),
    "open_attempts": Attempt.objects.filter(ended_at=None).count(),
    "points": list(run.metrics.values_list("step", "loss")),
    "step": [run.step, run.total_steps],
    "endings": list(run.attempts.values_list("ending", flat=True)),
}))
"""


class Installation:
    """`environment`: what makes it SQLite or PostgreSQL with Redis. Starts with `up`; `stop` ends everything."""

    def __init__(self, folder: Path, environment: dict[str, str], *, hosts: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.workspace = folder / "ws"
        self.environment = {
            "LORAPILOT_WORKSPACE": str(self.workspace),
            "LORAPILOT_HOST_NAME": "here",
            "LORAPILOT_ENV_FILE": os.devnull,
            "STATIC_ROOT": str(folder / "static"),
            "API_RATE": "100000/min",
        } | environment
        self.hosts = hosts  # of `manage.py worker`; none: `up` trains itself
        self.running: dict[str, Running] = {}
        self.port = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """`up`, on the same port as before, and the workers of a fleet."""
        argv = ["manage.py", "up", "--port", str(self.port), *(["--web-only"] if self.hosts else [])]
        self._launch("up", argv)
        self.port = int(self.up.wait_for(r"LoRA Pilot runs at http://127.0.0.1:(\d+)", 60).group(1))
        for host in self.hosts:
            if host not in self.running or self.running[host].process.poll() is not None:
                self._launch(host, ["manage.py", "worker"], LORAPILOT_HOST_NAME=host)
                self.running[host].wait_for("This machine trains as", 60)
        if not hasattr(self, "client"):
            self._prepare()

    def _launch(self, role: str, argv: list[str], **more: str) -> None:
        output = self.folder / f"{role}.txt"
        output.unlink(missing_ok=True)
        self.running[role] = Running(argv, output, self.environment | more)

    @property
    def up(self) -> Running:
        return self.running["up"]

    def _prepare(self) -> None:
        self.dataset, token = self.django(PREPARE).split()
        self.client = Client(f"http://127.0.0.1:{self.port}", token)
        self.model = self.client.find("/models/", "pilot-tiny")["id"]

    def django(self, program: str, *arguments: str) -> str:
        """What a program prints that runs with this installation's settings."""
        environment = os.environ | self.environment | {"DJANGO_SETTINGS_MODULE": "lorapilot.settings"}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def submit(self, name: str) -> int:
        asked = {"dataset": self.dataset, "base_model": self.model, "output_name": name, "settings": SETTINGS}
        return int(self.client.call("POST", "/runs/", json=asked)["id"])

    def look(self, run: int) -> dict | None:
        """The run as a user sees it; None while the platform does not answer."""
        try:
            return self.client.call("GET", f"/runs/{run}/")
        except (ApiError, requests.RequestException):
            return None

    def facts(self, run: int) -> dict:
        return json.loads(self.django(FACTS, str(run)))

    # --- processes ----------------------------------------------------------------------------------------------------

    def main_of(self, role: str, host: str = "up") -> psutil.Process:
        """The main process of `web`, `worker` or `io`."""
        mark = {"web": "lorapilot.server", "worker": "lorapilot.cluster", "io": "lorapilot.cluster io"}[role]

        def find() -> psutil.Process | None:
            for child in psutil.Process(self.running[host].pid).children():
                with suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    if mark in line and (role == "io") == ("lorapilot.cluster io" in line):
                        return child
            return None

        return wait_until(find, 30)

    def busy_worker(self) -> psutil.Process:
        """The process of the cluster that has done most: it supervises the run."""
        sentinel = wait_until(lambda: next(iter(self.main_of("worker").children()), None), 30)
        return max(wait_until(sentinel.children, 30), key=lambda one: sum(one.cpu_times()[:2]))

    def family(self, role: str) -> list[psutil.Process]:
        main = psutil.Process(self.running[role].pid)
        return [main, *main.children(recursive=True)]

    def runner_of(self, name: str, attempt: int) -> dict | None:
        """Who trains an attempt, while it does: `pid` of the runner, and `trainer_pid`."""
        file = self.workspace / "outputs" / name / "_attempts" / str(attempt) / "runner.json"
        try:
            record = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return record if is_alive(record["pid"]) and is_alive(record.get("trainer_pid", record["pid"])) else None

    def trainers(self) -> list[psutil.Process]:
        """Runners and trainers of this workspace that live."""
        outputs = str(self.workspace / "outputs")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(part.startswith(outputs) for part in process.cmdline()) and is_alive(process.pid):
                    found.append(process)
        return found

    def stop(self) -> None:
        for running in reversed(list(self.running.values())):
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGCONT)
                running.process.terminate()
        for running in self.running.values():
            try:
                running.process.wait(30)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        for process in self.trainers():
            with suppress(psutil.Error):
                process.kill()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Witness(threading.Thread):
    """Reads a run's log by websocket, with a reconnect from its own offset whenever the connection is lost."""

    def __init__(self, installation: Installation, run: int) -> None:
        super().__init__(daemon=True)
        self.installation = installation
        self.run_id = run
        self.log = bytearray()
        self.faults: list[str] = []
        self.reconnects = -1
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            with suppress(OSError, WebSocketException, ApiError, requests.RequestException, TimeoutError):
                self._listen()
            time.sleep(0.2)

    def _listen(self) -> None:
        client = self.installation.client
        address = f"{client.base_url.replace('http', 'ws', 1)}/ws/runs/{self.run_id}/?offset={len(self.log)}"
        with connect(address, origin=client.base_url, open_timeout=5) as socket:
            socket.send(json.dumps({"type": "ticket", "ticket": client.call("POST", "/tickets/")["ticket"]}))
            self.reconnects += 1
            while not self.is_over:
                with suppress(TimeoutError):
                    frame = socket.recv(timeout=0.5)
                    if isinstance(frame, bytes):
                        self._take(frame)

    def _take(self, frame: bytes) -> None:
        offset = int.from_bytes(frame[:8], "big")
        if offset != len(self.log):
            self.faults.append(f"a frame of offset {offset} after {len(self.log)} bytes")
        self.log[offset:] = frame[8:]

    def finish(self, log: bytes) -> None:
        """Wait until all of the log has come."""
        with suppress(AssertionError):
            wait_until(lambda: len(self.log) >= len(log), 10)
        self.is_over = True
        self.join(5)


@contextmanager
def mounted(path: Path, megabytes: int):
    """A small file system of its own at `path`. Raises OSError where mounting is not possible."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
