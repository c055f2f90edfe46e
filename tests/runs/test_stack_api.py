"""Trainers over HTTP: which there are, their options, configurations as text; and runs with a stack and options."""

import sys
import tomllib

import pytest
from rest_framework.test import APIClient

from runs.models import Run, RunEvent
from runs.stacks import STACKS
from tests.factories import make_base_model, make_dataset, make_run, make_slot
from tests.models_registry.conftest import SD15, write_file

pytestmark = pytest.mark.django_db

STACKS_URL = "/api/v1/stacks/"
READ = "/api/v1/stacks/kohya/read-config/"
NOTHING = "There is no such thing, or it is not shared with you."
ABSENT = "Kohya sd-scripts is not installed. `manage.py doctor` on that host names the commands that mend it."


@pytest.fixture
def run(workspace, alice, team, handed_out):
    run = make_run(alice, values={"rank": 8, "alpha": 4, "noise_offset": 0.1})
    run.groups.add(team)
    return run


@pytest.fixture
def sd15(workspace):
    """A base model that Kohya trains, and its tokenizer."""
    from models_registry.services import register_base_model

    write_file(workspace / "models" / "sd15.safetensors", SD15)
    folder = workspace / "models" / "tokenizers" / "openai_clip-vit-large-patch14"
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return register_base_model(path="sd15.safetensors")


@pytest.fixture
def kohya(settings, tmp_path):
    home = tmp_path / "sd-scripts"
    home.mkdir()
    (home / "train_network.py").touch()
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(home), "python": sys.executable}}


def test_every_address_wants_a_token_and_its_own_method(run, alice, api_of):
    urls = {STACKS_URL: "get", f"{STACKS_URL}kohya/": "get", READ: "post", f"/api/v1/runs/{run.pk}/config/": "get"}
    for url, method in urls.items():
        assert getattr(APIClient(), method)(url).status_code == 401
        other = "get" if method == "post" else "post"
        assert getattr(api_of(alice), other)(url).status_code == 405


def test_list(workspace, alice, api_of, settings):
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": "", "python": ""}}
    shown = {row["key"]: row for row in api_of(alice, "read").get(STACKS_URL).json()}
    assert set(shown) == set(STACKS)
    builtin, kohya = shown["builtin"], shown["kohya"]
    assert builtin == {
        "key": "builtin",
        "name": STACKS["builtin"].name,
        "unavailable": "",
        "architectures": sorted(STACKS["builtin"].architectures),
        "saves_on_stop": True,
        "has_profiles": True,
    }
    assert (kohya["saves_on_stop"], kohya["has_profiles"], kohya["unavailable"]) == (False, True, ABSENT)


def test_list_knows_what_a_host_has_told(workspace, alice, api_of, settings):
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": "", "python": ""}}
    host = make_slot().host
    host.trainers = {"kohya": {"home": "/sd-scripts", "python_version": "3.11.7"}}
    host.save()
    shown = {row["key"]: row["unavailable"] for row in api_of(alice).get(STACKS_URL).json()}
    assert shown["kohya"] == ""


def test_options_of_a_trainer(workspace, alice, api_of):
    shown = {row["key"]: row for row in api_of(alice, "read").get(f"{STACKS_URL}kohya/").json()}
    assert len(shown) > 200
    assert shown["blocks_to_swap"]["closed"] == ""
    assert shown["network_dim"]["closed"] == "network_dim is set by the field Rank."
    swap = shown["blocks_to_swap"]
    assert (swap["type"], swap["least"], swap["choices"]) == ("int", 0, [])
    assert set(swap) == {
        "key", "group", "type", "label", "help", "choices", "least", "most", "above", "default", "architectures",
        "closed",
    }  # fmt: skip


def test_our_own_trainer_has_no_options_beside_the_settings(workspace, alice, api_of):
    assert api_of(alice).get(f"{STACKS_URL}builtin/").json() == []


@pytest.mark.parametrize(("method", "url"), [("get", f"{STACKS_URL}nemo/"), ("post", f"{STACKS_URL}nemo/read-config/")])
def test_unknown_trainer(workspace, alice, api_of, method, url):
    answer = getattr(api_of(alice), method)(url, {"config": "a = 1"} if method == "post" else None)
    known = ", ".join(sorted(STACKS))
    assert (answer.status_code, answer.json()["detail"]) == (404, f"There is no trainer 'nemo'. There are {known}.")


