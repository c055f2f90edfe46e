"""The order of the queue, what runs wait for, and when they will probably start."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.utils import timezone

from lorapilot.errors import Conflict, UserError
from runs import disk, services, waiting
from runs.enums import DeviceKind, Priority
from runs.models import Device, Host, Run, Slot
from tests.factories import make_run, make_slot

NOW = timezone.now()


def waits(owner, place, priority=0):
    return SimpleNamespace(owner_id=owner, place=place, priority=priority, pk=place)


def order(runs, training=None):
    return [run.pk for run in waiting.in_order(runs, training or {})]


@pytest.mark.parametrize(
    ("runs", "training", "expected"),
    [
        ([], {}, []),
        ([waits(1, 2), waits(1, 1)], {}, [1, 2]),  # age
        ([waits(1, 1), waits(1, 2), waits(1, 3), waits(2, 4), waits(2, 5)], {}, [1, 4, 2, 5, 3]),  # turns
        ([waits(1, 1), waits(1, 2), waits(2, 3)], {1: 1}, [3, 1, 2]),  # who trains has had a turn
        ([waits(1, 1), waits(2, 2), waits(2, 3)], {1: 1, 2: 1}, [1, 2, 3]),
        ([waits(1, 1), waits(2, 2, priority=1), waits(1, 3, priority=-1)], {2: 5}, [2, 1, 3]),  # priority before turns
    ],
)
def test_order_is_priority_then_turns_then_age(runs, training, expected):
    assert order(runs, training) == expected


def test_fifty_runs_of_one_person_do_not_go_before_the_first_of_another():
    runs = [waits(1, place) for place in range(50)] + [waits(2, 100), waits(3, 101)]
    assert order(runs, {1: 1})[:4] == [100, 101, 0, 1]


@pytest.fixture
def queue(workspace, alice, bob, handed_out):
    """Nothing takes runs: they all wait. Alice's first, second, third, then Bob's."""
    Run.objects.all().delete()
    runs = [make_run(alice, output_name=name) for name in ("a1", "a2", "a3")]
    return [*runs, make_run(bob, output_name="b1")]


def names():
    return [run.output_name for run in waiting.queue_in_order()]


def test_own_runs_are_reordered_and_others_keep_their_place(queue, alice):
    a1, _, a3, _ = queue
    assert names() == ["a1", "b1", "a2", "a3"]
    services.reorder_run(a3, actor=alice, to="first")
    assert names() == ["a3", "b1", "a1", "a2"]
    services.reorder_run(a3, actor=alice, to="down")
    assert names() == ["a1", "b1", "a3", "a2"]
    services.reorder_run(a1, actor=alice, to="last")
    assert names() == ["a3", "b1", "a2", "a1"]
    services.reorder_run(a1, actor=alice, to="up")
    services.reorder_run(a3, actor=alice, to="up")  # it is the first already
    assert names() == ["a3", "b1", "a1", "a2"]
    assert a1.events.last().message == "Moved in the queue: up."


def test_reorder_refuses_nonsense_and_runs_that_do_not_wait(queue, alice):
    with pytest.raises(UserError, match="up, down, first or last"):
        services.reorder_run(queue[0], actor=alice, to="sideways")
    services.stop_run(queue[0], actor=alice)
    with pytest.raises(Conflict, match="not waiting in the queue"):
        services.reorder_run(queue[0], actor=alice, to="up")


def test_high_priority_is_for_staff_and_goes_first(queue, alice, bob, staff):
    with pytest.raises(UserError, match="ask staff"):
        services.set_priority(queue[3], actor=bob, priority=Priority.HIGH)
    services.set_priority(queue[3], actor=staff, priority=Priority.HIGH)
    services.set_priority(queue[0], actor=alice, priority=Priority.LOW)
    assert names() == ["b1", "a2", "a3", "a1"]
    with pytest.raises(UserError, match="Priority is"):
        services.set_priority(queue[0], actor=alice, priority=7)


def test_held_runs_are_passed_by_and_keep_their_place(queue, alice):
    services.hold_run(queue[0], actor=alice)
    assert names() == ["a2", "b1", "a3"]
    services.release_run(queue[0], actor=alice)
    assert names() == ["a1", "b1", "a2", "a3"]


# --- what runs wait for -----------------------------------------------------------------------------------------------


def gpu_slot(name, gpus=1, host_name="gpuhost"):
    host, _ = Host.objects.get_or_create(name=host_name, defaults={"heartbeat_at": timezone.now()})
    slot = Slot.objects.create(host=host, name=name)
    for index in range(gpus):
        Device.objects.create(host=host, slot=slot, kind="cuda", uuid=f"GPU-{name}-{index}", index=index, name="H100")
    return slot


@pytest.mark.parametrize(
    ("device", "gpus", "slots", "suits"),
    [
        ("cpu", 1, [("cpu", 1)], [True]),
        ("cpu", 1, [("cuda", 1)], [True]),  # a driver was installed meanwhile
        ("cuda", 1, [("cpu", 1), ("cuda", 1)], [False, True]),
        ("cuda", 2, [("cuda", 1), ("cuda", 2)], [False, True]),
        ("cuda", 1, [("cuda", 2)], [False]),
    ],
)
def test_run_starts_on_a_slot_that_suits_it(device, gpus, slots, suits):
    run = SimpleNamespace(device=device, spec={"gpus": gpus}, stack="builtin")
    places = [waiting.Place(Slot(host=Host()), DeviceKind(kind), count) for kind, count in slots]
    assert [place.suits(run) for place in places] == suits


@pytest.mark.parametrize(
    ("trainers", "suits"),
    [
        ({}, False),
        ({"kohya": {"home": "", "python_version": ""}}, False),
        ({"kohya": {"home": "/sd-scripts", "python_version": ""}}, False),  # its Python does not answer
        ({"kohya": {"home": "/sd-scripts", "python_version": "3.11.7"}}, True),
    ],
)
def test_run_starts_where_its_trainer_is(trainers, suits):
    place = waiting.Place(Slot(host=Host(trainers=trainers)), DeviceKind.CPU, 1)
    assert place.suits(SimpleNamespace(device="cpu", spec={}, stack="kohya")) is suits


def test_run_waits_for_a_host_with_its_trainer(queue):
    run = queue[0]
    make_slot()
    Run.objects.filter(pk=run.pk).update(stack="kohya")
    run.refresh_from_db()
    assert waiting.reason_to_wait(run) == (
        "No host that takes runs has Kohya sd-scripts. The Services page says how to install it."
    )


def test_reasons_to_wait_say_what_to_do(queue, settings, monkeypatch):
    run = queue[0]
    assert waiting.reason_to_wait(run).startswith("No host takes runs at the moment: start `manage.py worker`")
    slot = gpu_slot("gpu0+1", gpus=2)
    assert waiting.reason_to_wait(run).startswith("It needs a slot with one device")
    make_slot()
    assert waiting.reason_to_wait(run) == ""
    run.spec["gpus"] = 4
    assert waiting.reason_to_wait(run).startswith("It needs a slot with 4 GPUs")
    run.spec["gpus"] = 2
    assert waiting.reason_to_wait(run) == ""
    Host.objects.filter(pk=slot.host_id).update(draining_at=timezone.now())
    assert waiting.reason_to_wait(run).startswith("It needs a slot with 2 GPUs")
    run.spec["gpus"] = 1
    run.not_before = timezone.now() + timedelta(seconds=20)
    assert waiting.reason_to_wait(run).startswith("It waits a moment after an interruption")
    run.not_before = timezone.now() + timedelta(hours=1)  # the clock was set back: nobody waits for an hour
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES + 5 * 1024**2)
    assert "It waits for space on the disk: it needs about" in waiting.reason_to_wait(run)


# --- when they start --------------------------------------------------------------------------------------------------


def starts(now=NOW):
    return {
        Run.objects.get(pk=pk).output_name: round((at - now).total_seconds())
        for pk, at in waiting.forecast(now).items()
    }


def test_forecast_goes_by_the_time_left_and_by_runs_alike(workspace, alice, handed_out):
    done, first, second, third = (make_run(alice, output_name=name) for name in ("done", "first", "second", "third"))
    Run.objects.filter(pk=done.pk).update(status="succeeded", finished_at=NOW, steps_per_second=0.04)
    slot = make_slot()
    assert starts() == {"first": 0, "second": 100, "third": 200}
    Run.objects.filter(pk=first.pk).update(status="running", slot=slot, eta_seconds=30)
    assert starts() == {"second": 30, "third": 130}
    make_slot(name="other")
    assert starts() == {"second": 0, "third": 30}
    Run.objects.filter(pk=second.pk).update(held_at=NOW)
    assert starts() == {"third": 0}
    Run.objects.filter(pk=third.pk).update(spec=third.spec | {"gpus": 2})
    assert starts() == {}


def test_forecast_of_other_steps_is_in_proportion_to_their_pixels(workspace, alice, handed_out):
    done, first = (make_run(alice, output_name=name) for name in ("done", "first"))
    make_run(alice, output_name="second")
    Run.objects.filter(pk=done.pk).update(status="succeeded", finished_at=NOW, steps_per_second=0.04)
    Run.objects.filter(pk=first.pk).update(spec=first.spec | {"batch_size": 3})
    make_slot()
    assert starts() == {"first": 0, "second": 300}


def test_forecast_leaves_out_what_nobody_can_tell(workspace, alice, handed_out):
    for name in ("first", "second"):
        make_run(alice, output_name=name)
    make_slot()
    assert starts() == {"first": 0}
