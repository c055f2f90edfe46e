"""Runs over HTTP: works, wrong method, stranger, bad input, and the database afterwards."""

import json
from datetime import timedelta
from threading import Thread

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework.test import APIClient

from datasets.models import Dataset, DatasetVersion
from runs import library, services, waiting
from runs.models import Attempt, Checkpoint, Host, MetricPoint, Run, RunEvent, Sample
from tests.factories import make_base_model, make_dataset, make_run, make_slot

pytestmark = pytest.mark.django_db(transaction=True)

URL = "/api/v1/runs/"
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
NOTHING = "There is no such thing, or it is not shared with you."
READ_ONLY = "This token can only read. Create one with scope `write` on the account page."
NOT_WAITING = "first is not waiting in the queue."
PRIORITY = "Priority is -1 (low), 0 (normal) or 1 (high)."


def at(run, part=""):
    return f"{URL}{run.pk}/{part}"


def everything():
    """All rows of runs, to be compared before and after."""
    tables = (Run, Attempt, RunEvent, DatasetVersion)
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables}


def waits(owner, *names, **options):
    """Runs of `owner` that wait, since no host takes any."""
    made = [make_run(owner, output_name=name, **options) for name in names]
    return made[0] if len(made) == 1 else made


def end(run, status="stopped"):
    Run.objects.filter(pk=run.pk).update(status=status, slot=None, finished_at=timezone.now())


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


@pytest.mark.parametrize("values", [{"sample_prompts": ["a \ud800"]}, {"sample_prompts": ["a\0b"]}, {"\ud800": 1}])
def test_submit_refuses_texts_that_would_break_every_list(workspace, alice, api_of, handed_out, values):
    good = {"dataset": make_dataset(alice).pk, "base_model": make_base_model().pk, "output_name": "new"}
    body = json.dumps(good | {"settings": values})
    answer = api_of(alice).post(URL, body, content_type="application/json")
    assert (answer.status_code, Run.objects.count(), DatasetVersion.objects.count()) == (400, 0, 0)


def test_submit_of_a_form_refuses_a_null_character(workspace, alice, api_of, handed_out):
    body = {"dataset": make_dataset(alice).pk, "base_model": make_base_model().pk, "output_name": "new"}
    answer = api_of(alice).post(URL, body | {"settings.sample_prompts": "a\0b"}, format="multipart")
    assert (answer.status_code, "none of them a null character" in answer.json()["detail"]) == (400, True)


@pytest.mark.parametrize("name", ["dataset", "base_model"])
def test_list_refuses_an_id_that_none_can_be(run, alice, api_of, name):
    assert api_of(alice).get(f"{URL}?{name}={'9' * 30}").status_code == 400
    assert api_of(alice).get(f"{URL}?{name}=99").json()["results"] == []


@pytest.mark.parametrize("part", ["artifacts/{}/download/", "artifacts/{}/publish/", "samples/{}/file/"])
@pytest.mark.parametrize("number", ["9" * 18, "9" * 5000])
def test_file_with_a_number_that_none_has_does_not_exist(run, alice, api_of, part, number):
    asked = "post" if "publish" in part else "get"
    assert getattr(api_of(alice), asked)(at(run, part.format(number))).status_code == 404


def alice_dataset(alice):
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


READS = ["", "log/", "metrics/", "artifacts/", "samples/", "events/", "attempts/"]
WRITES = ["stop/", "pause/", "kill/", "resume/", "hold/", "release/", "priority/", "move/"]


@pytest.mark.parametrize("part", READS)
def test_run_is_read_by_owner_and_team_and_is_not_there_for_strangers(run, alice, bob, charlie, staff, api_of, part):
    answers = [api_of(user).get(f"/api/v1/runs/{run.pk}/{part}").status_code for user in (alice, bob, staff, charlie)]
    assert answers == [200, 200, 200, 404]


