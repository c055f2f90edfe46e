"""The calls that existing scripts make: their fields and statuses, who may, what is refused, and what is stored."""

import json
import sys

import pytest
from django.test import Client
from rest_framework.test import APIClient

from datasets.models import DatasetVersion
from datasets.services import create_dataset
from lorapilot.models import Job
from lorapilot.services import set_secret
from models_registry.models import BaseModel, Pull
from models_registry.services import attach_component, register_base_model
from runs import diffusion_pipe_scripts
from runs.models import Run, RunEvent, TrainPilotBase
from runs.supervision import runner
from runs.trainpilot import DEFAULT
from tests.factories import make_base_model, make_dataset, make_run, make_slot
from tests.models_registry.conftest import SDXL, write_file
from tests.models_registry.published import GEMMA2, HUNYUAN_VIDEO, LLAMA3, LUMINA2, clip, vae
from tests.runs import diffusion_pipe_stand_in

pytestmark = pytest.mark.django_db

DOCUMENTED_TOML = "/opt/pilot/apps/TrainPilot/newlora.toml"
NOTHING = "There is no such thing, or it is not shared with you."
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
READ_ONLY = "This token can only read. Create one with scope `write` on the account page."
HUB_ID = "a/sdxl is a Hugging Face id. Runs stay off the network: name a model of the models folder instead."
GET = [
    "/api/trainpilot/logs",
    "/api/trainpilot/toml",
    "/dpipe/train/logs",
    "/api/datasets",
    "/api/models",
    "/api/models/pilot/pull/status",
    "/api/services",
    "/api/telemetry",
    "/api/tensorboard/status",
]
POST = [
    "/api/trainpilot/start",
    "/api/trainpilot/stop",
    "/api/trainpilot/toml",
    "/api/trainpilot/model-check",
    "/dpipe/train/validate",
    "/dpipe/train/start",
    "/dpipe/train/stop",
    "/api/models/pilot/pull/start",
]
START, STOP, LOGS, TOML, CHECK = (
    f"/api/trainpilot/{name}" for name in ("start", "stop", "logs", "toml", "model-check")
)


@pytest.fixture
def cats(workspace, alice, handed_out):
    """Alice's dataset; the bundled base model is the only one."""
    make_base_model()
    return make_dataset(alice, name="cats")


@pytest.fixture
def kohya(settings, tmp_path):
    """sd-scripts is installed, as far as its files tell."""
    home = tmp_path / "sd-scripts"
    home.mkdir()
    (home / "train_network.py").touch()
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(home), "python": sys.executable}}


def rows():
    """All that a refused call may not change."""
    tables = (Run, RunEvent, DatasetVersion, TrainPilotBase, BaseModel, Pull, Job)
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables}


def refused(api, url, body, status):
    """The one sentence of a refusal that has changed nothing."""
    before = rows()
    answer = api.post(url, json.dumps(body), content_type="application/json")
    assert (answer.status_code, rows() == before) == (status, True), answer.content
    return answer.json()["detail"]


def running(run, *, pid=4321):
    """As while its trainer runs."""
    Run.objects.filter(pk=run.pk).update(status="running", slot=make_slot(f"host-{run.pk}"))
    run.attempt_folder().mkdir(parents=True)
    record = {"pid": 1, "start_ticks": 1, "boot_id": runner.boot_id(), "trainer_pid": pid}
    (run.attempt_folder() / "runner.json").write_text(json.dumps(record))
    run.refresh_from_db()
    return run


def ended(run, **values):
    Run.objects.filter(pk=run.pk).update(
        **{"status": "stopped", "slot": None, "finished_at": run.created_at, "exit_code": 130} | values
    )


def log(run, data):
    run.log_path.parent.mkdir(parents=True, exist_ok=True)
    run.log_path.write_bytes(data)


def guided(owner, name="first"):
    return make_run(owner, output_name=name, profile="quick_test", values={"warmup_steps": 0})


# --- All of them ------------------------------------------------------------------------------------------------------
def test_anonymous_is_asked_for_a_token(db):
    api = APIClient()
    answers = {url: api.get(url) if url in GET else api.post(url) for url in [*GET, *POST]}
    assert {url for url, answer in answers.items() if answer.status_code != 401} == set()
    assert {answer.headers["WWW-Authenticate"] for answer in answers.values()} == {"Token"}


def test_wrong_method(alice, api_of):
    api = api_of(alice)
    wrong = {("delete", url) for url in {*GET, *POST}} | {("get", url) for url in {*POST} - {*GET}}
    wrong |= {("post", url) for url in {*GET} - {*POST}}
    assert {(method, url) for method, url in wrong if getattr(api, method)(url).status_code != 405} == set()


def test_token_that_only_reads_may_not_post(workspace, alice, api_of):
    api = api_of(alice, "read")
    assert {url: refused(api, url, {}, 403) for url in POST} == dict.fromkeys(POST, READ_ONLY)


@pytest.mark.parametrize("body", ["[]", "[1]", '"text"', "3", "null"])
def test_body_that_is_no_object_is_refused(workspace, alice, api_of, body):
    api = api_of(alice)
    for url, status in ((START, 400), (TOML, 422), ("/dpipe/train/start", 400)):
        answer = api.post(url, body, content_type="application/json")
        assert (answer.status_code, bool(answer.json()["detail"])) == (status, True)


def test_session_needs_the_csrf_token(workspace, alice):
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    assert browser.post(START, {"dataset_name": "cats"}).status_code == 403
    assert browser.get("/api/datasets").status_code == 200


# --- TrainPilot: start ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["cats", "1_cats"])
def test_start_queues_a_guided_run_by_either_name(cats, alice, api_of, name):
    body = {"dataset_name": name, "output_name": "my-cats", "profile": "quick_test", "toml_path": DOCUMENTED_TOML}
    answer = api_of(alice).post(START, body)
    run = Run.objects.get()
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "queued", "run": run.pk, "pid": None, "stack": "builtin"},
    )
    assert (run.owner, run.output_name, run.profile, run.stack) == (alice, "my-cats", "quick_test", "builtin")
    assert (run.dataset_version.dataset, run.base_model.name) == (cats, "pilot-tiny")
    assert (run.spec["steps"], run.spec["rank"], run.spec["lr_schedule"]) == (24, 32, "cosine_with_restarts")


