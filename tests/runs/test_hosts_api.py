"""Hosts over HTTP: everybody reads, staff act; wrong method, bad input, and the database afterwards."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework.test import APIClient

from lorapilot.models import AuditEntry
from runs import disk
from runs.models import Attempt, Device, Host, Run, Slot
from tests.factories import make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)

URL = "/api/v1/hosts/"
NAME = "gpu-1.example.org"
STAFF_ONLY = "Only staff can change hosts and their slots. Ask whoever runs this installation."
READ_ONLY = "This token can only read. Create one with scope `write` on the account page."
NOTHING = "There is no such thing, or it is not shared with you."
ACTIONS = ["drain/", "undrain/", "declare-dead/", "slots/gpu0+1/enable/", "slots/gpu0+1/disable/"]


def at(part="", name=NAME):
    return f"{URL}{name}/{part}"


def everything():
    tables = (Host, Slot, Device, Run, Attempt, AuditEntry)
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables}


def audit():
    return list(AuditEntry.objects.order_by("pk").values_list("actor__username", "action", "subject"))


@pytest.fixture
def slot(workspace, db, handed_out):
    """A slot of two devices on a machine whose name has dots."""
    slot = make_slot(NAME, name="gpu0+1")
    Device.objects.create(host=slot.host, slot=slot, kind="cpu", uuid="second", index=1, name="CPU", memory_bytes=7)
    return slot


@pytest.fixture
def host(slot):
    return slot.host


@pytest.fixture
def run(slot, alice, handed_out):
    """It trains on the host."""
    run = make_run(alice, values={"gpus": 2})
    run.refresh_from_db()
    assert (run.status, run.slot) == ("starting", slot)
    return run


def silence(host):
    Host.objects.filter(pk=host.pk).update(heartbeat_at=timezone.now() - timedelta(minutes=1))


# --- Reading ----------------------------------------------------------------------------------------------------------
def test_host_is_shown_with_slots_devices_and_disk(slot, run, alice, api_of, settings, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda: 123)
    shown = api_of(alice, "read").get(at()).json()
    heartbeat = shown.pop("heartbeat_at")
    assert heartbeat == slot.host.heartbeat_at.isoformat().replace("+00:00", "Z")
    device = {"kind": "cpu", "index": 0, "name": "CPU", "memory_bytes": 0}
    assert shown == {
        "name": NAME,
        "condition": "online",
        "draining_at": None,
        "lost_at": None,
        "dead_at": None,
        "slots": [
            {
                "id": slot.pk,
                "name": "gpu0+1",
                "is_enabled": True,
                "is_busy": True,
                "run": run.pk,
                "devices": [
                    device | {"uuid": "gpu0+1"},
                    device | {"uuid": "second", "index": 1, "memory_bytes": 7},
                ],
            }
        ],
        "disk": {"free_bytes": 123, "floor_bytes": settings.DISK_FLOOR_BYTES},
    }
    listed = api_of(alice, "read").get(URL).json()
    assert listed == {
        "count": 1,
        "next": None,
        "previous": None,
        "results": [shown | {"heartbeat_at": heartbeat}],
    }


def test_run_on_a_slot_is_named_to_those_who_see_it(run, alice, bob, charlie, staff, team, api_of):
    def seen(*people):
        slots = [api_of(user).get(at()).json()["slots"][0] for user in people]
        return [(slot["is_busy"], slot["run"]) for slot in slots]

    assert seen(alice, bob, charlie, staff) == [(True, run.pk), (True, None), (True, None), (True, run.pk)]
    run.groups.add(team)
    assert seen(bob, charlie) == [(True, run.pk), (True, None)]
    Run.objects.update(status="stopped", slot=None, finished_at=timezone.now())
    assert seen(alice, bob) == [(False, None), (False, None)]


@pytest.mark.parametrize(
    ("marks", "condition"),
    [
        ({}, "online"),
        ({"draining_at": timezone.now()}, "draining"),
        ({"draining_at": timezone.now(), "lost_at": timezone.now()}, "lost"),
        ({"heartbeat_at": None}, "lost"),
        ({"lost_at": timezone.now(), "dead_at": timezone.now()}, "dead"),
    ],
)
def test_condition_in_one_word(host, charlie, api_of, marks, condition):
    Host.objects.update(**marks)
    assert api_of(charlie).get(at()).json()["condition"] == condition


def test_reading_wants_a_token_and_a_host(host, alice, api_of):
    assert [APIClient().get(path).status_code for path in (URL, at())] == [401, 401]
    for name in ("gpu-1", f"{NAME}.", "x" * 300):
        answer = api_of(alice).get(at(name=name))
        assert (answer.status_code, answer.json()) == (404, {"detail": NOTHING})
    assert api_of(alice).get(at(name="a%00b")).status_code == 404  # PostgreSQL takes no such text


def test_reading_refuses_other_methods(host, staff, api_of):
    before, api = everything(), api_of(staff)
    for path in (URL, at()):
        answers = [getattr(api, method)(path).status_code for method in ("post", "put", "patch", "delete")]
        assert answers == [405] * 4
    assert everything() == before


def queries(api, address):
    api.get(address)
    with CaptureQueriesContext(connection) as asked:
        count = api.get(address).json()["count"]
    return count, len(asked)


def test_list_takes_as_many_queries_for_three_as_for_one(run, alice, api_of):
    api = api_of(alice)
    one, asked = queries(api, URL)
    for name in ("b", "c"):
        for slot in ("gpu0", "gpu1"):
            make_slot(name, name=slot)
        make_run(alice, output_name=name)
    assert Run.objects.filter(status="starting").count() == 3
    assert (one, queries(api, URL)) == (1, (3, asked))


# --- Who may act ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ACTIONS)
def test_actions_are_for_staff_with_write_tokens(run, alice, bob, charlie, staff, api_of, part):
    before = everything()
    for user in (alice, bob, charlie):
        answer = api_of(user).post(at(part))
        assert (answer.status_code, answer.json()) == (403, {"detail": STAFF_ONLY})
    answer = api_of(staff, "read").post(at(part))
    assert (answer.status_code, answer.json()) == (403, {"detail": READ_ONLY})
    assert APIClient().post(at(part)).status_code == 401
    assert everything() == before


@pytest.mark.parametrize("part", ACTIONS)
def test_actions_refuse_other_methods_and_hosts_that_are_not_there(run, staff, api_of, part):
    before, api = everything(), api_of(staff)
    assert [getattr(api, method)(at(part)).status_code for method in ("get", "put", "patch", "delete")] == [405] * 4
    answer = api.post(at(part, name="gpu-1"))
    assert (answer.status_code, answer.json()) == (404, {"detail": NOTHING})
    assert everything() == before


# --- Maintenance ------------------------------------------------------------------------------------------------------
def test_drain_lets_runs_end_there(host, run, staff, api_of):
    answer = api_of(staff).post(at("drain/"))
    assert (answer.status_code, answer.json()["condition"]) == (200, "draining")
    began = answer.json()["draining_at"]
    run.refresh_from_db()
    assert run.status == "starting"
    assert api_of(staff).post(at("drain/")).json()["draining_at"] == began
    assert audit() == [("staff", "host drained", NAME)] * 2


def test_drain_with_move_lets_runs_save_and_go_on_elsewhere(host, run, alice, staff, api_of):
    answer = api_of(staff).post(at("drain/"), {"move_runs": True})
    assert (answer.status_code, answer.json()["condition"], answer.json()["slots"][0]["run"]) == (
        200,
        "draining",
        run.pk,
    )
    run.refresh_from_db()
    assert (run.status, run.stop_intent, run.stop_requested_by) == ("stopping", "move", staff)
    assert audit() == [("staff", "host drained, runs moved", NAME)]
    assert api_of(alice).get(f"/api/v1/runs/{run.pk}/").json()["host_condition"] == "draining"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"move_runs": "some"}, "move_runs: Must be a valid boolean."),
        ({"move_runs": None}, "move_runs: This field may not be null."),
        (["move_runs"], "Invalid data. Expected a dictionary, but got list."),
    ],
)
def test_drain_refuses_bad_input_and_changes_nothing(run, staff, api_of, asked, sentence):
    before = everything()
    answer = api_of(staff).post(at("drain/"), asked)
    assert (answer.status_code, answer.json()["detail"]) == (400, sentence)
    assert everything() == before


def test_undrain_lets_waiting_runs_start(host, slot, alice, staff, api_of):
    api = api_of(staff)
    api.post(at("drain/"))
    waiting = make_run(alice, values={"gpus": 2})
    assert waiting.status == "queued"
    answer = api.post(at("undrain/")).json()
    assert (answer["condition"], answer["draining_at"], answer["slots"][0]["run"]) == ("online", None, waiting.pk)
    waiting.refresh_from_db()
    assert (waiting.status, waiting.slot) == ("starting", slot)
    assert audit()[1:] == [("staff", "host undrained", NAME)]


def test_declare_dead_is_refused_for_a_host_that_is_heard_of(run, staff, api_of):
    before = everything()
    answer = api_of(staff).post(at("declare-dead/"))
    sentence = f"{NAME} is heard of. Drain it instead, or stop its worker and wait half a minute."
    assert (answer.status_code, answer.json()) == (409, {"detail": sentence})
    assert everything() == before


def test_declare_dead_lets_runs_go_on_elsewhere(host, run, alice, staff, api_of):
    silence(host)
    other = make_slot("other")
    Device.objects.create(host=other.host, slot=other, kind="cpu", uuid="second", index=1, name="CPU")
    answer = api_of(staff).post(at("declare-dead/"))
    assert (answer.status_code, answer.json()["condition"], answer.json()["slots"][0]["is_busy"]) == (
        200,
        "dead",
        False,
    )
    run.refresh_from_db()
    assert (run.status, run.slot, run.attempt) == ("starting", other, 2)
    endings = [(row["number"], row["ending"]) for row in api_of(alice).get(f"/api/v1/runs/{run.pk}/attempts/").json()]
    assert endings == [(1, "moved"), (2, "")]
    assert audit() == [("staff", "host declared dead", NAME)]


# --- Slots ------------------------------------------------------------------------------------------------------------
def test_slot_is_disabled_and_finishes_its_run(slot, run, staff, api_of):
    answer = api_of(staff).post(at("slots/gpu0+1/disable/"))
    shown = answer.json()["slots"][0]
    assert (answer.status_code, shown["is_enabled"], shown["run"]) == (200, False, run.pk)
    slot.refresh_from_db()
    run.refresh_from_db()
    assert (slot.is_enabled, run.status) == (False, "starting")
    assert audit() == [("staff", "slot disabled", f"{NAME}/gpu0+1")]


def test_slot_is_enabled_and_takes_a_run(slot, alice, staff, api_of):
    Slot.objects.update(is_enabled=False)
    waiting = make_run(alice)
    Run.objects.update(spec=waiting.spec | {"gpus": 2})
    shown = api_of(staff).post(at("slots/gpu0+1/enable/")).json()["slots"][0]
    assert (shown["is_enabled"], shown["is_busy"]) == (True, True)
    waiting.refresh_from_db()
    assert (waiting.status, waiting.slot) == ("starting", slot)
    assert audit() == [("staff", "slot enabled", f"{NAME}/gpu0+1")]


@pytest.mark.parametrize("part", ["slots/gpu7/enable/", "slots/gpu7/disable/"])
def test_slot_of_another_host_is_not_found(slot, staff, api_of, part):
    make_slot("other", name="gpu7")
    before = everything()
    answer = api_of(staff).post(at(part))
    assert (answer.status_code, answer.json()) == (404, {"detail": NOTHING})
    assert everything() == before
