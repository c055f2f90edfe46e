"""Datasets, pictures and versions over HTTP: works, wrong method, stranger, bad input, and the database afterwards."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
from django.contrib.auth.models import Group
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIClient

from datasets import pictures, services
from datasets.models import Dataset, DatasetVersion, Picture
from lorapilot.models import AuditEntry

URL = "/api/v1/datasets/"
NAME = "Use 1 to 100 letters (A–Z), digits, spaces, dots, dashes or underscores; begin with a letter or digit."
TAKEN = "You already have a dataset named {}. Choose another name."
TRIGGER_WORD = "Use a trigger word of at most 100 characters, without commas."
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
NOTHING = "There is no such thing, or it is not shared with you."
READ_ONLY = "This token can only read. Create one with scope `write` on the account page."


def at(dataset, part=""):
    return f"{URL}{dataset.pk}/{part}"


def sent_files(api, dataset, *files):
    uploads = [SimpleUploadedFile(name, content) for name, content in files]
    return api.post(at(dataset, "pictures/"), {"files": uploads}, format="multipart")


@pytest.fixture
def api(alice, api_of):
    return api_of(alice)


@pytest.fixture
def shared(dataset, add, alice):
    """Alice's dataset, which Bob sees, with a picture and a version; and a private one of hers."""
    add("red")
    services.pin_version(dataset)
    services.create_dataset(alice, name="Private")
    return dataset


@pytest.fixture
def reads(shared):
    picture, version = shared.pictures.get(), shared.versions.get()
    return [
        at(shared),
        at(shared, "pictures/"),
        at(shared, f"pictures/{picture.pk}/"),
        at(shared, "versions/"),
        at(shared, f"versions/{version.pk}/"),
    ]


@pytest.fixture
def writes(shared, draw):
    """Each call that changes the dataset, as a function of an API client."""
    picture = at(shared, f"pictures/{shared.pictures.get().pk}/")
    return [
        lambda api: api.patch(at(shared), {"name": "Mine", "trigger_word": "x", "groups": []}),
        lambda api: api.delete(at(shared)),
        lambda api: sent_files(api, shared, ("blue.png", draw("blue"))),
        lambda api: api.patch(picture, {"caption": "x"}),
        lambda api: api.delete(picture),
        lambda api: api.post(at(shared, "versions/")),
    ]


# --- Who may ----------------------------------------------------------------------------------------------------------
def test_reads_are_for_owner_team_and_staff(reads, alice, bob, charlie, staff, api_of):
    for address in reads:
        answers = [api_of(user).get(address) for user in (alice, bob, staff, charlie)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 404], address
        assert answers[-1].json() == {"detail": NOTHING}


def test_writes_are_for_the_owner(writes, shared, bob, charlie, api_of, everything):
    before = everything()
    for user, status, sentence in ((bob, 403, NOT_YOURS), (charlie, 404, NOTHING)):
        answers = [write(api_of(user)) for write in writes]
        assert [(answer.status_code, answer.json()) for answer in answers] == [(status, {"detail": sentence})] * 6
    assert everything() == before


def test_writes_of_staff_are_done(shared, staff, api_of):
    assert api_of(staff).patch(at(shared), {"name": "Tidied"}).json()["owner"] == "alice"
    assert Dataset.objects.filter(name="Tidied").count() == 1


def test_writes_are_refused_to_a_read_only_token(writes, alice, api_of, everything):
    before, reader = everything(), api_of(alice, "read")
    answers = [write(reader) for write in [*writes, lambda api: api.post(URL, {"name": "New"})]]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(403, {"detail": READ_ONLY})] * 7
    assert everything() == before


def test_everything_wants_a_token(reads, writes, everything):
    before, anonymous = everything(), APIClient()
    assert [anonymous.get(address).status_code for address in [URL, *reads]] == [401] * 6
    assert [write(anonymous).status_code for write in [*writes, lambda api: api.post(URL, {"name": "N"})]] == [401] * 7
    assert everything() == before


@pytest.mark.parametrize(
    ("address", "methods"),
    [
        (URL, ["put", "patch", "delete"]),
        ("{dataset}", ["put", "post"]),
        ("{dataset}pictures/", ["put", "patch", "delete"]),
        ("{dataset}pictures/{picture}/", ["put", "post"]),
        ("{dataset}versions/", ["put", "patch", "delete"]),
        ("{dataset}versions/{version}/", ["put", "patch", "post", "delete"]),
    ],
)
def test_wrong_method_is_refused(shared, api, everything, address, methods):
    before = everything()
    picture, version = shared.pictures.get().pk, shared.versions.get().pk
    url = address.format(dataset=at(shared), picture=picture, version=version)
    assert [getattr(api, method)(url).status_code for method in methods] == [405] * len(methods)
    assert everything() == before


