"""Runs over HTTP: works, wrong method, stranger, bad input, and the database afterwards."""

import pytest

from runs.models import Checkpoint, MetricPoint, Run, RunEvent, Sample
from tests.factories import make_base_model, make_dataset, make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def run(workspace, alice, team, handed_out):
    make_slot()
    run = make_run(alice)
    run.groups.add(team)
    return run


def test_submit_queues_a_run_on_a_pinned_version(workspace, alice, api_of, handed_out):
    dataset, model = make_dataset(alice), make_base_model()
    asked = {"dataset": dataset.pk, "base_model": model.pk, "output_name": "mine", "profile": "quick_test"}
    answer = api_of(alice).post("/api/v1/runs/", asked | {"settings": {"steps": 7, "warmup_steps": 0}})
    assert answer.status_code == 201
    run = Run.objects.get()
    assert (run.owner, run.status, run.output_name, run.total_steps) == (alice, "queued", "mine", 7)
    assert answer.json()["dataset_digest"] == run.dataset_version.digest
    assert run.spec["rank"] == 32  # the profile's, with the user's own steps
    assert (run.spec["resolution"], run.spec["precision"]) == (128, "fp32")
    assert sorted(run.spec["sample_prompts"]) == ["sks blue", "sks green", "sks red"]  # the captions


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"output_name": "../x"}, 400, "Use letters, digits"),
        ({"output_name": "taken"}, 409, "There is a result called 'taken' already."),
        ({"output_name": "TAKEN"}, 409, "There is a result called 'TAKEN' already."),
        ({"settings": {"stepz": 1}}, 400, "There is no setting 'stepz'. Did you mean steps?"),
        ({"settings": {"steps": -1}}, 400, "Steps must be at least 1."),
        ({"profile": "best"}, 400, 'profile: "best" is not a valid choice.'),
        ({"dataset": 0}, 400, 'dataset: Invalid pk "0"'),
    ],
)
def test_submit_refuses_bad_input_and_changes_nothing(workspace, alice, api_of, handed_out, change, status, sentence):
    make_run(alice, output_name="taken")
    good = {"dataset": alice_dataset(alice), "base_model": make_base_model().pk, "output_name": "new"}
    answer = api_of(alice).post("/api/v1/runs/", good | change)
    assert answer.status_code == status
    assert answer.json()["detail"].startswith(sentence)
    assert Run.objects.count() == 1


def alice_dataset(alice):
    from datasets.models import Dataset

    return Dataset.objects.get(owner=alice).pk


def test_submit_of_an_empty_dataset_says_what_to_do(workspace, alice, api_of):
    from datasets.services import create_dataset

    dataset = create_dataset(alice, name="empty")
    asked = {"dataset": dataset.pk, "base_model": make_base_model().pk, "output_name": "new"}
    answer = api_of(alice).post("/api/v1/runs/", asked)
    assert answer.status_code == 400
    assert "pictures" in answer.json()["detail"]
    assert Run.objects.count() == 0


def test_submit_on_a_strangers_dataset_is_refused(workspace, alice, charlie, api_of):
    asked = {"dataset": make_dataset(alice).pk, "base_model": make_base_model().pk, "output_name": "new"}
    assert api_of(charlie).post("/api/v1/runs/", asked).status_code == 400
    assert Run.objects.count() == 0


READS = ["", "log/", "metrics/", "artifacts/", "samples/", "events/"]
WRITES = ["stop/", "resume/", "hold/", "release/"]


@pytest.mark.parametrize("part", READS)
def test_run_is_read_by_owner_and_team_and_is_not_there_for_strangers(run, alice, bob, charlie, staff, api_of, part):
    answers = [api_of(user).get(f"/api/v1/runs/{run.pk}/{part}").status_code for user in (alice, bob, staff, charlie)]
    assert answers == [200, 200, 200, 404]


@pytest.mark.parametrize("part", WRITES)
def test_run_is_changed_by_the_owner_only(run, bob, charlie, api_of, part):
    before = Run.objects.values().get()
    answers = [api_of(user).post(f"/api/v1/runs/{run.pk}/{part}").status_code for user in (bob, charlie)]
    assert answers == [403, 404]
    assert api_of(bob).delete(f"/api/v1/runs/{run.pk}/").status_code == 403
    assert Run.objects.values().get() == before