@pytest.mark.parametrize("part", WRITES)
def test_run_is_changed_by_the_owner_only(run, bob, charlie, api_of, part):
    before = everything()
    for user, status, sentence in ((bob, 403, NOT_YOURS), (charlie, 404, NOTHING)):
        answers = [api_of(user).post(at(run, part)), api_of(user).delete(at(run))]
        assert [(answer.status_code, answer.json()) for answer in answers] == [(status, {"detail": sentence})] * 2
    assert everything() == before


@pytest.mark.parametrize("part", WRITES)
def test_changing_calls_refuse_other_methods_and_read_only_tokens(run, alice, api_of, part):
    before, api = everything(), api_of(alice)
    answers = [getattr(api, method)(at(run, part)).status_code for method in ("get", "put", "patch", "delete")]
    refused = api_of(alice, "read").post(at(run, part))
    assert (answers, refused.status_code, refused.json()) == ([405] * 4, 403, {"detail": READ_ONLY})
    assert APIClient().post(at(run, part)).status_code == 401
    assert everything() == before


@pytest.mark.parametrize("part", ["log/", "metrics/", "artifacts/", "samples/", "events/", "attempts/"])
def test_reading_calls_refuse_other_methods(run, alice, api_of, part):
    api = api_of(alice)
    assert [getattr(api, method)(at(run, part)).status_code for method in ("post", "put", "delete")] == [405] * 3


@pytest.mark.parametrize("part", WRITES)
def test_run_that_is_not_there(db, alice, api_of, part):
    api = api_of(alice)
    assert [api.post(f"{URL}{key}/{part}").status_code for key in ("0", "x", "9" * 30)] == [404] * 3


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


# --- What a run says of itself ----------------------------------------------------------------------------------------
def test_run_that_waits_says_where_it_stands(workspace, alice, bob, api_of, handed_out):
    ahead, run = waits(alice, "ahead"), waits(bob, "first")
    shown = api_of(bob).get(at(run)).json()
    assert {name: shown[name] for name in ("priority", "queue_place", "starts_at", "waits_for", "stop_intent")} == {
        "priority": 0,
        "queue_place": 2,
        "starts_at": None,
        "waits_for": "No host takes runs at the moment: start `manage.py worker` on one, or end a maintenance.",
        "stop_intent": "",
    }
    assert (shown["device"], shown["needed_bytes"], shown["adaptations"]) == ("cpu", run.needed_bytes, {})
    assert (shown["slot"], shown["host_condition"]) == (None, None)
    make_slot()
    Run.objects.filter(pk=ahead.pk).update(held_at=timezone.now())
    shown = api_of(bob).get(at(run)).json()
    assert (shown["queue_place"], shown["waits_for"]) == (1, "")
    assert abs(timezone.datetime.fromisoformat(shown["starts_at"]) - timezone.now()) < timedelta(seconds=20)
    shown = api_of(alice).get(at(ahead)).json()
    assert [shown[name] for name in ("queue_place", "starts_at", "waits_for")] == [None, None, None]


def test_run_that_trains_says_how_its_host_is(run, alice, api_of):
    shown = api_of(alice).get(at(run)).json()
    assert (shown["slot"], shown["host_condition"], shown["status"]) == ("testhost/cpu", "online", "starting")
    assert [shown[name] for name in ("queue_place", "starts_at", "waits_for")] == [None, None, None]
    Host.objects.update(lost_at=timezone.now())
    assert api_of(alice).get(at(run)).json()["host_condition"] == "lost"
    end(run)
    assert api_of(alice).get(at(run)).json()["host_condition"] is None


def test_attempts_say_how_each_ended(run, alice, api_of):
    ended = timezone.now()
    Attempt.objects.filter(run=run).update(ended_at=ended, ending="out_of_memory", exit_code=2, start_step=2)
    slot = Attempt.objects.get().slot
    Attempt.objects.create(run=run, number=2, slot=slot, log_offset=120, adaptations={"batch_size": 1})
    shown = api_of(alice).get(at(run, "attempts/")).json()
    assert [row.pop("created_at") for row in shown] == [
        attempt.created_at.isoformat().replace("+00:00", "Z") for attempt in run.attempts.all()
    ]
    assert shown == [
        {
            "number": 1,
            "slot": "testhost/cpu",
            "ended_at": ended.isoformat().replace("+00:00", "Z"),
            "ending": "out_of_memory",
            "exit_code": 2,
            "start_step": 2,
            "adaptations": {},
            "log_offset": 0,
        },
        {
            "number": 2,
            "slot": "testhost/cpu",
            "ended_at": None,
            "ending": "",
            "exit_code": None,
            "start_step": 0,
            "adaptations": {"batch_size": 1},
            "log_offset": 120,
        },
    ]