@pytest.mark.django_db(transaction=True)
def test_start_takes_a_free_slot_and_queues_the_next_one(cats, alice, api_of, handed_out):
    make_slot()
    first, second = (api_of(alice).post(START, {"dataset_name": "cats", "output_name": name}) for name in ("a", "b"))
    assert [answer.status_code for answer in (first, second)] == [200, 200]
    assert [answer.json()["status"] for answer in (first, second)] == ["started", "queued"]
    assert list(Run.objects.order_by("pk").values_list("status", "profile")) == [
        ("starting", "regular"),
        ("queued", "regular"),
    ]
    assert len(handed_out) == 1


def test_start_from_a_form(cats, alice, api_of):
    answer = api_of(alice).post(START, {"dataset_name": "cats"}, format="multipart")
    assert (answer.status_code, Run.objects.get().output_name) == (200, "cats")


@pytest.mark.parametrize("given", [{}, {"output_name": ""}, {"output_name": None}, {"output_name": "  "}])
def test_start_names_the_result_as_the_dataset(cats, alice, api_of, given):
    assert api_of(alice).post(START, {"dataset_name": "1_cats", **given}).status_code == 200
    assert Run.objects.get().output_name == "cats"


def test_start_makes_a_file_name_of_the_dataset_s(cats, alice, api_of):
    make_dataset(alice, name="my cats 2")
    assert api_of(alice).post(START, {"dataset_name": "my cats 2"}).status_code == 200
    assert Run.objects.get().output_name == "my-cats-2"


def test_start_prefers_the_whole_name_and_the_caller_s_own(cats, alice, bob, team, api_of):
    exact = make_dataset(alice, name="1_cats")
    cats.groups.add(team)
    own = make_dataset(bob, name="cats")
    api_of(alice).post(START, {"dataset_name": "1_cats", "output_name": "a"})
    api_of(bob).post(START, {"dataset_name": "1_cats", "output_name": "b"})
    used = {run.output_name: run.dataset_version.dataset for run in Run.objects.all()}
    assert used == {"a": exact, "b": own}


def test_start_takes_a_dataset_that_is_shared(cats, bob, team, api_of):
    cats.groups.add(team)
    assert api_of(bob).post(START, {"dataset_name": "cats"}).status_code == 200
    assert (Run.objects.get().owner, Run.objects.get().dataset_version.dataset) == (bob, cats)


def test_start_does_not_find_a_stranger_s_dataset(cats, charlie, api_of):
    sentence = refused(api_of(charlie), START, {"dataset_name": "cats"}, 404)
    assert sentence == "There is no dataset 'cats': GET /api/datasets lists yours."


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "dataset_name is required: GET /api/datasets lists yours."),
        ({"dataset_name": ["cats"]}, 400, "dataset_name is a text."),
        ({"dataset_name": "dogs"}, 404, "There is no dataset 'dogs': GET /api/datasets lists yours."),
        ({"dataset_name": "1_"}, 404, "There is no dataset '1_': GET /api/datasets lists yours."),
        ({"dataset_name": "empty"}, 400, "empty has no pictures yet: add some first."),
        ({"dataset_name": "cats", "profile": "best"}, 400, "profile is one of quick_test, regular, high_quality."),
        ({"dataset_name": "cats", "output_name": "../x"}, 400, "Use letters, digits, '.', '_' and '-' only"),
        ({"dataset_name": "cats", "output_name": "Taken"}, 409, "There is a result called 'Taken' already."),
        ({"dataset_name": "cats", "toml_path": "/etc/passwd"}, 400, "toml_path can only be trainpilot/alice.toml"),
        ({"dataset_name": "cats", "base_model": "SDXL"}, 404, "There is no base model 'SDXL'"),
        ({"dataset_name": "cats", "base_model": "9" * 5000}, 404, "There is no base model '999"),
        ({"dataset_name": "cats", "base_model": "9" * 40}, 404, "There is no base model '999"),
        ({"dataset_name": "\ud800"}, 400, "dataset_name: Surrogate characters are not allowed: U+D800."),
    ],
)
def test_start_refuses_bad_input_and_changes_nothing(cats, alice, api_of, body, status, sentence):
    make_run(alice, output_name="taken")
    create_dataset(alice, name="empty")
    assert refused(api_of(alice), START, body, status).startswith(sentence)


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        (
            'pretrained_model_name_or_path = "gone.safetensors"',
            "There is no gone.safetensors in the models folder. Put the file there.",
        ),
        (
            'pretrained_model_name_or_path = "pilot-tiny"\nvae = "vae/gone.safetensors"',
            "There is no vae/gone.safetensors in the models folder. Put the file there.",
        ),
        ('pretrained_model_name_or_path = "a/sdxl"', HUB_ID),
        (
            'pretrained_model_name_or_path = "new.safetensors"',
            "new.safetensors is not registered yet: staff do that on the Models page.",
        ),
        (
            'pretrained_model_name_or_path = "/etc/passwd"',
            "There is no /etc/passwd in the models folder. Put the file there.",
        ),
    ],
)
def test_start_refuses_a_model_that_is_not_here_and_takes_no_other(cats, alice, api_of, workspace, toml, sentence):
    (workspace / "models" / "new.safetensors").touch()
    assert api_of(alice).post(TOML, {"content": toml}).status_code == 200
    assert refused(api_of(alice), START, {"dataset_name": "cats"}, 400) == sentence


def test_call_with_a_form_refuses_a_null_character(cats, alice, api_of):
    answer = api_of(alice).post(START, {"dataset_name": "a\0b"}, format="multipart")
    assert (answer.status_code, answer.json()["detail"]) == (400, "dataset_name has a null character.")


def test_start_takes_the_model_that_the_base_configuration_names(cats, alice, api_of, workspace):
    write_file(workspace / "models" / "checkpoints" / "xl.safetensors", SDXL)
    register_base_model(path="checkpoints/xl.safetensors")
    path = workspace / "models" / "pilot-tiny"
    api_of(alice).post(TOML, {"content": f'pretrained_model_name_or_path = "{path}"\nnoise_offset = 0.1'})
    assert api_of(alice).post(START, {"dataset_name": "cats"}).status_code == 200
    run = Run.objects.get()
    assert (run.base_model.name, run.spec["noise_offset"]) == ("pilot-tiny", 0.1)


