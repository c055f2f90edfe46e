"""Captions that a run makes on a device: in the queue as others are, with slot, log and stop."""

import sys
import textwrap
import time

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from datasets import services as dataset_services
from datasets.captioning import services
from datasets.captioning.services import Order
from lorapilot.errors import Conflict, UserError
from models_registry import manifest
from runs import captioning as captions
from runs import services as run_services
from runs import waiting
from runs.dispatch import dispatch
from runs.models import Run
from runs.stacks import CAPTIONER, base, captioner
from runs.stacks.builtin import EVENTS_FILE
from runs.supervision.follow import supervise_slice
from tests.captioners import make_blip, make_tagger
from tests.factories import make_dataset, make_run, make_slot, picture_file

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def dataset(alice, team, workspace):
    """Alice's, shared with Bob's team: red and green without a caption, blue with one."""
    made = make_dataset(alice)
    made.pictures.exclude(original_name="blue.png").update(caption="")
    return dataset_services.share_dataset(made, groups=[team])


def page_of(name, captioning, *arguments):
    return reverse(f"captioning:{name}", args=[captioning.dataset_id, captioning.pk, *arguments])


def texts(dataset):
    return dict(dataset.pictures.order_by("pk").values_list("original_name", "caption"))


def states(captioning):
    return list(captioning.proposals.order_by("pk").values_list("picture__original_name", "state", "caption"))


# --- Captions of a run ------------------------------------------------------------------------------------------------
STAND_IN = textwrap.dedent(
    """
    import json, signal, sys, time
    order = json.load(open(sys.argv[1]))
    behaviour = sys.argv[2]
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    def tell(event, **content):
        with open(order["events_file"], "a") as file:
            file.write(json.dumps({"v": 1, "event": event, "at": time.time(), **content}) + "\\n")
    step, total = order["start_step"], order["start_step"] + len(order["pictures"])
    print("looking", flush=True)
    tell("started", start_step=step, total_steps=total)
    captioned = 0
    for picture in order["pictures"]:
        name = picture.rpartition("/")[2].partition(".")[0]
        if behaviour == "sees nothing":
            tell("refused", image=name, reason="Nothing was found.")
        else:
            tell("captioned", image=name, caption="seen_" + str(step))
            captioned += 1
        step += 1
        tell("progress", step=step, total_steps=total, steps_per_second=2.0, eta_seconds=1.0)
        if behaviour == "refuses":
            tell("error", code="model", message="The model is no good.")
            sys.exit(2)
        while behaviour == "waits" and not stopped:
            time.sleep(0.02)
        if stopped:
            tell("stopped", step=step)
            sys.exit(130)
    tell("finished", step=total, captioned=captioned)
    """
)


@pytest.fixture
def tagger(workspace, monkeypatch):
    """A folder as of a tagger; `behaviour` of the program that stands in for ours."""
    folder = workspace / "models" / "taggers" / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"")
    (folder / "selected_tags.csv").write_text("name,category\n")
    real = captioner.CaptionerStack.compile

    class Program:
        behaviour = "finishes"

    def compile_stand_in(self, job_):
        plan = real(self, job_)
        program = job_.attempt_folder / "captioner.py"
        return base.LaunchPlan(
            files={**plan.files, program: STAND_IN},
            argv=[sys.executable, str(program), str(plan.config), Program.behaviour],
            env={"PATH": ""},
            cwd=job_.folder,
            stop=[base.StopStep("SIGINT", 10), base.StopStep("SIGKILL", 1)],
        )

    monkeypatch.setattr(captioner.CaptionerStack, "compile", compile_stand_in)
    return Program


LOCAL = {"captioner": "tagger", "model": "taggers/tiny", "options": {"begin_with_trigger": True}}


def play_worker(attempts, until=lambda: False, seconds=60):
    deadline = time.monotonic() + seconds
    while attempts and not until():
        assert time.monotonic() < deadline
        supervise_slice(attempts.pop().pk)


def test_run_of_the_captioner_proposes(tagger, alice, dataset, handed_out):
    make_slot()
    made = captions.start(alice, dataset, Order(**LOCAL))
    run = Run.objects.get()
    assert (run.stack, run.base_model, run.captioning, run.output_name, run.total_steps) == (
        *("captioner", None, made, "captions-shapes"),
        2,
    )
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.step, run.total_steps, run.slot) == ("succeeded", 2, 2, None)
    assert states(made) == [("red.png", "proposed", "sks, seen_0"), ("green.png", "proposed", "sks, seen_1")]
    assert texts(dataset) == {"red.png": "", "green.png": "", "blue.png": "sks blue"}
    assert run.log_path.read_bytes() == b"looking\n"
    assert captions.activity_of(made).status == "succeeded"


