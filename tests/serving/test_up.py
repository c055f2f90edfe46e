"""`manage.py up` and `worker` as a person runs them, and with everything killed that can be."""

import os
import signal
import socket
import time
import urllib.request

import psutil
import pytest

from tests.serving.conftest import wait_until

CLUSTER_SIZE = {"worker": 7, "io": 7}  # main process, sentinel, pusher, monitor, and 3 workers
ENDS_WITHIN = 15.0


def environment(folder, **more):
    return {
        "LORAPILOT_WORKSPACE": str(folder),
        "LORAPILOT_HOST_NAME": "here",
        "STATIC_ROOT": os.environ["STATIC_ROOT"],  # collected once for the whole session
    } | more


def up(start, folder):
    """A platform that runs, with all its processes in place."""
    running = start(["manage.py", "up", "--port", "0"], folder / "up.txt", **environment(folder / "ws"))
    running.port = int(running.wait_for(r"LoRA Pilot runs at http://127.0.0.1:(\d+)").group(1))
    wait_until(lambda: sizes(running) == {"web": 1} | CLUSTER_SIZE, 30)
    wait_until(lambda: is_healthy(running.port))
    return running


@pytest.fixture(scope="module")
def platform(started_once, tmp_path_factory):
    """One for all tests that leave it running."""
    running = up(started_once, tmp_path_factory.mktemp("platform"))
    yield running
    everybody = everyone(running)
    assert running.stop() == 0
    assert [process for process in everybody if not is_gone(process)] == []
    assert running.said.endswith("Stopped.\n")


@pytest.fixture
def own_platform(started, tmp_path):
    return up(started, tmp_path)


def children_of(running):
    """The main processes by role."""
    found = {}
    for child in psutil.Process(running.pid).children():
        try:
            line = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "lorapilot.server" in line:
            found["web"] = child
        elif "lorapilot.cluster" in line:
            found["io" if "io" in line else "worker"] = child
    return found


def sizes(running):
    """How many processes each role has."""
    try:
        return {role: 1 + len(main.children(recursive=True)) for role, main in children_of(running).items()}
    except psutil.NoSuchProcess:
        return {}


def everyone(running):
    return psutil.Process(running.pid).children(recursive=True)


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz/", timeout=10) as response:
            return response.read() == b"ok"
    except OSError:
        return False


def is_gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def test_first_start_tells_a_password_and_fills_the_logs_folder(platform):
    assert platform.said.count("sign in  as admin, password ") == 1
    logs = platform.output.parent / "ws" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["io.log", "web.log", "worker.log"]


def test_second_instance_is_refused_with_the_first_one_s_process_id(platform, started, tmp_path):
    same = environment(platform.output.parent / "ws")
    second = started(["manage.py", "up", "--port", "0"], tmp_path / "second.txt", **same)
    assert second.process.wait(30) == 75
    assert f"(process {platform.pid} on " in second.said


def test_web_server_that_is_killed_is_back_on_its_port(platform):
    web = children_of(platform)["web"]
    web.kill()
    assert is_healthy(platform.port)  # the connection waits in the socket meanwhile
    assert children_of(platform)["web"].pid != web.pid
    assert "web ended (SIGKILL); starting it again now." in platform.said


@pytest.mark.parametrize("victim", ["main process", "sentinel", "idle worker"])
def test_cluster_with_a_killed_process_is_replaced_whole(platform, victim):
    wait_until(lambda: sizes(platform) == {"web": 1} | CLUSTER_SIZE)  # the one before may still be starting
    main = children_of(platform)["worker"]
    old = [main, *main.children(recursive=True)]
    victims = {"main process": main, "sentinel": main.children()[0], "idle worker": main.children()[0].children()[0]}
    victims[victim].kill()
    wait_until(lambda: all(is_gone(process) for process in old))
    wait_until(lambda: sizes(platform) == {"web": 1} | CLUSTER_SIZE)
    assert children_of(platform)["worker"].pid != main.pid


def test_nothing_is_left_when_the_platform_itself_is_killed(own_platform):
    everybody = everyone(own_platform)
    own_platform.process.kill()
    wait_until(lambda: all(is_gone(process) for process in everybody), ENDS_WITHIN)


def test_ctrl_c_twice_does_not_wait(own_platform):
    hung = children_of(own_platform)["worker"]
    hung.suspend()
    started_at = time.monotonic()
    own_platform.process.send_signal(signal.SIGINT)
    own_platform.wait_for("Stopping")
    own_platform.process.send_signal(signal.SIGINT)
    assert own_platform.process.wait(8) == 0
    assert is_gone(hung)
    assert time.monotonic() - started_at < 8


def test_port_that_is_taken_is_one_sentence(started, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        second = started(["manage.py", "up", "--port", port], tmp_path / "up.txt", **environment(tmp_path / "ws"))
        assert second.process.wait(30) == 69
    assert second.said == (
        f"CommandError: Cannot listen on 127.0.0.1, port {port}: Address already in use. "
        "Choose another with --port or --host.\n"
    )


def test_worker_waits_for_migrations_and_works_beside_a_web_only_platform(started, tmp_path):
    worker = started(["manage.py", "worker"], tmp_path / "worker.txt", **environment(tmp_path / "ws"))
    worker.wait_for("Waiting until `manage.py up` on the web host")
    web = started(
        ["manage.py", "up", "--web-only", "--port", "0"], tmp_path / "web.txt", **environment(tmp_path / "ws")
    )
    web.wait_for("LoRA Pilot runs at")
    worker.wait_for("This machine trains as here")
    wait_until(lambda: sizes(worker) == CLUSTER_SIZE)
    assert list(children_of(web)) == ["web"]
    assert (worker.stop(), web.stop()) == (0, 0)