def test_start_takes_the_only_model_that_did_not_come_with_us(cats, alice, api_of, workspace):
    for name in ("xl", "yl"):
        write_file(workspace / "models" / f"{name}.safetensors", SDXL)
    register_base_model(path="xl.safetensors")
    assert api_of(alice).post(START, {"dataset_name": "cats"}).status_code == 200
    assert Run.objects.get().base_model.name == "xl"
    register_base_model(path="yl.safetensors")
    sentence = refused(api_of(alice), START, {"dataset_name": "cats", "output_name": "b"}, 400)
    assert sentence.startswith("Which base model? Write its path as pretrained_model_name_or_path")


@pytest.mark.parametrize("how", ["id", "name", "path"])
def test_start_takes_a_base_model_that_the_call_names(cats, alice, api_of, how):
    model = make_base_model()
    given = {"id": model.pk, "name": model.name, "path": model.path}[how]
    assert api_of(alice).post(START, {"dataset_name": "cats", "base_model": given}).status_code == 200
    assert Run.objects.get().base_model == model


def test_start_uses_kohya_where_it_is_installed(cats, alice, api_of, workspace, kohya):
    write_file(workspace / "models" / "xl.safetensors", SDXL)
    register_base_model(path="xl.safetensors")
    for folder in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        copy_tokenizer(workspace, folder)
    answer = api_of(alice).post(START, {"dataset_name": "cats", "output_name": "mine"})
    assert (answer.status_code, answer.json()["stack"], Run.objects.get().stack) == (200, "kohya", "kohya")


def copy_tokenizer(workspace, folder):
    """Kohya is told that it is there."""
    target = workspace / "models" / "tokenizers" / folder
    target.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_text("{}")


# --- TrainPilot: stop and logs ----------------------------------------------------------------------------------------
def test_stop_without_a_run_is_a_noop(cats, alice, api_of):
    assert api_of(alice).post(STOP).json() == {"status": "noop"}
    ended(guided(alice))
    assert api_of(alice).post(STOP).json() == {"status": "noop"}


def test_stop_ends_the_one_that_trains_then_the_one_that_waits(cats, alice, api_of):
    active, waiting = running(guided(alice)), guided(alice, "second")
    by_hand = make_run(alice, output_name="by-hand")
    assert api_of(alice).post(STOP).json() == {"status": "stopped"}
    active.refresh_from_db()
    assert (active.status, active.stop_intent, active.stop_requested_by) == ("stopping", "stop", alice)
    ended(active)
    assert api_of(alice).post(STOP).json() == {"status": "stopped"}
    assert api_of(alice).post(STOP).json() == {"status": "noop"}
    waiting.refresh_from_db()
    by_hand.refresh_from_db()
    assert (waiting.status, by_hand.status) == ("stopped", "queued")


def test_stop_of_a_named_run(cats, alice, api_of):
    first, second = guided(alice), guided(alice, "second")
    assert api_of(alice).post(STOP, {"run": first.pk}).json() == {"status": "stopped"}
    assert api_of(alice).post(STOP, {"run": str(first.pk)}).json() == {"status": "noop"}
    assert list(Run.objects.order_by("pk").values_list("status", flat=True)) == ["stopped", "queued"]
    assert second.status == "queued"


@pytest.mark.parametrize("url", [STOP, "/dpipe/train/stop"])
def test_stop_is_for_who_may_change_the_run(cats, alice, bob, charlie, staff, team, api_of, url):
    run = guided(alice)
    run.groups.add(team)
    assert refused(api_of(charlie), url, {"run": run.pk}, 404) == NOTHING
    assert refused(api_of(bob), url, {"run": run.pk}, 403) == NOT_YOURS
    assert refused(api_of(bob), url, {"run": "first"}, 400) == "run is a whole number, 1 or more."
    assert api_of(bob).post(url).json()["status"] == "noop"  # without a name it is about the caller's own
    assert api_of(staff).post(url, {"run": run.pk}).json()["status"] == "stopped"


def test_logs_without_a_run(alice, api_of):
    assert api_of(alice).get(LOGS).json() == {
        "run": None,
        "lines": [],
        "running": False,
        "offset": 0,
        "exit_code": None,
    }


def test_logs_of_the_newest_guided_run(cats, alice, api_of):
    guided(alice)
    run = guided(alice, "second")
    make_run(alice, output_name="by-hand")
    queued = {"run": run.pk, "lines": [], "running": False, "offset": 0, "exit_code": None}
    assert api_of(alice).get(LOGS).json() == queued
    log(running(run), b"one\ntwo\nthr")
    shown = {"run": run.pk, "lines": ["one", "two"], "running": True, "offset": 8, "exit_code": None}
    assert api_of(alice).get(LOGS).json() == shown
    ended(run, exit_code=3)
    shown = {"run": run.pk, "lines": ["one", "two", "thr"], "running": False, "offset": 11, "exit_code": 3}
    assert api_of(alice).get(LOGS).json() == shown


def test_logs_by_offset_tell_each_line_once(cats, alice, api_of):
    run = running(guided(alice))
    log(run, b"one\ntwo\nthree\nfou")
    offset, seen = 0, []
    for _ in range(4):
        answer = api_of(alice).get(LOGS, {"offset": offset, "limit": 2}).json()
        offset, seen = answer["offset"], [*seen, answer["lines"]]
    assert (seen, offset) == ([["one", "two"], ["three"], [], []], 14)
    log(run, b"one\ntwo\nthree\nfour\n")
    assert api_of(alice).get(LOGS, {"offset": offset}).json()["lines"] == ["four"]
    assert api_of(alice).get(LOGS, {"offset": 10**9}).json()["lines"] == []


def test_logs_show_a_progress_bar_as_a_terminal_does(cats, alice, api_of):
    run = running(guided(alice))
    log(run, b"begin\n\rstep 1\rstep 2\x1b[A\rste")
    answer = api_of(alice).get(LOGS).json()
    assert (answer["lines"], answer["offset"]) == (["begin", "step 2"], 24)
    log(run, b"begin\n\rstep 1\rstep 2\x1b[A\rstep 3\rdone\n")
    assert api_of(alice).get(LOGS, {"offset": 24}).json()["lines"] == ["done"]


