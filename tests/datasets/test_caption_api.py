"""Captions over the API: works, wrong method, stranger, bad input, and the database afterwards."""

from __future__ import annotations

import io

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from datasets import bulk_edits, caption_edits, services
from datasets.caption_operations import Operation
from datasets.models import TagList
from datasets.selections import Selection


def captions_of(dataset):
    return list(dataset.pictures.order_by("pk").values_list("caption", flat=True))


@pytest.fixture
def api(alice, api_of):
    return api_of(alice)


@pytest.fixture
def rows(add):
    return add("red", "green", "blue")


@pytest.fixture
def at(dataset):
    return lambda part: f"/api/v1/datasets/{dataset.pk}/{part}"


@pytest.fixture
def calls(dataset, rows, at, alice):
    """Reads and writes, as (method, address, body)."""
    edit = bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=Selection(None), actor=alice).edit
    every = {"filter": {}, "kind": "add", "text": "y"}
    picture = f"pictures/{rows[0].pk}/"
    reads = [("get", at(part), None) for part in ("caption-edits/", f"{picture}history/", "tags/", "trigger/")]
    writes = [
        ("post", at("caption-edits/"), every),
        ("post", at("caption-edits/preview/"), every),
        ("post", at(f"caption-edits/{edit.pk}/undo/"), None),
        ("post", at("pictures/delete/"), {"filter": {}}),
        ("post", at(f"{picture}undo/"), None),
    ]
    return reads, writes


def asked(api, call):
    method, address, body = call
    return (
        getattr(api, method)(address, body, format="json").status_code
        if body
        else getattr(api, method)(address).status_code
    )


# --- Who may ----------------------------------------------------------------------------------------------------------
def test_calls_are_for_owner_team_and_nobody_else(calls, bob, charlie, alice, api_of, client, everything):
    reads, writes = calls
    before = everything()
    assert [asked(api_of(bob), call) for call in reads] == [200] * 4
    assert [asked(api_of(bob), call) for call in writes] == [403] * 5
    assert [asked(api_of(charlie), call) for call in (*reads, *writes)] == [404] * 9
    assert [asked(api_of(alice, "read"), call) for call in writes] == [403] * 5
    assert [client.get(address).status_code for _, address, _ in reads] == [401] * 4
    assert everything() == before


def test_wrong_method_is_refused(calls, api, everything):
    reads, writes = calls
    before = everything()
    assert [api.put(address).status_code for _, address, _ in (*reads, *writes)] == [405] * 9
    assert [api.get(address).status_code for _, address, _ in writes[1:]] == [405] * 4
    assert everything() == before


def test_edit_and_picture_of_another_dataset_are_not_found(dataset, rows, bob, api_of, alice):
    own = services.create_dataset(bob, name="Own")
    edit = bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=Selection(None), actor=alice).edit
    api, address = api_of(bob), f"/api/v1/datasets/{own.pk}/"
    tried = [f"caption-edits/{edit.pk}/undo/", f"pictures/{rows[0].pk}/undo/", "caption-edits/999999999999/undo/"]
    assert [api.post(address + part).status_code for part in tried] == [404] * 3


# --- One caption ------------------------------------------------------------------------------------------------------
def test_caption_of_a_past_revision_is_a_conflict_with_both_texts(dataset, rows, at, api):
    address = at(f"pictures/{rows[0].pk}/")
    assert api.patch(address, {"caption": "theirs", "revision": 1}).json()["revision"] == 2
    answer = api.patch(address, {"caption": "mine", "revision": 1})
    assert (answer.status_code, answer.json()) == (
        409,
        {
            "detail": "Somebody changed this caption meanwhile. Choose which one stays.",
            "caption": "theirs",
            "revision": 2,
            "yours": "mine",
        },
    )
    assert captions_of(dataset)[0] == "theirs"
    assert api.patch(address, {"caption": "mine", "revision": 0}).status_code == 400
    assert api.patch(address, {"caption": "mine", "revision": 2}).json()["caption"] == "mine"
    assert api.patch(address, {"caption": "without a revision"}).json()["revision"] == 4


def test_caption_is_undone_and_its_history_shown(dataset, rows, at, api, alice):
    address = at(f"pictures/{rows[0].pk}/")
    api.patch(address, {"caption": "new"})
    assert api.post(f"{address}undo/", {"revision": 1}).status_code == 409
    assert api.post(f"{address}undo/", {"revision": 2}).json()["caption"] == "a red picture"
    assert api.post(f"{address}undo/").status_code == 409
    history = api.get(f"{address}history/").json()
    (change,) = history["results"]
    assert change.pop("created_at")
    assert change == {"before": "a red picture", "after": "new", "revision": 2, "actor": "alice", "is_undone": True}


# --- Many captions ----------------------------------------------------------------------------------------------------
def test_edit_is_previewed_applied_listed_and_undone(dataset, rows, at, api):
    body = {"kind": "regex", "text": r"a (\w+)", "replacement": r"\1", "pictures": [rows[0].pk, rows[1].pk]}
    before = captions_of(dataset)
    plan = api.post(at("caption-edits/preview/"), body, format="json").json()
    assert (plan["selected"], plan["changed"], captions_of(dataset)) == (2, 2, before)
    change = {"id": rows[0].pk, "name": "red.png", "before": "a red picture", "after": "red picture"}
    assert plan["changes"][0] == change
    wrong = api.post(at("caption-edits/"), body | {"fingerprint": "other"}, format="json")
    assert (wrong.status_code, captions_of(dataset)) == (409, before)
    done = api.post(at("caption-edits/"), body | {"fingerprint": plan["fingerprint"]}, format="json").json()
    assert (done["changed"], done["left_alone"]) == (2, 0)
    assert captions_of(dataset) == ["red picture", "green picture", "a blue picture"]
    assert api.get(at("caption-edits/")).json()["results"] == [done["edit"]]
    undo = at(f"caption-edits/{done['edit']['id']}/undo/")
    assert api.post(undo).json() == {"back": 2, "left_alone": 0}
    assert (api.post(undo).status_code, captions_of(dataset)) == (409, before)
    again = api.post(at("caption-edits/"), body | {"text": "(nothing)"}, format="json")
    assert again.json() == {"changed": 0, "left_alone": 0, "edit": None}