# --- Pause, end now, less memory --------------------------------------------------------------------------------------
def test_pause_asks_a_training_run_to_save(run, alice, api_of):
    api = api_of(alice)
    for _ in range(2):
        answer = api.post(at(run, "pause/"))
        assert (answer.status_code, answer.json()["status"], answer.json()["stop_intent"]) == (200, "stopping", "pause")
    run.refresh_from_db()
    assert (run.status, run.stop_intent, run.stop_requested_by) == ("stopping", "pause", alice)
    assert RunEvent.objects.filter(run=run, new_status="stopping", actor=alice, message="Asked to pause.").count() == 1


def test_pause_holds_a_waiting_run_until_it_is_released(workspace, alice, api_of, handed_out):
    run, api = waits(alice, "first"), api_of(alice)
    answer = api.post(at(run, "pause/")).json()
    assert (answer["status"], answer["held_at"] is None, answer["queue_place"]) == ("queued", False, None)
    make_slot()
    answer = api.post(at(run, "release/")).json()  # a slot is free: it starts at once, and the answer knows
    assert (answer["status"], answer["held_at"], answer["slot"]) == ("starting", None, "testhost/cpu")
    run.refresh_from_db()
    assert (run.status, run.held_at) == ("starting", None)


def test_kill_ends_a_training_run_without_saving(run, alice, api_of):
    for _ in range(2):
        assert api_of(alice).post(at(run, "kill/")).json()["status"] == "stopping"
    run.refresh_from_db()
    assert (run.status, run.stop_intent, run.kill_requested_at is None) == ("stopping", "stop", False)
    messages = ["Asked to stop.", "To be ended at once, without saving."]
    assert list(run.events.filter(actor=alice).values_list("message", flat=True)) == ["Submitted.", *messages]


def test_kill_of_a_waiting_run_takes_it_from_the_queue(workspace, alice, api_of, handed_out):
    run = waits(alice, "first")
    assert api_of(alice).post(at(run, "kill/")).json()["status"] == "stopped"
    run.refresh_from_db()
    assert (run.status, run.kill_requested_at) == ("stopped", None)


@pytest.mark.parametrize("part", ["stop/", "pause/", "kill/"])
def test_run_that_has_ended_cannot_end_again(run, alice, api_of, part):
    end(run, "succeeded")
    before = everything()
    answer = api_of(alice).post(at(run, part))
    assert (answer.status_code, answer.json()) == (409, {"detail": "first is not running: it is succeeded."})
    assert everything() == before


def test_resume_with_less_memory_takes_the_next_step(run, alice, api_of):
    end(run, "failed")
    Host.objects.update(draining_at=timezone.now())  # it stays in the queue
    answer = api_of(alice).post(at(run, "resume/"), {"less_memory": True})
    assert (answer.status_code, answer.json()["adaptations"]) == (200, {"gradient_checkpointing": True})
    run.refresh_from_db()
    assert (run.status, run.attempt, run.adaptations) == ("queued", 2, {"gradient_checkpointing": True})
    end(run, "failed")
    answer = api_of(alice).post(at(run, "resume/"), {"less_memory": True})
    sentence = "There is nothing left to save memory with. Use a smaller model or resolution in a new run."
    assert (answer.status_code, answer.json()) == (409, {"detail": sentence})
    assert api_of(alice).post(at(run, "resume/")).json()["adaptations"] == {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"less_memory": "much"}, "less_memory: Must be a valid boolean."),
        ({"less_memory": None}, "less_memory: This field may not be null."),
        ([True], "Invalid data. Expected a dictionary, but got list."),
    ],
)
def test_resume_refuses_bad_input(run, alice, api_of, asked, sentence):
    end(run)
    before = everything()
    answer = api_of(alice).post(at(run, "resume/"), asked)
    assert (answer.status_code, answer.json()["detail"]) == (400, sentence)
    assert everything() == before


