"""What a host stores about itself, and what is made of it: samples of devices, processes, trainers, telemetry."""

import ctypes
import subprocess
import sys
import types
from datetime import timedelta

import psutil
import pytest
from django.db import OperationalError
from django.utils import timezone

from lorapilot import children
from lorapilot.management import platform
from runs import device_history, lookout, vitals
from runs.models import Device, DeviceSample, Host
from runs.stacks.installation import TRAINERS, Installation
from tests.factories import make_slot

URL = "/api/v1/hosts/testhost/history/"


class Nvml(types.SimpleNamespace):
    """Two GPUs; the second is one that tells nothing but its memory."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__(is_there=True, shut_down=0)

    def nvmlInit(self):  # noqa: N802 its name, as below
        if not self.is_there:
            raise self.NVMLError

    def nvmlShutdown(self):  # noqa: N802
        self.shut_down += 1

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return types.SimpleNamespace(used=(handle + 1) << 30)

    def told(self, handle, value):
        if handle:
            raise self.NVMLError
        return value

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return types.SimpleNamespace(gpu=self.told(handle, 87))

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        return self.told(handle, ctypes.c_uint(64).value)

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return self.told(handle, 412_500)


@pytest.fixture
def nvml(monkeypatch):
    stand_in = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


@pytest.fixture
def gpus(db):
    host = Host.objects.create(name="testhost", heartbeat_at=timezone.now())
    facts = {"host": host, "kind": "cuda", "name": "NVIDIA H100", "memory_bytes": 80 << 30}
    return [Device.objects.create(uuid=f"GPU-{index}", index=index, **facts) for index in range(2)]


@pytest.fixture
def quick_look(monkeypatch):
    """No trainer's Python is started."""
    found = {key: Installation(home="", looked_at=1.0) for key in TRAINERS}
    asked = []
    monkeypatch.setattr(lookout.installation, "look_at_all", lambda *, has_gpu: asked.append(has_gpu) or found)
    return asked


def back(sample_or_samples, **span):
    """Move samples into the past."""
    for sample in sample_or_samples:
        DeviceSample.objects.filter(pk=sample.pk).update(at=sample.at - timedelta(**span))


# --- Readings ---------------------------------------------------------------------------------------------------------
def test_gpus_tell_what_they_can(nvml):
    assert vitals.read_devices() == {
        "GPU-0": vitals.Reading(87, 1 << 30, 64, 412.5),
        "GPU-1": vitals.Reading(None, 2 << 30, None, None),
    }
    assert nvml.shut_down == 1


def test_machine_without_a_driver_tells_of_its_cpu(nvml, monkeypatch):
    nvml.is_there = False
    monkeypatch.setattr(vitals._Cpu, "times", None)
    first = vitals.read_devices()["cpu"]
    assert (first.utilisation, 0 < first.memory_used_bytes < psutil.virtual_memory().total) == (None, True)
    assert 0 <= vitals.read_devices()["cpu"].utilisation <= 100


def test_cpu_is_busy_when_it_is_neither_idle_nor_waiting():
    times = types.SimpleNamespace
    fields = ("user", "idle", "iowait", "guest")
    before = times(_fields=fields, user=10.0, idle=100.0, iowait=5.0, guest=9.0)
    after = times(_fields=fields, user=40.0, idle=150.0, iowait=25.0, guest=30.0)
    assert vitals._busy_percent(before, after) == 30.0
    assert vitals._busy_percent(after, after) == 0.0


# --- Storing ----------------------------------------------------------------------------------------------------------
def test_each_device_is_sampled_once_in_half_a_minute(nvml, gpus):
    Device.objects.create(host=gpus[0].host, kind="cuda", uuid="GPU-gone", name="gone")
    assert [lookout.sample_devices(), lookout.sample_devices()] == [2, 0]
    stored = DeviceSample.objects.order_by("device__uuid").values_list(
        "device__uuid", "utilisation", "memory_used_bytes", "temperature", "power_watts"
    )
    assert list(stored) == [("GPU-0", 87, 1 << 30, 64, 412.5), ("GPU-1", None, 2 << 30, None, None)]
    back(DeviceSample.objects.all(), seconds=31)
    assert lookout.sample_devices() == 2


def test_samples_are_kept_for_a_day(nvml, gpus):
    lookout.sample_devices()
    back(DeviceSample.objects.all(), hours=24, seconds=1)
    lookout.sample_devices()
    assert DeviceSample.objects.count() == 2


def test_host_stores_its_processes_and_trainers(nvml, gpus, quick_look):
    lookout.look_around({"testhost": 1.0, "io": 2.0, "web": 3.0})
    host = Host.objects.get()
    assert host.processes["running"] == {"testhost": 1.0, "io": 2.0}
    assert {key: Installation.from_json(kept).looked_at for key, kept in host.trainers.items()} == dict.fromkeys(
        TRAINERS, 1.0
    )
    assert (DeviceSample.objects.count(), quick_look) == (2, [True])