@pytest.mark.parametrize("part", ["0/", "x/", "99999/", "9" * 40 + "/"])
def test_numbers_that_lead_nowhere_are_not_found(shared, api, everything, part):
    before = everything()
    addresses = [f"{URL}{part}", at(shared, f"pictures/{part}"), at(shared, f"versions/{part}")]
    assert [api.get(address).status_code for address in addresses] == [404, 404, 404]
    for address in addresses[:2]:
        answers = [api.patch(address, {"caption": "x", "name": "x"}), api.delete(address)]
        assert [answer.status_code for answer in answers] == [404, 404]
    assert [api.get(f"{URL}{part}{name}/").status_code for name in ("pictures", "versions")] == [404, 404]
    assert everything() == before


def test_picture_and_version_are_reached_through_their_own_dataset_only(shared, bob, api_of):
    """Bob's own dataset does not lead to what is Alice's, whatever number he writes behind it."""
    own, api = services.create_dataset(bob, name="Own"), api_of(bob)
    picture, version = shared.pictures.get().pk, shared.versions.get().pk
    address = at(own, f"pictures/{picture}/")
    answers = [api.get(address), api.patch(address, {"caption": "x"}), api.delete(address)]
    answers.append(api.get(at(own, f"versions/{version}/")))
    assert [answer.status_code for answer in answers] == [404] * 4
    assert shared.pictures.get().caption == "a red picture"


# --- Datasets ---------------------------------------------------------------------------------------------------------
def test_list_has_ones_own_and_shared_datasets(shared, alice, bob, charlie, staff, api_of):
    services.create_dataset(charlie, name="Birds")
    named = {
        user.username: [row["name"] for row in api_of(user).get(URL).json()["results"]]
        for user in (alice, bob, charlie, staff)
    }
    assert named == {
        "alice": ["Private", "Cats"],
        "bob": ["Cats"],
        "charlie": ["Birds"],
        "staff": ["Birds", "Private", "Cats"],
    }


def test_list_finds_a_part_of_the_name(shared, api):
    assert [row["name"] for row in api.get(f"{URL}?name=CAT").json()["results"]] == ["Cats"]
    assert api.get(f"{URL}?name=dog").json() == {"count": 0, "next": None, "previous": None, "results": []}


def test_list_comes_in_pages(shared, api):
    page = api.get(f"{URL}?page_size=1").json()
    assert (page["count"], len(page["results"])) == (2, 1)
    assert [row["name"] for row in api.get(page["next"]).json()["results"]] == ["Cats"]
    assert api.get(f"{URL}?page=3").status_code == 404


def test_dataset_is_shown_with_its_counts(shared, bob, draw, api, api_of):
    services.import_files(shared, files=[("blue.png", io.BytesIO(draw("blue")))])
    shown = api_of(bob).get(at(shared)).json()
    assert shown == {
        "id": shared.pk,
        "name": "Cats",
        "trigger_word": "ohwx",
        "owner": "alice",
        "groups": ["team"],
        "editor_groups": [],
        "picture_count": 2,
        "missing_count": 1,
        "created_at": shown["created_at"],
        "updated_at": shown["updated_at"],
    }
    assert next(row for row in api.get(URL).json()["results"] if row["id"] == shared.pk) == shown


def test_create_makes_an_empty_dataset(alice, api, workspace):
    answer = api.post(URL, {"name": "  My cats 2.0 ", "trigger_word": " oh  wx "})
    dataset = Dataset.objects.get()
    assert (answer.status_code, answer.json()["id"], answer.json()["picture_count"]) == (201, dataset.pk, 0)
    assert (dataset.name, dataset.trigger_word, dataset.owner) == ("My cats 2.0", "oh wx", alice)
    assert list(dataset.groups.all()) == []
    assert api.post(URL, {"name": "Without a word"}).json()["trigger_word"] == ""