# --- The queue --------------------------------------------------------------------------------------------------------
def test_queue_is_in_the_order_in_which_runs_start(workspace, alice, bob, charlie, staff, team, api_of, handed_out):
    a1, a2, held = waits(alice, "a1", "a2", "held")
    b1 = waits(bob, "b1")
    services.hold_run(held, actor=alice)
    a2.groups.add(team)
    seen = {}
    for user in (alice, bob, charlie, staff):
        shown = api_of(user).get(f"{URL}queue/").json()
        assert (shown["rule"], shown["length"], sorted(shown)) == (waiting.TURN_RULE, 3, ["length", "rule", "runs"])
        seen[user.username] = [(row["output_name"], row["queue_place"]) for row in shown["runs"]]
    assert seen == {
        "alice": [("a1", 1), ("a2", 3)],
        "bob": [("b1", 2), ("a2", 3)],
        "charlie": [],
        "staff": [("a1", 1), ("b1", 2), ("a2", 3)],
    }
    assert [row["id"] for row in api_of(staff).get(f"{URL}queue/").json()["runs"]] == [a1.pk, b1.pk, a2.pk]


def test_queue_and_batch_know_one_method(db, alice, api_of):
    api = api_of(alice)
    assert [getattr(api, method)(f"{URL}queue/").status_code for method in ("post", "put", "delete")] == [405] * 3
    assert [getattr(api, method)(f"{URL}batch/").status_code for method in ("get", "put", "delete")] == [405] * 3
    assert [APIClient().get(f"{URL}queue/").status_code, APIClient().post(f"{URL}batch/").status_code] == [401, 401]


def test_priority_of_a_waiting_run(workspace, alice, staff, api_of, handed_out):
    first, second = waits(alice, "first", "second")
    answer = api_of(alice).post(at(first, "priority/"), {"priority": -1})
    assert (answer.status_code, answer.json()["priority"], answer.json()["queue_place"]) == (200, -1, 2)
    answer = api_of(staff).post(at(first, "priority/"), {"priority": 1})
    assert (answer.status_code, answer.json()["priority"], answer.json()["queue_place"]) == (200, 1, 1)
    first.refresh_from_db()
    second.refresh_from_db()
    assert (first.priority, second.priority) == (1, 0)
    assert list(first.events.values_list("actor__username", "message")) == [
        ("alice", "Submitted."),
        ("alice", "Priority: low."),
        ("staff", "Priority: high."),
    ]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "priority: This field is required."),
        ({"priority": 2}, PRIORITY),
        ({"priority": 10**30}, PRIORITY),
        ({"priority": 0.5}, "priority: A valid integer is required."),
        ({"priority": True}, "priority: A valid integer is required."),
        ({"priority": "high"}, "priority: A valid integer is required."),
        ({"priority": None}, "priority: This field may not be null."),
    ],
)
def test_priority_refuses_bad_input_and_changes_nothing(workspace, alice, api_of, handed_out, asked, sentence):
    run = waits(alice, "first")
    before = everything()
    answer = api_of(alice).post(at(run, "priority/"), asked)
    assert (answer.status_code, answer.json()["detail"], list(answer.json()["errors"])) == (400, sentence, ["priority"])
    assert everything() == before


def test_high_priority_is_for_staff_to_give(workspace, alice, api_of, handed_out):
    run = waits(alice, "first")
    before = everything()
    answer = api_of(alice).post(at(run, "priority/"), {"priority": 1})
    sentence = "High priority passes by the runs of others: ask staff for it."
    assert (answer.status_code, answer.json()["detail"]) == (403, sentence)
    assert everything() == before