def test_logs_go_on_behind_a_line_without_an_end(cats, alice, api_of, monkeypatch):
    monkeypatch.setattr("runs.scripts_api.LOG_BYTES", 4)
    log(running(guided(alice)), b"abcdefgh\nx\n")
    offsets = [0]
    for _ in range(4):
        offsets.append(api_of(alice).get(LOGS, {"offset": offsets[-1]}).json()["offset"])
    assert offsets == [0, 4, 8, 11, 11]


def test_logs_have_a_limit(cats, alice, api_of):
    log(running(guided(alice)), b"".join(b"%d\n" % number for number in range(6000)))
    api = api_of(alice)
    counts = [len(api.get(LOGS, query).json()["lines"]) for query in ({}, {"limit": 3}, {"limit": 99_999})]
    assert counts == [500, 3, 5000]
    assert api.get(LOGS, {"limit": 3}).json()["lines"] == ["5997", "5998", "5999"]
    assert len(api.get(LOGS, {"limit": 99_999, "offset": 0}).json()["lines"]) == 5000


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"limit": "0"}, "limit is a whole number, 1 or more."),
        ({"limit": "-1"}, "limit is a whole number, 1 or more."),
        ({"offset": "1.5"}, "offset is a whole number, 0 or more."),
        ({"offset": "9" * 30}, "offset is a whole number, 0 or more."),
        ({"run": "first"}, "run is a whole number, 1 or more."),
    ],
)
def test_logs_refuse_what_is_no_number(cats, alice, api_of, query, sentence):
    guided(alice)
    answer = api_of(alice).get(LOGS, query)
    assert (answer.status_code, answer.json()["detail"]) == (400, sentence)


@pytest.mark.parametrize("url", [LOGS, "/dpipe/train/logs"])
def test_logs_are_for_who_sees_the_run(cats, alice, bob, charlie, team, api_of, url):
    run = guided(alice)
    run.groups.add(team)
    log(run, b"hello\n")
    assert api_of(bob).get(url, {"run": run.pk}).json()["lines"] == ["hello"]
    assert api_of(bob).get(url).json()["run"] is None
    answer = api_of(charlie).get(url, {"run": run.pk})
    assert (answer.status_code, answer.json()["detail"]) == (404, NOTHING)


# --- TrainPilot: the base configuration -------------------------------------------------------------------------------
def test_toml_is_the_documented_one_until_it_is_replaced(alice, bob, api_of):
    assert api_of(alice).get(TOML).json() == {"content": DEFAULT, "path": "trainpilot/alice.toml"}
    answer = api_of(alice).post(TOML, {"content": "seed = 7\n"})
    assert (answer.status_code, answer.json()) == (200, {"content": "seed = 7\n", "path": "trainpilot/alice.toml"})
    assert api_of(alice).get(TOML).json() == answer.json()
    assert api_of(bob).get(TOML).json() == {"content": DEFAULT, "path": "trainpilot/bob.toml"}
    assert TrainPilotBase.objects.get().owner == alice


@pytest.mark.parametrize("body", [{}, {"content": ""}, {"content": " \n"}, {"content": None}, {"content": {"a": 1}}])
def test_toml_that_is_empty_is_422(alice, api_of, body):
    assert refused(api_of(alice), TOML, body, 422) == "content is the TOML, and it is empty."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("seed = 1\nrank = = 2\n", "This is no TOML: Invalid value (at line 2, column 8)."),
        ('seed = 1\nname = "', "This is no TOML: Unterminated string (at line 2, column 9)."),
        ("seed = ", "This is no TOML: Invalid value (at line 1, column 8)."),
        ('mixed_precision = "fp8"', "mixed_precision: 'fp8' is none of no, fp16, bf16."),
    ],
)
def test_toml_that_cannot_be_read_changes_nothing(alice, api_of, content, sentence):
    api = api_of(alice)
    api.post(TOML, {"content": "seed = 7"})
    assert refused(api, TOML, {"content": content}, 400) == sentence
    assert api.post(TOML, {"content": content}).json()["errors"] == {"content": [sentence]}


def check(api, toml):
    api.post(TOML, {"content": toml})
    answer = api.post(CHECK, {"toml_path": DOCUMENTED_TOML})
    assert (answer.status_code, answer.json()["toml_path"]) == (200, "trainpilot/alice.toml")
    return answer.json()


def item(**values):
    common = {"kind": "checkpoint", "key": "pretrained_model_name_or_path", "model_name": "", "reason": ""}
    return common | {"is_local_path": True, "exists": True} | values


def test_model_check_of_the_documented_configuration(alice, api_of):
    assert api_of(alice).post(CHECK).json() == {"toml_path": "trainpilot/alice.toml", "items": [], "missing": []}


def test_model_check_of_what_is_here(workspace, alice, api_of):
    write_file(workspace / "models" / "a" / "xl.safetensors", SDXL)
    found = check(api_of(alice), 'vae = "a"\npretrained_model_name_or_path = "a/xl.safetensors"')
    here = [item(value="a/xl.safetensors"), item(kind="vae", key="vae", value="a")]
    assert (found["items"], found["missing"]) == (here, [])


def test_model_check_does_not_miss_an_id_of_the_hub(workspace, alice, api_of):
    found = check(api_of(alice), '[model]\npretrained_model_name_or_path = "a/sdxl"')
    assert found["items"] == [item(value="a/sdxl", is_local_path=False, exists=None, reason=HUB_ID)]
    assert found["missing"] == []


def test_model_check_names_the_model_that_brings_a_file_by_its_name_only(workspace, alice, api_of, settings, tmp_path):
    settings.MODELS_MANIFEST = tmp_path / "manifest"
    settings.MODELS_MANIFEST.write_text("xl|hf_file|a/b:xl.safetensors|checkpoints\n")
    api = api_of(alice)
    known = check(api, 'pretrained_model_name_or_path = "/workspace/models/stable-diffusion/xl.safetensors"')["missing"]
    other = check(api, 'pretrained_model_name_or_path = "checkpoints/mine.safetensors"')["missing"]
    path = "/workspace/models/stable-diffusion/xl.safetensors"
    remedy = "Pull xl on the Models page: it brings xl.safetensors to checkpoints/xl.safetensors"
    reason = f"There is no {path} in the models folder. {remedy}: write this path instead."
    assert known == [item(value=path, exists=False, model_name="xl", reason=reason)]
    reason = "There is no checkpoints/mine.safetensors in the models folder. Put the file there."
    assert other == [item(value="checkpoints/mine.safetensors", exists=False, reason=reason)]


