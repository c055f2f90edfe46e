"""Signals at a process that has installed the trainer's handler."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_trainer.stop import ECHO_SECONDS
from tests.trainer.conftest import REPOSITORY

LOOP = """
import sys, time
from lora_trainer.stop import StopSignal
stop = StopSignal()
stop.install()
print("ready", flush=True)
seconds = float(sys.argv[1])
while seconds > 0:
    time.sleep(0.01)
    seconds -= 0.01 * stop.requested
print("saved", flush=True)
"""


@pytest.fixture
def saving():
    """saving(3): a process that saves for 3 seconds, once it is asked to stop."""
    started = []

    def start(seconds):
        command = [sys.executable, "-c", LOOP, str(seconds)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_signals_of_the_same_moment_are_one_request(saving):
    process = saving(0.2)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.02)
    assert process.wait(20) == 0
    assert process.stdout.read().splitlines()[-1] == "saved"


def test_second_signal_later_ends_the_process_at_once(saving):
    process = saving(60)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(ECHO_SECONDS + 0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    assert "saved" not in process.stdout.read()


def test_full_disk_does_not_swallow_the_request():
    with Path("/dev/full").open("w") as full:
        code = LOOP.replace('print("ready", flush=True)', "").replace('print("saved", flush=True)', "sys.exit(7)")
        process = subprocess.Popen([sys.executable, "-c", code, "0.05"], cwd=REPOSITORY, stdout=full)
        while not is_handled(process.pid, signal.SIGINT) or not is_handled(process.pid, signal.SIGTERM):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7


def is_handled(pid, number):
    """Whether the process has a handler of its own for the signal."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)