def test_move_among_ones_own(workspace, alice, bob, api_of, handed_out):
    a1, a2, a3 = waits(alice, "a1", "a2", "a3")
    waits(bob, "b1")
    api = api_of(alice)
    places = []
    for to in ("first", "down", "last", "up"):
        answer = api.post(at(a3, "move/"), {"to": to})
        assert answer.status_code == 200
        places.append((to, answer.json()["queue_place"], [run.output_name for run in waiting.queue_in_order()]))
    assert places == [
        ("first", 1, ["a3", "b1", "a1", "a2"]),
        ("down", 3, ["a1", "b1", "a3", "a2"]),
        ("last", 4, ["a1", "b1", "a2", "a3"]),
        ("up", 3, ["a1", "b1", "a3", "a2"]),
    ]
    assert (a1.events.count(), a2.events.count(), a3.events.count()) == (1, 1, 5)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "to: This field is required."),
        ({"to": ""}, "to: This field may not be blank."),
        ({"to": ["up"]}, "to: Not a valid string."),
        ({"to": "sideways"}, "Move it up, down, first or last."),
    ],
)
def test_move_refuses_bad_input_and_changes_nothing(workspace, alice, api_of, handed_out, asked, sentence):
    run, _ = waits(alice, "first", "second")
    before = everything()
    answer = api_of(alice).post(at(run, "move/"), asked)
    assert (answer.status_code, answer.json()["detail"], list(answer.json()["errors"])) == (400, sentence, ["to"])
    assert everything() == before


@pytest.mark.parametrize(
    ("part", "asked"), [("priority/", {"priority": -1}), ("move/", {"to": "up"}), ("hold/", {}), ("release/", {})]
)
def test_run_that_does_not_wait_keeps_its_place(run, alice, api_of, part, asked):
    before = everything()
    answer = api_of(alice).post(at(run, part), asked)
    assert (answer.status_code, answer.json()) == (409, {"detail": NOT_WAITING})
    assert everything() == before


def test_submit_takes_a_priority(workspace, alice, staff, api_of, handed_out):
    good = {"dataset": make_dataset(alice).pk, "base_model": make_base_model().pk, "output_name": "low"}
    assert api_of(alice).post(URL, good | {"priority": -1}).json()["priority"] == -1
    answer = api_of(alice).post(URL, good | {"output_name": "high", "priority": 1})
    sentence = "High priority passes by the runs of others: ask staff for it."
    assert (answer.status_code, answer.json()) == (403, {"detail": sentence, "errors": {"priority": [sentence]}})
    assert api_of(alice).post(URL, good | {"output_name": "high", "priority": 5}).json()["detail"] == PRIORITY
    assert api_of(staff).post(URL, good | {"output_name": "high", "priority": 1}).status_code == 201
    assert sorted(Run.objects.values_list("output_name", "priority")) == [("high", 1), ("low", -1)]


def test_submit_answers_with_the_run_as_it_started(workspace, alice, api_of, handed_out):
    make_slot()
    good = {"dataset": make_dataset(alice).pk, "base_model": make_base_model().pk, "output_name": "new"}
    answer = api_of(alice).post(URL, good).json()
    assert (answer["status"], answer["slot"], answer["queue_place"]) == ("starting", "testhost/cpu", None)


# --- Several at once --------------------------------------------------------------------------------------------------
@pytest.fixture
def batch(workspace, alice, handed_out):
    """What submits several runs of Alice's, without `varied`."""
    settings = {"steps": 4, "alpha": 2}
    dataset, model = make_dataset(alice).pk, make_base_model().pk
    return {"dataset": dataset, "base_model": model, "output_name": "cat", "settings": settings, "priority": -1}


def test_batch_queues_a_run_for_each_combination(batch, alice, api_of):
    answer = api_of(alice).post(f"{URL}batch/", batch | {"varied": {"rank": [2, 4], "learning_rate": [0.0001, "2e-4"]}})
    assert answer.status_code == 201
    runs = list(Run.objects.order_by("pk"))
    assert [row["id"] for row in answer.json()] == [run.pk for run in runs]
    assert [row["queue_place"] for row in answer.json()] == [1, 2, 3, 4]
    assert [(run.output_name, run.spec["rank"], run.spec["learning_rate"]) for run in runs] == [
        ("cat-r2-lr0.0001", 2, 0.0001),
        ("cat-r2-lr2e-4", 2, 0.0002),
        ("cat-r4-lr0.0001", 4, 0.0001),
        ("cat-r4-lr2e-4", 4, 0.0002),
    ]
    assert {(run.owner, run.priority, run.status, run.total_steps) for run in runs} == {(alice, -1, "queued", 4)}
    assert [run.dataset_version for run in runs] == [DatasetVersion.objects.get()] * 4


