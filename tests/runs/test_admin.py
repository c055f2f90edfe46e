"""Runs and hosts in the admin: actions call the services; nothing that they own can be edited."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from lorapilot.models import AuditEntry, User
from runs.models import Attempt, Device, Host, Run, Slot
from tests.factories import make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)

RUNS, HOSTS, SLOTS, DEVICES = (f"/admin/runs/{model}/" for model in ("run", "host", "slot", "device"))


@pytest.fixture
def browser(client_of, staff):
    return client_of(staff)


@pytest.fixture
def training(workspace, alice, handed_out):
    make_slot()
    run = make_run(alice, output_name="training")
    run.refresh_from_db()
    assert run.status == "starting"
    return run


@pytest.fixture
def waiting(training, alice):
    """It waits for the slot on which the other trains."""
    return make_run(alice, output_name="waiting")


def act(browser, page, action, *rows):
    """What the page says after `action` was chosen for `rows`."""
    answer = browser.post(page, {"action": action, "_selected_action": [row.pk for row in rows]}, follow=True)
    assert answer.redirect_chain == [(page, 302)]
    for row in rows:
        row.refresh_from_db()
    return [str(message) for message in answer.context["messages"]]


def audit():
    return list(
        AuditEntry.objects.exclude(action="signed in")
        .order_by("pk")
        .values_list("actor__username", "action", "subject")
    )


# --- Runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("action", "done", "waits", "trains"),
    [
        ("pause_runs", "is asked to pause", ("queued", True, ""), ("stopping", False, "pause")),
        ("stop_runs", "is asked to stop", ("stopped", False, ""), ("stopping", False, "stop")),
        ("kill_runs", "ends now", ("stopped", False, ""), ("stopping", False, "stop")),
    ],
)
def test_runs_are_ended(browser, staff, waiting, training, action, done, waits, trains):
    said = act(browser, RUNS, action, waiting, training)
    assert sorted(said) == [f"training {done}.", f"waiting {done}."]
    found = [(run.status, run.held_at is not None, run.stop_intent) for run in (waiting, training)]
    assert found == [waits, trains]
    assert (training.kill_requested_at is not None, training.stop_requested_by) == (action == "kill_runs", staff)


def test_waiting_runs_are_held_and_released(browser, waiting, training):
    assert act(browser, RUNS, "hold_runs", waiting) == ["waiting is held."]
    assert (waiting.status, waiting.held_at is None) == ("queued", False)
    assert act(browser, RUNS, "release_runs", waiting) == ["waiting is released."]
    assert (waiting.status, waiting.held_at) == ("queued", None)
    assert act(browser, RUNS, "hold_runs", training) == ["training is not waiting in the queue."]
    assert training.held_at is None


@pytest.mark.parametrize(("name", "priority"), [("high", 1), ("normal", 0), ("low", -1)])
def test_waiting_runs_are_given_a_priority(browser, waiting, training, name, priority):
    said = act(browser, RUNS, f"give_{name}_priority", waiting, training)
    assert sorted(said) == ["training is not waiting in the queue.", f"waiting has {name} priority."]
    assert (waiting.priority, training.priority) == (priority, 0)
    assert waiting.events.last().message == f"Priority: {name}."


def test_ended_runs_are_queued_again_with_less_memory(browser, waiting):
    Run.objects.filter(pk=waiting.pk).update(status="failed", finished_at=timezone.now())
    said = act(browser, RUNS, "requeue_runs_with_less_memory", waiting)
    assert said == ["waiting is in the queue again, with less memory."]
    assert (waiting.status, waiting.attempt, waiting.adaptations) == ("queued", 2, {"gradient_checkpointing": True})
    assert act(browser, RUNS, "requeue_runs", waiting) == ["waiting cannot be resumed: it is queued."]


def test_those_who_only_look_have_no_actions(client_of, waiting):
    viewer = User.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_run"))
    page = client_of(viewer).get(RUNS)
    assert (page.status_code, b"kill_runs" in page.content) == (200, False)
    client_of(viewer).post(RUNS, {"action": "kill_runs", "_selected_action": [waiting.pk]})
    waiting.refresh_from_db()
    assert waiting.status == "queued"


def test_attempts_show_how_they_ended(browser, training):
    Attempt.objects.update(ending="out_of_memory", start_step=1234, adaptations={"batch_size": 1})
    page = browser.get("/admin/runs/attempt/").content.decode()
    assert [text in page for text in ("Out of memory", "1234", "batch_size")] == [True, True, True]
    assert browser.get("/admin/runs/attempt/?ending=stopped").content.decode().count("1234") == 0


# --- Hosts ------------------------------------------------------------------------------------------------------------
def test_host_is_shown_and_nothing_of_it_is_edited(browser, training):
    host = Host.objects.get()
    Slot.objects.create(host=host, name="gpu9", is_enabled=False)
    listed = browser.get(HOSTS).content.decode()
    assert [text in listed for text in ("online", "cpu, gpu9 (disabled)")] == [True, True]
    page = browser.get(f"{HOSTS}{host.pk}/change/").content.decode()
    assert [text in page for text in ("online", "gpu9", "Devices", 'name="_save"', 'name="is_enabled"')] == [
        True,
        True,
        True,
        False,
        False,
    ]
    for path in (f"{HOSTS}add/", f"{HOSTS}{host.pk}/change/"):
        assert browser.post(path, {"name": "other", "draining_at_0": "2030-01-01"}).status_code == 403
    assert Host.objects.values_list("name", "draining_at").get() == ("testhost", None)


def test_list_of_hosts_takes_as_many_queries_for_three_as_for_one(browser, training, django_assert_num_queries):
    browser.get(HOSTS)
    with CaptureQueriesContext(connection) as asked:
        browser.get(HOSTS)
    for name in ("b", "c"):
        make_slot(name)
    with django_assert_num_queries(len(asked)):
        browser.get(HOSTS)


def test_hosts_are_drained_and_come_back(browser, training):
    host = Host.objects.get()
    assert act(browser, HOSTS, "drain", host) == ["testhost: host drained."]
    training.refresh_from_db()
    assert (host.condition, training.status) == ("draining", "starting")
    assert act(browser, HOSTS, "end_maintenance", host) == ["testhost: host undrained."]
    assert host.condition == "online"
    assert act(browser, HOSTS, "drain_and_move_runs", host) == ["testhost: host drained, runs moved."]
    training.refresh_from_db()
    assert (host.condition, training.status, training.stop_intent) == ("draining", "stopping", "move")
    actions = ["host drained", "host undrained", "host drained, runs moved"]
    assert audit() == [("staff", action, "testhost") for action in actions]


def test_only_lost_hosts_are_declared_dead(browser, training):
    lost, online = Host.objects.get(), make_slot("online").host
    Host.objects.filter(pk=lost.pk).update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    said = act(browser, HOSTS, "declare_dead", lost, online)
    refused = "online is heard of. Drain it instead, or stop its worker and wait half a minute."
    assert sorted(said) == [refused, "testhost: host declared dead."]
    training.refresh_from_db()
    assert (lost.condition, online.condition) == ("dead", "online")
    assert (training.status, training.slot.host, training.attempt) == ("starting", online, 2)
    assert audit() == [("staff", "host declared dead", "testhost")]


@pytest.mark.parametrize(
    ("page", "action", "codename"), [(HOSTS, "drain", "view_host"), (SLOTS, "disable", "view_slot")]
)
def test_hosts_and_slots_are_left_alone_by_those_who_only_look(client_of, training, page, action, codename):
    viewer = User.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename=codename))
    rows = Host.objects.all() if page == HOSTS else Slot.objects.all()
    client_of(viewer).post(page, {"action": action, "_selected_action": [row.pk for row in rows]})
    assert (Host.objects.get().condition, Slot.objects.get().is_enabled) == ("online", True)


# --- Slots and devices ------------------------------------------------------------------------------------------------
def test_slots_are_disabled_and_enabled_by_the_service(browser, training, waiting):
    other = Slot.objects.create(host=Host.objects.get(), name="other", is_enabled=False)
    Device.objects.create(host=other.host, slot=other, kind="cpu", uuid="other", name="CPU")
    assert waiting.status == "queued"
    assert act(browser, SLOTS, "disable", training.slot) == ["testhost/cpu: slot disabled."]
    assert act(browser, SLOTS, "enable", other) == ["testhost/other: slot enabled."]
    waiting.refresh_from_db()
    training.refresh_from_db()
    assert (training.status, training.slot.is_enabled) == ("starting", False)
    assert (other.is_enabled, waiting.status, waiting.slot) == (True, "starting", other)
    assert audit() == [("staff", "slot disabled", "testhost/cpu"), ("staff", "slot enabled", "testhost/other")]


def test_slot_is_added_and_named(browser, training):
    host = Host.objects.get()
    form = {"host": host.pk, "name": "left"}
    assert browser.post(f"{SLOTS}add/", form).status_code == 302
    left = Slot.objects.get(name="left")
    assert (left.host, left.is_enabled) == (host, True)
    page = f"{SLOTS}{left.pk}/change/"
    other = make_slot("other").host
    assert browser.post(page, {"name": "both", "host": other.pk, "is_enabled": ""}).status_code == 302
    left.refresh_from_db()
    assert (left.name, left.host, left.is_enabled) == ("both", host, True)
    assert browser.post(page, {"name": "both"}).status_code == 302
    answer = browser.post(page, {"name": "cpu"})
    assert (answer.status_code, answer.context["errors"]) == (200, [["This host has a slot of that name already."]])
    answer = browser.post(f"{SLOTS}add/", {"host": host.pk, "name": "cpu"})
    assert (answer.status_code, len(answer.context["errors"])) == (200, 1)
    assert sorted(host.slots.values_list("name", flat=True)) == ["both", "cpu"]


def gpu(slot, index):
    return Device.objects.create(host=slot.host, slot=slot, kind="cuda", uuid=f"GPU-{index}", index=index, name="H100")


@pytest.fixture
def gpus(workspace, db):
    """Two slots of one GPU each on a host."""
    host = Host.objects.create(name="gpuhost", heartbeat_at=timezone.now())
    return [gpu(Slot.objects.create(host=host, name=f"gpu{index}"), index) for index in (0, 1)]


def move(browser, device, slot):
    """The errors of the form, or none when the device was moved."""
    answer = browser.post(f"{DEVICES}{device.pk}/change/", {"slot": slot.pk if slot else "", "name": "forged"})
    device.refresh_from_db()
    return [] if answer.status_code == 302 else [str(error) for errors in answer.context["errors"] for error in errors]


def test_devices_are_grouped_into_slots(browser, gpus):
    first, second = gpus
    assert move(browser, second, first.slot) == []
    assert (second.slot, second.name) == (first.slot, "H100")
    assert move(browser, second, None) == []
    assert second.slot is None


def test_device_of_a_slot_that_trains_stays(browser, alice, gpus, handed_out):
    first, second = gpus
    run = make_run(alice)
    run.refresh_from_db()
    assert (run.status, run.slot) == ("starting", first.slot)
    trains = f"{first.slot} trains now: disable it, and wait until its run has ended."
    busy, free = first.slot, second.slot
    assert [move(browser, first, None), move(browser, first, free), move(browser, second, busy)] == [[trains]] * 3
    assert (first.slot, second.slot) == (busy, free)
    assert move(browser, first, busy) == []  # saved as it is
    deleted = [browser.post(f"{DEVICES}{device.pk}/delete/", {"post": "yes"}).status_code for device in gpus]
    assert (deleted, list(Device.objects.all())) == ([403, 302], [first])


def test_slot_has_devices_of_one_host_and_one_kind(browser, gpus):
    first, _ = gpus
    elsewhere = make_slot("other")
    assert move(browser, first, elsewhere) == ["A slot has devices of one host. Choose a slot of gpuhost."]
    cpu = make_slot("gpuhost")
    assert move(browser, first, cpu) == ["A slot has devices of one kind, and gpuhost/cpu has others."]
    assert first.slot.name == "gpu0"
    assert browser.post(f"{DEVICES}{first.pk}/change/", {"slot": "0"}).status_code == 200
