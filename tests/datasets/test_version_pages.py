"""Versions compared and restored, and the pages and API of quality: who may, and what the database holds afterwards."""

from __future__ import annotations

import io
import re

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from datasets import checking, destruction, edits, pictures, quality_urls, services, versions
from datasets.edit_services import edit_picture
from datasets.models import Dataset, DatasetVersion, Picture
from lorapilot.errors import Missing
from lorapilot.jobs import run_job
from lorapilot.models import AuditEntry, Job

ROW = ("pk", "sha256", "extension", "width", "height", "bytes", "original_name", "caption", "repeats", "edit")


def to(name, *args):
    return reverse(f"datasets:{name}", args=args)


def rows(dataset):
    return list(dataset.pictures.order_by("pk").values(*ROW))


def told(answer):
    return [(message.level_tag, str(message)) for message in get_messages(answer.wsgi_request)]


# --- Differences ------------------------------------------------------------------------------------------------------
def test_diff_of_the_same_is_empty(dataset, add):
    add("red", "blue")
    version = services.pin_version(dataset)
    assert versions.diff(version, dataset).is_empty
    assert versions.diff(version, version).is_empty


def test_diff_tells_added_removed_edited_and_captions_apart(dataset, add):
    red, blue, green, _ = add("red", "blue", "green", "white")
    before = services.pin_version(dataset)
    services.set_caption(red, caption="a dark red picture of a cat")
    services.delete_picture(blue)
    edit_picture(green, rotation=90, crop=None)
    add("black")
    dataset.trigger_word = "sks"
    found = versions.diff(before, services.set_trigger_word(dataset, trigger_word="sks"))
    assert found.trigger_word == ("ohwx", "sks")
    assert [listed["name"] for listed in found.added] == ["black.png"]
    assert [listed["name"] for listed in found.removed] == ["blue.png"]
    told = [(change.after["name"], change.is_edited, change.caption) for change in found.changed]
    assert told == [
        ("green.png", True, []),
        ("red.png", False, [("=", "a"), ("+", " dark"), ("=", " red picture"), ("+", " of a cat")]),
    ]
    back = versions.diff(dataset, before)
    assert ([one["name"] for one in back.added], [one["name"] for one in back.removed]) == (["blue.png"], ["black.png"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "a cat"),
        ("a cat, red", "a dog, red"),
        ("one  two", "one two"),
        ("Kätzchen – schläft", "kätzchen, schläft!"),
        ("a", ""),
    ],
)
def test_text_diff_gives_both_sides_back(before, after):
    pieces = versions.text_diff(before, after)
    assert "".join(text for sign, text in pieces if sign != "+") == before
    assert "".join(text for sign, text in pieces if sign != "-") == after


# --- Restore ----------------------------------------------------------------------------------------------------------
def test_restore_makes_the_dataset_as_it_was_and_can_be_undone(dataset, add):
    red, blue, green, white = add("red", "blue", "green", "white")
    edit_picture(white, rotation=90, crop=(0, 0, 20, 20))
    first, first_rows = services.pin_version(dataset), rows(dataset)
    services.set_caption(red, caption="other")
    services.delete_picture(blue)
    edit_picture(green, rotation=180, crop=None)
    edit_picture(white, rotation=0, crop=None)
    add("black")
    services.set_trigger_word(dataset, trigger_word="sks")
    changed, changed_rows = services.list_pictures(dataset), rows(dataset)
    restored = versions.restore_version(dataset, first)
    dataset.refresh_from_db()
    assert (dataset.trigger_word, services.list_pictures(dataset)) == ("ohwx", first.pictures)
    assert versions.diff(first, dataset).is_empty
    assert services.pin_version(dataset) == first
    kept = {row["sha256"]: row for row in first_rows}
    red.refresh_from_db()
    assert {name: getattr(red, name) for name in ROW} == kept[red.sha256]  # the very row
    undone = versions.restore_version(dataset, restored.before)
    dataset.refresh_from_db()
    assert (dataset.trigger_word, services.list_pictures(dataset)) == ("sks", changed)
    assert undone.before == first
    assert {row["caption"] for row in rows(dataset)} == {row["caption"] for row in changed_rows}