def test_lookout_outlives_what_goes_wrong_and_says_it_once(db, monkeypatch, caplog):
    errors = iter([OperationalError("away"), ValueError("odd"), ValueError("odd"), None, ValueError("odd")])

    def look_around(processes):
        if error := next(errors):
            raise error

    monkeypatch.setattr(lookout, "look_around", look_around)
    monkeypatch.setattr(platform.connections, "close_all", lambda: None)
    watch = platform.Lookout()
    said = []
    for _ in range(5):
        watch._look()
        said.append(len([record for record in caplog.records if record.levelname == "ERROR"]))
    assert said == [0, 1, 1, 1, 2]


PARENT = """
import subprocess, sys
argvs = ["lorapilot.cluster", "io"], ["lorapilot.cluster", "gpu-1"], ["lorapilot.server"], ["lorapilot.other"]
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
children = [subprocess.Popen([sys.executable, "-m", *argv], **pipes) for argv in argvs]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
input()
for child in children:
    child.communicate("\\n")
print(flush=True)
input()
"""


def test_running_children_are_told_by_what_they_run(tmp_path):
    (tmp_path / "lorapilot").mkdir()
    for module in ("cluster", "server", "other"):
        (tmp_path / "lorapilot" / f"{module}.py").write_text("print(flush=True); input()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        expected = {
            name: psutil.Process(pid).create_time() for name, pid in zip(("io", "gpu-1", "web"), pids, strict=False)
        }
        assert children.running_children(parent.pid) == expected
        assert children.running_children(pids[0]) == {}
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
        assert children.running_children(parent.pid) == {}
        parent.communicate("\n")


# --- Reading ----------------------------------------------------------------------------------------------------------
def test_many_points_become_few_without_hiding_a_peak():
    points = [(float(n), 10.0 * (n % 2), 900 if n == 7 else n, None, float(n)) for n in range(12)]
    assert device_history.thin_out(points, 3) == [
        (3.0, 5.0, 3, None, 3.0),
        (7.0, 5.0, 900, None, 7.0),
        (11.0, 5.0, 11, None, 11.0),
    ]
    assert device_history.thin_out(points, 12) == points
    assert len(device_history.thin_out(points, 5)) == 5


def test_history_is_thinned_to_500_points(gpus):
    now = timezone.now()
    DeviceSample.objects.bulk_create(
        DeviceSample(device=gpus[0], at=now - timedelta(seconds=30 * n), utilisation=n) for n in range(1200)
    )
    first, second = device_history.history_of(gpus[0].host, hours=24)
    assert (first.device, len(first.points), second.points) == (gpus[0], 500, [])
    moments = [point[0] for point in first.points]
    assert (moments == sorted(moments), moments[-1]) == (True, pytest.approx(now.timestamp(), abs=1e-3))


def test_api_tells_the_history_of_a_host_to_everybody(nvml, gpus, charlie, api_of):
    lookout.sample_devices()
    (sample,) = DeviceSample.objects.filter(device=gpus[0])
    answer = api_of(charlie, "read").get(URL, {"hours": 1})
    device = {"kind": "cuda", "uuid": "GPU-0", "index": 0, "name": "NVIDIA H100", "memory_bytes": 80 << 30}
    assert answer.json()[0] == {
        "device": device,
        "points": [[sample.at.timestamp(), 87.0, float(1 << 30), 64.0, 412.5]],
    }
    back([sample], hours=2)
    assert api_of(charlie).get(URL, {"hours": 1}).json()[0]["points"] == []
    assert len(api_of(charlie).get(URL).json()[0]["points"]) == 1


@pytest.mark.parametrize("hours", ["0", "25", "-1", "1.5", "many"])
def test_api_refuses_other_hours(gpus, alice, api_of, hours):
    answer = api_of(alice).get(URL, {"hours": hours})
    assert (answer.status_code, list(answer.json()["errors"])) == (400, ["hours"])


def test_api_of_history_refuses_visitors_other_methods_and_unknown_hosts(gpus, alice, client, api_of):
    assert client.get(URL).status_code == 401
    assert [api_of(alice).post(URL).status_code, api_of(alice).delete(URL).status_code] == [405, 405]
    assert api_of(alice).get("/api/v1/hosts/nobody/history/").status_code == 404


def test_telemetry_tells_the_machine_and_all_gpus(nvml, gpus, workspace, alice, staff):
    lookout.sample_devices()
    back(DeviceSample.objects.filter(device=gpus[1]), minutes=3)
    told = device_history.telemetry(alice)
    common = {"name": "NVIDIA H100", "host": "testhost", "mem_total": 80 << 30}
    assert told["gpus"] == [
        {"index": 0, "util": 87.0, "mem_used": 1 << 30} | common,
        {"index": 1, "util": None, "mem_used": None} | common,
    ]
    assert (len(told["load"]), told["cpu_count"] > 0, sorted(told["memory"])) == (3, True, ["total", "used"])
    assert [sorted(disk) for disk in told["disks"]] == [["free", "path", "total"]]
    paths = [device_history.telemetry(user)["disks"][0]["path"] for user in (alice, staff)]
    assert paths == ["workspace", str(workspace / "outputs")]


def test_telemetry_of_a_cpu_host_has_no_gpu(db, workspace, alice):
    make_slot()
    assert device_history.telemetry(alice)["gpus"] == []