@pytest.mark.parametrize(
    ("asked", "status", "field", "sentence"),
    [
        ({}, 400, "name", "name: This field is required."),
        ({"name": ""}, 400, "name", "name: This field may not be blank."),
        ({"name": None}, 400, "name", "name: This field may not be null."),
        ({"name": "../cats"}, 400, "name", NAME),
        ({"name": "-cats"}, 400, "name", NAME),
        ({"name": "Kätzchen"}, 400, "name", NAME),
        ({"name": "a/b"}, 400, "name", NAME),
        ({"name": "x" * 101}, 400, "name", "name: Ensure this field has no more than 100 characters."),
        ({"name": "a\0b"}, 400, "name", "name: Null characters are not allowed."),
        ({"name": "New", "trigger_word": "a,b"}, 400, "trigger_word", TRIGGER_WORD),
        ({"name": "New", "trigger_word": "a\u200bb"}, 400, "trigger_word", TRIGGER_WORD),
        ({"name": "Cats"}, 409, "name", TAKEN.format("Cats")),
        ({"name": "cATS "}, 409, "name", TAKEN.format("cATS")),
        (["Cats"], 400, "non_field_errors", "Invalid data. Expected a dictionary, but got list."),
    ],
)
def test_create_refuses_bad_input_and_changes_nothing(dataset, api, everything, asked, status, field, sentence):
    before = everything()
    answer = api.post(URL, asked)
    assert (answer.status_code, answer.json()["detail"]) == (status, sentence)
    assert list(answer.json()["errors"]) == [field]
    assert everything() == before


def test_create_takes_a_name_that_somebody_else_has(dataset, bob, api_of):
    assert api_of(bob).post(URL, {"name": "Cats"}).status_code == 201
    assert sorted(Dataset.objects.values_list("owner__username", "name")) == [("alice", "Cats"), ("bob", "Cats")]


def test_change_keeps_what_is_left_out(shared, api):
    assert api.patch(at(shared), {"trigger_word": "sks"}).json()["trigger_word"] == "sks"
    assert api.patch(at(shared), {"name": "Dogs"}).json()["name"] == "Dogs"
    assert api.patch(at(shared), {}).status_code == 200
    shared.refresh_from_db()
    assert (shared.name, shared.trigger_word) == ("Dogs", "sks")
    assert [group.name for group in shared.groups.all()] == ["team"]
    assert api.patch(at(shared), {"trigger_word": ""}).json()["trigger_word"] == ""


@pytest.mark.parametrize(
    ("asked", "status", "field", "sentence"),
    [
        ({"name": "Dogs", "trigger_word": "a,b"}, 400, "trigger_word", TRIGGER_WORD),
        ({"trigger_word": "sks", "name": "private"}, 409, "name", TAKEN.format("private")),
        ({"trigger_word": "sks", "name": "no/slash"}, 400, "name", NAME),
        ({"name": "Dogs", "groups": ["nobody"]}, 400, "groups", "groups: Object with name=nobody does not exist."),
        ({"name": "Dogs", "groups": ["team", "others"]}, 400, "groups", "groups: You are not in the group others."),
        ({"name": "Dogs", "groups": "team"}, 400, "groups", 'groups: Expected a list of items but got type "str".'),
        ({"name": "Dogs", "groups": [{}]}, 400, "groups", "groups: Object with name={} does not exist."),
    ],
)
def test_change_refuses_bad_input_and_changes_nothing(shared, api, everything, asked, status, field, sentence):
    Group.objects.create(name="others")
    before = everything()
    answer = api.patch(at(shared), asked)
    assert (answer.status_code, answer.json()["detail"]) == (status, sentence)
    assert list(answer.json()["errors"]) == [field]
    assert everything() == before


def test_share_and_stop_sharing(shared, alice, bob, api, api_of):
    member = api_of(bob)
    assert api.patch(at(shared), {"groups": []}).json()["groups"] == []
    assert member.get(at(shared)).status_code == 404
    private = Dataset.objects.get(name="Private")
    assert api.patch(at(private), {"groups": ["team"]}).json()["groups"] == ["team"]
    assert member.get(at(private)).status_code == 200
    assert list(AuditEntry.objects.values_list("actor__username", "action", "subject").order_by("pk")) == [
        ("alice", "dataset shared", "Cats: -"),
        ("alice", "dataset shared", "Private: team"),
    ]


def test_staff_share_with_any_group(shared, staff, api_of):
    Group.objects.create(name="others")
    answer = api_of(staff).patch(at(shared), {"groups": ["others"]})
    assert (answer.status_code, answer.json()["groups"]) == (200, ["others"])


def test_delete_takes_the_dataset_and_leaves_versions_and_others(shared, api):
    version = shared.versions.get()
    assert api.delete(at(shared)).status_code == 204
    assert [dataset.name for dataset in Dataset.objects.all()] == ["Private"]
    assert (Picture.objects.count(), DatasetVersion.objects.get()) == (0, version)
    assert [api.get(at(shared, part)).status_code for part in ("", "pictures/", "versions/")] == [404] * 3
    assert [api.delete(at(shared)).status_code, api.patch(at(shared), {"name": "x"}).status_code] == [404, 404]
    assert list(AuditEntry.objects.values_list("actor__username", "action", "subject")) == [
        ("alice", "dataset deleted", "Cats")
    ]