def test_read_config_gives_settings_options_and_the_model(workspace, alice, api_of):
    model = make_base_model()
    config = (
        'pretrained_model_name_or_path = "pilot-tiny"\nnetwork_dim = 8\nmin_bucket_reso = 512\nmax_train_epochs = 3\n'
    )
    answer = api_of(alice).post(READ, {"config": config})
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "settings": {"rank": 8},
            "options": {"min_bucket_reso": 512},
            "base_model": model.pk,
            "notes": ["Its 3 epochs are left out: choose the dataset and read it again, or set Steps."],
        },
    )
    assert Run.objects.count() == 0


def test_epochs_and_a_share_of_warm_up_become_steps_of_a_dataset(workspace, alice, charlie, api_of):
    dataset = make_dataset(alice)
    dataset.pictures.update(repeats=5)
    assert dataset.pictures.count() == 3
    config = "train_batch_size = 2\nmax_train_epochs = 10\nlr_warmup_steps = 0.05\n"
    shown = api_of(alice).post(READ, {"config": config, "dataset": dataset.pk}).json()
    assert shown["settings"] == {"batch_size": 2, "steps": 80, "warmup_steps": 4}
    assert shown["notes"] == ["Its 10 epochs are 80 steps with this dataset."]
    without = api_of(alice).post(READ, {"config": config}).json()
    assert (without["settings"], len(without["notes"])) == ({"batch_size": 2}, 2)
    assert api_of(charlie).post(READ, {"config": config, "dataset": dataset.pk}).status_code == 404

    def steps_of(trainer, config):
        asked = {"config": config, "dataset": dataset.pk}
        return api_of(alice).post(f"{STACKS_URL}{trainer}/read-config/", asked).json()["settings"]["steps"]

    assert steps_of("kohya", "max_train_steps = 7\nmax_train_epochs = 1") == 15  # epochs win
    assert [steps_of("diffusion_pipe", f"epochs = 4\n{most}") for most in ("", "max_steps = 30", "max_steps = 90")] == [
        60,
        30,
        60,
    ]


def test_read_config_says_when_the_model_is_not_here(workspace, alice, api_of):
    shown = api_of(alice).post(READ, {"config": 'pretrained_model_name_or_path = "/x/y.safetensors"'}).json()
    note = "It names the base model /x/y.safetensors, which is not registered here: choose one."
    assert (shown["base_model"], shown["notes"]) == (None, [note])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "config: This field is required."),
        ({"config": ""}, "The configuration is empty."),
        ({"config": "a = = 1"}, "This is no TOML: Invalid value (at line 1, column 5)."),
        ({"config": "min_bucket_reso = true"}, "Smallest bucket side is a whole number."),
        ({"config": "x" * 200_001}, "A configuration has at most 200,000 characters."),
    ],
)
def test_read_config_refuses_what_it_cannot_read(workspace, alice, api_of, body, sentence):
    answer = api_of(alice).post(READ, body)
    assert (answer.status_code, answer.json()["detail"]) == (400, sentence)


def test_config_of_a_run(run, alice, bob, api_of):
    shown = api_of(bob, "read").get(f"/api/v1/runs/{run.pk}/config/").json()
    assert (shown["filename"], shown["lost"], shown["refusal"]) == ("first.toml", [], "")
    config = tomllib.loads(shown["text"])
    assert (config["network_dim"], config["noise_offset"]) == (8, 0.1)


def test_config_of_a_run_for_another_trainer(run, sd15, alice, api_of):
    Run.objects.filter(pk=run.pk).update(base_model=sd15, spec=run.spec | {"ema_decay": 0.9})
    shown = api_of(alice).get(f"/api/v1/runs/{run.pk}/config/", {"stack": "kohya"}).json()
    config = tomllib.loads(shown["text"])
    assert (shown["filename"], config["network_dim"]) == ("first.toml", 8)
    assert (shown["lost"], shown["refusal"]) == (["Moving average (0.9) has no counterpart in Kohya sd-scripts."], "")


def test_config_of_a_run_that_another_trainer_cannot_train(run, alice, api_of):
    shown = api_of(alice).get(f"/api/v1/runs/{run.pk}/config/", {"stack": "diffusion_pipe"}).json()
    assert (shown["text"], shown["lost"], bool(shown["refusal"])) == ("", [], True)