def test_batch_varies_profile_and_seed(batch, alice, api_of):
    varied = {"profile": ["quick_test", "regular"], "seed": [1, 2]}
    answer = api_of(alice).post(f"{URL}batch/", batch | {"varied": varied, "settings": {"warmup_steps": 0}})
    assert [(row["output_name"], row["profile"], row["spec"]["seed"]) for row in answer.json()] == [
        ("cat-quick-test-s1", "quick_test", 1),
        ("cat-quick-test-s2", "quick_test", 2),
        ("cat-regular-s1", "regular", 1),
        ("cat-regular-s2", "regular", 2),
    ]


LISTS = "Vary numbers, texts, true and false, not lists or objects."


@pytest.mark.parametrize(
    ("change", "status", "field", "sentence"),
    [
        ({}, 400, "varied", "varied: This field is required."),
        ({"varied": [8]}, 400, "varied", 'varied: Expected a dictionary of items but got type "list".'),
        ({"varied": {"rank": 8}}, 400, "varied", 'varied: Expected a list of items but got type "int".'),
        ({"varied": {"rank": [[8]]}}, 400, "varied", f"varied: {LISTS}"),
        ({"varied": {"sample_prompts": [{}]}}, 400, "varied", f"varied: {LISTS}"),
        ({"varied": {"ranks": [8]}}, 400, "ranks", "There is no setting 'ranks' to vary."),
        ({"varied": {"rank": [2, 0]}}, 400, "rank", "Rank must be at least 1."),
        ({"varied": {"rank": [2, None]}}, 400, "rank", "Rank is a whole number."),
        ({"varied": {"seed": list(range(51))}}, 400, None, "That makes more than 50 runs. Vary less at a time."),
        ({"varied": {"profile": ["best"]}}, 400, "profile", "There is no profile 'best'. Choose one of:"),
        ({"varied": {"rank": [2]}, "priority": 1}, 403, "priority", "High priority passes by the runs of others:"),
        ({"varied": {"rank": [2]}, "output_name": "x/"}, 400, "output_name", "Use letters, digits"),
        ({"varied": {"rank": [2]}, "output_name": "c" * 99}, 400, "output_name", "Use letters, digits"),
        ({"varied": {"rank": [2, 4]}}, 409, "output_name", "There is a result called 'cat-r4' already."),
        ({"varied": {"rank": [2, "2"]}}, 409, "output_name", "There is a result called 'cat-r2' already."),
        ({"varied": {"rank": [2]}, "dataset": 0}, 400, "dataset", 'dataset: Invalid pk "0"'),
    ],
)
def test_batch_is_all_or_nothing(batch, alice, api_of, change, status, field, sentence):
    make_run(alice, output_name="cat-r4")
    before = everything()
    answer = api_of(alice).post(f"{URL}batch/", batch | change)
    assert (answer.status_code, answer.json()["detail"][: len(sentence)]) == (status, sentence)
    assert field is None or list(answer.json()["errors"]) == [field]
    assert everything() == before


def test_batch_is_for_those_who_see_the_dataset(batch, alice, bob, charlie, team, api_of):
    asked = batch | {"varied": {"rank": [2, 4]}}
    assert api_of(alice, "read").post(f"{URL}batch/", asked).json() == {"detail": READ_ONLY}
    assert api_of(charlie).post(f"{URL}batch/", asked).json()["detail"].startswith("dataset: Invalid pk")
    assert Run.objects.count() == 0
    Dataset.objects.get().groups.add(team)
    assert api_of(bob).post(f"{URL}batch/", asked).status_code == 201
    assert list(Run.objects.values_list("owner__username", flat=True)) == ["bob", "bob"]


