"""Background jobs: at least once to the end, never in two processes at a time, cancelled when asked."""

import threading
from datetime import timedelta

import pytest
from django.db import connection, connections, transaction
from django.utils import timezone
from django_q.models import OrmQ

from lorapilot import jobs
from lorapilot.errors import UserError
from lorapilot.models import Job, JobStatus

started = threading.Event()
go_on = threading.Event()
calls = []


@jobs.job
def add(progress, a, b):
    progress(1, 2, "adding")
    return {"sum": a + b}


@jobs.job
def refuse(progress):
    raise UserError("The archive is empty. Put pictures into it.")


@jobs.job
def crash(progress):
    raise RuntimeError("secret detail")


@jobs.job
def postpone(progress):
    raise jobs.JobPostponed("Waits for the others.")


@jobs.job
def wait(progress):
    calls.append(threading.get_ident())
    started.set()
    assert go_on.wait(20)
    return {}


def not_a_job(progress):
    calls.append("not a job")
    return {}


@pytest.fixture(autouse=True)
def fresh():
    started.clear()
    go_on.clear()
    calls.clear()


def _row(work, owner=None, **values):
    return Job.objects.create(kind=f"{__name__}.{work.__name__}", label="a job", owner=owner, **values)


def test_run_job_keeps_the_result(alice):
    row = _row(add, alice, arguments={"a": 2, "b": 3})
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert (row.status, row.result, row.message) == (JobStatus.SUCCEEDED, {"sum": 5}, "")
    assert (row.done, row.total) == (1, 2)
    assert row.finished_at is not None


def test_run_job_shows_what_the_user_can_do(alice):
    row = _row(refuse, alice)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert (row.status, row.message) == (JobStatus.FAILED, "The archive is empty. Put pictures into it.")


def test_run_job_hides_our_own_faults(alice, caplog):
    row = _row(crash, alice)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert row.status == JobStatus.FAILED
    assert row.message == "Something went wrong on our side. The server's log has the details."
    assert "secret detail" in caplog.text


def test_run_job_that_is_postponed_comes_back(alice):
    row = _row(postpone, alice)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert (row.status, row.message, row.lease) == (JobStatus.QUEUED, "Waits for the others.", None)
    assert jobs.restart_silent_jobs() == 0
    long_ago = timezone.now() - timedelta(minutes=1)
    Job.objects.update(created_at=long_ago, heartbeat_at=long_ago)
    assert jobs.restart_silent_jobs() == 1
    assert OrmQ.objects.get().task["args"] == (str(row.pk),)


@pytest.mark.parametrize("ends_by", [add, refuse, crash])
def test_postponed_job_looks_again_when_another_of_its_kind_ends(alice, ends_by):
    waiting = _row(postpone, alice)
    jobs.run_job(str(waiting.pk))
    Job.objects.update(kind=f"{__name__}.{ends_by.__name__}")
    jobs.run_job(str(_row(ends_by, alice, arguments={"a": 1, "b": 1} if ends_by is add else {}).pk))
    assert OrmQ.objects.get().task["args"] == (str(waiting.pk),)


@pytest.mark.parametrize("kind", [f"{__name__}.not_a_job", "os.getcwd", "no.such.module"])
def test_run_job_runs_only_jobs(alice, kind, caplog):
    row = _row(add, alice)
    Job.objects.filter(pk=row.pk).update(kind=kind)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert row.status == JobStatus.FAILED
    assert calls == []


def test_run_job_of_a_deleted_job_does_nothing(db):
    jobs.run_job("00000000-0000-0000-0000-000000000000")
    assert Job.objects.count() == 0


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_run_job_that_has_ended_is_not_run_again(alice, status):
    row = _row(wait, alice, status=status, finished_at=timezone.now())
    jobs.run_job(str(row.pk))
    assert calls == []