def test_deleting_one_picture_leaves_the_captions_of_the_others_and_restoring_brings_it_back(dataset, add):
    made = add("red", "blue", "green", "white", "black")
    version, before = services.pin_version(dataset), rows(dataset)
    services.delete_picture(made[2])
    assert rows(dataset) == [row for row in before if row["original_name"] != made[2].original_name]
    versions.restore_version(dataset, version)
    by_name = {row["original_name"]: row["caption"] for row in rows(dataset)}
    assert by_name == {row["original_name"]: row["caption"] for row in before}


def test_restore_turns_a_picture_back_in_its_place(dataset, add):
    red, blue = add("red", "blue")
    version, before = services.pin_version(dataset), rows(dataset)
    ids = [red.pk, blue.pk]
    edit_picture(red, rotation=90, crop=(0, 0, 20, 20))
    assert red.fingerprint
    restored = versions.restore_version(dataset, version)
    assert (rows(dataset), list(dataset.pictures.values_list("pk", flat=True))) == (before, ids)
    red.refresh_from_db()
    assert (red.edit, red.width, red.fingerprint, red.checked_at) == (None, 64, "", None)
    versions.restore_version(dataset, restored.before)
    red.refresh_from_db()
    assert (red.edit["rotation"], red.width, list(dataset.pictures.values_list("pk", flat=True))) == (90, 20, ids)
    assert services.list_pictures(dataset) == restored.before.pictures


def test_restore_of_an_emptied_dataset(dataset, add):
    (red,) = add("red")
    version = services.pin_version(dataset)
    services.delete_picture(red)
    assert versions.restore_version(dataset, version).before is None
    assert dataset.pictures.get().caption == "a red picture"


def test_restore_names_what_is_gone_and_refuses_when_all_is(dataset, add):
    red, _ = add("red", "blue")
    version = services.pin_version(dataset)
    destruction.destroy_picture(red, everywhere=False)
    assert versions.restore_version(dataset, version).missing == ["red.png"]
    assert dataset.pictures.get().original_name == "blue.png"
    destruction.destroy_picture(dataset.pictures.get(), everywhere=False)
    before = DatasetVersion.objects.count()
    with pytest.raises(Missing):
        versions.restore_version(dataset, version)
    assert (dataset.pictures.count(), DatasetVersion.objects.count()) == (0, before)


# --- For good ---------------------------------------------------------------------------------------------------------
def files():
    return {path.stem for path in pictures.workspace.datasets().glob("pictures/??/*")}


def test_destroyed_picture_leaves_all_datasets_of_the_owner_and_the_disk(dataset, add, alice):
    red, _ = add("red", "blue")
    root = red.sha256
    other = services.create_dataset(alice, name="Other")
    add("red", to=other)
    edit_picture(red, rotation=90, crop=None)
    version = services.pin_version(dataset)
    before = DatasetVersion.objects.values().get()
    kept = rows(dataset)[1:]
    destruction.destroy_picture(red, everywhere=False)
    assert (rows(dataset), other.pictures.count()) == (kept, 0)
    assert files() == {kept[0]["sha256"]}
    assert not pictures.thumbnail_path(root).exists()
    assert DatasetVersion.objects.values().get() == before  # checksum and caption stay
    assert destruction.missing_pictures(version) == ["red.png"]


def test_destroyed_picture_stays_for_somebody_else_who_uploaded_the_same(dataset, add, charlie):
    (red,) = add("red")
    others = services.create_dataset(charlie, name="Others")
    add("red", to=others)
    destruction.destroy_picture(red, everywhere=False)
    assert (dataset.pictures.count(), others.pictures.count(), len(files())) == (0, 1, 1)
    destruction.destroy_picture(others.pictures.get(), everywhere=False)
    assert files() == set()


def test_destroyed_picture_stays_for_a_version_of_somebody_else(dataset, add, charlie):
    (red,) = add("red")
    others = services.create_dataset(charlie, name="Others")
    add("red", to=others)
    version = services.pin_version(others)
    services.delete_dataset(others)
    destruction.destroy_picture(red, everywhere=False)
    assert destruction.missing_pictures(version) == []
    add("red")
    destruction.destroy_picture(dataset.pictures.get(), everywhere=True)
    assert (files(), Picture.objects.count()) == (set(), 0)


