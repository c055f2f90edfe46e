"""Which runs saw a picture, and what deleting one for good does to runs."""

from __future__ import annotations

import pytest
from django.urls import reverse

from datasets import destruction, pictures, services
from datasets.edit_services import edit_picture
from datasets.models import DatasetVersion, Picture
from lorapilot.errors import UserError
from lorapilot.models import AuditEntry
from runs import picture_history
from runs.enums import Status
from runs.models import Checkpoint, Run
from runs.services import resume_run, retry_run
from runs.services import stop_run as stop
from tests.factories import make_dataset, make_run


@pytest.fixture
def dataset(alice, team, workspace):
    return services.share_dataset(make_dataset(alice), groups=[team])


@pytest.fixture
def red(dataset):
    return dataset.pictures.get(original_name="red.png")


def page(name, picture):
    return reverse(f"runs:{name}", args=[picture.dataset_id, picture.pk])


def test_runs_that_saw_a_picture_with_the_caption_that_it_had(alice, dataset, red):
    first = make_run(alice, output_name="first")
    Checkpoint.objects.create(run=first, step=4, path="first.safetensors", bytes=1, sha256="0" * 64, is_final=True)
    services.set_caption(red, caption="other")
    root = red.sha256
    edit_picture(red, rotation=90, crop=None)
    make_run(alice, output_name="second")
    services.delete_picture(red)
    make_run(alice, output_name="third")
    seen = picture_history.runs_that_saw(alice, root)
    told = [(one.run.output_name, one.caption, one.is_edited, one.loras) for one in seen]
    assert told == [("second", "other", True, []), ("first", "sks red", False, ["first.safetensors"])]


def test_runs_of_others_are_not_told(alice, bob, charlie, staff, dataset, red, client_of):
    make_run(alice, output_name="hers")
    assert picture_history.runs_that_saw(bob, red.sha256) == []
    assert [one.run.output_name for one in picture_history.runs_that_saw(staff, red.sha256)] == ["hers"]
    answer = client_of(bob).get(page("of_picture", red))
    assert (answer.status_code, "hers" in answer.content.decode()) == (200, False)


def test_page_lists_runs(alice, dataset, red, client_of, client, charlie):
    make_run(alice, output_name="hers")
    text = client_of(alice).get(page("of_picture", red)).content.decode()
    assert ("hers" in text, "sks red" in text, "Delete for good" in text) == (True, True, True)
    assert client_of(charlie).get(page("of_picture", red)).status_code == 404
    assert client.get(page("of_picture", red)).status_code == 302
    assert client_of(alice).post(page("of_picture", red)).status_code == 405


def test_versions_name_their_runs(alice, bob, charlie, dataset, red, client_of, django_assert_num_queries):
    runs = [make_run(alice, output_name=name) for name in ("first", "second")]
    services.set_caption(red, caption="other")
    later = make_run(alice, output_name="later")
    one, two = runs[0].dataset_version_id, later.dataset_version_id
    found = picture_history.runs_on_versions(alice, dataset)
    assert found == {one: [runs[1], runs[0]], two: [later]}
    address = reverse("runs:of_versions", args=[dataset.pk])
    answer = client_of(alice).get(address).content.decode()
    links = [f'<a href="{reverse("runs:detail", args=[run.pk])}">{run.output_name}</a>' for run in (*runs, later)]
    assert f'<span id="runs-of-version-{one}" hx-swap-oob="true">{links[1]}, {links[0]}</span>' in answer
    assert f'<span id="runs-of-version-{two}" hx-swap-oob="true">{links[2]}</span>' in answer
    versions_page = client_of(alice).get(reverse("datasets:versions", args=[dataset.pk])).content.decode()
    assert (f'hx-get="{address}"' in versions_page, f'id="runs-of-version-{one}"' in versions_page) == (True, True)
    assert "runs-of-version" not in client_of(bob).get(address).content.decode()  # hers are not his to see
    assert client_of(charlie).get(address).status_code == 404
    assert client_of(alice).post(address).status_code == 405
    with django_assert_num_queries(1):
        assert len(picture_history.runs_on_versions(alice, dataset)) == 2
    for number in range(6):
        make_run(alice, output_name=f"more-{number}")
    assert "</a> and 1 more</span>" in client_of(alice).get(address).content.decode()


def test_api_lists_runs(alice, bob, charlie, dataset, red, api_of):
    run = make_run(alice, output_name="hers")
    address = f"/api/v1/datasets/{dataset.pk}/pictures/{red.pk}/runs/"
    assert api_of(alice).get(address).json() == [
        {
            "run": run.pk,
            "output_name": "hers",
            "status": "queued",
            "version": "shapes v1",
            "caption": "sks red",
            "is_edited": False,
            "loras": [],
        }
    ]
    assert api_of(bob).get(address).json() == []
    assert [api_of(charlie).get(address).status_code, api_of(alice).post(address).status_code] == [404, 405]


