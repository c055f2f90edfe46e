"""Fifty processes claim one slot at once, on SQLite and on PostgreSQL: one wins, forty-nine are told so."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.services import postgres_url

ROOT = Path(__file__).resolve().parents[2]
RACE = """
import os, django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from django.db import connection
from lorapilot.models import User
from tests.factories import make_run, make_slot
from runs import dispatch
from runs.models import Attempt, Run, RunEvent, Slot
dispatch.hand_out = lambda attempt: None
owner = User.objects.create_user("alice")
runs = [make_run(owner, output_name=f"run-{number}") for number in range(50)]
slot = make_slot()
connection.close()  # each process opens its own
gate, opener = os.pipe()
racers = []
for run in runs:
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        os.read(gate, 1)  # until the parent lets all go at once
        os._exit(10 if dispatch.claim(run, slot) else 20)
    racers.append(pid)
os.close(opener)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers]
print(codes.count(10), codes.count(20))
print(Run.objects.filter(status="starting").count(), Run.objects.filter(status="queued").count())
print(Attempt.objects.count(), RunEvent.objects.filter(new_status="starting").count())
"""


def race(folder, **more):
    environment = {"LORAPILOT_WORKSPACE": str(folder), "DJANGO_SETTINGS_MODULE": "lorapilot.settings"} | more
    done = subprocess.run(
        [sys.executable, "-c", RACE],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "1 49\n1 49\n1 1\n"), done.stderr


def test_one_of_fifty_processes_gets_the_slot_on_sqlite(tmp_path):
    race(tmp_path)


@pytest.mark.postgres
def test_one_of_fifty_processes_gets_the_slot_on_postgresql(tmp_path):
    with postgres_url(f"lorapilot_race_{uuid.uuid4().hex[:8]}") as url:
        race(tmp_path, DATABASE_URL=url)