def test_versions_with_finds_the_uploaded_and_the_edited_picture_only(dataset, add):
    red, blue = add("red", "blue")
    root = red.sha256
    services.set_caption(blue, caption=f'it says "{root[:40]}"')
    first = services.pin_version(dataset)
    edit_picture(red, rotation=90, crop=None)
    second = services.pin_version(dataset)
    services.delete_picture(red)
    services.pin_version(dataset)
    assert set(destruction.versions_with(root)) == {first, second}
    assert edits.root_of({"sha256": red.sha256, "edit": red.edit}) == root


# --- Pages ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def addresses(dataset, add):
    (picture,) = add("red")
    services.pin_version(dataset)
    of_dataset = (
        "quality",
        "buckets",
        "quality-summary",
        "quality-check",
        "quality-keep",
        "versions",
        "versions-compare",
        "version-pin",
    )
    found = {name: to(name, dataset.pk) for name in of_dataset}
    found |= {name: to(name, dataset.pk, picture.pk) for name in ("picture-edit", "unedited")}  # see test_edits.py
    return found | {"version-restore": to("version-restore", dataset.pk, 1)}


def test_every_page_is_tested_here(addresses):
    assert {pattern.name for pattern in quality_urls.urlpatterns} == set(addresses)


def test_pages_ask_visitors_to_sign_in_and_are_not_there_for_strangers(
    addresses, charlie, client, client_of, everything
):
    before, stranger = everything(), client_of(charlie)
    gets = {name: stranger.get(address).status_code for name, address in addresses.items()}
    assert gets == dict.fromkeys(addresses, 404) | {"quality-keep": 405, "version-pin": 405}
    posts = {name: stranger.post(address).status_code for name, address in addresses.items()}
    asks = {"quality-check", "quality-keep", "picture-edit", "version-restore", "version-pin"}
    assert posts == {name: 404 if name in asks else 405 for name in addresses}
    assert {client.get(address).status_code for address in addresses.values()} == {302}
    assert {client.post(address).status_code for address in addresses.values()} == {302}
    assert everything() == before


def test_pages_are_looked_at_and_not_changed_by_the_team(addresses, dataset, bob, client_of):
    member = client_of(bob)
    looks = ("quality", "quality-summary", "quality-check", "versions")
    assert [member.get(addresses[name]).status_code for name in looks] == [200] * 4
    assert member.get(addresses["versions-compare"], {"from": "1"}).status_code == 200
    before = rows(dataset)
    for name in ("quality-keep", "version-restore", "picture-edit", "version-pin"):
        assert member.post(addresses[name], {"turn": "90"}).status_code == 403
    assert rows(dataset) == before


def test_quality_page_shows_what_is_found(dataset, add, alice, client_of):
    red, _, _ = add("red", "blue", "green")
    services.set_caption(red, caption="ohwx, 1girl, 2girls, cat, cat")
    pictures.picture_path(red.sha256, "png").unlink()
    checked = checking.check_dataset(dataset, actor=alice)
    run_job(str(checked.pk))
    page = client_of(alice).get(to("quality", dataset.pk), {"resolution": "64"}).content.decode()
    for told_ in ("1 unreadable", "2 without the trigger word", "1 with tags that contradict", "1 with a tag twice"):
        assert told_ in page
    assert "64×" in page
    assert "<style" not in page
    assert " style=" not in page


def test_quality_page_pages_through_a_bucket_with_the_parts_that_are_trained(dataset, add, alice, client_of):
    add("red", "blue", "green")
    browser = client_of(alice)
    page = browser.get(to("quality", dataset.pk), {"resolution": "64", "buckets": "off"}).content.decode()
    assert page.count("M7.5 0.0h48.2v48.0h-48.2z") == 3
    settings = {"resolution": "512", "upscale": "off", "bucket": "dropped", "step": "128", "minimum": "256"}
    page = browser.get(to("quality", dataset.pk), settings).content.decode()
    assert "3 pictures smaller than one step are left out." in page
    assert page.count('class="placed"') == 3


@pytest.mark.parametrize(("query", "shown"), [({}, "1024"), ({"resolution": ""}, "1024"), ({"resolution": "64"}, "64")])
def test_quality_page_shows_the_resolution_that_it_counts_with(dataset, add, alice, client_of, query, shown):
    add("red")
    page = client_of(alice).get(to("quality", dataset.pk), query).content.decode()
    assert re.search(r'name="resolution" value="(\d+)"', page)[1] == shown


