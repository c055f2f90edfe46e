"""What a configuration names of model files, and what of the manifest would bring what a trainer lacks."""

import pytest
from django.urls import reverse

from lorapilot.models import Job
from models_registry import manifest_selectors
from models_registry.models import BaseModel, Pull
from runs.model_check import check_configuration, remedies
from runs.models import Run
from runs.stacks import STACKS
from tests.factories import make_base_model, make_dataset

pytestmark = pytest.mark.django_db


@pytest.fixture
def flux(workspace):
    """A FLUX.1 transformer alone in its file, as it is registered."""
    return BaseModel.objects.create(
        name="FLUX.1", path="flux1.safetensors", layout="file", architecture="flux", resolution=1024
    )


def test_what_kohya_lacks_for_flux_is_what_the_manifest_brings(flux, staff):
    names = {remedy.name: remedy.is_here for remedy in remedies(STACKS["kohya"], flux, staff)}
    assert names
    assert not any(names.values())
    assert {remedy.title for remedy in remedies(STACKS["kohya"], flux, staff)} >= {"CLIP-L text encoder", "VAE"}


@pytest.mark.parametrize(
    ("architecture", "stack", "names"),
    [
        ("chroma", "kohya", {"flux-ae", "flux-t5xxl"}),
        ("lumina2", "kohya", {"flux-ae", "lumina2-gemma2"}),
        ("z_image", "diffusion_pipe", {"flux-ae", "z-image-qwen3-4b"}),
        ("anima", "kohya", {"anima-vae", "anima-qwen3-0.6b"}),
    ],
)
def test_parts_that_kinds_of_models_share_are_offered_to_each(flux, staff, architecture, stack, names):
    flux.architecture = architecture
    assert {remedy.name for remedy in remedies(STACKS[stack], flux, staff) if remedy.role != "tokenizer"} == names


def test_only_what_would_help_is_looked_for_on_the_disk(flux, staff, monkeypatch):
    looked = []
    monkeypatch.setattr(manifest_selectors, "installed_bytes", lambda entry, _pull: looked.append(entry.name))
    found = remedies(STACKS["kohya"], flux, staff)
    assert looked == [remedy.name for remedy in found]


def test_nothing_is_offered_for_a_model_that_the_trainer_cannot_train(flux, staff):
    assert remedies(STACKS["builtin"], flux, staff) == []


def test_form_offers_a_pull_to_staff_and_says_who_can_to_others(flux, staff, alice, client_of, kohya):
    chosen = {"dataset": make_dataset(alice).pk, "base_model": flux.pk, "output_name": "cat", "stack": "kohya"}
    page = client_of(alice).post(reverse("runs:preview"), chosen).content.decode()
    assert "What would bring it" in page
    assert "Staff can pull it." in page
    chosen["dataset"] = make_dataset(staff).pk
    name = remedies(STACKS["kohya"], flux, staff)[0].name
    page = client_of(staff).post(reverse("runs:preview"), chosen).content.decode()
    assert f'hx-post="{reverse("models:pull", args=[name])}"' in page
    assert '<span class="mono">vae/ae.safetensors</span> <span class="muted">in the models folder' in page


def test_pull_beside_the_form_answers_with_a_line(flux, staff, alice, client_of):
    name = next(remedy.name for remedy in remedies(STACKS["kohya"], flux, staff))
    address, asked = reverse("models:pull", args=[name]), {"HX-Request": "true"}
    assert b"is being pulled" in client_of(staff).post(address, headers=asked).content
    assert Job.objects.get().label == f"Pull {name}"
    assert b"Only staff can pull models." in client_of(alice).post(address, headers=asked).content


def test_items_of_a_configuration(workspace):
    (workspace / "models" / "here.safetensors").parent.mkdir(exist_ok=True)
    (workspace / "models" / "here.safetensors").touch()
    found = check_configuration(
        """
        pretrained_model_name_or_path = "stabilityai/stable-diffusion-xl-base-1.0"
        vae = "here.safetensors"
        """
    )
    hub, vae = found
    assert (hub.kind, hub.is_local_path, hub.exists) == ("checkpoint", False, None)
    assert (vae.kind, vae.is_local_path, vae.exists, vae.reason) == ("vae", True, True, "")


def test_missing_file_is_never_mapped_to_another_by_its_folder(workspace):
    (item,) = check_configuration('pretrained_model_name_or_path = "checkpoints/nobody-knows-it.safetensors"')
    assert (item.exists, item.model_name) == (False, "")
    assert item.reason == (
        "There is no checkpoints/nobody-knows-it.safetensors in the models folder. Put the file there."
    )


CHECK = "/api/v1/runs/check/"