def test_model_check_refuses_another_toml(alice, api_of):
    sentence = refused(api_of(alice), CHECK, {"toml_path": "trainpilot/bob.toml"}, 400)
    assert sentence.startswith("toml_path can only be trainpilot/alice.toml, your own base configuration")


# --- Diffusion Pipe ---------------------------------------------------------------------------------------------------
VALIDATE, DP_START, DP_STOP, DP_LOGS = (f"/dpipe/train/{name}" for name in ("validate", "start", "stop", "logs"))
PATHS = {
    "transformer_path": "hunyuan/transformer.safetensors",
    "vae_path": "hunyuan/vae.safetensors",
    "llm_path": "hunyuan/llm",
    "clip_path": "hunyuan/clip",
}
BODY = PATHS | {
    "dataset_path": "/workspace/datasets/1_cats/",
    "config_dir": "/workspace/config",
    "output_dir": "/workspace/outputs/my-video",
}


@pytest.fixture
def pipe(settings, tmp_path):
    """Diffusion Pipe is installed, as far as its files tell."""
    home = tmp_path / "diffusion-pipe"
    diffusion_pipe_stand_in.install(home)
    settings.TRAINERS = settings.TRAINERS | {"diffusion_pipe": {"home": str(home), "python": sys.executable}}


@pytest.fixture
def files(workspace):
    """HunyuanVideo and its parts in the models folder, not registered."""
    folder = workspace / "models" / "hunyuan"
    write_file(folder / "transformer.safetensors", HUNYUAN_VIDEO)
    write_file(folder / "vae.safetensors", vae(16, dimensions=5, name="decoder.conv_in.conv.weight"))
    for name, tensors in (("llm", LLAMA3), ("clip", clip(768))):
        write_file(folder / name / "model.safetensors", tensors)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hunyuan(files):
    model = register_base_model(path=PATHS["transformer_path"], name="HunyuanVideo")
    for role, path in (
        ("vae", PATHS["vae_path"]),
        ("llm", PATHS["llm_path"]),
        ("clip_l", "hunyuan/clip/model.safetensors"),
    ):
        attach_component(model, role=role, path=path)
    return model


def test_validate(files, alice, api_of):
    api = api_of(alice)
    assert api.post(VALIDATE, PATHS).json() == {"ok": True, "missing": []}
    absolute = {name: str(files.parent / path) for name, path in PATHS.items()}
    assert api.post(VALIDATE, absolute).json() == {"ok": True, "missing": []}
    wrong = PATHS | {"vae_path": "/etc/passwd", "llm_path": "gone"}
    del wrong["clip_path"]
    assert api.post(VALIDATE, wrong).json() == {
        "ok": False,
        "missing": [
            {"field": "vae_path", "path": "/etc/passwd"},
            {"field": "llm_path", "path": "gone"},
            {"field": "clip_path", "path": ""},
        ],
    }
    assert BaseModel.objects.count() == 0


def test_pipe_starts_with_the_documented_defaults(cats, pipe, hunyuan, alice, api_of):
    answer = api_of(alice).post(DP_START, BODY)
    run = Run.objects.get()
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "queued", "run": run.pk, "pid": None, "config": "outputs/my-video/my-video.toml"},
    )
    assert (run.owner, run.output_name, run.stack, run.profile) == (alice, "my-video", "diffusion_pipe", "")
    assert (run.base_model, run.dataset_version.dataset) == (hunyuan, cats)
    # 3 pictures x 10 repeats, batches of 1, 4 to an update: 8 updates an epoch, 1000 epochs.
    expected = {
        "steps": 8000, "save_every_steps": 16, "batch_size": 1, "learning_rate": 2e-5, "rank": 32, "alpha": 32.0,
        "weight_decay": 0.01, "gradient_accumulation_steps": 4, "repeats": 10, "resolution": 512, "enable_bucket": True,
        "max_grad_norm": 1.0, "warmup_steps": 100, "gradient_checkpointing": True, "precision": "bf16",
        "save_precision": "bf16", "lr_schedule": "constant_with_warmup",
    }  # fmt: skip
    assert {name: run.spec[name] for name in expected} == expected
    assert run.options == {
        "optimizer.type": "adamw_optimi",
        "optimizer.betas": [0.9, 0.99],
        "optimizer.eps": 1e-8,
        "dataset.min_ar": 0.5,
        "dataset.max_ar": 2.0,
        "dataset.num_ar_buckets": 7,
        "dataset.frame_buckets": [1, 33],
        "checkpoint_every_n_minutes": 120,
        "caching_batch_size": 1,
        "partition_method": "parameters",
        "video_clip_mode": "single_middle",
    }


LISTS = {"betas": [0.8, 0.9], "resolutions_input": [768], "ar_buckets": [0.5, 1, 1.5], "frame_buckets": [1, 17]}


@pytest.mark.parametrize("form", ["lists", "texts", "form"])
def test_pipe_takes_lists_and_their_json(cats, pipe, hunyuan, alice, api_of, form):
    lists = LISTS if form == "lists" else {name: json.dumps(value) for name, value in LISTS.items()}
    numbers = {"epochs": "3", "batch_size": "2", "num_repeats": "1", "warmup_steps": "0", "enable_ar_bucket": "true"}
    body = (
        BODY
        | lists
        | (numbers if form == "form" else {"epochs": 3, "batch_size": 2, "num_repeats": 1, "warmup_steps": 0})
    )
    answer = api_of(alice).post(DP_START, body, format="multipart" if form == "form" else "json")
    assert answer.status_code == 200, answer.json()
    run = Run.objects.get()
    assert (run.options["optimizer.betas"], run.spec["resolution"]) == ([0.8, 0.9], 768)
    assert (run.options["dataset.ar_buckets"], run.options["dataset.frame_buckets"]) == ([0.5, 1.0, 1.5], [1, 17])
    # 3 pictures, batches of 2, 4 to an update: one update an epoch.
    assert (run.spec["steps"], run.spec["lr_schedule"], run.spec["save_every_steps"]) == (3, "constant", 2)


