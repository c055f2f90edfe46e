"""What becomes of a run when its processes are killed, memory or the disk runs out, or it is stopped in every way.

Real processes of a stand-in trainer; its saved state is of step 2.
"""

import json
import os
import signal
import time

import psutil
import pytest
from django.utils import timezone

from lorapilot.errors import Conflict
from runs import disk, endings, hosts, services
from runs.enums import Ending, Status
from runs.models import Attempt, Host, Run
from runs.spec import RunSpec
from runs.supervision import follow, process, runner
from runs.supervision.follow import supervise_slice
from tests.factories import make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def run(workspace, alice, stand_in, handed_out, monkeypatch):
    for name, seconds in {
        "SLICE_SECONDS": 0.4,
        "POLL_SECONDS": 0.03,
        "ROW_SECONDS": 0.1,
        "OBSERVE_SECONDS": 0.0,
        "GUARD_SECONDS": 0.0,
    }.items():
        monkeypatch.setattr(follow, name, seconds)
    monkeypatch.setattr(endings, "PAUSES", (0,) * 5)
    make_slot()
    return make_run(alice, values={"steps": 8})


def play(attempts, seconds=25):
    """Deliver slices until nothing is handed out any more."""
    deadline = time.monotonic() + seconds
    while attempts:
        assert time.monotonic() < deadline
        supervise_slice(attempts.pop().pk)


def play_until(run, condition, attempts, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition(run):
        assert time.monotonic() < deadline, (run.status, run.step, run.reason)
        supervise_slice(attempts.pop().pk)
        run.refresh_from_db()


def at_step(number):
    return lambda run: run.step >= number


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def record(run):
    return process._record(run.attempt_folder())


def endings_of(run):
    return list(run.attempts.values_list("ending", "start_step"))


def says(run, start):
    return run.events.filter(message__startswith=start).count()


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", ["trainer_pid", "pid"])
def test_killed_run_goes_on_from_its_state_by_itself(run, stand_in, handed_out, victim, number):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    os.kill(record(run)[victim], number)
    draft = run.folder / ".lora-step00000003.safetensors.77-ab.tmp"  # as a trainer that is killed while it saves
    draft.write_bytes(b"half")
    stand_in.behaviour = "finishes"
    play(handed_out)
    assert not draft.exists()
    run.refresh_from_db()
    assert (run.status, run.attempt, run.step) == ("succeeded", 2, 8)
    assert endings_of(run)[0] == (Ending.INTERRUPTED, 0)
    assert [point.step for point in run.metrics.all()] == list(range(1, 9))
    assert says(run, "Its process was killed from outside, or the machine restarted. It goes on from step") == 1


def test_machine_that_was_restarted_leaves_no_run_behind(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    alive = record(run)
    os.kill(alive["pid"], signal.SIGKILL)
    runner.write_json(run.attempt_folder() / "runner.json", alive | {"boot_id": "another"})
    stand_in.behaviour = "finishes"
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("succeeded", 2)


def test_pid_that_belongs_to_somebody_else_now_is_not_taken_for_the_runner(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    alive = record(run)
    os.kill(alive["pid"], signal.SIGKILL)
    mine = {"pid": os.getpid(), "start_ticks": alive["start_ticks"]}
    runner.write_json(run.attempt_folder() / "runner.json", alive | mine)
    stand_in.behaviour = "finishes"
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("succeeded", 2)


def test_run_that_is_interrupted_again_and_again_ends(run, stand_in, handed_out, monkeypatch):
    stand_in.behaviour = "is terminated"
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("errored", 6)
    assert run.reason.startswith("It was interrupted 6 times without getting any further.")


def test_pause_after_an_interruption_is_kept_and_then_over(run, stand_in, handed_out, monkeypatch):
    monkeypatch.setattr(endings, "PAUSES", (60,))
    stand_in.behaviour = "is terminated"
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("queued", 2)
    assert 50 < (run.not_before - timezone.now()).total_seconds() <= 60
    stand_in.behaviour = "finishes"
    Run.objects.filter(pk=run.pk).update(not_before=timezone.now())
    from runs.dispatch import dispatch

    assert dispatch() == 1
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.not_before) == ("succeeded", None)


def test_progress_between_interruptions_starts_the_count_anew(run, handed_out):
    first = run.attempts.get()
    Attempt.objects.filter(pk=first.pk).update(ending=Ending.INTERRUPTED, start_step=0, ended_at=timezone.now())
    for number, start in ((2, 0), (3, 0)):
        Attempt.objects.create(run=run, number=number, slot=first.slot, ending=Ending.INTERRUPTED, start_step=start)
    newest = Attempt(run=run, number=4, slot=first.slot, ending=Ending.INTERRUPTED, start_step=0)
    assert endings.in_a_row(run, newest, saved_step=0) == 3
    assert endings.in_a_row(run, newest, saved_step=40) == 0
    newest.start_step = 20
    assert endings.in_a_row(run, newest, saved_step=20) == 0


def test_runner_that_was_killed_before_it_could_start_is_tried_again(run, handed_out, monkeypatch):
    calls = []

    def start(folder, launch, secrets=None):
        calls.append(folder.name)
        if len(calls) == 1:
            raise process.NotStarted
        return real(folder, launch, secrets)

    real = process.start
    monkeypatch.setattr(process, "start", start)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, calls) == ("succeeded", ["1", "2"])


def test_half_written_state_is_passed_by(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    torn = run.folder / "state" / "step00000003"
    torn.mkdir()
    (torn / "training.pt").write_bytes(b"half")
    assert services.newest_state_step(run) == 2


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_takes_the_ladder_with_leave(run, alice, stand_in, handed_out):
    keep_trying = {"less_memory_when_out": True, "batch_size": 2}
    Run.objects.filter(pk=run.pk).update(spec=run.spec | keep_trying)
    stand_in.behaviour = "runs out of memory"
    stand_in.then = "finishes"
    stand_in.enough = {"gradient_checkpointing": True, "batch_size": 1, "gradient_accumulation_steps": 2}
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("succeeded", 3)
    assert run.adaptations == stand_in.enough
    assert run.spec["gradient_checkpointing"] is False  # what was submitted stays what was submitted
    assert [attempt.adaptations for attempt in run.attempts.all()] == [
        {},
        {"gradient_checkpointing": True},
        stand_in.enough,
    ]
    assert endings_of(run) == [(Ending.OUT_OF_MEMORY, 0), (Ending.OUT_OF_MEMORY, 2), (Ending.SUCCEEDED, 2)]
    assert says(run, "Memory ran out. Gradient checkpointing is on") == 1
    assert says(run, "Memory ran out. Batches of 1 instead of 2") == 1


def test_memory_that_runs_out_without_leave_fails_and_can_be_resumed_with_less(run, alice, stand_in, handed_out):
    stand_in.behaviour = "runs out of memory"
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.reason) == ("failed", "The GPU ran out of memory.")
    stand_in.behaviour = "finishes"
    services.resume_run(run, actor=alice, less_memory=True)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.adaptations) == ("succeeded", {"gradient_checkpointing": True})