# --- Pictures ---------------------------------------------------------------------------------------------------------
def test_picture_is_shown_with_what_it_is(shared, api):
    picture = shared.pictures.get()
    shown = api.get(at(shared, f"pictures/{picture.pk}/")).json()
    assert shown == {
        "id": picture.pk,
        "original_name": "red.png",
        "caption": "a red picture",
        "revision": 1,
        "sha256": picture.sha256,
        "extension": "png",
        "width": 64,
        "height": 48,
        "bytes": picture.bytes,
        "repeats": 1,
        "thumbnail": f"/datasets/{shared.pk}/pictures/{picture.pk}/thumbnail/",
        "original": f"/datasets/{shared.pk}/pictures/{picture.pk}/original/",
        "created_at": shown["created_at"],
        "updated_at": shown["updated_at"],
    }
    assert api.get(at(shared, "pictures/")).json() == {"count": 1, "next": None, "previous": None, "results": [shown]}


def test_add_takes_pictures_captions_and_archives(dataset, draw, api):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("a/green.png", draw("green"))
    files = [("red.png", draw("red")), ("red.txt", b"a red cat"), ("more.zip", archive.getvalue())]
    answer = sent_files(api, dataset, *files)
    assert (answer.status_code, answer.json()) == (
        201,
        {"detail": "Pictures: 2 added.", "added": 2, "captioned": 0, "duplicates": 0, "refused": [], "notes": []},
    )
    assert sorted(dataset.pictures.values_list("original_name", "caption")) == [
        ("green.png", ""),
        ("red.png", "a red cat"),
    ]


def test_add_names_what_is_refused_and_takes_the_rest(dataset, draw, api):
    answer = sent_files(api, dataset, ("red.png", draw("red")), ("bad.png", b"no picture"), ("bad.zip", b"no archive"))
    assert answer.status_code == 201
    assert (answer.json()["detail"], answer.json()["added"]) == ("Pictures: 1 added.", 1)
    assert answer.json()["refused"] == [
        {"name": "bad.png", "reason": "This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."},
        {
            "name": "bad.zip",
            "reason": "This is not a readable ZIP archive. Create it again and upload the new file.",
        },
    ]
    assert dataset.pictures.get().original_name == "red.png"


def test_add_of_nothing_usable_is_bad_input(dataset, api, everything):
    rows, files, staging = everything()
    answer = sent_files(api, dataset, ("bad.png", b"no picture"), ("lone.txt", b"whose?"))
    assert answer.status_code == 400
    assert answer.json()["detail"] == (
        "Nothing was imported. bad.png: This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."
        " lone.txt: No picture has the same name. Upload the picture with its caption."
    )
    assert (everything()[0]["Picture"], *everything()[1:]) == (rows["Picture"], files, staging)


def test_add_of_what_is_there_changes_nothing(shared, draw, api):
    before = Picture.objects.values().get()
    answer = sent_files(api, shared, ("other-name.png", draw("red")))
    assert (answer.status_code, answer.json()["detail"]) == (201, "Pictures: 1 already here.")
    assert answer.json()["notes"] == [{"name": "other-name.png", "reason": "It is here already."}]
    assert Picture.objects.values().get() == before


def test_add_wants_files_in_a_form(dataset, draw, api, everything):
    before = everything()
    empty = api.post(at(dataset, "pictures/"), {}, format="multipart")
    assert (empty.status_code, empty.json()["detail"]) == (400, "files: This list may not be empty.")
    assert api.post(at(dataset, "pictures/"), {"files": ["red.png"]}).status_code == 415
    many = sent_files(api, dataset, *((f"{number}.txt", b"") for number in range(501)))
    assert (many.status_code, many.json()) == (413, {"detail": "That is more than one request may carry."})
    assert everything() == before


def test_caption_becomes_one_line(shared, api):
    picture = shared.pictures.get()
    answer = api.patch(at(shared, f"pictures/{picture.pk}/"), {"caption": " ein Hündchen,\r\n\n im Gras "})
    assert (answer.status_code, answer.json()["caption"]) == (200, "ein Hündchen, im Gras")
    assert shared.pictures.get().caption == "ein Hündchen, im Gras"
    assert api.patch(at(shared, f"pictures/{picture.pk}/"), {"caption": ""}).json()["caption"] == ""
    assert api.get(at(shared)).json()["missing_count"] == 1


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "caption: This field is required."),
        ({"caption": None}, "caption: This field may not be null."),
        ({"caption": ["x"]}, "caption: Not a valid string."),
        ({"caption": "a\0b"}, "caption: Null characters are not allowed."),
        ({"caption": "\ud800"}, "caption: Surrogate characters are not allowed: U+D800."),
        ({"caption": "x" * 5001}, "The caption has 5,001 characters; the most is 5,000. Shorten it."),
    ],
)
def test_caption_refuses_bad_input_and_changes_nothing(shared, api, everything, asked, sentence):
    before = everything()
    address = at(shared, f"pictures/{shared.pictures.get().pk}/")
    answer = api.patch(address, json.dumps(asked), content_type="application/json")
    assert (answer.status_code, answer.json()["detail"]) == (400, sentence)
    assert list(answer.json()["errors"]) == ["caption"]
    assert everything() == before