def test_pipe_counts_repeats_of_pictures_and_warms_up_within_the_run(cats, pipe, hunyuan, alice, api_of):
    cats.pictures.filter(pk=cats.pictures.first().pk).update(repeats=5)
    body = BODY | {"epochs": 2, "num_repeats": 2, "gradient_accumulation_steps": 3}
    assert api_of(alice).post(DP_START, body).status_code == 200
    run = Run.objects.get()
    assert (run.spec["steps"], run.spec["warmup_steps"]) == (2 * 5, 9)  # (5 + 1 + 1) x 2 pictures, 3 to an update


BOUNDS = {
    "epochs": (1, 100_000), "batch_size": (1, 256), "learning_rate": (1e-9, 1), "save_every": (1, 100_000),
    "eval_every": (1, 100_000), "rank": (1, 512), "weight_decay": (0, 10), "eps": (1e-16, 1),
    "gradient_accumulation_steps": (1, 256), "num_repeats": (1, 1000), "min_ar": (0.1, 10), "max_ar": (0.1, 10),
    "num_ar_buckets": (1, 64), "gradient_clipping": (0, 1000), "warmup_steps": (0, 100_000),
    "eval_micro_batch_size_per_gpu": (1, 256), "eval_gradient_accumulation_steps": (1, 256),
    "checkpoint_every_n_minutes": (1, 10_080), "caching_batch_size": (1, 256), "steps_per_print": (1, 10_000),
}  # fmt: skip
WHOLE = set(BOUNDS) - {"learning_rate", "weight_decay", "eps", "min_ar", "max_ar", "gradient_clipping"}


def test_pipe_bounds_every_number(files, alice, api_of):
    api, before, said, expected = api_of(alice), rows(), {}, {}
    for name, (least, most) in BOUNDS.items():
        kind = "a whole number" if name in WHOLE else "a number"
        wrong = dict.fromkeys((least - 1, most + 1), f"{name} is {least:g} to {most:g}.")
        wrong |= dict.fromkeys(("many", None, "nan"), f"{name} is {kind}.")
        wrong |= {least + 0.5: f"{name} is {kind}."} if name in WHOLE else {}
        for value, sentence in wrong.items():
            answer = api.post(DP_START, BODY | {name: value})
            said[name, value] = (answer.status_code, answer.json()["detail"])
            expected[name, value] = (400, sentence)
    assert (said, rows()) == (expected, before)


def test_pipe_bounds_are_those_of_all_its_numbers():
    assert set(BOUNDS) == set(diffusion_pipe_scripts.NUMBERS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *[({name: " "}, f"{name} is required.") for name in BODY],
        ({"vae_path": "/etc/passwd"}, "There is no /etc/passwd in the models folder."),
        ({"vae_path": "../outputs"}, "There is no ../outputs in the models folder."),
        ({"llm_path": "gone\0"}, "llm_path: Null characters are not allowed."),
        ({"vae_path": 3}, "vae_path is a text of at most 500 characters."),
        ({"betas": [0.9]}, "betas has 2 items."),
        ({"betas": "[0.9, 2]"}, "betas is 0 to 1."),
        ({"betas": "0.9,"}, "betas is a list of numbers."),
        ({"betas": {"a": 1}}, "betas is a list of numbers."),
        ({"betas": "{}"}, "betas is a list of numbers."),
        ({"resolutions_input": []}, "resolutions_input has 1 item."),
        ({"resolutions_input": [512, 768]}, "resolutions_input has 1 item."),
        ({"resolutions_input": [[512, 512]]}, "resolutions_input is a whole number."),
        ({"resolutions_input": [8192]}, "resolutions_input is 64 to 4096."),
        ({"frame_buckets": ""}, "frame_buckets has 1 to 64 items."),
        ({"frame_buckets": [1.5]}, "frame_buckets is a whole number."),
        ({"ar_buckets": [50]}, "ar_buckets is 0.1 to 10."),
        ({"min_ar": 3}, "min_ar is at most max_ar."),
        ({"enable_ar_bucket": "maybe"}, "enable_ar_bucket is true or false."),
        ({"dtype": "float8"}, "dtype is one of bfloat16, float16, float32."),
        ({"save_dtype": "float8"}, "save_dtype is one of bfloat16, float16, float32."),
        ({"video_clip_mod": "x"}, "There is no field 'video_clip_mod' in this call."),
        ({"only_double_blocks": True}, "This version of Diffusion Pipe has no only_double_blocks: leave it out."),
        (
            {"resume_from_checkpoint": "true"},
            "Resume the run itself: POST /api/v1/runs/<run>/resume/. A new run starts anew.",
        ),
        (
            {"wandb_api_key": "secret"},
            "A key is no setting of a run: set that of Weights & Biases on your account page.",
        ),
    ],
)
def test_pipe_refuses_bad_input_and_changes_nothing(files, alice, api_of, change, sentence):
    assert refused(api_of(alice), DP_START, BODY | change, 400) == sentence


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"dataset_path": "/workspace/datasets/1_dogs"}, 404, "There is no dataset '1_dogs'"),
        ({"dataset_path": "/workspace/datasets/empty"}, 400, "empty has no pictures yet: add some first."),
        ({"output_dir": "/workspace/outputs/taken"}, 409, "There is a result called 'taken' already."),
        ({"output_dir": "/workspace/outputs/.x"}, 400, "Use letters, digits"),
        ({"model_type": "hunyuan"}, 400, "There is no model_type 'hunyuan'."),
        ({"model_type": "flux"}, 400, "HunyuanVideo is HunyuanVideo, not flux."),
        ({"optimizer_type": "magic"}, 400, "Optimizer: 'magic' is none of adamw,"),
        ({"partition_method": "halves"}, 400, "How it is cut: 'halves' is none of"),
        ({"video_clip_mode": "all"}, 400, "Clips of videos: 'all' is none of"),
        ({"vae_path": "hunyuan/llm"}, 400, "HunyuanVideo is trained with vae.safetensors as its VAE: name that file"),
        ({"enable_wandb": True}, 400, "monitoring.enable_wandb needs your key of Weights & Biases: set it on your"),
    ],
)
def test_pipe_refuses_what_cannot_be_trained(cats, pipe, hunyuan, alice, api_of, change, status, sentence):
    make_run(alice, output_name="taken")
    create_dataset(alice, name="empty")
    assert refused(api_of(alice), DP_START, BODY | change, status).startswith(sentence)


