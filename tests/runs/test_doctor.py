"""`manage.py doctor`: the same parts at a terminal, with the commands that mend them."""

import fcntl
import json
import time

import pytest
from django.core.management import call_command
from django.db import OperationalError

from lorapilot import database
from lorapilot.management.commands import doctor
from runs.models import Host
from runs.stacks.installation import TRAINERS, Installation, Problem
from tests.factories import make_slot


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """How this machine's trainers were looked at; no Python of theirs is started."""
    asked = []
    found = {key: Installation(problems=[Problem("Not there.", "first\nsecond")]) for key in TRAINERS}
    found["builtin"] = Installation(home="/srv", version="1", problems=[], looked_at=time.time())

    def look_at_all(**how):
        asked.append(how)
        return found

    monkeypatch.setattr(doctor, "look_at_all", look_at_all)
    return asked


@pytest.fixture
def well(workspace, db):
    """An installation that runs: its lock is held, its host is heard of."""
    make_slot()
    Host.objects.update(processes={"at": time.time(), "running": {"testhost": 1.0, "io": 1.0}})
    (workspace / "locks").mkdir()
    with (workspace / "locks" / "web.lock").open("w+") as lock:
        lock.write("4711 on web-1\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def consult(capsys, *options):
    """What it says, and its exit code."""
    code = 0
    try:
        call_command("doctor", *options)
    except SystemExit as exit_:
        code = exit_.code
    return capsys.readouterr().out, code


def test_all_is_well(well, capsys, asked):
    said, code = consult(capsys)
    assert (code, "Nothing is down." in said, asked) == (0, True, [{"has_gpu": False, "is_fresh": True}])
    lines = said.splitlines()
    assert "  ok       Web               Served by process 4711 on web-1." in lines
    assert "  ok       testhost/cpu      Free." in lines
    assert lines[lines.index("  off      Kohya sd-scripts  Not installed.") :][:4] == [
        "  off      Kohya sd-scripts  Not installed.",
        "           Not there.",
        "             $ first",
        "             $ second",
    ]


def test_exit_code_tells_that_something_is_down(well, capsys):
    Host.objects.update(heartbeat_at=None)
    said, code = consult(capsys)
    assert (code, said.splitlines()[-1]) == (1, "Down: Background work, testhost.")


def test_json_is_the_list_of_parts(well, capsys):
    said, code = consult(capsys, "--json")
    found = {part["name"]: part for part in json.loads(said)}
    assert (code, found["kohya"]["state"], found["kohya"]["problems"]) == (
        0,
        "off",
        [{"what": "Not there.", "mend": "first\nsecond", "is_warning": True}],
    )
    assert found["builtin"]["details"][1] == {"label": "Folder", "value": "/srv"}


def test_nothing_runs_before_the_first_start(workspace, capsys, monkeypatch):
    monkeypatch.setattr(database, "is_missing", lambda: True)
    said, code = consult(capsys)
    assert (code, said.splitlines()[-1]) == (1, "Down: Web, Database.")
    assert "             $ python manage.py up" in said.splitlines()


def test_database_that_is_away_is_told(workspace, capsys, monkeypatch):
    def away():
        raise OperationalError("connection refused")

    monkeypatch.setattr(database, "describe", away)
    said, code = consult(capsys)
    assert (code, "It said: connection refused" in said) == (1, True)
    assert "Built-in trainer" in said


def test_lock_is_only_looked_at(well, workspace):
    lock = workspace / "locks" / "web.lock"
    assert doctor._is_held(lock)
    free = workspace / "locks" / "free.lock"
    free.touch()
    assert [doctor._is_held(free), doctor._is_held(workspace / "none.lock")] == [False, False]
    with free.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing of ours is left on it
