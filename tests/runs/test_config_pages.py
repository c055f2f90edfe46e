"""Trainers on the run form, and configurations as text: written, read, shown for other trainers, and run on them."""

import html
import json
import sys

import pytest
from django.urls import reverse

from lorapilot.models import AuditEntry
from runs import trainpilot
from runs.models import Run, TrainPilotBase
from tests.factories import make_base_model, make_dataset, make_run, make_slot

pytestmark = pytest.mark.django_db
NO_RUN = ["options", "write_config", "read_config", "base_config"]


def to(name, *args):
    return reverse(f"runs:{name}", args=args)


@pytest.fixture
def kohya(tmp_path, settings):
    """A folder like that of sd-scripts: enough to be called installed."""
    home = tmp_path / "sd-scripts"
    home.mkdir()
    (home / "train_network.py").touch()
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(home), "python": sys.executable}}


@pytest.fixture
def browser(alice, client_of):
    return client_of(alice)


@pytest.fixture
def chosen(workspace, alice):
    """What the form holds when a dataset and a model are chosen."""
    return {
        "dataset": make_dataset(alice).pk,
        "base_model": make_base_model().pk,
        "output_name": "cat",
        "stack": "kohya",
        "profile": "",
    }


def text(answer):
    return html.unescape(answer.content.decode())


# --- The form ---------------------------------------------------------------------------------------------------------
def test_form_offers_every_trainer_and_ours_is_chosen(browser, workspace):
    page = text(browser.get(to("new")))
    for name in ("Built-in trainer", "Kohya sd-scripts", "AI Toolkit", "Diffusion Pipe"):
        assert f">{name}</option>" in page
    assert '<option value="builtin" selected>' in page


def test_options_are_those_of_the_trainer_for_the_kind_of_model(browser, chosen):
    page = text(browser.post(to("options"), chosen | {"option-huber_schedule": "snr"}))
    assert 'name="option-scale_weight_norms"' in page
    assert 'name="option-guidance_scale"' not in page  # for FLUX.1 only; the model is SDXL
    assert '<option value="snr" selected>' in page
    assert "option-" not in text(browser.post(to("options"), chosen | {"stack": "builtin"}))


def test_run_is_submitted_with_its_trainer_and_options(browser, chosen, kohya, handed_out):
    make_slot(trainers=["kohya"])
    values = {"steps": "20", "option-scale_weight_norms": "1.5", "option-network_args": "rank_dropout=0.1"}
    answer = browser.post(to("new"), chosen | values)
    run = Run.objects.get()
    assert answer.url == to("detail", run.pk)
    assert run.stack == "kohya"
    assert run.options == {"scale_weight_norms": 1.5, "network_args": ["rank_dropout=0.1"]}


@pytest.mark.parametrize(
    ("values", "field", "sentence"),
    [
        ({"option-scale_weight_norms": "lots"}, "option-scale_weight_norms", "is a number."),
        ({"stack": "other"}, "stack", "Select a valid choice."),
        ({"stack": "ai_toolkit"}, "stack", "AI Toolkit is not installed."),
        ({"option-random_crop": "true"}, "option-random_crop", "Random crops and colours differ each time"),
    ],
)
def test_form_that_is_refused_says_why_at_the_field(browser, chosen, kohya, values, field, sentence):
    answer = browser.post(to("new"), chosen | values)
    assert answer.status_code == 422
    errors = answer.context["form"].errors[field]
    assert sentence in " ".join(errors)
    assert not Run.objects.exists()


def test_everything_that_is_wrong_is_said_at_once(browser, chosen, kohya, alice, api_of):
    own = {"scale_weight_norms": "lots", "huber_schedule": "never", "network_args": "rank_dropout=0.1"}
    values = {"rank": "0", "warmup_steps": "-1", "min_snr_gamma": "5"}
    answer = browser.post(to("new"), chosen | values | {f"option-{key}": value for key, value in own.items()})
    wrong = {"rank", "warmup_steps", "option-scale_weight_norms"}
    assert (answer.status_code, set(answer.context["form"].errors)) == (422, wrong | {"option-huber_schedule"})

    asked = chosen | {"settings": values, "options": own | {"huber_schedul": "snr"}}
    previewed = text(browser.post(to("preview"), chosen | values | {f"option-{key}": one for key, one in own.items()}))
    assert previewed.count("notice-warning") == len(wrong) + 1
    answer = api_of(alice).post("/api/v1/runs/", asked, format="json")
    said = answer.json()
    assert (answer.status_code, said["detail"]) == (400, said["errors"]["rank"][0])
    own_wrong = {f"options.{key}" for key in ("scale_weight_norms", "huber_schedule", "huber_schedul")}
    assert set(said["errors"]) == {"rank", "warmup_steps"} | own_wrong
    assert not Run.objects.exists()