def test_pipe_that_is_not_installed_is_refused_before_the_start(cats, hunyuan, alice, api_of):
    assert refused(api_of(alice), DP_START, BODY, 400).startswith("diffusion-pipe is not installed.")


def test_pipe_does_not_find_a_stranger_s_dataset(cats, pipe, hunyuan, charlie, api_of):
    assert refused(api_of(charlie), DP_START, BODY, 404).startswith("There is no dataset '1_cats'")


def test_pipe_model_is_registered_for_staff_only(pipe, files, staff, alice, api_of, handed_out):
    make_dataset(alice, name="cats")
    assert refused(api_of(alice), DP_START, BODY, 403).startswith("Only staff can register and remove base models.")
    assert api_of(staff).post(DP_START, BODY).status_code == 200
    model = BaseModel.objects.get()
    parts = {part.role: part.path for part in model.components.filter(is_attached=True)}
    assert (model.path, model.architecture) == ("hunyuan/transformer.safetensors", "hunyuan_video")
    assert parts == {
        "vae": "hunyuan/vae.safetensors",
        "llm": "hunyuan/llm",
        "clip_l": "hunyuan/clip/model.safetensors",
    }
    assert Run.objects.get().base_model == model


def test_pipe_trains_another_type_with_the_parts_of_its_model(cats, pipe, alice, api_of, workspace):
    models = workspace / "models"
    write_file(models / "lumina.safetensors", LUMINA2)
    write_file(models / "ae.safetensors", vae(16))
    write_file(models / "gemma.safetensors", GEMMA2)
    model = register_base_model(path="lumina.safetensors")
    for role, path in (("vae", "ae.safetensors"), ("llm", "gemma.safetensors")):
        attach_component(model, role=role, path=path)
    names = ("dataset_path", "config_dir", "output_dir")
    body = {name: BODY[name] for name in names} | {"model_type": "lumina_2", "transformer_path": "lumina.safetensors"}
    answer = api_of(alice).post(DP_START, body | {"optimizer_type": "Prodigy", "wandb_run_name": "not used"})
    assert answer.status_code == 200, answer.json()
    options = Run.objects.get().options
    assert options["optimizer.type"] == "Prodigy"
    assert {"optimizer.betas", "optimizer.eps", "dataset.frame_buckets", "video_clip_mode"} & set(options) == set()


@pytest.mark.parametrize("status", ["waits", "trains"])
def test_pipe_second_start_is_409_with_the_run(cats, pipe, hunyuan, alice, bob, api_of, team, status):
    cats.groups.add(team)
    first = Run.objects.get(pk=api_of(alice).post(DP_START, BODY).json()["run"])
    if status == "trains":
        running(first)
    before = rows()
    answer = api_of(alice).post(DP_START, BODY | {"output_dir": "second"})
    sentence = f"Your run {first.pk} (my-video) {status} already: stop it first."
    assert (answer.status_code, answer.json(), rows() == before) == (
        409,
        {"detail": sentence, "run": first.pk},
        True,
    )
    assert api_of(bob).post(DP_START, BODY | {"output_dir": "bob"}).status_code == 200  # it is about the caller's own
    ended(first)
    assert api_of(alice).post(DP_START, BODY | {"output_dir": "second"}).status_code == 200


def test_pipe_start_is_queued_behind_other_runs(cats, pipe, hunyuan, alice, api_of):
    running(guided(alice))
    assert api_of(alice).post(DP_START, BODY).json()["status"] == "queued"


def pipe_run(api, name="my-video"):
    return Run.objects.get(pk=api.post(DP_START, BODY | {"output_dir": name}).json()["run"])


def test_pipe_stop(cats, pipe, hunyuan, alice, bob, api_of):
    api = api_of(alice)
    noop = {"status": "noop", "detail": "No Diffusion Pipe run of yours trains or waits."}
    assert api.post(DP_STOP).json() == noop
    guided(alice, "other")
    assert api.post(DP_STOP).json() == noop
    run = running(pipe_run(api), pid=4321)
    assert api.post(DP_STOP, {"pid": 1}).json() == noop
    assert api_of(bob).post(DP_STOP, {"pid": 4321}).json() == noop
    assert refused(api, DP_STOP, {"pid": "x"}, 400) == "pid is a whole number, 1 or more."
    assert api.post(DP_STOP, {"pid": 4321}).json() == {"status": "stopped", "pid": 4321}
    run.refresh_from_db()
    assert run.status == "stopping"
    ended(run)
    assert api.post(DP_STOP, {"run": run.pk}).json() == noop
    waiting = pipe_run(api, "second")
    assert api.post(DP_STOP, {"run": waiting.pk}).json() == {"status": "stopped", "pid": None}
    waiting.refresh_from_db()
    assert waiting.status == "stopped"


def test_pipe_logs(cats, pipe, hunyuan, alice, api_of):
    api = api_of(alice)
    assert api.get(DP_LOGS).json() == {"run": None, "pid": None, "lines": []}
    first = running(pipe_run(api), pid=77)
    log(first, b"one\ntwo\n")
    assert api.get(DP_LOGS).json() == {"run": first.pk, "pid": 77, "lines": ["one", "two"]}
    assert api.get(DP_LOGS, {"limit": 1}).json()["lines"] == ["two"]
    ended(first)
    second = pipe_run(api, "second")
    assert api.get(DP_LOGS).json() == {"run": second.pk, "pid": None, "lines": []}
    for query in ({"run": first.pk}, {"pid": 77}):
        assert api.get(DP_LOGS, query).json() == {"run": first.pk, "pid": 77, "lines": ["one", "two"]}
    answer = api.get(DP_LOGS, {"pid": 78})
    sentence = "None of your latest runs has the process 78: name the run."
    assert (answer.status_code, answer.json()["detail"]) == (404, sentence)
    assert api.get(DP_LOGS, {"pid": "x"}).status_code == 400


def test_pid_of_another_boot_is_not_told(cats, pipe, hunyuan, alice, api_of):
    run = running(pipe_run(api_of(alice)))
    record = run.attempt_folder() / "runner.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"boot_id": "another"}))
    assert api_of(alice).get(DP_LOGS).json()["pid"] is None