def test_check_of_a_run_tells_what_would_be_trained(workspace, alice, api_of):
    dataset, model = make_dataset(alice), make_base_model()
    asked = {"dataset": dataset.pk, "base_model": model.pk, "profile": "quick_test", "settings": {"repeats": 2}}
    answer = api_of(alice).post(CHECK, asked, format="json")
    assert answer.status_code == 200
    found = answer.json()
    assert (found["refusal"], found["missing"]) == ("", [])
    plan = found["plan"]
    assert (plan["images"], plan["repeats"], plan["spec"]["rank"]) == (3, 2, 32)
    assert plan["steps"] == plan["spec"]["steps"] == plan["epochs"] * plan["updates_per_epoch"]
    assert plan["needed_bytes"] > 0
    assert set(plan) >= {"memory_bytes", "free_bytes", "expected_seconds", "notes", "not_expressed", "device"}
    assert not Run.objects.exists()


@pytest.mark.parametrize("is_installed", [True, False])
def test_check_of_a_run_tells_what_the_trainer_lacks(flux, staff, api_of, request, is_installed):
    if is_installed:
        request.getfixturevalue("kohya")
    asked = {"dataset": make_dataset(staff).pk, "base_model": flux.pk, "stack": "kohya"}
    found = api_of(staff).post(CHECK, asked, format="json").json()
    assert found["plan"] is None
    assert found["refusal"]
    vae = {"name": "flux-ae", "role": "vae", "title": "VAE", "path": "vae/ae.safetensors", "is_here": False}
    assert vae in found["missing"]


def test_check_of_a_run_refuses_as_the_submission_does(workspace, alice, charlie, api_of):
    dataset, model = make_dataset(alice), make_base_model()
    asked = {"dataset": dataset.pk, "base_model": model.pk, "settings": {"steps": -1}}
    answer = api_of(alice).post(CHECK, asked, format="json")
    assert (answer.status_code, answer.json()["detail"]) == (400, "Steps must be at least 1.")
    assert api_of(charlie).post(CHECK, asked | {"settings": {}}, format="json").status_code == 400
    assert api_of(alice, "read").post(CHECK, asked, format="json").status_code == 403


@pytest.fixture
def big_slow(settings, tmp_path):
    settings.MODELS_MANIFEST = tmp_path / "manifest"
    settings.MODELS_MANIFEST.write_text("big-slow|hf_file|a/b:big-slow.safetensors|test\n")


def base_page(client, content):
    client.post(reverse("runs:base_config"), {"content": content})
    return client.get(reverse("runs:base_config")).content.decode()


def test_base_configuration_shows_what_is_missing_and_staff_pull_it(workspace, big_slow, staff, alice, client_of):
    names_it = 'pretrained_model_name_or_path = "test/big-slow.safetensors"'
    page = base_page(client_of(staff), names_it)
    assert "There is no test/big-slow.safetensors in the models folder." in page
    assert f'hx-post="{reverse("models:pull", args=["big-slow"])}"' in page
    page = base_page(client_of(alice), names_it)
    assert "Staff can pull it." in page
    assert "hx-post" not in page


def test_base_configuration_without_missing_files_shows_no_check(workspace, alice, client_of):
    assert "Model files that it names" not in base_page(client_of(alice), "seed = 7")


def test_missing_file_that_a_pull_would_put_there(workspace, big_slow):
    (item,) = check_configuration('pretrained_model_name_or_path = "test/big-slow.safetensors"')
    assert (item.exists, item.model_name) == (False, "big-slow")
    assert item.reason == (
        "There is no test/big-slow.safetensors in the models folder. "
        "Pull big-slow on the Models page: it brings big-slow.safetensors."
    )


@pytest.mark.parametrize("subdir", ["", "mine"])
def test_file_that_lies_elsewhere_is_not_pulled_again(workspace, big_slow, subdir):
    file = workspace / "models" / (subdir or "test") / "big-slow.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    if subdir:
        Pull.objects.create(name="big-slow", subdir=subdir)
    (item,) = check_configuration('pretrained_model_name_or_path = "other/big-slow.safetensors"')
    assert (item.exists, item.model_name) == (False, "")
    assert item.reason == (
        "There is no other/big-slow.safetensors in the models folder. "
        f"That file is at {subdir or 'test'}/big-slow.safetensors: write this path instead."
    )


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("vae", "vae"),
        ("ae", "vae"),
        ("clip_l", "clip_l"),
        ("clip_g", "clip_g"),
        ("t5xxl", "t5"),
        ("gemma2", "llm"),
        ("text_encoder", "llm"),
        ("qwen3", "llm"),
        ("byt5", "byt5"),
    ],
)
def test_parts_of_a_model_are_checked_too(workspace, key, role):
    (item,) = check_configuration(f'{key} = "nowhere/part.safetensors"')
    assert (item.kind, item.key, item.exists) == (role, key, False)


@pytest.fixture
def kohya(tmp_path, settings):
    import sys

    home = tmp_path / "sd-scripts"
    home.mkdir()
    (home / "train_network.py").touch()
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(home), "python": sys.executable}}