def test_destroying_asks_with_what_is_affected_and_hides_runs_of_others(alice, bob, dataset, red, client_of):
    for owner, name in ((alice, "hers"), (bob, "his")):
        run = make_run_on(dataset, owner, name)
        stop(run, actor=owner)
    text = client_of(alice).get(page("destroy_picture", red)).content.decode()
    assert ("hers" in text, "his<" in text, "And 1 run of others." in text, "shapes v1" in text) == (
        True,
        False,
        True,
        True,
    )
    assert Picture.objects.filter(pk=red.pk).exists()


def make_run_on(dataset, owner, name):
    from runs.services import submit_run
    from tests.factories import make_base_model

    values = {"steps": 4, "rank": 2, "alpha": 2}
    return submit_run(owner, dataset=dataset, base_model=make_base_model(), output_name=name, values=values)


def test_destroyed_picture_stops_a_resume_and_a_repetition_with_a_sentence(alice, dataset, red, client_of):
    run = make_run(alice, output_name="hers")
    stop(run, actor=alice)
    version = DatasetVersion.objects.values().get()
    others = list(dataset.pictures.exclude(pk=red.pk).values())
    answer = client_of(alice).post(page("destroy_picture", red))
    assert (answer.status_code, answer.url) == (302, reverse("datasets:detail", args=[dataset.pk]))
    assert list(dataset.pictures.values()) == others
    assert not pictures.picture_path(red.sha256, "png").exists()
    assert DatasetVersion.objects.values().get() == version
    message = (
        "shapes v1 cannot be trained on again: red.png of it was deleted for good. "
        "Start a new run on the dataset as it is now."
    )
    for again in (lambda: resume_run(run, actor=alice), lambda: retry_run(run, actor=alice)):
        with pytest.raises(UserError) as refused:
            again()
        assert refused.value.message == message
    run.refresh_from_db()
    assert (run.status, Run.objects.count()) == (Status.STOPPED, 1)
    assert make_run(alice, output_name="next").status == Status.QUEUED
    assert AuditEntry.objects.get(action="picture deleted for good").subject == "red.png of shapes"


def test_destroying_is_refused_while_a_run_waits_for_the_picture(alice, bob, dataset, red, client_of):
    make_run_on(dataset, bob, "his")
    answer = client_of(alice).post(page("destroy_picture", red))
    assert (answer.status_code, "Runs that wait or train need this picture. Stop" in answer.content.decode()) == (
        409,
        True,
    )
    assert pictures.picture_path(red.sha256, "png").exists()
    assert Picture.objects.filter(pk=red.pk).exists()


def test_destroying_is_for_owner_and_staff(bob, charlie, staff, client, dataset, red, client_of, api_of):
    api = f"/api/v1/datasets/{dataset.pk}/pictures/{red.pk}/for-good/"
    for user, status in ((bob, 403), (charlie, 404)):
        assert client_of(user).get(page("destroy_picture", red)).status_code == status
        assert client_of(user).post(page("destroy_picture", red)).status_code == status
        assert api_of(user).delete(api).status_code == status
    assert client.post(page("destroy_picture", red)).status_code == 302
    assert client_of(staff).put(page("destroy_picture", red)).status_code == 405
    assert api_of(staff).get(api).status_code == 405
    assert pictures.picture_path(red.sha256, "png").exists()
    assert api_of(staff).delete(api).status_code == 204
    assert not pictures.picture_path(red.sha256, "png").exists()


def test_staff_destroy_everywhere_and_an_owner_only_what_is_own(alice, charlie, staff, dataset, red):
    others = make_dataset(charlie)
    run = make_run_on(others, charlie, "theirs")
    picture_history.destroy_picture(alice, red)  # Charlie's waiting run needs Charlie's version only
    assert (others.pictures.count(), destruction.missing_pictures(run.dataset_version)) == (3, [])
    stop(run, actor=charlie)
    green = dataset.pictures.get(original_name="green.png")
    picture_history.destroy_picture(staff, green)
    assert destruction.missing_pictures(run.dataset_version) == ["green.png"]
    assert not others.pictures.filter(sha256=green.sha256).exists()


def test_run_form_links_to_the_quality_of_the_dataset(alice, dataset, client_of, workspace):
    from tests.factories import make_base_model

    fields = {
        "dataset": dataset.pk,
        "base_model": make_base_model().pk,
        "output_name": "x",
        "profile": "",
        "resolution": 64,
    }
    text = client_of(alice).post(reverse("runs:preview"), fields).content.decode()
    address = reverse("datasets:quality-summary", args=[dataset.pk])
    assert f'hx-get="{address}?resolution=64&amp;buckets=on"' in text