@pytest.mark.parametrize(
    "query", [{"resolution": "65"}, {"resolution": "big"}, {"minimum": "2000"}, {"step": "12"}, {"buckets": "some"}]
)
def test_quality_page_says_which_bucket_settings_cannot_be(dataset, add, alice, api_of, client_of, query):
    add("red")
    answer = client_of(alice).get(to("quality", dataset.pk), query)
    assert (answer.status_code, "error" in answer.content.decode()) == (400, True)
    assert client_of(alice).get(to("quality-summary", dataset.pk), query).status_code == 200
    assert api_of(alice).get(f"/api/v1/datasets/{dataset.pk}/quality/", query).status_code == 400


def test_bucket_leads_to_the_grid_with_its_pictures(dataset, add, alice, client_of):
    add("red", "blue")
    browser = client_of(alice)
    page = browser.get(to("quality", dataset.pk), {"resolution": "64", "upscale": "off"}).content.decode()
    link = f"{to('detail', dataset.pk)}?bucket=64x48&amp;resolution=64&amp;upscale=off#pictures"
    assert f'<a href="{link}">2 pictures in 64×48: captions and edits</a>' in page
    page = browser.get(to("quality", dataset.pk), {"bucket": "dropped", "upscale": "off", "step": 256}).content.decode()
    link = f"{to('detail', dataset.pk)}?bucket=dropped&amp;step=256&amp;upscale=off#pictures"
    assert f'<a href="{link}">2 pictures left out: captions and edits</a>' in page


def test_buckets_to_choose_from_are_counted(dataset, add, draw, alice, client_of):
    add("red", "blue")
    services.import_files(dataset, files=[("wide.png", io.BytesIO(draw("red", size=(128, 64))))])
    browser = client_of(alice)
    choices = browser.get(
        to("buckets", dataset.pk), {"resolution": "64", "minimum": "16", "bucket": "88x40"}
    ).content.decode()
    assert re.findall(r"<option.*?</option>", choices) == [
        '<option value="">All</option>',
        '<option value="72x56">72x56 (2)</option>',
        '<option value="88x40" selected>88x40 (1)</option>',
    ]
    choices = browser.get(to("buckets", dataset.pk), {"bucket": "88x40"}).content.decode()
    assert "<option selected>88x40</option>" in choices
    assert browser.get(to("buckets", dataset.pk), {"resolution": "x"}).status_code == 400


def test_quality_page_of_an_empty_dataset(dataset, alice, client_of):
    assert "No pictures yet" in client_of(alice).get(to("quality", dataset.pk)).content.decode()


def test_quality_summary_counts(dataset, add, alice, client_of):
    add("red", "blue")
    page = client_of(alice).get(to("quality-summary", dataset.pk), {"resolution": "64"}).content.decode()
    assert "2 without trigger word" in page
    assert "2 not checked" in page
    assert f"{to('quality', dataset.pk)}?resolution=64" in page


def test_check_page_starts_the_job_and_tells_how_far_it_is(dataset, add, alice, client_of):
    add("red")
    browser, address = client_of(alice), to("quality-check", dataset.pk)
    answer = browser.post(address)
    assert (answer.status_code, answer.url) == (302, to("quality", dataset.pk))
    assert "Checking the files: 1 to go" in browser.post(address, headers={"HX-Request": "true"}).content.decode()
    job = Job.objects.get()
    assert (job.owner, job.arguments["dataset_id"]) == (alice, dataset.pk)
    run_job(str(job.pk))
    assert "All files are checked" in browser.get(address).content.decode()


def test_keep_page_keeps_one(dataset, add, alice, client_of):
    red, blue = add("red", "blue")
    chosen = {"pictures": [red.pk, blue.pk], "keep": blue.pk, "caption_of": red.pk}
    answer = client_of(alice).post(to("quality-keep", dataset.pk), chosen)
    assert (answer.status_code, answer.url) == (302, to("quality", dataset.pk))
    assert told(answer) == [("success", "Kept one. Restore version 1 to undo this.")]
    assert list(dataset.pictures.values_list("pk", "caption")) == [(blue.pk, "a red picture")]
    for wrong in ({}, chosen | {"keep": "x"}, chosen | {"pictures": ["x"]}):
        assert client_of(alice).post(to("quality-keep", dataset.pk), wrong).status_code == 400