def test_config_is_for_who_sees_the_run(run, charlie, alice, api_of):
    answer = api_of(charlie).get(f"/api/v1/runs/{run.pk}/config/")
    assert (answer.status_code, answer.json()["detail"]) == (404, NOTHING)
    assert api_of(alice).get(f"/api/v1/runs/{run.pk}/config/", {"stack": "nemo"}).status_code == 404


# --- Runs with a stack and options ------------------------------------------------------------------------------------
def test_submit_with_a_stack_and_its_options(sd15, kohya, alice, api_of, handed_out):
    body = {"dataset": make_dataset(alice).pk, "base_model": sd15.pk, "output_name": "mine", "stack": "kohya"}
    answer = api_of(alice).post("/api/v1/runs/", body | {"options": {"min_bucket_reso": "256", "clip_skip": 2}})
    assert (answer.status_code, answer.json()["stack"]) == (201, "kohya")
    assert answer.json()["options"] == {"min_bucket_reso": 256, "clip_skip": 2}
    assert Run.objects.get().options == {"min_bucket_reso": 256, "clip_skip": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": "nemo"}, 'stack: "nemo" is not a valid choice.'),
        ({"options": {"network_dim": 4}}, "network_dim is set by the field Rank."),
        ({"options": {"clip_skipp": 4}}, "sd-scripts has no option 'clip_skipp'. Did you mean clip_skip?"),
        ({"options": {"output_dir": "/x"}}, "output_dir is set by the platform. Each run has a folder of its own."),
        ({"options": [1]}, 'options: Expected a dictionary of items but got type "list".'),
    ],
)
def test_submit_refuses_options_and_changes_nothing(sd15, kohya, alice, api_of, handed_out, change, sentence):
    body = {"dataset": make_dataset(alice).pk, "base_model": sd15.pk, "output_name": "mine", "stack": "kohya"}
    answer = api_of(alice).post("/api/v1/runs/", body | change)
    assert (answer.status_code, answer.json()["detail"], Run.objects.count()) == (400, sentence, 0)


def test_submit_with_a_trainer_that_is_not_installed(sd15, alice, api_of, settings, handed_out):
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": "", "python": ""}}
    body = {"dataset": make_dataset(alice).pk, "base_model": sd15.pk, "output_name": "mine", "stack": "kohya"}
    answer = api_of(alice).post("/api/v1/runs/", body)
    assert (answer.status_code, answer.json()["detail"], Run.objects.count()) == (400, ABSENT, 0)


def test_retry_with_another_stack_and_settings(run, sd15, kohya, bob, api_of):
    Run.objects.filter(pk=run.pk).update(base_model=sd15, spec=run.spec | {"ema_decay": 0.9})
    body = {"stack": "kohya", "settings": {"rank": 12}, "output_name": "again"}
    answer = api_of(bob).post(f"/api/v1/runs/{run.pk}/retry/", body)
    assert (answer.status_code, answer.json()["stack"], answer.json()["spec"]["rank"]) == (201, "kohya", 12)
    made = Run.objects.get(output_name="again")
    assert (made.owner, made.retry_of, made.spec["alpha"]) == (bob, run, 4)
    assert "Moving average (0.9) has no counterpart in Kohya sd-scripts." in made.notes


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"settings": {"rank": 0}}, "Rank must be at least 1."),
        ({"settings": {"rankk": 4}}, "There is no setting 'rankk'. Did you mean rank?"),
        ({"stack": "nemo"}, 'stack: "nemo" is not a valid choice.'),
        ({"stack": "diffusion_pipe"}, "diffusion-pipe is not installed. `manage.py doctor` on that host"),
    ],
)
def test_retry_refuses_bad_input_and_changes_nothing(run, alice, charlie, api_of, settings, body, sentence):
    settings.TRAINERS = settings.TRAINERS | {"diffusion_pipe": {"home": "", "python": ""}}
    before = list(RunEvent.objects.values())
    answer = api_of(alice).post(f"/api/v1/runs/{run.pk}/retry/", body)
    assert (answer.status_code, answer.json()["detail"].startswith(sentence)) == (400, True), answer.json()
    assert api_of(charlie).post(f"/api/v1/runs/{run.pk}/retry/", {}).status_code == 404
    assert (Run.objects.count(), list(RunEvent.objects.values())) == (1, before)
