"""A run again with changes, from the page and by the API: what is filled in, who may, and what comes of it."""

from __future__ import annotations

import html

import pytest
from django.urls import reverse

from datasets.models import Dataset
from datasets.services import delete_dataset, import_files
from runs import cloning, services
from runs.enums import Priority
from runs.models import Run
from runs.stacks.kohya import KohyaStack
from tests.factories import make_base_model, make_dataset, make_run, picture_file

NEW = "/runs/new/"


@pytest.fixture
def run(workspace, alice, team, handed_out):
    """Alice's, by the regular profile with three values of her own; Bob's team sees it."""
    values = {"steps": 40, "warmup_steps": 0, "sample_prompts": ["a cat", "a dog"], "flip": False}
    run = make_run(alice, profile="regular", values=values)
    run.groups.add(team)
    return run


def page(answer):
    return html.unescape(answer.content.decode())


def filled_in(browser, run, **change):
    """What the form sends when nothing is changed but `change`."""
    form = browser.get(NEW, {"from": run.pk}).context["form"]
    shown = {bound.name: bound.value() for bound in form}
    return {name: value for name, value in shown.items() if value is not None} | {"from": run.pk} | change


def test_form_shows_everything_of_the_run(run, alice, client_of):
    answer = client_of(alice).get(NEW, {"from": run.pk})
    form, text = answer.context["form"], answer.content.decode()
    shown = {name: form[name].value() for name in ("dataset", "output_name", "profile", "priority", "steps", "flip")}
    assert shown == {
        "dataset": "version",
        "output_name": "first-2",
        "profile": "regular",
        "priority": 0,
        "steps": "40",
        "flip": "false",
    }
    assert (form["sample_prompts"].value(), form["batch_size"].value()) == ("a cat\na dog", None)
    assert f'<a href="{reverse("runs:detail", args=[run.pk])}">first</a>' in text
    assert '<option value="version" selected>shapes v1: its exact 3 pictures</option>' in text
    assert f'<option value="{run.dataset_version.dataset_id}">shapes, as it is now</option>' in text


@pytest.mark.parametrize("profile", ["", "quick_test", "regular"])
def test_form_sent_unchanged_trains_the_same(workspace, alice, client_of, handed_out, profile):
    run = make_run(alice, profile=profile, values={"steps": 40, "warmup_steps": 0, "learning_rate": 3e-5})
    browser = client_of(alice)
    answer = browser.post(NEW, filled_in(browser, run))
    again = Run.objects.get(output_name="first-2")
    assert (answer.status_code, answer.url) == (302, reverse("runs:detail", args=[again.pk]))
    assert (again.spec, again.profile, again.dataset_version) == (run.spec, profile, run.dataset_version)
    assert again.retry_of == run


def test_form_sent_with_changes_trains_those(run, alice, client_of):
    browser = client_of(alice)
    browser.post(NEW, filled_in(browser, run, rank="7", output_name="other", priority="-1"))
    again = Run.objects.get(output_name="other")
    assert again.spec == run.spec | {"rank": 7}
    assert (again.retry_of, again.priority) == (run, Priority.LOW)


def test_form_may_take_the_dataset_as_it_is_now(run, alice, client_of):
    dataset = Dataset.objects.get()
    import_files(dataset, files=[("black.png", picture_file("black"))])
    browser = client_of(alice)
    browser.post(NEW, filled_in(browser, run, output_name="exact"))
    browser.post(NEW, filled_in(browser, run, output_name="now", dataset=dataset.pk))
    found = {again.output_name: str(again.dataset_version) for again in Run.objects.filter(retry_of=run)}
    assert found == {"exact": "shapes v1", "now": "shapes v2"}


def test_form_submits_many_copies(run, alice, client_of):
    browser = client_of(alice)
    browser.post(NEW, filled_in(browser, run, vary_seed="1, 2"))
    made = Run.objects.filter(retry_of=run).order_by("pk")
    assert [(one.output_name, one.dataset_version_id) for one in made] == [
        ("first-2-s1", run.dataset_version_id),
        ("first-2-s2", run.dataset_version_id),
    ]


def test_trainers_own_options_are_filled_in_and_trained_again(run, alice, client_of, monkeypatch):
    monkeypatch.setattr("runs.planning.why_unavailable", lambda _: "")
    monkeypatch.setattr(KohyaStack, "refusal", lambda *_: "")
    options = {"ip_noise_gamma": 0.1, "cache_latents": False, "lr_scheduler_args": ["lr_end=0.1", "min_lr=0.2"]}
    Run.objects.update(stack="kohya", options=options, profile="")
    browser = client_of(alice)
    sent = filled_in(browser, run)
    assert [sent["stack"], sent["option-ip_noise_gamma"], sent["option-cache_latents"]] == ["kohya", "0.1", "false"]
    answer = browser.post(NEW, sent)
    assert answer.status_code == 302, answer.context["form"].errors
    again = Run.objects.get(output_name="first-2")
    assert (again.stack, again.options, again.spec) == ("kohya", options, run.spec)


def test_configuration_is_written_and_read_for_a_copy(run, alice, client_of):
    browser = client_of(alice)
    sent = filled_in(browser, run)
    written = browser.post("/runs/new/write-config/", sent)
    config = written.context["config"]
    assert "network_dim = 2" in config
    read = browser.post(
        "/runs/new/read-config/", sent | {"config": config.replace("network_dim = 2", "network_dim = 12")}
    )
    form = read.context["form"]
    assert (form.origin, form["dataset"].value(), form["rank"].value()) == (run, "version", "12")