@pytest.mark.parametrize(
    ("sizes", "captions", "kept", "worded"),
    [
        ([(50, 40), (64, 51)], ["a long caption", "short"], 1, 1),  # the most pixels
        ([(64, 51), (64, 51)], ["short", "a long caption"], 1, 1),  # then the longest caption
        ([(64, 51), (64, 51)], ["same", "same"], 0, 0),  # then the first
        ([(50, 40), (64, 51)], ["the only caption", ""], 1, 0),  # no caption is worth keeping
    ],
)
def test_quality_page_chooses_the_largest_of_those_that_look_alike(
    dataset, add, alice, client_of, sizes, captions, kept, worded
):
    pair = add("red", "blue")
    for picture, (width, height), caption in zip(pair, sizes, captions, strict=True):
        values = {"width": width, "height": height, "caption": caption, "fingerprint": "0" * 38}
        dataset.pictures.filter(pk=picture.pk).update(**values)
    page = client_of(alice).get(to("quality", dataset.pk)).content.decode()
    chosen = dict(re.findall(r'name="(keep|caption_of)" value="(\d+)" checked', page))
    assert chosen == {"keep": str(pair[kept].pk), "caption_of": str(pair[worded].pk)}


def test_versions_page_lists_and_compares(dataset, add, alice, client_of):
    (red,) = add("red")
    version = services.pin_version(dataset)
    services.set_caption(red, caption="a dark red picture")
    browser = client_of(alice)
    page = browser.get(to("versions", dataset.pk)).content.decode()
    assert ("v1" in page, f'href="{to("version-export", dataset.pk, version.pk)}" download' in page) == (True, True)
    page = browser.get(to("versions-compare", dataset.pk), {"from": "1"}).content.decode()
    assert "a<ins> dark</ins> red picture" in page
    page = browser.get(to("versions-compare", dataset.pk), {"from": "now", "to": "1"}).content.decode()
    assert "a<del> dark</del> red picture" in page
    for wrong in ({}, {"from": "9"}, {"from": "-1"}, {"from": "1", "to": "x"}, {"from": "9" * 30}):
        assert browser.get(to("versions-compare", dataset.pk), wrong).status_code == 404


def test_versions_page_asks_the_database_as_often_for_one_version_as_for_three(dataset, add, alice, client_of):
    browser = client_of(alice)
    (red,) = add("red")

    def queries():
        with CaptureQueriesContext(connection) as captured:
            assert browser.get(to("versions", dataset.pk)).status_code == 200
        return len(captured)

    services.pin_version(dataset)
    one = queries()
    for caption in ("b", "c"):
        services.set_caption(red, caption=caption)
        services.pin_version(dataset)
    assert (queries(), DatasetVersion.objects.count()) == (one, 3)


def test_version_is_kept_by_hand_and_once(dataset, add, alice, bob, client_of):
    browser, address = client_of(alice), to("version-pin", dataset.pk)
    assert browser.post(address).status_code == 400  # no pictures yet
    add("red")
    assert "Keep a version now" in browser.get(to("versions", dataset.pk)).content.decode()
    assert "Keep a version now" not in client_of(bob).get(to("versions", dataset.pk)).content.decode()
    answer = browser.post(address)
    assert (answer.status_code, answer.url) == (302, to("versions", dataset.pk))
    assert told(answer)[-1:] == [("success", "The dataset as it is now is kept as version 1.")]
    assert told(browser.post(address))[-1:] == [
        ("info", "The dataset is the same as version 1, so there is nothing new to keep.")
    ]
    assert DatasetVersion.objects.get().number == 1


def test_restore_page_asks_then_restores(dataset, add, alice, client_of):
    (red,) = add("red")
    services.pin_version(dataset)
    services.set_caption(red, caption="other")
    browser, address = client_of(alice), to("version-restore", dataset.pk, 1)
    assert "Restore version 1?" in browser.get(address).content.decode()
    assert dataset.pictures.get().caption == "other"
    answer = browser.post(address)
    assert (answer.status_code, answer.url) == (302, to("versions", dataset.pk))
    assert told(answer) == [("success", "The dataset is as in version 1. Restore version 2 to undo this.")]
    assert dataset.pictures.get().caption == "a red picture"
    assert AuditEntry.objects.get(action="dataset restored").subject == "Cats to v1"
    assert browser.get(to("version-restore", dataset.pk, 9)).status_code == 404