def test_end_of_the_ladder_is_said(run, alice, stand_in, handed_out):
    stand_in.behaviour = "runs out of memory"
    play(handed_out)
    run.refresh_from_db()
    Run.objects.filter(pk=run.pk).update(adaptations={"gradient_checkpointing": True, "batch_size": 1})
    run.refresh_from_db()
    with pytest.raises(Conflict, match="nothing left to save memory with"):
        services.resume_run(run, actor=alice, less_memory=True)


def test_kernel_s_own_count_tells_memory_from_somebody_s_kill(run, stand_in, handed_out):
    stand_in.behaviour = "is killed"
    supervise_slice(handed_out.pop().pk)
    exit_file = run.attempt_folder(1) / "exit.json"
    deadline = time.monotonic() + 10
    while not exit_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    facts = json.loads(exit_file.read_text())
    assert (facts["code"], facts["signals"]) == (-9, [])
    assert facts["oom_kills"] == 0
    reading = follow.Reading(
        name=run.output_name, folder=run.folder, attempt_folder=run.attempt_folder(1), spec=RunSpec()
    )
    outcome = stand_in.outcome(reading, follow.Exit(code=-9, stop_requested=False, oom_kills=1))
    assert (outcome.status, outcome.cause.name) == (Status.FAILED, "OUT_OF_MEMORY")


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_below_the_floor_a_run_saves_and_goes_on_when_there_is_space(run, stand_in, handed_out, monkeypatch, settings):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES - 1)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.held_at, run.attempt) == ("queued", None, 2)
    assert says(run, "Only 2.0") == 1
    assert services.newest_state_step(run) == run.step
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES * 2)
    stand_in.behaviour = "finishes"
    from runs.dispatch import dispatch

    assert dispatch() == 1
    play(handed_out)
    run.refresh_from_db()
    assert run.status == "succeeded"


def test_below_the_floor_a_trainer_that_does_not_save_goes_back_to_its_state_and_not_to_nothing(
    run, stand_in, handed_out, monkeypatch, settings
):
    stand_in.behaviour = "slow"
    monkeypatch.setattr(stand_in, "saves_on_stop", False, raising=False)
    monkeypatch.setattr(follow, "GUARD_SECONDS", 0)
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES - 1)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("queued", 2)
    assert services.newest_state_step(run) >= 2  # before that it would have lost all that it did
    assert run.events.filter(message__contains="it goes back to its last saved state").count() == 1