def test_order_whose_name_was_just_taken_is_refused_and_leaves_nothing(tagger, alice, dataset, monkeypatch):
    make_run(alice, output_name="captions-shapes")
    monkeypatch.setattr(captions, "free_name", lambda name: name)
    with pytest.raises(Conflict, match="another run called captions-shapes"):
        captions.start(alice, dataset, Order(**LOCAL))
    assert (Run.objects.count(), dataset.captionings.count()) == (1, 0)


@pytest.mark.parametrize("is_page", [True, False])
def test_orders_ask_as_often_for_three_as_for_one(tagger, alice, dataset, handed_out, client_of, api_of, is_page):
    address = f"/datasets/{dataset.pk}/captioning/" if is_page else f"/api/v1/datasets/{dataset.pk}/captioning/"
    client = client_of(alice) if is_page else api_of(alice)
    asked = []
    for count in (1, 2):
        for _ in range(count):
            made = captions.start(alice, dataset, Order(**LOCAL))
            captions.cancel(made, actor=alice)
        client.get(address)
        with CaptureQueriesContext(connection) as queries:
            assert client.get(address).status_code == 200
        asked.append(len(queries))
    assert asked[0] == asked[1]


def test_run_of_the_captioner_waits_for_its_slot_like_others(tagger, alice, dataset, handed_out):
    make_slot()
    trains = make_run(alice)
    captions.start(alice, dataset, Order(**LOCAL))
    assert list(Run.objects.order_by("pk").values_list("status", flat=True)) == ["starting", "queued"]
    assert trains.trains


def test_stopped_run_keeps_its_captions_and_goes_on_with_the_rest(tagger, alice, dataset, handed_out):
    make_slot()
    tagger.behaviour = "waits"
    made = captions.start(alice, dataset, Order(**LOCAL))
    run = Run.objects.get()

    def stop_once_captioned():
        if made.proposals.filter(state="proposed").exists() and run_services.newest_state_step(run):
            run.refresh_from_db()
            if run.status == "running":
                captions.cancel(made, actor=alice)
        return False

    play_worker(handed_out, until=stop_once_captioned)
    run.refresh_from_db()
    assert (run.status, run.reason) == ("stopped", "Stopped at picture 1; the captions so far are kept.")
    assert [state for _, state, _ in states(made)] == ["proposed", "waiting"]
    tagger.behaviour = "finishes"
    captions.go_on(made, actor=alice)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt, run.step, Run.objects.count()) == ("succeeded", 2, 2, 1)
    assert [text for _, _, text in states(made)] == ["sks, seen_0", "sks, seen_1"]


def test_run_that_sees_nothing_fails_and_is_tried_again_as_a_new_run(tagger, alice, dataset, handed_out):
    make_slot()
    tagger.behaviour = "sees nothing"
    made = captions.start(alice, dataset, Order(**LOCAL))
    play_worker(handed_out)
    run = Run.objects.get()
    assert (run.status, run.reason[:26]) == ("failed", "No picture got a caption. ")
    assert set(made.proposals.values_list("state", "reason")) == {("failed", "Nothing was found.")}
    tagger.behaviour = "finishes"
    captions.go_on(made, actor=alice)
    play_worker(handed_out)
    assert {state for _, state, _ in states(made)} == {"proposed"}


def test_run_whose_program_refuses_fails_with_its_sentence(tagger, alice, dataset, handed_out):
    make_slot()
    tagger.behaviour = "refuses"
    captions.start(alice, dataset, Order(**LOCAL))
    play_worker(handed_out)
    assert list(Run.objects.values_list("status", "reason")) == [("failed", "The model is no good.")]


def test_run_whose_dataset_was_deleted_says_so(tagger, alice, dataset, handed_out):
    captions.start(alice, dataset, Order(**LOCAL))
    dataset_services.delete_dataset(dataset)
    make_slot()
    dispatch()
    play_worker(handed_out)
    run = Run.objects.get()
    assert (run.status, run.captioning, run.reason[:36]) == ("failed", None, "No picture waits for a caption any m")


def test_database_holds_that_only_captions_lack_a_base_model(tagger, alice, dataset, handed_out):
    captions.start(alice, dataset, Order(**LOCAL))
    trains = make_run(alice)
    for run, values in ((trains, {"base_model": None}), (Run.objects.get(stack="captioner"), {"stack": "builtin"})):
        with pytest.raises(IntegrityError), transaction.atomic():
            Run.objects.filter(pk=run.pk).update(**values)


