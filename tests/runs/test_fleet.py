"""Hosts: their slots, maintenance, silence, and the end of a machine."""

from datetime import timedelta

import pytest
from django.utils import timezone

from lorapilot.errors import Conflict, UserError
from runs import fleet, hosts, services
from runs.dispatch import claim, dispatch
from runs.enums import DeviceKind, Ending, Status
from runs.models import Attempt, Device, Host, Run, Slot
from runs.reconcile import reconcile, restart_silent_slices
from runs.supervision import follow
from runs.transitions import change_status
from tests.factories import make_run, make_slot

LONG_AGO = timezone.now() - timedelta(minutes=5)


def gpus(*numbers):
    return [hosts.Found(DeviceKind.CUDA, f"GPU-{number}", number, "H100", 80 << 30) for number in numbers]


def register(monkeypatch, *numbers):
    monkeypatch.setattr(hosts, "find_gpus", lambda: gpus(*numbers))
    return hosts.register_host()


def layout(host):
    """{slot: device indices} of the enabled slots."""
    return {
        slot.name: sorted(slot.devices.values_list("index", flat=True)) for slot in host.slots.filter(is_enabled=True)
    }


# --- slots ------------------------------------------------------------------------------------------------------------


def test_machine_without_a_gpu_is_one_cpu_slot(db, monkeypatch):
    host = register(monkeypatch)
    assert (host.name, host.condition, layout(host)) == ("testhost", "online", {"cpu": [0]})
    device = Device.objects.get()
    assert (device.uuid, device.memory_bytes > 0) == ("cpu", True)


def test_each_gpu_is_a_slot_and_one_that_is_gone_is_disabled(db, monkeypatch):
    host = register(monkeypatch, 0, 1)
    assert layout(host) == {"gpu0": [0], "gpu1": [1]}
    assert layout(register(monkeypatch, 0, 1)) == {"gpu0": [0], "gpu1": [1]}
    assert layout(register(monkeypatch, 1)) == {"gpu1": [1]}
    assert Slot.objects.get(name="gpu0").is_enabled is False
    assert layout(register(monkeypatch, 0, 1)) == {"gpu0": [0], "gpu1": [1]}


def test_driver_that_appears_replaces_the_cpu_slot(db, monkeypatch):
    register(monkeypatch)
    assert layout(register(monkeypatch, 0)) == {"gpu0": [0]}


def test_configured_slots_join_gpus_and_leave_others_alone(db, monkeypatch, settings):
    settings.SLOT_LAYOUT = ["0", "2+3", "7"]
    host = register(monkeypatch, 0, 1, 2, 3)
    assert layout(host) == {"gpu0": [0], "gpu2+3": [2, 3]}
    settings.SLOT_LAYOUT = ["0+1", "2", "3"]
    assert layout(register(monkeypatch, 0, 1, 2, 3)) == {"gpu0+1": [0, 1], "gpu2": [2], "gpu3": [3]}


def test_slot_that_trains_keeps_its_gpus_until_it_is_free(workspace, alice, monkeypatch, settings, handed_out):
    register(monkeypatch, 0, 1)
    run = make_run(alice)
    assert claim(run, Slot.objects.get(name="gpu0"))
    settings.SLOT_LAYOUT = ["0+1"]
    assert layout(register(monkeypatch, 0, 1)) == {}
    assert Slot.objects.get(name="gpu0").devices.count() == 1
    change_status(run, old=Status.STARTING, new=Status.FAILED)
    assert layout(register(monkeypatch, 0, 1)) == {"gpu0+1": [0, 1]}


def test_slots_that_staff_arranged_stay(db, monkeypatch):
    host = register(monkeypatch, 0, 1)
    Device.objects.update(slot=Slot.objects.get(name="gpu0"))
    Slot.objects.filter(name="gpu1").update(is_enabled=False)
    assert layout(register(monkeypatch, 0, 1)) == {"gpu0": [0, 1]}
    assert layout(host) == {"gpu0": [0, 1]}


def test_second_machine_on_one_sqlite_file_is_refused(db, monkeypatch):
    Host.objects.create(name="other", boot_id="another machine", heartbeat_at=timezone.now())
    with pytest.raises(UserError, match="Several hosts need PostgreSQL"):
        register(monkeypatch)
    Host.objects.update(heartbeat_at=LONG_AGO)
    assert register(monkeypatch).name == "testhost"


# --- maintenance ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(workspace, alice, handed_out):
    """A run that trains on the first host, and a second host that is free."""
    slot = make_slot("first")
    run = make_run(alice)
    claim(run, slot)  # or dispatch has done it, where a test commits
    run.refresh_from_db()
    assert run.slot == slot
    change_status(run, old=Status.STARTING, new=Status.RUNNING)
    make_slot("second")
    handed_out.clear()
    return run


def first():
    return Host.objects.get(name="first")


