"""Attempts from slot to end, with real processes."""

import os
import signal
import time

import psutil
import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from runs import endings, services
from runs.dispatch import claim, dispatch
from runs.enums import EDGES, Status
from runs.models import Attempt, Run
from runs.reconcile import restart_silent_slices
from runs.supervision import follow, process
from runs.supervision.follow import supervise_slice
from runs.transitions import change_status
from tests.factories import make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)


def play_worker(attempts, seconds=20):
    """Deliver slices until nothing is handed out any more."""
    deadline = time.monotonic() + seconds
    while attempts:
        assert time.monotonic() < deadline
        supervise_slice(attempts.pop().pk)


@pytest.fixture
def run(workspace, alice, stand_in, handed_out):
    make_slot()
    return make_run(alice)


def trains(pid):
    """Whether a process is alive; a dead one that nobody has buried yet is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def told(run):
    return [(event.old_status, event.new_status) for event in run.events.all() if event.new_status]


def test_run_trains_to_its_end(run, handed_out):
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.step, run.total_steps, run.exit_code, run.slot) == ("succeeded", 4, 4, 0, None)
    assert list(run.metrics.values_list("step", "loss")) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [(found.path, found.is_final) for found in run.checkpoints.all()] == [("lora.safetensors", True)]
    assert told(run) == [("", "queued"), ("queued", "starting"), ("starting", "running"), ("running", "succeeded")]
    assert run.log_path.read_bytes() == b"hello from the trainer\n\rstep 1\rstep 2\rstep 3\rstep 4"
    assert Attempt.objects.get().ended_at is not None


NO_WORD = "The trainer ended with exit code {} and no word of why. The end of the log may tell."
KILLED = "The trainer was killed 3 times without getting any further. Most likely memory ran out."


@pytest.mark.parametrize(
    ("behaviour", "status", "reason", "code"),
    [
        ("refuses", "failed", "There are no pictures. Add some.", 2),
        ("breaks", "errored", NO_WORD.format(1), 1),
        ("says nothing", "errored", NO_WORD.format(0), 0),
        ("is killed", "failed", KILLED, -9),
    ],
)
def test_run_that_fails_says_why(run, stand_in, handed_out, monkeypatch, behaviour, status, reason, code):
    monkeypatch.setattr(endings, "PAUSES", (0,) * 5)
    stand_in.behaviour = behaviour
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.reason, run.exit_code, run.slot) == (status, reason, code, None)
    is_guess = behaviour == "is killed"
    assert run.attempts.last().ending == ("out_of_memory" if is_guess else status)


def test_stop_saves_first_and_resume_goes_on(run, alice, stand_in, handed_out, monkeypatch):
    monkeypatch.setattr(follow, "SLICE_SECONDS", 1.0)
    stand_in.behaviour = "slower"
    supervise_slice(handed_out.pop().pk)
    services.stop_run(run, actor=alice)
    services.stop_run(run, actor=alice)  # asking again changes nothing
    play_worker(handed_out)
    run.refresh_from_db()
    assert run.status == "stopped"
    assert run.reason == f"Stopped at step {run.step}; weights and state are saved."
    stand_in.behaviour = "finishes"
    services.resume_run(run, actor=alice)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt, run.step) == ("succeeded", 2, 4)
    assert [point.step for point in run.metrics.all()] == [1, 2, 3, 4]
    offsets = [attempt.log_offset for attempt in run.attempts.all()]
    assert offsets[0] == 0
    assert run.log_path.read_bytes()[offsets[1] :].startswith(b"hello from the trainer\n")


def test_stop_of_a_waiting_run_is_at_once(run, alice, handed_out):
    second = make_run(alice, output_name="second")
    services.stop_run(second, actor=alice)
    assert (second.status, second.slot) == ("stopped", None)


def test_killed_runner_takes_its_trainer_along_and_the_run_starts_again(run, stand_in, handed_out, monkeypatch):
    monkeypatch.setattr(follow, "SLICE_SECONDS", 0.6)
    stand_in.behaviour = "slower"
    supervise_slice(handed_out.pop().pk)
    record = process._record(run.attempt_folder(1))
    os.kill(record["pid"], signal.SIGKILL)
    supervise_slice(handed_out.pop().pk)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("starting", 2)  # back through the queue to the free slot
    assert not trains(record["trainer_pid"])
    assert run.events.filter(message__startswith="Its process was killed from outside").count() == 1
    stand_in.behaviour = "finishes"
    play_worker(handed_out)
    run.refresh_from_db()
    assert run.status == "succeeded"


def test_second_delivery_is_refused_while_a_slice_works(run, handed_out):
    attempt = handed_out.pop()
    Attempt.objects.filter(pk=attempt.pk).update(lease_at=timezone.now())
    supervise_slice(attempt.pk)
    run.refresh_from_db()
    assert run.status == "starting"
    assert not process.has_started(run.attempt_folder(1))


def test_lost_slice_is_handed_out_again_once(run, handed_out):
    attempt = handed_out.pop()
    assert restart_silent_slices() == 0  # it was handed out a moment ago
    Attempt.objects.filter(pk=attempt.pk).update(enqueued_at=None)
    assert [restart_silent_slices(), restart_silent_slices()] == [1, 0]
    play_worker(handed_out)
    run.refresh_from_db()
    assert run.status == "succeeded"


def test_second_runner_of_an_attempt_exits(run, handed_out):
    play_worker(handed_out)
    folder = run.attempt_folder(1)
    from runs.supervision import runner

    assert runner.main(folder) == runner.LOCKED


def test_result_of_an_earlier_attempt_changes_nothing(run, handed_out):
    stale = Run.objects.get(pk=run.pk)
    Run.objects.filter(pk=run.pk).update(attempt=2)
    assert change_status(stale, old=Status.STARTING, new=Status.FAILED) is False
    run.refresh_from_db()
    assert run.status == "starting"


def test_edges_that_do_not_exist_are_refused(run):
    with pytest.raises(ValueError, match="A run never goes from succeeded to queued"):
        change_status(run, old=Status.SUCCEEDED, new=Status.QUEUED)
    assert set(EDGES) == set(Status)


def test_slot_takes_one_run_and_the_next_waits(run, alice, handed_out):
    second = make_run(alice, output_name="second")
    second.refresh_from_db()
    assert second.status == "queued"
    run.refresh_from_db()
    assert claim(second, run.slot) is False
    with pytest.raises(IntegrityError), transaction.atomic():
        Run.objects.filter(pk=second.pk).update(status="running", slot=run.slot)
    play_worker(handed_out)
    second.refresh_from_db()
    assert second.status == "succeeded"


def test_held_run_waits_until_it_is_released(run, alice, handed_out):
    second = make_run(alice, output_name="second")
    services.hold_run(second, actor=alice)
    play_worker(handed_out)
    second.refresh_from_db()
    assert (second.status, dispatch()) == ("queued", 0)
    services.release_run(second, actor=alice)
    play_worker(handed_out)
    second.refresh_from_db()
    assert second.status == "succeeded"
