"""Background jobs over the API: one's own; staff see and cancel all; for a stranger there are none."""

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from lorapilot.models import Job, JobStatus

URL = "/api/v1/jobs/"


def _job(owner, **values):
    return Job.objects.create(kind="nothing", label="Import of cats.zip", owner=owner, **values)


@pytest.mark.parametrize("rows", [1, 3])
def test_list_of_ones_own(api_of, alice, bob, rows, django_assert_num_queries):
    for _ in range(rows):
        _job(alice)
    _job(bob)
    api = api_of(alice, "read")
    api.get(URL)
    with django_assert_num_queries(3):
        answer = api.get(URL)
    assert answer.json()["count"] == rows
    assert {row["owner"] for row in answer.json()["results"]} == {"alice"}


def test_list_of_staff_has_all(api_of, alice, bob, staff):
    hers, his = _job(alice), _job(bob)
    assert {row["id"] for row in api_of(staff).get(URL).json()["results"]} == {str(hers.pk), str(his.pk)}


def test_list_by_status(api_of, alice):
    _job(alice)
    failed = _job(alice, status=JobStatus.FAILED, finished_at=timezone.now())
    api = api_of(alice)
    assert [row["id"] for row in api.get(URL, {"status": "failed"}).json()["results"]] == [str(failed.pk)]
    answer = api.get(URL, {"status": "lost"})
    assert (answer.status_code, list(answer.json()["errors"])) == (400, ["status"])


def test_list_in_pages(api_of, alice):
    for _ in range(3):
        _job(alice)
    api = api_of(alice)
    first = api.get(URL, {"page_size": 2}).json()
    assert (first["count"], len(first["results"]), first["previous"]) == (3, 2, None)
    second = api.get(first["next"]).json()
    assert (len(second["results"]), second["next"]) == (1, None)
    beyond = api.get(URL, {"page": 9})
    assert (beyond.status_code, beyond.json()) == (404, {"detail": "Invalid page."})


def test_one(api_of, alice):
    job = _job(alice, done=3, total=9, message="Unpacking", result={"added": 2})
    body = api_of(alice, "read").get(f"{URL}{job.pk}/").json()
    assert body.pop("created_at")
    assert body == {
        "id": str(job.pk),
        "label": "Import of cats.zip",
        "owner": "alice",
        "status": "queued",
        "done": 3,
        "total": 9,
        "message": "Unpacking",
        "result": {"added": 2},
        "cancel_requested_at": None,
        "finished_at": None,
    }


def test_cancel(api_of, alice):
    job = _job(alice)
    answer = api_of(alice).post(f"{URL}{job.pk}/cancel/")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    job.refresh_from_db()
    assert (job.status, job.finished_at is None) == (JobStatus.CANCELLED, False)


def test_cancel_by_staff(api_of, alice, staff):
    job = _job(alice, status=JobStatus.RUNNING)
    answer = api_of(staff).post(f"{URL}{job.pk}/cancel/")
    assert (answer.status_code, answer.json()["status"]) == (200, "running")
    job.refresh_from_db()
    assert job.cancel_requested_at is not None


def test_cancel_ended_is_409(api_of, alice):
    job = _job(alice, status=JobStatus.SUCCEEDED, finished_at=timezone.now())
    answer = api_of(alice).post(f"{URL}{job.pk}/cancel/")
    assert (answer.status_code, answer.json()) == (409, {"detail": "This job has already ended."})


def test_cancel_with_a_read_token_is_403(api_of, alice):
    job = _job(alice)
    assert api_of(alice, "read").post(f"{URL}{job.pk}/cancel/").status_code == 403
    job.refresh_from_db()
    assert job.status == JobStatus.QUEUED


@pytest.mark.parametrize("who", ["bob", "charlie"])
def test_stranger_gets_404(api_of, alice, request, who):
    job = _job(alice)
    api = api_of(request.getfixturevalue(who))
    assert api.get(f"{URL}{job.pk}/").status_code == 404
    assert api.post(f"{URL}{job.pk}/cancel/").status_code == 404
    job.refresh_from_db()
    assert job.status == JobStatus.QUEUED


def test_nobody_gets_401(alice):
    job = _job(alice)
    for path in ("", f"{job.pk}/"):
        assert APIClient().get(URL + path).status_code == 401
    assert APIClient().post(f"{URL}{job.pk}/cancel/").status_code == 401


def test_wrong_method_is_405(api_of, alice):
    job = _job(alice)
    api = api_of(alice)
    assert api.post(URL).status_code == 405
    assert api.delete(f"{URL}{job.pk}/").status_code == 405
    assert api.get(f"{URL}{job.pk}/cancel/").status_code == 405