def test_draining_host_takes_no_more_runs(run, alice, staff):
    fleet.drain_host(first(), actor=staff)
    fleet.drain_host(Host.objects.get(name="second"), actor=staff)
    waiting = make_run(alice, output_name="waiting")
    assert (first().condition, dispatch()) == ("draining", 0)
    run.refresh_from_db()
    assert run.status == "running"
    fleet.undrain_host(Host.objects.get(name="second"))
    waiting.refresh_from_db()
    assert (waiting.status, str(waiting.slot)) == ("starting", "second/cpu")


def test_drain_can_move_runs_away(run, staff):
    fleet.drain_host(first(), actor=staff, move_runs=True)
    run.refresh_from_db()
    assert (run.status, run.stop_intent, run.stop_requested_by) == ("stopping", "move", staff)
    assert run.events.last().message == "first is taken out for maintenance: it saves, and goes on elsewhere."


def test_disabled_slot_takes_no_run(run, alice):
    slot = fleet.set_slot_enabled(Slot.objects.get(host__name="second"), is_enabled=False)
    make_run(alice, output_name="waiting")
    assert dispatch() == 0
    fleet.set_slot_enabled(slot, is_enabled=True)
    assert Run.objects.get(output_name="waiting").status == "starting"


# --- silence ----------------------------------------------------------------------------------------------------------


def silence(host_name="first"):
    Host.objects.filter(name=host_name).update(heartbeat_at=LONG_AGO)


def test_silent_host_is_marked_once_and_its_run_says_so(run, handed_out):
    silence()
    before = Run.objects.get(pk=run.pk).revision
    assert [fleet.mark_silent_hosts(), fleet.mark_silent_hosts()] == [1, 0]
    run.refresh_from_db()
    assert (first().condition, run.status, run.revision) == ("lost", "running", before + 1)
    assert run.events.last().message.startswith("Nothing is heard of first. The run may still be training there")
    Attempt.objects.update(enqueued_at=None)
    assert (restart_silent_slices(), handed_out) == (0, [])  # its queue would only grow


def test_host_that_is_back_follows_its_runs_again(run, handed_out, settings, monkeypatch):
    monkeypatch.setattr(hosts, "find_gpus", list)
    silence()
    fleet.mark_silent_hosts()
    Attempt.objects.update(enqueued_at=None)
    settings.HOST_NAME = "first"
    reconcile()
    assert first().condition == "online"
    assert run.events.last().message == "first is heard of again."
    assert [attempt.run for attempt in handed_out] == [run]


def test_whoever_was_away_itself_marks_nobody(run):
    silence()
    reconcile(is_host=False, watched_seconds=5)
    assert first().condition == "online"
    reconcile(is_host=False, watched_seconds=60)
    assert first().condition == "lost"


def test_clock_that_was_set_back_makes_no_lease_eternal(run, handed_out):
    ahead = timezone.now() + timedelta(hours=1)
    Attempt.objects.update(lease_at=ahead, enqueued_at=ahead)
    assert restart_silent_slices() == 1
    assert follow._take_lease(run.attempts.get().pk) is not None


# --- dead -------------------------------------------------------------------------------------------------------------


def test_host_that_is_heard_of_cannot_be_declared_dead(run, staff):
    with pytest.raises(Conflict, match="Drain it instead"):
        fleet.declare_dead(first(), actor=staff)
    run.refresh_from_db()
    assert (run.status, first().condition) == ("running", "online")


@pytest.mark.django_db(transaction=True)
def test_runs_of_a_dead_host_go_on_elsewhere_and_its_results_are_refused(run, staff, handed_out):
    silence()
    old = Run.objects.get(pk=run.pk)
    assert fleet.declare_dead(first(), actor=staff) == [run]
    run.refresh_from_db()
    assert (run.status, run.attempt, str(run.slot)) == ("starting", 2, "second/cpu")
    assert run.attempts.get(number=1).ending == Ending.MOVED
    assert run.events.filter(message="first was declared dead. It starts again from step 0.", actor=staff).exists()
    assert change_status(old, old=Status.RUNNING, new=Status.SUCCEEDED) is False
    assert follow._take_lease(run.attempts.get(number=1).pk) is None
    assert dispatch() == 0


@pytest.mark.parametrize(("intent", "status", "is_held"), [("stop", "stopped", False), ("pause", "queued", True)])
def test_what_was_asked_of_a_run_on_a_dead_host_is_done(run, alice, staff, intent, status, is_held):
    {"stop": services.stop_run, "pause": services.pause_run}[intent](run, actor=alice)
    silence()
    Host.objects.filter(name="second").update(draining_at=timezone.now())
    fleet.declare_dead(first(), actor=staff)
    run.refresh_from_db()
    assert (run.status, run.held_at is not None) == (status, is_held)


def test_dead_host_that_comes_back_takes_runs_again(run, alice, staff, settings, monkeypatch):
    monkeypatch.setattr(hosts, "find_gpus", list)
    silence()
    fleet.declare_dead(first(), actor=staff)
    Host.objects.filter(name="first").update(heartbeat_at=timezone.now())
    Host.objects.filter(name="second").update(draining_at=timezone.now())
    assert dispatch() == 0  # not before it has ended what it should not train
    settings.HOST_NAME = "first"
    reconcile()
    assert first().condition == "online"