def test_full_disk_does_not_fail_the_run(run, stand_in, handed_out, monkeypatch, settings):
    stand_in.behaviour = "fills the disk"
    monkeypatch.setattr(disk, "lack_of_space", lambda run: "full" if run.attempt > 1 else "")
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt, endings_of(run)[0][0]) == ("queued", 2, Ending.DISK_FULL)
    assert run.reason == "The disk is full. It goes on from step 2. It waits until there is space."


def test_runner_writes_how_it_ended_as_soon_as_there_is_space(tmp_path, monkeypatch):
    tries = []

    def full_at_first(path, content):
        tries.append(path.name)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        real(path, content)

    real = runner.write_json
    monkeypatch.setattr(runner, "write_json", full_at_first)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    (tmp_path / ".reserved").write_bytes(b"0" * 10)
    runner.write_exit(tmp_path, {"code": 0})
    assert (len(tries), json.loads((tmp_path / "exit.json").read_text())) == (3, {"code": 0})
    assert not (tmp_path / ".reserved").exists()


# --- stop, pause, end now ---------------------------------------------------------------------------------------------


def test_pause_saves_and_release_goes_on(run, alice, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(3), handed_out)
    services.pause_run(run, actor=alice)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt, run.held_at is not None) == ("queued", 2, True)
    assert run.reason == f"Paused. It goes on from step {run.step}."
    stand_in.behaviour = "finishes"
    services.release_run(run, actor=alice)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.step, run.held_at) == ("succeeded", 8, None)


def test_pause_of_a_waiting_run_holds_it(run, alice):
    second = make_run(alice, output_name="second")
    services.pause_run(second, actor=alice)
    assert (second.status, second.held_at is not None) == ("queued", True)


def test_stop_wins_over_pause(run, alice, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(1), handed_out)
    services.pause_run(run, actor=alice)
    services.stop_run(run, actor=alice)
    services.pause_run(run, actor=alice)  # too late: it stops
    play(handed_out)
    run.refresh_from_db()
    assert run.status == "stopped"


def test_trainer_that_does_not_react_is_ended_by_the_clock(run, alice, stand_in, handed_out):
    stand_in.behaviour = "ignores signals"
    play_until(run, at_step(1), handed_out)
    services.stop_run(run, actor=alice)
    play(handed_out)
    run.refresh_from_db()
    assert (run.status, run.exit_code) == ("stopped", -9)
    assert run.reason == (
        "Stopped before anything could be saved. It did not react to SIGINT, and was killed. "
        "Resume goes on from the last saved state, if there is one."
    )


def test_end_now_does_not_wait(run, alice, stand_in, handed_out):
    stand_in.behaviour = "ignores signals"
    stand_in.grace_seconds = 60
    play_until(run, at_step(1), handed_out)
    services.kill_run(run, actor=alice)
    services.kill_run(run, actor=alice)  # asking again changes nothing
    play(handed_out, seconds=10)
    run.refresh_from_db()
    assert (run.status, run.kill_requested_at) == ("stopped", None)
    assert says(run, "To be ended at once, without saving.") == 1


def test_resume_forgets_what_was_measured_after_the_state(run, alice, stand_in, handed_out):
    stand_in.behaviour = "ignores signals"
    play_until(run, at_step(4), handed_out)
    services.kill_run(run, actor=alice)
    play(handed_out)
    run.refresh_from_db()
    reached = run.step
    assert reached >= 4
    stand_in.behaviour = "slow"
    services.resume_run(run, actor=alice)
    play_until(run, lambda run: run.attempt == 2 and run.metrics.filter(attempt=2).exists(), handed_out)
    assert list(run.metrics.filter(attempt=1).values_list("step", flat=True)) == [1, 2]
    services.kill_run(run, actor=alice)
    play(handed_out)


# --- processes that nobody wants any more -----------------------------------------------------------------------------


def test_later_attempt_fences_the_runner_of_an_earlier_one(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(1), handed_out)
    pids = record(run)
    run.attempt_folder(2).mkdir()
    deadline = time.monotonic() + 10
    while is_alive(pids["pid"]) or is_alive(pids["trainer_pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_runner_of_an_attempt_that_is_over_is_ended(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(1), handed_out)
    pids = record(run)
    assert hosts.end_orphans("testhost") == 0
    Attempt.objects.update(ended_at=timezone.now(), ending=Ending.MOVED)
    assert hosts.end_orphans("another host") == 0  # the same machine may have several names
    assert hosts.end_orphans("testhost") == 1
    assert not is_alive(pids["pid"])
    assert not is_alive(pids["trainer_pid"])


def test_runner_of_a_run_that_is_gone_is_ended(run, stand_in, handed_out):
    stand_in.behaviour = "slow"
    play_until(run, at_step(1), handed_out)
    pids = record(run)
    Run.objects.all().delete()
    assert hosts.end_orphans("testhost") == 1
    assert not is_alive(pids["trainer_pid"])
    assert Host.objects.count() == 1
