"""Three hosts, a web side, PostgreSQL and one workspace folder: process groups of their own, as on four machines."""

import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import psycopg
import pytest

from lora_trainer.state_files import complete_states
from lorapilot.management.api_client import ApiError, Client
from tests.services import postgres_url
from tests.serving.conftest import ROOT, wait_until

pytestmark = pytest.mark.postgres

PREPARE = """
import django; django.setup()
from lorapilot.models import ApiToken, User
from tests.factories import make_dataset
admin = User.objects.get(username="admin")
print(make_dataset(admin).pk, ApiToken.objects.create(user=admin, name="test", scope="write")[1])
"""
STEPS = 60


@pytest.fixture
def fleet(tmp_path, started):
    """(client, database, workers by host name): nothing trains yet."""
    with postgres_url(f"lorapilot_fleet_{uuid.uuid4().hex[:8]}") as url:
        environment = {
            "LORAPILOT_WORKSPACE": str(tmp_path / "ws"),
            "STATIC_ROOT": os.environ["STATIC_ROOT"],
            "DATABASE_URL": url,
            "LORAPILOT_HOST_NAME": "web-side",
        }
        web = started(["manage.py", "up", "--web-only", "--port", "0"], tmp_path / "web.txt", **environment)
        address = web.wait_for(r"LoRA Pilot runs at (http://127.0.0.1:\d+)").group(1)
        workers = {
            name: started(
                ["manage.py", "worker"], tmp_path / f"{name}.txt", **environment | {"LORAPILOT_HOST_NAME": name}
            )
            for name in ("ada", "bob", "cyd")
        }
        for worker in workers.values():
            worker.wait_for("This machine trains as")
        prepared = subprocess.run(
            [sys.executable, "-c", PREPARE],
            cwd=ROOT,
            env=os.environ | environment | {"DJANGO_SETTINGS_MODULE": "lorapilot.settings"},
            capture_output=True,
            text=True,
            check=True,
        )
        dataset, token = prepared.stdout.split()
        with Client(address, token) as client:
            client.dataset = int(dataset)
            yield client, url, workers
            for run in client.call("GET", "/runs/")["results"]:
                if run["status"] in ("starting", "running", "queued"):
                    client.call("POST", f"/runs/{run['id']}/kill/")
            wait_until(lambda: not runners(tmp_path))
        for one in (*workers.values(), web):
            if one.process.poll() is None:
                one.stop()


def runners(folder):
    """The runners and trainers whose files are below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def freeze_when_saved(folder):
    """The trainer of an output folder, stopped once it has a state: not at its end, however fast the machine is."""
    if not complete_states(folder / "state"):
        return None
    [trainer] = [one for one in runners(folder) if "lora_trainer" in " ".join(one.cmdline())]
    trainer.suspend()
    return trainer


def submit(client, name):
    values = {"steps": STEPS, "batch_size": 1, "rank": 2, "alpha": 2, "save_every_steps": 5, "sample_prompts": ["x"]}
    model = client.find("/models/", "pilot-tiny")["id"]
    values |= {"sample_steps": 1}
    asked = {"dataset": client.dataset, "base_model": model, "output_name": name, "settings": values}
    return client.call("POST", "/runs/", json=asked)["id"]


def look(client, run):
    return client.call("GET", f"/runs/{run}/")


def test_three_hosts_share_the_runs_and_a_dead_one_s_run_goes_on_elsewhere(fleet, tmp_path):
    client, url, workers = fleet
    runs = [submit(client, name) for name in ("one", "two")]
    frozen = {}

    def both_are_frozen():
        for name in {"one", "two"} - frozen.keys():
            if trainer := freeze_when_saved(tmp_path / "ws/outputs" / name):
                frozen[name] = trainer
        return len(frozen) == 2

    wait_until(both_are_frozen, 120)
    wait_until(lambda: all(look(client, run)["status"] == "running" for run in runs), 60)
    slots = [look(client, run)["slot"] for run in runs]
    assert len(set(slots)) == 2
    moved, slot = runs[1], slots[1]
    host = slot.removesuffix("/cpu")

    with pytest.raises(ApiError, match=f"{host} is heard of"):
        client.call("POST", f"/hosts/{host}/declare-dead/")
    os.kill(workers[host].pid, signal.SIGKILL)
    with psycopg.connect(url, autocommit=True) as database:  # half a minute passes
        earlier = "UPDATE runs_host SET heartbeat_at = heartbeat_at - interval '5 minutes' WHERE name = %s"
        database.execute(earlier, [host])
    wait_until(lambda: client.call("GET", f"/hosts/{host}/")["condition"] == "lost")
    assert look(client, moved)["status"] == "running"  # nothing is taken from a silent host
    client.call("POST", f"/hosts/{host}/declare-dead/")
    wait_until(lambda: look(client, moved)["slot"] not in (None, slot), 60)
    for trainer in frozen.values():  # that of the dead host too, as behind a cut cable
        trainer.resume()

    def is_done():
        time.sleep(0.5)
        return all(look(client, run)["status"] == "succeeded" for run in runs)

    wait_until(is_done, 120)
    attempts = client.call("GET", f"/runs/{moved}/attempts/")
    assert [attempt["ending"] for attempt in attempts] == ["moved", "succeeded"]
    assert (attempts[0]["slot"], attempts[1]["slot"] in slots) == (slot, False)  # on the host that was free
    assert 0 < attempts[1]["start_step"] < STEPS
    points = client.call("GET", f"/runs/{moved}/metrics/")["points"]
    assert [point[0] for point in points] == list(range(1, STEPS + 1))
    wait_until(lambda: not runners(tmp_path / "ws"))