def test_options_of_another_trainer_wait_until_it_is_chosen_again(browser, chosen, kohya):
    typed = {"option-network_args": 'rank_dropout=0.1\nmodule_dropout="0"', "option-scale_weight_norms": "1.5"}
    page = text(browser.post(to("options"), chosen | typed | {"stack": "builtin"}))
    assert "2 options of another trainer or model wait until you choose it again." in page
    assert '<input type="hidden" name="option-scale_weight_norms" value="1.5">' in page
    assert 'value="rank_dropout=0.1\nmodule_dropout="0""' in page
    assert "another trainer or model" not in text(browser.post(to("options"), chosen | typed))
    answer = browser.post(to("new"), chosen | typed | {"stack": "builtin", "output_name": ""})
    assert (answer.status_code, answer.context["form"].kept) == (422, typed)


def test_preview_tells_what_the_trainer_cannot_express(browser, chosen, kohya):
    page = text(browser.post(to("preview"), chosen | {"ema_decay": "0.999"}))
    assert "Moving average (0.999) has no counterpart in Kohya sd-scripts." in page
    for figure in ("Repeats", "Memory, about", "Disk, at most", "Time"):
        assert f"<dt>{figure}</dt>" in page


# --- As text ----------------------------------------------------------------------------------------------------------
def test_form_is_written_as_the_trainer_s_configuration(browser, chosen, kohya):
    page = text(browser.post(to("write_config"), chosen | {"rank": "24", "option-scale_weight_norms": "1.5"}))
    assert "network_dim = 24\n" in page
    assert "scale_weight_norms = 1.5\n" in page


def test_writing_without_a_dataset_keeps_the_text(browser, workspace):
    page = text(browser.post(to("write_config"), {"stack": "kohya", "config": "network_dim = 3"}))
    assert "Choose a dataset and a base model first." in page
    assert "network_dim = 3" in page


def test_configuration_fills_the_form_and_says_what_is_left_out(browser, chosen):
    config = 'network_dim = 24\nscale_weight_norms = 1.5\nwandb_api_key = "x"\npretrained_model_name_or_path = "gone"'
    answer = browser.post(to("read_config"), chosen | {"config": config})
    form = answer.context["form"]
    assert (answer.status_code, form["rank"].value(), form["profile"].value()) == (200, "24", "")
    assert form["option-scale_weight_norms"].value() == "1.5"
    assert form["base_model"].value() == str(chosen["base_model"])
    page = text(answer)
    assert "wandb_api_key is left out." in page
    assert "names the base model gone, which is not registered here" in page


def test_epochs_are_steps_of_the_chosen_dataset(browser, chosen):
    answer = browser.post(to("read_config"), chosen | {"config": "max_train_epochs = 4"})
    assert answer.context["form"]["steps"].value() == "12"
    assert "Its 4 epochs are 12 steps with this dataset." in text(answer)


def test_configuration_names_the_base_model_by_its_path(browser, chosen):
    config = 'pretrained_model_name_or_path = "pilot-tiny"\nnetwork_dim = 4'
    form = browser.post(to("read_config"), chosen | {"base_model": "", "config": config}).context["form"]
    assert form["base_model"].value() == str(chosen["base_model"])


def test_configuration_that_is_none_is_refused_with_line_and_column(browser, chosen):
    answer = browser.post(to("read_config"), chosen | {"config": "rank = = 3", "output_name": "kept"})
    assert answer.status_code == 422
    assert "This is no TOML: Invalid value (at line 1, column 8)." in text(answer)
    assert answer.context["form"]["output_name"].value() == "kept"


# --- A run elsewhere --------------------------------------------------------------------------------------------------
@pytest.fixture
def run(workspace, alice, team, handed_out):
    """Alice's, shared with Bob's team."""
    run = make_run(alice, values={"ema_decay": 0.999, "min_snr_gamma": 5.0})
    run.groups.add(team)
    return run


@pytest.mark.parametrize("stack", ["builtin", "kohya", "ai_toolkit", "diffusion_pipe"])
def test_run_is_shown_in_the_words_of_every_trainer(browser, run, stack):
    """Also of those that are not installed: or why that one cannot train the model."""
    answer = browser.get(to("config", run.pk), {"stack": stack})
    found = answer.context["found"]
    assert answer.status_code == 200
    assert found.text or found.refusal
    assert (run.folder / "_attempts").exists() is False


def test_configuration_is_downloaded(browser, run):
    answer = browser.get(to("config", run.pk), {"stack": "kohya", "download": "1"})
    assert answer["Content-Disposition"] == 'attachment; filename="first.toml"'
    assert b"network_dim = 2\n" in answer.content


def test_what_is_lost_elsewhere_is_shown(browser, run):
    page = text(browser.get(to("config", run.pk), {"stack": "kohya"}))
    assert "Moving average (0.999) has no counterpart in Kohya sd-scripts." in page
    assert "Run again on Kohya sd-scripts" in page


def test_run_is_run_again_on_another_trainer(browser, run, kohya):
    answer = browser.post(to("run_on", run.pk), {"stack": "kohya"})
    again = Run.objects.exclude(pk=run.pk).get()
    assert answer.url == to("detail", again.pk)
    assert (again.stack, again.retry_of, again.dataset_version) == ("kohya", run, run.dataset_version)
    assert "Moving average (0.999) has no counterpart in Kohya sd-scripts." in again.notes