def test_pipe_sends_curves_with_the_owner_s_key(cats, pipe, hunyuan, alice, api_of):
    set_secret(alice, name="wandb", value="k" * 40)
    body = BODY | {"enable_wandb": True, "wandb_run_name": "cats 1", "wandb_tracker_name": "loras"}
    assert api_of(alice).post(DP_START, body).status_code == 200
    found = {key: value for key, value in Run.objects.get().options.items() if key.startswith("monitoring.")}
    assert found == {
        "monitoring.enable_wandb": True,
        "monitoring.wandb_tracker_name": "loras",
        "monitoring.wandb_run_name": "cats 1",
    }


# --- Other calls ------------------------------------------------------------------------------------------------------
def test_datasets(cats, alice, charlie, bob, team, api_of, django_assert_num_queries):
    size = sum(cats.pictures.values_list("bytes", flat=True))
    row = {"name": "1_cats", "display": "cats", "images": 3, "size_bytes": size, "has_tags": True}
    assert api_of(alice, "read").get("/api/datasets").json() == [row | {"path": "datasets/1_cats"}]
    assert api_of(charlie).get("/api/datasets").json() == []
    cats.groups.add(team)
    assert api_of(bob).get("/api/datasets").json() == [row | {"path": "datasets/1_cats"}]
    create_dataset(alice, name="empty")
    empty = {"name": "1_empty", "display": "empty", "images": 0, "size_bytes": 0, "has_tags": False}
    assert api_of(alice).get("/api/datasets").json()[0] == empty | {"path": "datasets/1_empty"}


@pytest.fixture
def manifest(settings, tmp_path, workspace):
    settings.MODELS_MANIFEST = tmp_path / "manifest"
    settings.MODELS_MANIFEST.write_text(
        "xl|hf_file|a/b:xl.safetensors|checkpoints||2000|mit|no|sdxl|kohya|checkpoint\n"
    )
    settings.DISK_FLOOR_BYTES = 0


def test_models(manifest, workspace, alice, staff, api_of):
    row = {
        "name": "xl",
        "kind": "hf_file",
        "source": "a/b:xl.safetensors",
        "subdir": "checkpoints",
        "include": "",
        "expected_size_bytes": 2000,
        "category": "checkpoints",
        "installed": False,
        "size_bytes": 0,
        "target_path": "checkpoints/xl.safetensors",
    }
    assert api_of(alice, "read").get("/api/models").json() == [row]
    path = write_file(workspace / "models" / "checkpoints" / "xl.safetensors", SDXL)
    assert api_of(staff).get("/api/models").json() == [
        row | {"installed": True, "size_bytes": path.stat().st_size, "target_path": str(path)}
    ]


def test_pull(manifest, alice, staff, api_of):
    idle = {"name": "xl", "state": "idle", "progress_pct": 0.0, "last_line": "", "error": ""}
    assert api_of(alice, "read").get("/api/models/xl/pull/status").json() == idle
    assert refused(api_of(alice), "/api/models/xl/pull/start", {}, 403).startswith("Only staff can pull models.")
    answer = api_of(staff).post("/api/models/xl/pull/start")
    assert (answer.status_code, answer.json()) == (200, idle | {"state": "running"})
    assert (Pull.objects.get().name, Pull.objects.get().requested_by) == ("xl", staff)
    assert api_of(alice).get("/api/models/xl/pull/status").json()["state"] == "running"
    assert refused(api_of(staff), "/api/models/xl/pull/start", {}, 409) == "xl is being pulled already."


def test_pull_of_an_unknown_model(manifest, staff, alice, api_of):
    assert refused(api_of(staff), "/api/models/yl/pull/start", {}, 404) == "The manifest has no model called yl."
    assert api_of(alice).get("/api/models/yl/pull/status").status_code == 404
    assert "subdir" in api_of(staff).post("/api/models/xl/pull/start", {"subdir": "../x"}).json()["errors"]
    assert Pull.objects.count() == 0


def test_services(workspace, alice, api_of):
    make_slot("gpu-1")
    shown = api_of(alice, "read").get("/api/services").json()
    assert {tuple(row) for row in shown} == {("name", "display", "state", "running")}
    names = {row["name"] for row in shown}
    wanted = {"web", "database", "broker", "worker:gpu-1", "builtin", "kohya", "diffusion_pipe", "tensorboard"}
    assert wanted - names == set()
    web = next(row for row in shown if row["name"] == "web")
    assert (web["running"], web["state"] in {"ok", "warning"}) == (True, True)


def test_telemetry(workspace, alice, staff, api_of):
    slot = make_slot("gpu-1")
    slot.devices.update(kind="cuda", name="H100", memory_bytes=80, index=1)
    slot.devices.get().samples.create(at=slot.host.heartbeat_at, utilisation=7.0, memory_used_bytes=9)
    shown = api_of(alice, "read").get("/api/telemetry").json()
    assert set(shown) == {"load", "cpu_count", "memory", "disks", "gpus"}
    assert (len(shown["load"]), set(shown["memory"])) == (3, {"total", "used"})
    assert [set(disk) for disk in shown["disks"]] == [{"path", "total", "free"}]
    assert shown["disks"][0]["path"] == "workspace"
    assert api_of(staff).get("/api/telemetry").json()["disks"][0]["path"] == str(workspace / "outputs")
    gpu = {"index": 1, "name": "H100", "host": "gpu-1", "util": 7.0, "mem_used": 9, "mem_total": 80}
    assert shown["gpus"] == [gpu]


def test_tensorboard_status(cats, alice, charlie, api_of):
    run = guided(alice)
    (run.folder / "tensorboard").mkdir(parents=True)
    (run.folder / "tensorboard" / "events.out.tfevents.1").touch()
    sources = api_of(alice, "read").get("/api/tensorboard/status").json()
    assert (list(sources), set(sources["sources"])) == (["sources"], {"trainpilot", "kohya", "ai-toolkit", "diffpipe"})
    ready = {"ready": True, "path": "outputs/first/tensorboard", "reason": ""}
    reason = "No Kohya run of yours has written TensorBoard events yet."
    assert sources["sources"]["trainpilot"] == ready
    assert sources["sources"]["kohya"] == {"ready": False, "path": "", "reason": reason}
    assert api_of(charlie).get("/api/tensorboard/status").json()["sources"]["trainpilot"]["ready"] is False