def test_enqueue_starts_after_commit(alice, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        row = jobs.enqueue(add, label="2 + 3", owner=alice, a=2, b=3)
        assert OrmQ.objects.count() == 0
    assert len(callbacks) == 1
    assert OrmQ.objects.get().task["func"] == "lorapilot.jobs.run_job"
    assert OrmQ.objects.get().task["args"] == (str(row.pk),)
    assert OrmQ.objects.get().key == "io"
    assert (row.status, row.arguments, row.owner) == (JobStatus.QUEUED, {"a": 2, "b": 3}, alice)


@pytest.mark.django_db(transaction=True)
def test_enqueue_rolled_back_starts_nothing():
    with transaction.atomic():
        jobs.enqueue(add, label="2 + 3", owner=None, a=2, b=3)
        transaction.set_rollback(True)
    assert (Job.objects.count(), OrmQ.objects.count()) == (0, 0)


def test_cancel_queued_ends_at_once(alice):
    row = _row(wait, alice)
    jobs.cancel(row)
    row.refresh_from_db()
    assert (row.status, row.message) == (JobStatus.CANCELLED, "Cancelled.")
    jobs.run_job(str(row.pk))
    assert calls == []


def test_cancel_running_is_seen_by_progress(alice):
    @jobs.job
    def cancelled_meanwhile(progress):
        jobs.cancel(Job.objects.get())
        progress(1, 2)
        raise AssertionError("progress did not notice")

    globals()["cancelled_meanwhile"] = cancelled_meanwhile
    row = _row(cancelled_meanwhile, alice)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert (row.status, row.message) == (JobStatus.CANCELLED, "Cancelled.")
    assert row.cancel_requested_at is not None


def test_cancel_ended_changes_nothing(alice):
    row = _row(wait, alice, status=JobStatus.SUCCEEDED, finished_at=timezone.now())
    jobs.cancel(row)
    row.refresh_from_db()
    assert (row.status, row.cancel_requested_at) == (JobStatus.SUCCEEDED, None)


@pytest.mark.django_db(transaction=True)
def test_second_delivery_is_refused_while_the_first_runs():
    row = _row(wait)

    def deliver():
        try:
            jobs.run_job(str(row.pk))
        finally:
            connections.close_all()

    first = threading.Thread(target=deliver)
    first.start()
    try:
        assert started.wait(20)
        second = threading.Thread(target=deliver)
        second.start()
        second.join(20)
        assert not second.is_alive()
        assert first.is_alive()
    finally:
        go_on.set()
        first.join(20)
    assert len(calls) == 1
    row.refresh_from_db()
    assert row.status == JobStatus.SUCCEEDED


def test_restart_silent_jobs_hands_out_lost_ones_once(alice):
    long_ago = timezone.now() - jobs.SILENT_AFTER - timedelta(seconds=1)
    silent = _row(add, alice, status=JobStatus.RUNNING, heartbeat_at=long_ago, arguments={"a": 1, "b": 1})
    lost = _row(add, alice)
    Job.objects.filter(pk=lost.pk).update(created_at=long_ago)
    _row(add, alice)  # queued just now
    _row(add, alice, status=JobStatus.RUNNING, heartbeat_at=timezone.now())
    _row(add, alice, status=JobStatus.SUCCEEDED, heartbeat_at=long_ago, finished_at=long_ago)
    assert jobs.restart_silent_jobs() == 2
    assert {task.task["args"][0] for task in OrmQ.objects.all()} == {str(silent.pk), str(lost.pk)}
    assert jobs.restart_silent_jobs() == 0
    jobs.run_job(str(silent.pk))
    silent.refresh_from_db()
    assert (silent.status, silent.result) == (JobStatus.SUCCEEDED, {"sum": 2})


def test_a_worker_that_was_only_slow_cannot_end_a_job_that_was_given_to_another(alice):
    @jobs.job
    def slow(progress):
        Job.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=1))
        assert jobs.restart_silent_jobs() == 1
        return {"by": "the slow one"}

    globals()["slow"] = slow
    row = _row(slow, alice)
    jobs.run_job(str(row.pk))
    row.refresh_from_db()
    assert (row.status, row.result, row.finished_at) == (JobStatus.QUEUED, {}, None)


def test_visible_jobs_are_ones_own_and_all_for_staff(alice, bob, staff):
    hers, his = _row(add, alice), _row(add, bob)
    assert list(jobs.visible_jobs(alice)) == [hers]
    assert set(jobs.visible_jobs(staff)) == {hers, his}


def test_job_without_a_finish_cannot_have_ended(alice):
    from django.db.utils import IntegrityError

    with pytest.raises(IntegrityError), transaction.atomic():
        _row(add, alice, status=JobStatus.SUCCEEDED)
    assert connection.is_usable()