def test_restore_page_promises_nothing_that_was_deleted_for_good(dataset, add, alice, client_of, api_of):
    red, blue, _ = add("red", "blue", "green")
    edit_picture(blue, rotation=90, crop=None)
    services.pin_version(dataset)
    for picture in (red, blue):
        destruction.destroy_picture(picture, everywhere=False)
    page = client_of(alice).get(to("version-restore", dataset.pk, 1)).content.decode()
    assert ("2 deleted for good" in page, "red.png" in page, "added" in page) == (True, True, False)
    assert "so they cannot come back" in page
    found = api_of(alice).get(f"/api/v1/datasets/{dataset.pk}/versions/diff/", {"from": "now", "to": 1}).json()
    assert ([one["name"] for one in found["missing"]], found["added"]) == (["blue.png", "red.png"], [])
    answer = client_of(alice).post(to("version-restore", dataset.pk, 1))
    assert told(answer)[1][0] == "warning"
    assert list(dataset.pictures.values_list("original_name", flat=True)) == ["green.png"]


# --- API --------------------------------------------------------------------------------------------------------------
def test_api_of_quality(dataset, add, alice, bob, charlie, api_of):
    red, blue = add("red", "blue")
    base = f"/api/v1/datasets/{dataset.pk}/quality/"
    found = api_of(bob).get(base, {"resolution": 64, "buckets": "off"}).json()
    assert (found["pictures"], found["unchecked"], found["without_trigger"]) == (2, 2, [red.pk, blue.pk])
    assert found["buckets"] == [{"width": 64, "height": 64, "pictures": 2}]
    assert found["placements"][0] == {
        "id": red.pk, "bucket": [64, 64], "resized": [85, 64], "crop": [10, 0], "scale": 1.3281,
    }  # fmt: skip
    answer = api_of(bob).post(f"{base}check/")
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    body = {"pictures": [red.pk, blue.pk], "keep": red.pk, "caption_of": red.pk}
    assert api_of(bob).post(f"{base}keep/", body, format="json").status_code == 403
    assert [api_of(charlie).get(base).status_code, api_of(charlie).post(f"{base}check/").status_code] == [404, 404]
    assert api_of(charlie).post(f"{base}keep/", body, format="json").status_code == 404
    assert api_of(alice).post(f"{base}keep/", {"keep": 1}, format="json").status_code == 400
    assert [api_of(alice).post(base).status_code, api_of(alice).get(f"{base}keep/").status_code] == [405, 405]
    assert dataset.pictures.count() == 2
    assert api_of(alice).post(f"{base}keep/", body, format="json").json()["number"] == 1
    assert dataset.pictures.get() == red


def test_api_of_versions(dataset, add, alice, bob, charlie, api_of):
    (red,) = add("red")
    version = services.pin_version(dataset)
    services.set_caption(red, caption="a picture")
    base = f"/api/v1/datasets/{dataset.pk}/versions/"
    assert api_of(bob).get(f"{base}diff/", {"from": 1}).json() == {
        "trigger_word": ["ohwx", "ohwx"],
        "added": [],
        "removed": [],
        "missing": [],
        "changed": [
            {
                "name": "red.png",
                "sha256": red.sha256,
                "is_edited": False,
                "repeats": [1, 1],
                "caption": [["=", "a "], ["-", "red "], ["=", "picture"]],
            }
        ],
    }
    restore = f"{base}{version.pk}/restore/"
    assert api_of(bob).post(restore).status_code == 403
    assert [api_of(charlie).post(restore).status_code, api_of(charlie).get(f"{base}diff/").status_code] == [404, 404]
    assert api_of(alice).get(f"{base}diff/").status_code == 404
    assert [api_of(alice).get(restore).status_code, api_of(alice).post(f"{base}diff/").status_code] == [405, 405]
    answer = api_of(alice).post(restore).json()
    assert (answer["before"]["number"], answer["missing"]) == (2, [])
    assert dataset.pictures.get().caption == "a red picture"
    other = services.create_dataset(alice, name="Other")
    assert api_of(alice).post(f"/api/v1/datasets/{other.pk}/versions/{version.pk}/restore/").status_code == 404
    assert Dataset.objects.get(pk=other.pk).pictures.count() == 0