def test_edit_of_a_filter_changes_what_it_finds(dataset, rows, at, api):
    body = {"kind": "add", "text": "x", "at_start": True, "filter": {"q": "green", "below": 65}}
    assert api.post(at("caption-edits/"), body, format="json").json()["changed"] == 1
    assert captions_of(dataset) == ["a red picture", "x, a green picture", "a blue picture"]


def test_pictures_of_a_bucket_are_listed_and_edited(dataset, rows, at, api, draw):
    services.import_files(dataset, files=[("wide.png", io.BytesIO(draw("red", size=(128, 64))))])
    bucket = {"bucket": "80x40", "resolution": 64, "minimum": 16, "upscale": "off"}
    listed = api.get(at("pictures/"), {"bucket": "64x48", "resolution": 64, "upscale": "off"}).json()["results"]
    assert [one["id"] for one in listed] == [row.pk for row in rows]
    edited = api.post(at("caption-edits/"), {"kind": "add", "text": "x", "filter": bucket}, format="json")
    assert edited.json()["changed"] == 1
    for wrong in ({"bucket": "x"}, {"bucket": "64x48", "step": 12}, {"upscale": "no"}):
        assert api.get(at("pictures/"), wrong).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "eat"},
        {"kind": ""},
        {"text": ""},
        {"text": "x" * 501},
        {"filter": None},
        {"filter": {"show": "x"}},
        {"filter": {"below": -1}},
        {"filter": {"q": "nothing"}},
        {"pictures": [1]},
        {"pictures": ["x"]},
    ],
)
def test_edit_that_is_none_is_refused_and_changes_nothing(dataset, rows, at, api, everything, change):
    before = everything()
    body = {"kind": "add", "text": "x", "filter": {}} | change
    for part in ("caption-edits/", "caption-edits/preview/"):
        answer = api.post(at(part), body, format="json")
        assert (answer.status_code, bool(answer.json()["detail"])) == (400, True)
    assert everything() == before


def test_pictures_are_deleted_and_come_back(dataset, rows, at, api):
    edit = api.post(at("pictures/delete/"), {"pictures": [rows[0].pk, rows[2].pk]}, format="json").json()
    assert (edit["picture_count"], captions_of(dataset)) == (2, ["a green picture"])
    assert api.post(at("pictures/delete/"), {"pictures": [rows[0].pk]}, format="json").status_code == 400
    assert api.post(at("pictures/delete/"), {}, format="json").status_code == 400
    assert api.post(at(f"caption-edits/{edit['id']}/undo/")).json() == {"back": 2, "left_alone": 0}
    assert captions_of(dataset) == ["a red picture", "a green picture", "a blue picture"]


def test_list_of_pictures_is_filtered_and_sorted(dataset, rows, at, api):
    def names(query):
        return [row["original_name"] for row in api.get(at(f"pictures/?{query}")).json()["results"]]

    assert names("sort=-name") == ["red.png", "green.png", "blue.png"]
    assert names("tag=A+Green+picture") == ["green.png"]
    assert [api.get(at(f"pictures/?{query}")).status_code for query in ("show=x", "sort=x", "below=x")] == [400] * 3


# --- Tags and the trigger word ----------------------------------------------------------------------------------------
def test_tags_and_trigger_word_are_told(dataset, rows, at, api):
    caption_edits.set_caption(rows[0], caption="ohwx, big")
    answer = api.get(at("tags/?q=bi&limit=1")).json()
    assert answer == {"results": [{"tag": "big", "count": 1, "is_own": False}]}
    assert len(api.get(at("tags/")).json()["results"]) == 4
    assert [api.get(at(f"tags/?limit={limit}")).status_code for limit in ("0", "501", "x", "9" * 99)] == [400] * 4
    report = {"trigger_word": "ohwx", "missing": 2, "leaking": 0, "foreign": [], "sample_prompts": ["ohwx"]}
    assert api.get(at("trigger/")).json() == report


def test_tag_list_is_ones_own(alice, bob, api, api_of, client):
    def sent(content):
        return api.put("/api/v1/tag-list/", {"file": SimpleUploadedFile("t.txt", content)}, format="multipart")

    assert api.get("/api/v1/tag-list/").status_code == 404
    assert (sent(b"cat\ndog").json()["tag_count"], sent(b"").status_code) == (2, 400)
    assert api.put("/api/v1/tag-list/", {}, format="multipart").status_code == 400
    assert api.get("/api/v1/tag-list/").json()["name"] == "t.txt"
    assert [api_of(bob).get("/api/v1/tag-list/").status_code, client.get("/api/v1/tag-list/").status_code] == [404, 401]
    assert api_of(alice, "read").delete("/api/v1/tag-list/").status_code == 403
    assert api.post("/api/v1/tag-list/").status_code == 405
    assert api.delete("/api/v1/tag-list/").status_code == 204
    assert TagList.objects.count() == 0
