"""A slot of two devices: the real trainer runs in a process on each, and saves when it is stopped."""

import time

import pytest

from runs import services
from runs.models import Device
from runs.stacks.builtin import EVENTS_FILE
from runs.supervision.follow import supervise_slice
from tests.factories import make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)
VALUES = {"gpus": 2, "steps": 400, "batch_size": 1, "save_every_steps": 10, "sample_prompts": ["x"], "sample_steps": 1}


def play_until(run, condition, attempts, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition(run):
        assert time.monotonic() < deadline, (run.status, run.step, run.log_path.read_text()[-2000:])
        supervise_slice(attempts.pop().pk)
        run.refresh_from_db()


def test_two_devices_train_one_run_and_a_stop_saves(workspace, alice, handed_out):
    slot = make_slot()
    Device.objects.create(host=slot.host, slot=slot, kind="cpu", uuid="cpu-1", name="CPU", index=1)
    run = make_run(alice, values=VALUES)
    play_until(run, lambda run: run.step >= 2, handed_out)
    events = (run.attempt_folder(1) / EVENTS_FILE).read_text()
    assert '"processes": 2' in events
    services.stop_run(run, actor=alice)
    play_until(run, lambda run: run.is_terminal, handed_out)
    assert (run.status, run.reason) == ("stopped", f"Stopped at step {run.step}; weights and state are saved.")
    assert services.newest_state_step(run) == run.step


def test_run_for_two_devices_is_refused_where_no_slot_has_two(workspace, alice, handed_out):
    make_slot()
    with pytest.raises(services.UserError, match=r"No slot has 2 GPUs. Staff join GPUs with LORAPILOT_SLOTS"):
        make_run(alice, values=VALUES)