@pytest.mark.parametrize("part", WRITES)
def test_changing_calls_refuse_get_and_read_only_tokens(run, alice, api_of, part):
    assert api_of(alice).get(f"/api/v1/runs/{run.pk}/{part}").status_code == 405
    assert api_of(alice, "read").post(f"/api/v1/runs/{run.pk}/{part}").status_code == 403


def test_stop_and_resume(run, alice, api_of):
    api = api_of(alice)
    assert api.post(f"/api/v1/runs/{run.pk}/stop/").json()["status"] == "stopping"
    assert api.post(f"/api/v1/runs/{run.pk}/stop/").status_code == 200
    answer = api.post(f"/api/v1/runs/{run.pk}/resume/")
    assert (answer.status_code, answer.json()["detail"]) == (409, "first cannot be resumed: it is stopping.")
    assert RunEvent.objects.filter(run=run, new_status="stopping", actor=alice).count() == 1


def test_retry_makes_a_new_run_with_a_name_of_its_own(run, bob, api_of):
    answer = api_of(bob).post(f"/api/v1/runs/{run.pk}/retry/", {})
    assert (answer.status_code, answer.json()["output_name"]) == (201, "first-2")
    again = Run.objects.get(output_name="first-2")
    assert (again.owner, again.spec, again.dataset_version) == (bob, run.spec, run.dataset_version)


def test_log_comes_by_offset(run, alice, api_of):
    run.log_path.parent.mkdir(parents=True)
    run.log_path.write_bytes(b"0123456789")
    answer = api_of(alice).get(f"/api/v1/runs/{run.pk}/log/?offset=4")
    assert (answer.content, answer["X-Log-Next-Offset"]) == (b"456789", "10")
    assert api_of(alice).get(f"/api/v1/runs/{run.pk}/log/?offset=-1").json()["detail"] == (
        "offset is a whole number, 0 or more."
    )


def test_metrics_keep_peaks_when_there_are_many(run, alice, api_of):
    from django.utils import timezone

    MetricPoint.objects.bulk_create(
        MetricPoint(run=run, step=step, attempt=1, loss=9.0 if step == 5001 else 0.5, at=timezone.now())
        for step in range(1, 10_001)
    )
    points = api_of(alice).get(f"/api/v1/runs/{run.pk}/metrics/").json()["points"]
    assert len(points) <= 2000
    assert (points[0][0], points[-1][0], [point[0] for point in points if point[1] == 9.0]) == (1, 10_000, [5001])
    assert len(api_of(alice).get(f"/api/v1/runs/{run.pk}/metrics/?since=9990").json()["points"]) == 10


def test_files_are_sent_to_those_who_see_the_run(run, alice, charlie, api_of):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "first.safetensors").write_bytes(b"weights")
    (run.folder / "drawn.png").write_bytes(b"picture")
    made = Checkpoint.objects.create(run=run, step=4, path="first.safetensors", bytes=7, sha256="0" * 64)
    drawn = Sample.objects.create(run=run, step=4, index=0, path="drawn.png", prompt="x", seed=1)
    for path, content in (
        (f"artifacts/{made.pk}/download/", b"weights"),
        (f"samples/{drawn.pk}/file/", b"picture"),
    ):
        answer = api_of(alice).get(f"/api/v1/runs/{run.pk}/{path}")
        assert b"".join(answer.streaming_content) == content
        assert api_of(charlie).get(f"/api/v1/runs/{run.pk}/{path}").status_code == 404


def test_list_asks_the_database_as_often_for_three_runs_as_for_one(run, alice, api_of, django_assert_num_queries):
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    api = api_of(alice)
    api.get("/api/v1/runs/")
    with CaptureQueriesContext(connection) as one:
        api.get("/api/v1/runs/")
    make_run(alice, output_name="second")
    make_run(alice, output_name="third")
    with django_assert_num_queries(len(one)):
        assert api.get("/api/v1/runs/").json()["count"] == 3


def test_delete_takes_row_and_files_of_an_ended_run_only(run, alice, api_of):
    api = api_of(alice)
    assert api.delete(f"/api/v1/runs/{run.pk}/").status_code == 409
    second = make_run(alice, output_name="second")
    api.post(f"/api/v1/runs/{second.pk}/stop/")
    second.folder.mkdir()
    assert api.delete(f"/api/v1/runs/{second.pk}/").status_code == 204
    assert not second.folder.exists()
    assert [found.output_name for found in Run.objects.all()] == ["first"]
