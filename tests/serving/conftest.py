"""Real servers and platforms, each on a port and in a workspace of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition, seconds=20.0):
    """The first true value of `condition()`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)
    return value


class Running:
    """A process of ours with its output in a file."""

    def __init__(self, argv, output, environment):
        self.output = output
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *argv], cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file
            )

    @property
    def pid(self):
        return self.process.pid

    @property
    def said(self):
        return self.output.read_text()

    def wait_for(self, pattern, seconds=30.0):
        """The first match of a regular expression in what it says."""

        def find():
            assert self.process.poll() is None, self.said
            return re.search(pattern, self.said)

        return wait_until(find, seconds)

    def stop(self, number=signal.SIGTERM, seconds=20):
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def memory(self):
        return psutil.Process(self.pid).memory_info().rss


def starter():
    """start(argv, output, **environment) for a fixture; what was started does not outlive it."""
    running = []

    def start(argv, output, **environment):
        running.append(Running(argv, output, environment))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()


started = pytest.fixture(starter, name="started")
started_once = pytest.fixture(starter, name="started_once", scope="module")