def test_run_on_a_trainer_that_is_not_installed_is_refused(browser, run):
    assert browser.post(to("run_on", run.pk), {"stack": "kohya"}).status_code == 400
    assert Run.objects.get() == run


def test_options_of_one_trainer_are_named_as_lost_on_another(alice, browser, workspace, kohya, handed_out):
    run = make_run(alice, stack="kohya", options={"scale_weight_norms": 1.5})
    found = browser.get(to("config", run.pk), {"stack": "builtin"}).context["found"]
    assert found.lost == ["scale_weight_norms of Kohya sd-scripts has no counterpart in Built-in trainer."]


def test_pages_of_a_run_do_not_exist_for_strangers(run, charlie, bob, client_of):
    assert client_of(bob).get(to("config", run.pk)).status_code == 200
    stranger = client_of(charlie)
    assert stranger.get(to("config", run.pk)).status_code == 404
    assert stranger.post(to("run_on", run.pk), {"stack": "kohya"}).status_code == 404


def test_visitors_are_asked_to_sign_in(run, client):
    for address in [*map(to, NO_RUN), to("config", run.pk), to("run_on", run.pk)]:
        for answer in (client.get(address), client.post(address)):
            assert (answer.status_code, answer.url) == (302, f"{reverse('account_login')}?next={address}")


def test_wrong_methods_are_refused(browser, run):
    for name in ("options", "write_config", "read_config"):
        assert browser.get(to(name)).status_code == 405
    assert browser.get(to("run_on", run.pk)).status_code == 405
    assert browser.post(to("config", run.pk)).status_code == 405


# --- TrainPilot's base configuration ----------------------------------------------------------------------------------
def test_base_configuration_is_the_documented_one_until_it_is_changed(browser, alice, bob):
    assert trainpilot.DEFAULT.splitlines()[0] in text(browser.get(to("base_config")))
    answer = browser.post(to("base_config"), {"content": "noise_offset = 0.05\nmin_bucket_reso = 256"})
    assert answer.url == to("base_config")
    assert trainpilot.base_of(alice).values == {"noise_offset": 0.05}
    assert trainpilot.base_of(alice).options == {"min_bucket_reso": 256}
    assert trainpilot.base_text(bob) == trainpilot.DEFAULT


def test_base_configuration_that_cannot_be_read_changes_nothing(browser, alice):
    answer = browser.post(to("base_config"), {"content": "noise_offset = many"})
    assert answer.status_code == 422
    assert "This is no TOML: Invalid value (at line 1, column 16)." in text(answer)
    assert "noise_offset = many" in text(answer)
    assert not TrainPilotBase.objects.exists()


def test_base_configuration_goes_back_to_the_documented_one(browser, alice):
    trainpilot.save_base(alice, "noise_offset = 0.05")
    browser.post(to("base_config"), {"reset": "1"})
    assert not TrainPilotBase.objects.exists()


def test_profile_builds_on_the_base_configuration(alice, workspace, kohya, handed_out):
    trainpilot.save_base(alice, "noise_offset = 0.05\nmin_bucket_reso = 256\nnetwork_dim = 8\nlr_warmup_steps = 900")
    run = make_run(alice, stack="kohya", profile="quick_test", values={"steps": 36, "rank": 32, "alpha": 16})
    assert (run.spec["noise_offset"], run.spec["warmup_steps"], run.spec["rank"]) == (
        0.05,
        2,
        32,
    )  # a tenth of 24 steps
    assert run.options == {"min_bucket_reso": 256}
    ours = make_run(alice, output_name="second", profile="quick_test", values={"steps": 36})
    assert ours.options == {}
    assert "min_bucket_reso of your base configuration has no counterpart in Built-in trainer." in ours.notes


def test_documented_base_configuration_says_the_profiles_own_base(alice):
    from runs.profiles import BASE

    read = trainpilot.base_of(alice)
    said = {name: value for name, value in read.values.items() if name != "gradient_checkpointing"}
    assert said == dict(BASE.items())
    assert read.notes == []


def test_nothing_of_a_configuration_is_kept_in_the_audit(browser, chosen):
    browser.post(to("read_config"), chosen | {"config": 'wandb_api_key = "secret"'})
    assert "secret" not in json.dumps(list(AuditEntry.objects.values()), default=str)


# --- The trigger word -------------------------------------------------------------------------------------------------
def test_trigger_word_is_in_the_sample_prompts_that_nobody_wrote():
    from runs.planning import default_prompts

    pictures = [{"caption": "sks red"}, {"caption": "a green square"}, {"caption": ""}]
    assert default_prompts(pictures, "sks") == ["sks red", "sks, a green square"]
    assert default_prompts(pictures) == ["sks red", "a green square"]


def test_sample_prompts_without_the_trigger_word_are_told(browser, chosen, kohya):
    page = text(browser.post(to("preview"), chosen | {"sample_prompts": "sks red\na green square"}))
    assert "The trigger word sks is missing in 1 of 2 sample prompts." in page