def test_preview_is_of_the_exact_pictures(run, alice, client_of):
    import_files(Dataset.objects.get(), files=[("black.png", picture_file("black"))])
    browser = client_of(alice)
    shown = {
        dataset: browser.post("/runs/preview/", filled_in(browser, run, dataset=dataset)).context["preview"].plan.images
        for dataset in ("version", Dataset.objects.get().pk)
    }
    assert list(shown.values()) == [3, 4]


def test_pictures_of_a_dataset_that_one_does_not_see_can_be_used(run, bob, client_of):
    browser = client_of(bob)
    assert "shapes, as it is now" not in browser.get(NEW, {"from": run.pk}).content.decode()
    refused = browser.post(NEW, filled_in(browser, run, dataset=run.dataset_version.dataset_id))
    assert (refused.status_code, list(refused.context["form"].errors)) == (422, ["dataset"])
    browser.post(NEW, filled_in(browser, run))
    again = Run.objects.get(owner=bob)
    assert (again.dataset_version, again.spec) == (run.dataset_version, run.spec)


def test_pictures_of_a_deleted_dataset_can_be_used(run, alice, client_of):
    delete_dataset(Dataset.objects.get())
    browser = client_of(alice)
    browser.post(NEW, filled_in(browser, run))
    assert Run.objects.get(output_name="first-2").dataset_version == run.dataset_version


def test_high_priority_is_passed_on_to_staff_only(run, alice, staff):
    Run.objects.update(priority=Priority.HIGH)
    run.refresh_from_db()
    given = [cloning.initial_of(run, user)["priority"] for user in (alice, staff)]
    assert given == [Priority.NORMAL, Priority.HIGH]


def test_all_settings_are_its_own_when_the_base_model_is_gone(run):
    run.base_model.architecture = "flux"
    run.options = {"color_aug": True}
    assert cloning.own_values(run, run.owner) == (run.spec, run.options)


def test_adapted_settings_are_copied_as_the_run_trained_with_them(run):
    run.adaptations = {"batch_size": 1, "gradient_accumulation_steps": 4}
    values, _ = cloning.own_values(run, run.owner)
    assert {name: values[name] for name in run.adaptations} == run.adaptations


def test_bad_input_is_refused_and_what_was_typed_is_kept(run, alice, client_of):
    browser = client_of(alice)
    answer = browser.post(NEW, filled_in(browser, run, steps="0", output_name="first"))
    assert (answer.status_code, Run.objects.count()) == (422, 1)
    assert answer.context["form"].origin == run
    assert f'name="from" value="{run.pk}"' in answer.content.decode()


@pytest.mark.parametrize("key", ["99", "x", "", "9" * 30])
def test_run_that_is_not_there_is_not_copied(run, alice, client_of, key):
    browser = client_of(alice)
    assert browser.get(NEW, {"from": key}).status_code == 404
    assert [browser.post(to, {"from": key}).status_code for to in (NEW, "/runs/preview/")] == [404, 404]


def test_stranger_copies_nothing(run, charlie, client_of):
    browser = client_of(charlie)
    assert browser.get(NEW, {"from": run.pk}).status_code == 404
    assert browser.post(NEW, {"from": run.pk, "output_name": "mine"}).status_code == 404
    assert Run.objects.count() == 1


def test_run_page_leads_to_the_form(run, bob, client_of):
    shown = client_of(bob).get(reverse("runs:detail", args=[run.pk])).content.decode()
    assert f'href="/runs/new/?from={run.pk}"' in shown


# --- The API ----------------------------------------------------------------------------------------------------------
def test_retry_by_the_api_changes_what_is_named(run, bob, api_of):
    answer = api_of(bob).post(
        f"/api/v1/runs/{run.pk}/retry/", {"settings": {"rank": 7, "flip": True}, "output_name": "mine"}, format="json"
    )
    assert (answer.status_code, answer.json()["output_name"]) == (201, "mine")
    again = Run.objects.get(owner=bob)
    assert (again.spec, again.retry_of) == (run.spec | {"rank": 7, "flip": True}, run)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"settings": {"rnk": 2}}, "rnk"),
        ({"settings": {"rank": 0}}, "rank"),
        ({"settings": "rank=2"}, "settings"),
        ({"settings": {}, "output_name": "../x"}, "output_name"),
    ],
)
def test_retry_by_the_api_refuses_bad_input(run, alice, api_of, body, field):
    answer = api_of(alice).post(f"/api/v1/runs/{run.pk}/retry/", body, format="json")
    assert (answer.status_code, list(answer.json()["errors"]), Run.objects.count()) == (400, [field], 1)


def test_retry_by_the_api_is_not_for_strangers(run, charlie, api_of):
    answer = api_of(charlie).post(f"/api/v1/runs/{run.pk}/retry/", {"settings": {"rank": 7}}, format="json")
    assert (answer.status_code, Run.objects.count()) == (404, 1)


def test_submission_may_name_a_version(workspace, alice, handed_out):
    first = make_run(alice)
    import_files(Dataset.objects.get(), files=[("black.png", picture_file("black"))])
    again = services.submit_run(
        alice, dataset=first.dataset_version, base_model=make_base_model(), output_name="second", values={"steps": 4}
    )
    assert again.dataset_version == first.dataset_version
    assert make_dataset(alice, name="others").versions.count() == 0