def test_pages_and_api_show_a_run_that_makes_captions(tagger, alice, bob, dataset, handed_out, client_of, api_of):
    make_slot()
    made = captions.start(alice, dataset, Order(**LOCAL))
    browser, caller, pk = client_of(alice), api_of(alice), Run.objects.get().pk
    for finish in (False, True):
        if finish:
            play_worker(handed_out)
        page = browser.get(f"/runs/{pk}/").content.decode()
        assert page_of("show", made) in page
        assert ("data-loss-chart" in page, "LoRA files" in page, "clone-button" in page) == (False, False, False)
        assert "taggers/tiny" in browser.get("/runs/").content.decode()
        shown = caller.get(f"/api/v1/runs/{pk}/").json()
        assert (shown["stack"], shown["base_model"], shown["base_model_sha256"]) == ("captioner", None, None)
        assert f"/runs/{pk}/" in browser.get(page_of("show", made)).content.decode()
    for address in (f"/runs/{pk}/config/", f"/runs/new/?from={pk}"):
        assert browser.get(address).status_code == 400
    assert browser.post(f"/runs/{pk}/retry/").status_code == 400
    assert caller.post("/api/v1/runs/", {"stack": "captioner"}).status_code == 400
    assert "captions-shapes" not in browser.get("/runs/compare/choose/").content.decode()
    assert client_of(bob).get(f"/runs/{pk}/").status_code == 404


def test_forecast_counts_runs_that_make_captions(tagger, alice, dataset, handed_out):
    make_slot()
    captions.start(alice, dataset, Order(**LOCAL))
    play_worker(handed_out)
    Run.objects.update(steps_per_second=2.0)
    dataset_services.import_files(dataset, files=[("yellow.png", picture_file("yellow"))])
    captions.start(alice, dataset, Order(**LOCAL))
    assert waiting.expected_seconds(Run.objects.first()) == 1.5


def test_models_of_this_installation_are_found(tagger, workspace):
    models = workspace / "models"
    for name, kind in (("blip", "blip"), ("gpt", "gpt2")):
        (models / name).mkdir()
        (models / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        for other in ("preprocessor_config.json", "tokenizer_config.json"):
            (models / name / other).write_text("{}")
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_text("[")
    assert (captions.local_models("tagger"), captions.local_models("sentences")) == (["taggers/tiny"], ["blip"])


def test_manifest_brings_what_the_captioners_need():
    entries = [entry for entry in manifest.load().entries if entry.stacks == ("captioner",)]
    complete = {one: [all(map(entry.provides, captions.FILES[one])) for entry in entries] for one in captions.FILES}
    assert [sum(found) for found in zip(*complete.values(), strict=True)] == [1] * len(entries)
    assert {one: sum(found) for one, found in complete.items()} == {"tagger": 3, "sentences": 1}


def test_captioner_is_no_trainer():
    for refuse in (lambda: CAPTIONER.read_config(""), lambda: CAPTIONER.check_spec(None, {})):
        with pytest.raises(UserError, match="trains nothing"):
            refuse()
    assert "trains nothing" in CAPTIONER.refusal(None)


# --- The real programs ------------------------------------------------------------------------------------------------
def run_for_real(alice, dataset, handed_out, **order):
    make_slot()
    made = captions.start(alice, dataset, Order(**order))
    play_worker(handed_out, seconds=120)
    run = Run.objects.get()
    assert (run.status, run.reason) == ("succeeded", "")
    assert (run.attempt_folder() / EVENTS_FILE).is_file()
    return made


def test_tiny_tagger_for_real(workspace, alice, dataset, handed_out):
    make_tagger(workspace / "models" / "tiny-tagger")
    made = run_for_real(alice, dataset, handed_out, captioner="tagger", model="tiny-tagger")
    assert states(made) == [
        ("red.png", "proposed", "sks, red queen, o_o"),
        ("green.png", "proposed", "sks, green leaf"),
    ]


def test_tiny_blip_for_real(workspace, alice, dataset, handed_out):
    make_blip(workspace / "models" / "tiny-blip")
    options = {"max_tokens": 8}
    made = run_for_real(alice, dataset, handed_out, captioner="sentences", model="tiny-blip", options=options)
    assert {state for _, state, _ in states(made)} == {"proposed"}
    services.accept(made, actor=alice)
    assert all(text.startswith("sks") for text in texts(dataset).values())