# --- Lists ------------------------------------------------------------------------------------------------------------
def test_list_is_filtered(workspace, alice, api_of, handed_out):
    waits(alice, "low", priority=-1)
    waits(alice, "normal")
    api = api_of(alice)
    found = {"priority=-1": ["low"], "priority=0": ["normal"], "priority=1": [], "stack=builtin": ["normal", "low"]}
    for asked, names in found.items():
        assert [row["output_name"] for row in api.get(f"{URL}?{asked}").json()["results"]] == names
    for name, value in (("priority", "7"), ("stack", "none")):
        answer = api.get(f"{URL}?{name}={value}")
        sentence = f"Select a valid choice. {value} is not one of the available choices."
        assert (answer.status_code, answer.json()["errors"]) == (400, {name: [sentence]})


def queries(api, address):
    api.get(address)
    with CaptureQueriesContext(connection) as asked:
        shown = api.get(address).json()
    return shown.get("count", shown.get("length")), len(asked)


@pytest.mark.parametrize("address", [URL, f"{URL}queue/"])
def test_list_of_waiting_runs_takes_as_many_queries_for_three_as_for_one(
    workspace, alice, charlie, api_of, handed_out, address
):
    make_slot()
    training = make_run(charlie, output_name="training")
    Run.objects.filter(pk=training.pk).update(eta_seconds=30)
    waits(alice, "first")
    one, asked = queries(api_of(alice), address)
    waits(alice, "second", "third")
    assert (one, queries(api_of(alice), address)) == (1, (3, asked))


def test_list_of_ended_runs_takes_as_many_queries_for_three_as_for_one_and_leaves_the_queue_alone(
    workspace, alice, api_of, handed_out
):
    api = api_of(alice)
    end(waits(alice, "first"))
    one, asked = queries(api, URL)
    for run in waits(alice, "second", "third"):
        end(run)
    assert (one, queries(api, URL)) == (1, (3, asked))
    assert asked == 3  # the token, the count, the rows


def test_list_of_attempts_takes_as_many_queries_for_three_as_for_one(run, alice, api_of):
    api = api_of(alice)
    api.get(at(run, "attempts/"))
    with CaptureQueriesContext(connection) as asked:
        assert len(api.get(at(run, "attempts/")).json()) == 1
    for number in (2, 3):
        Attempt.objects.create(run=run, number=number, slot=Attempt.objects.first().slot)
    with CaptureQueriesContext(connection) as again:
        assert len(api.get(at(run, "attempts/")).json()) == 3
    assert len(again) == len(asked)


def test_delete_takes_row_and_files_of_an_ended_run_only(run, alice, api_of):
    api = api_of(alice)
    assert api.delete(f"/api/v1/runs/{run.pk}/").status_code == 409
    second = make_run(alice, output_name="second")
    api.post(f"/api/v1/runs/{second.pk}/stop/")
    second.folder.mkdir()
    assert api.delete(f"/api/v1/runs/{second.pk}/").status_code == 204
    assert not second.folder.exists()
    assert [found.output_name for found in Run.objects.all()] == ["first"]


def test_delete_keeps_a_run_from_starting_meanwhile(run, alice, monkeypatch):
    """A slot that becomes free just now would train a run that is being deleted."""
    second = waits(alice, "second")
    forget, started = library.forget_run, []

    def start():
        try:
            with connection.cursor() as cursor:
                if connection.vendor == "postgresql":
                    cursor.execute("SET lock_timeout = '30s'")
            started.append(Run.objects.filter(pk=second.pk, status="queued").update(priority=0))
        finally:
            connection.close()

    def race(run):
        thread = Thread(target=start)
        thread.start()
        thread.join(1)
        seen.append((list(started), thread))
        forget(run)

    seen = []
    monkeypatch.setattr(library, "forget_run", race)
    services.delete_run(second)
    [(before, thread)] = seen
    thread.join(30)
    assert (before, started, Run.objects.filter(pk=second.pk).exists()) == ([], [0], False)