def test_caption_changes_nothing_but_the_caption(shared, api):
    before = Picture.objects.values().get()
    asked = {"caption": "new", "repeats": 9, "original_name": "x", "sha256": "0" * 64, "id": 7, "dataset": 9}
    api.patch(at(shared, f"pictures/{before['id']}/"), asked)
    after = Picture.objects.values().get()
    assert after == before | {"caption": "new", "revision": 2, "updated_at": after["updated_at"]}


def test_delete_takes_the_picture_out_and_its_file_stays(shared, add, api):
    add("blue")
    red, blue = shared.pictures.all()
    before = Picture.objects.values().get(pk=blue.pk)
    assert api.delete(at(shared, f"pictures/{red.pk}/")).status_code == 204
    assert (Picture.objects.values().get(), shared.versions.get().pictures[0]["sha256"]) == (before, red.sha256)
    assert pictures.picture_path(red.sha256, "png").exists()
    assert api.delete(at(shared, f"pictures/{red.pk}/")).status_code == 404


# --- Versions ---------------------------------------------------------------------------------------------------------
def test_version_of_the_same_content_is_the_same(shared, api):
    first = shared.versions.get()
    answer = api.post(at(shared, "versions/"))
    assert (answer.status_code, answer.json()) == (
        201,
        {
            "id": first.pk,
            "number": 1,
            "name": "Cats",
            "trigger_word": "ohwx",
            "digest": first.digest,
            "created_at": answer.json()["created_at"],
        },
    )
    api.patch(at(shared, f"pictures/{shared.pictures.get().pk}/"), {"caption": "another"})
    second = api.post(at(shared, "versions/")).json()
    assert (second["number"], second["digest"] == first.digest) == (2, False)
    assert [row["number"] for row in api.get(at(shared, "versions/")).json()["results"]] == [2, 1]


def test_version_lists_its_pictures(shared, api):
    version, picture = shared.versions.get(), shared.pictures.get()
    shown = api.get(at(shared, f"versions/{version.pk}/")).json()
    assert shown["pictures"] == [
        {
            "sha256": picture.sha256,
            "extension": "png",
            "width": 64,
            "height": 48,
            "bytes": picture.bytes,
            "caption": "a red picture",
            "repeats": 1,
            "name": "red.png",
        }
    ]
    assert "pictures" not in api.get(at(shared, "versions/")).json()["results"][0]


def test_version_of_an_empty_dataset_is_refused(dataset, api):
    answer = api.post(at(dataset, "versions/"))
    sentence = "The dataset has no pictures yet. Upload some, then try again."
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence, "errors": {"dataset": [sentence]}})
    assert DatasetVersion.objects.count() == 0


# --- Lists ask the database as often for three rows as for one --------------------------------------------------------
def queries(api, address):
    api.get(address)
    with CaptureQueriesContext(connection) as asked:
        count = api.get(address).json()["count"]
    return count, len(asked)


def test_list_of_datasets_takes_as_many_queries_for_three_as_for_one(dataset, add, alice, team, api):
    add("red")
    one, asked = queries(api, URL)
    for name in ("Dogs", "Birds"):
        other = services.share_dataset(services.create_dataset(alice, name=name), groups=[team])
        add("red", "blue", to=other)
    assert (one, queries(api, URL)) == (1, (3, asked))


def test_list_of_pictures_takes_as_many_queries_for_three_as_for_one(dataset, add, api):
    add("red")
    one, asked = queries(api, at(dataset, "pictures/"))
    add("green", "blue")
    assert (one, queries(api, at(dataset, "pictures/"))) == (1, (3, asked))


def test_list_of_versions_takes_as_many_queries_for_three_as_for_one(shared, api):
    one, asked = queries(api, at(shared, "versions/"))
    for word in ("sks", "xyz"):
        services.pin_version(services.set_trigger_word(shared, trigger_word=word))
    assert (one, queries(api, at(shared, "versions/"))) == (1, (3, asked))
