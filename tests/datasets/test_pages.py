"""Every page of datasets: works, wrong method, stranger, bad input, and the database afterwards."""

from __future__ import annotations

import hashlib
import re

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Group
from django.contrib.messages import get_messages
from django.core import signing
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from datasets import caption_urls, pictures, quality_urls, services, urls, views
from datasets.models import Dataset, DatasetVersion, Picture
from lorapilot.models import AuditEntry

HTMX = {"HX-Request": "true"}
NAME = "Use 1 to 100 letters (A–Z), digits, spaces, dots, dashes or underscores; begin with a letter or digit."
TRIGGER_WORD = "Use a trigger word of at most 100 characters, without commas."
LOOKED_AT = ("detail", "thumbnail", "original", "export", "version-export")
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."


def to(name, *args):
    return reverse(f"datasets:{name}", args=args)


def page(answer):
    return answer.content.decode()


def told(answer):
    """The messages that the next page will show."""
    return [(message.level_tag, str(message)) for message in get_messages(answer.wsgi_request)]


def uploaded(*files):
    return {"files": [SimpleUploadedFile(name, content) for name, content in files]}


@pytest.fixture
def browser(alice, client_of):
    return client_of(alice)


@pytest.fixture
def picture(add):
    return add("red")[0]


@pytest.fixture
def addresses(dataset, picture):
    """Every page below a dataset, by name."""
    of_dataset = ("detail", "edit", "share", "upload", "delete", "restore", "export")
    of_picture = ("caption", "picture-delete", "thumbnail", "original")
    version = services.pin_version(dataset)
    found = {name: to(name, dataset.pk) for name in of_dataset}
    found |= {name: to(name, dataset.pk, picture.pk) for name in of_picture}
    return found | {"version-export": to("version-export", dataset.pk, version.pk)}


# --- Who may, and how -------------------------------------------------------------------------------------------------
def test_every_page_is_tested_here(addresses):
    patterns = [*caption_urls.urlpatterns, *quality_urls.urlpatterns]  # test_caption_pages.py, test_version_pages.py
    elsewhere = {pattern.name for pattern in patterns} - {"caption"}
    assert {pattern.name for pattern in urls.urlpatterns} - elsewhere == {"list", "new", "found", "adopt", *addresses}


def test_pages_ask_visitors_to_sign_in(addresses, client, everything):
    before = everything()
    for address in (to("list"), to("new"), to("found"), to("adopt"), *addresses.values()):
        for answer in (client.get(address), client.post(address)):
            assert (answer.status_code, answer.url) == (302, f"{reverse('account_login')}?next={address}")
    assert everything() == before


def test_pages_do_not_exist_for_strangers(addresses, charlie, client_of, everything):
    before, stranger = everything(), client_of(charlie)
    asked = {
        name: (stranger.get(address).status_code, stranger.post(address).status_code)
        for name, address in addresses.items()
    }
    assert asked == {
        "detail": (404, 405),
        "edit": (405, 404),
        "share": (405, 404),
        "upload": (405, 404),
        "delete": (404, 404),
        "restore": (405, 404),
        "caption": (405, 404),
        "picture-delete": (404, 404),
        "thumbnail": (404, 405),
        "original": (404, 405),
        "export": (404, 405),
        "version-export": (404, 405),
    }
    assert everything() == before


def test_pages_are_looked_at_and_not_changed_by_the_team(addresses, bob, client_of, everything):
    before, member = everything(), client_of(bob)
    assert [member.get(addresses[name]).status_code for name in LOOKED_AT] == [200] * 5
    for name in ("edit", "share", "upload", "delete", "restore", "caption", "picture-delete"):
        answer = member.post(addresses[name], {"name": "Mine", "caption": "mine"})
        assert (answer.status_code, NOT_YOURS in page(answer)) == (403, True), name
    assert [member.get(addresses[name]).status_code for name in ("delete", "picture-delete")] == [403, 403]
    assert everything() == before


def test_pages_refuse_the_wrong_method(addresses, browser, everything):
    before = everything()
    refused = {name for name, address in addresses.items() if browser.get(address).status_code == 405}
    assert refused == {"edit", "share", "upload", "restore", "caption"}
    assert [browser.post(addresses[name]).status_code for name in LOOKED_AT] == [405] * 5
    assert [browser.post(to(name)).status_code for name in ("list", "found")] == [405] * 2
    every = {to("list"), to("new"), to("found"), to("adopt"), *addresses.values()}
    assert {browser.put(address).status_code for address in every} == {405}
    assert everything() == before


def test_pages_of_nothing_are_not_found(dataset, picture, alice, browser, everything):
    other = services.create_dataset(alice, name="Other")
    before = everything()
    of_dataset = ("edit", "share", "upload", "delete", "restore")
    assert [browser.post(to(name, 99)).status_code for name in of_dataset] == [404] * 5
    assert browser.get(to("detail", 99)).status_code == 404
    for pks in ((dataset.pk, 99), (other.pk, picture.pk), (99, picture.pk)):
        assert [browser.post(to(name, *pks)).status_code for name in ("caption", "picture-delete")] == [404, 404]
        assert [browser.get(to(name, *pks)).status_code for name in ("thumbnail", "original")] == [404, 404]
    assert everything() == before


def test_pages_of_staff_change_what_is_others(addresses, dataset, staff, client_of):
    answer = client_of(staff).post(addresses["edit"], {"name": "Tidied", "trigger_word": ""})
    assert (answer.status_code, answer.url) == (302, addresses["detail"])
    dataset.refresh_from_db()
    assert (dataset.name, dataset.trigger_word, dataset.owner.username) == ("Tidied", "", "alice")


# --- List -------------------------------------------------------------------------------------------------------------
def test_list_shows_what_one_may_see(dataset, add, alice, bob, charlie, client_of):
    add("red", "blue")
    Picture.objects.filter(original_name="blue.png").update(caption="")
    services.create_dataset(alice, name="Private")
    for user, names in ((alice, ["Cats", "Private"]), (bob, ["Cats"]), (charlie, [])):
        answer = client_of(user).get(to("list"))
        assert sorted(found.name for found in answer.context["page"]) == names
    seen = page(client_of(bob).get(to("list")))
    assert re.sub(r"\s+", " ", seen).count("2 pictures · 1 without caption · <span") == 1
    assert "Of alice" in seen
    assert f'src="{to("thumbnail", dataset.pk, dataset.pictures.first().pk)}"' in seen
    assert "Make your first dataset" in page(client_of(charlie).get(to("list")))


def test_list_finds_by_name(dataset, alice, browser):
    services.create_dataset(alice, name="Dogs")
    assert [found.name for found in browser.get(to("list") + "?q=+OG").context["page"]] == ["Dogs"]
    answer = browser.get(to("list") + "?q=<b>")
    assert list(answer.context["page"]) == []
    assert "Nothing that you may see contains “&lt;b&gt;”." in page(answer)


def test_list_comes_in_pages(alice, browser, workspace):
    for number in range(25):
        services.create_dataset(alice, name=f"Set {number}")
    first, second = browser.get(to("list") + "?q=set"), browser.get(to("list") + "?q=set&page=2")
    assert ([found.name for found in second.context["page"]], len(first.context["page"])) == (["Set 0"], 24)
    assert 'href="?q=set&amp;page=2"' in page(first)
    assert 'href="?q=set&amp;page=1"' in page(second)
    for odd, number in (("0", 2), ("99", 2), ("x", 1)):
        assert browser.get(to("list") + f"?page={odd}").context["page"].number == number


def test_list_takes_as_many_queries_for_three_as_for_one(dataset, add, alice, team, browser):
    add("red")
    browser.get(to("list"))
    with CaptureQueriesContext(connection) as one:
        browser.get(to("list"))
    for name in ("Dogs", "Birds"):
        add("red", "blue", to=services.share_dataset(services.create_dataset(alice, name=name), groups=[team]))
    with CaptureQueriesContext(connection) as three:
        assert len(browser.get(to("list")).context["page"]) == 3
    assert len(three) == len(one)


# --- A new one --------------------------------------------------------------------------------------------------------
def test_new_makes_a_dataset_and_leads_there(alice, browser, workspace):
    assert browser.get(to("new")).status_code == 200
    answer = browser.post(to("new"), {"name": " Cats ", "trigger_word": "ohwx"})
    dataset = Dataset.objects.get()
    assert (answer.status_code, answer.url) == (302, to("detail", dataset.pk))
    assert (dataset.name, dataset.trigger_word, dataset.owner) == ("Cats", "ohwx", alice)


@pytest.mark.parametrize(
    ("sent", "field", "sentence"),
    [
        ({"trigger_word": "ohwx"}, "name", "This field is required."),
        ({"name": "Kätzchen"}, "name", NAME),
        ({"name": "../x"}, "name", NAME),
        ({"name": "x" * 101}, "name", "Ensure this value has at most 100 characters (it has 101)."),
        ({"name": "cats"}, "name", "You already have a dataset named cats. Choose another name."),
        ({"name": "New", "trigger_word": "a,b"}, "trigger_word", TRIGGER_WORD),
    ],
)
def test_new_shows_errors_at_their_field_and_changes_nothing(dataset, browser, everything, sent, field, sentence):
    before = everything()
    answer = browser.post(to("new"), sent)
    assert (answer.status_code, answer.context["form"].errors) == (400, {field: [sentence]})
    assert everything() == before


# --- One dataset ------------------------------------------------------------------------------------------------------
def test_detail_of_a_dataset_shows_pictures_and_captions(dataset, add, browser):
    add("red", "blue")
    seen = page(browser.get(to("detail", dataset.pk)))
    assert seen.count('class="card picture-card"') == 2
    assert "a red picture" in seen
    assert "ohwx" in seen


def test_detail_of_an_empty_dataset_says_what_to_do(dataset, browser, bob, client_of):
    assert "Choose some above, or drop them there." in page(browser.get(to("detail", dataset.pk)))
    assert "Ask alice to add some." in page(client_of(bob).get(to("detail", dataset.pk)))


def test_detail_offers_changes_to_those_who_may(dataset, picture, browser, bob, client_of):
    changes = [to(name, dataset.pk) for name in ("upload", "edit", "share", "delete")]
    changes += [to(name, dataset.pk, picture.pk) for name in ("caption", "picture-delete")]
    seen = page(browser.get(to("detail", dataset.pk)))
    assert [address in seen for address in changes] == [True] * 6
    seen = page(client_of(bob).get(to("detail", dataset.pk)))
    assert [address in seen for address in changes] == [False] * 6
    assert "a red picture" in seen
    assert "of alice" in seen


def test_detail_shows_captions_and_names_as_text(dataset, picture, browser):
    Picture.objects.update(caption="<script>x</script>", original_name='"><b>.png')
    seen = page(browser.get(to("detail", dataset.pk)))
    assert "<script>x" not in seen
    assert "&lt;script&gt;x" in seen
    assert '"><b>.png' not in seen


def test_versions_are_shown_newest_first(dataset, picture, browser):
    services.pin_version(dataset)
    services.set_caption(picture, caption="another")
    services.pin_version(dataset)
    assert [version.number for version in browser.get(to("versions", dataset.pk)).context["versions"]] == [2, 1]


def test_versions_are_reached_when_no_picture_is_left(dataset, picture, browser):
    services.pin_version(dataset)
    services.delete_picture(picture)
    assert f'href="{to("versions", dataset.pk)}"' in page(browser.get(to("detail", dataset.pk)))


def test_detail_comes_in_pages(dataset, browser):
    Picture.objects.bulk_create(
        Picture(
            dataset=dataset, sha256=f"{number:064}", extension="png", width=1, height=1, bytes=1, original_name="a.png"
        )
        for number in range(61)
    )
    first = browser.get(to("detail", dataset.pk))
    sixtieth = dataset.pictures.all()[59].pk
    assert f'href="{to("detail", dataset.pk)}?after={sixtieth}#pictures"' in page(first)
    second = browser.get(f"{to('detail', dataset.pk)}?after={sixtieth}")
    assert [page(answer).count('class="card picture-card"') for answer in (first, second)] == [60, 1]
    assert "61 pictures" in page(second)


def test_detail_shows_pictures_without_caption_alone(dataset, add, browser):
    add("red", "blue")
    address = to("detail", dataset.pk) + "?show=missing"
    assert "Every picture has a caption" in page(browser.get(address))
    services.set_caption(dataset.pictures.first(), caption="")
    assert [found.original_name for found in browser.get(address).context["pictures"]] == ["red.png"]
    assert "1 without caption" in page(browser.get(address))


def test_detail_takes_as_many_queries_for_three_as_for_one(dataset, add, browser):
    add("red")
    services.pin_version(dataset)
    browser.get(to("detail", dataset.pk))
    with CaptureQueriesContext(connection) as one:
        browser.get(to("detail", dataset.pk))
    for colour in ("blue", "green"):
        add(colour)
        services.pin_version(dataset)
    with CaptureQueriesContext(connection) as three:
        browser.get(to("detail", dataset.pk))
    assert len(three) == len(one)


def test_edit_changes_name_and_trigger_word(dataset, browser):
    answer = browser.post(to("edit", dataset.pk), {"name": "Dogs", "trigger_word": "sks"})
    assert (answer.status_code, answer.url, told(answer)) == (302, to("detail", dataset.pk), [("success", "Saved.")])
    dataset.refresh_from_db()
    assert (dataset.name, dataset.trigger_word) == ("Dogs", "sks")


@pytest.mark.parametrize(
    ("sent", "field", "sentence"),
    [
        ({"name": "Dogs", "trigger_word": "a,b"}, "trigger_word", TRIGGER_WORD),
        ({"name": "", "trigger_word": "sks"}, "name", "This field is required."),
        ({"name": "x/y", "trigger_word": "sks"}, "name", NAME),
        (
            {"name": "OTHER", "trigger_word": "sks"},
            "name",
            "You already have a dataset named OTHER. Choose another name.",
        ),
    ],
)
def test_edit_shows_errors_and_changes_nothing(dataset, alice, browser, everything, sent, field, sentence):
    services.create_dataset(alice, name="Other")
    before = everything()
    answer = browser.post(to("edit", dataset.pk), sent)
    assert (answer.status_code, answer.context["edit_form"].errors) == (400, {field: [sentence]})
    assert answer.context["dataset"].name == "Cats"
    assert everything() == before


def test_share_is_for_exactly_the_groups_that_are_chosen(dataset, alice, team, bob, browser, client_of):
    second = Group.objects.create(name="second")
    alice.groups.add(second)
    answer = browser.post(to("share", dataset.pk), {f"group_{second.pk}": "view"})
    assert (answer.status_code, answer.url) == (302, to("detail", dataset.pk))
    assert told(answer) == [("success", "Sharing saved.")]
    assert list(dataset.groups.all()) == [second]
    assert client_of(bob).get(to("detail", dataset.pk)).status_code == 404
    browser.post(to("share", dataset.pk), {})
    assert list(dataset.groups.all()) == []
    shared = AuditEntry.objects.filter(actor=alice, action="dataset shared").order_by("pk")
    assert list(shared.values_list("subject", flat=True)) == ["Cats: second", "Cats: -"]


def test_share_with_a_group_of_others_is_refused(dataset, browser, everything):
    others = Group.objects.create(name="others")
    before = everything()
    seen = browser.get(to("detail", dataset.pk))
    assert [field.label for field in seen.context["share_form"]] == ["team"]
    team = dataset.groups.get()
    answer = browser.post(to("share", dataset.pk), {f"group_{team.pk}": "own"})
    sentence = "Select a valid choice. own is not one of the available choices."
    assert (answer.status_code, answer.context["share_form"].errors) == (400, {f"group_{team.pk}": [sentence]})
    assert everything() == before
    browser.post(to("share", dataset.pk), {f"group_{team.pk}": "view", f"group_{others.pk}": "edit"})
    assert (list(dataset.groups.all()), list(dataset.editor_groups.all())) == ([team], [])


def test_share_keeps_a_group_that_staff_chose(dataset, browser, team):
    others = Group.objects.create(name="others")
    services.share_dataset(dataset, groups=[team, others])
    assert (
        browser.post(to("share", dataset.pk), {f"group_{team.pk}": "view", f"group_{others.pk}": "edit"}).status_code
        == 302
    )
    assert set(dataset.groups.all()) == {team, others}
    assert list(dataset.editor_groups.all()) == [others]


def test_upload_box_is_open_where_there_is_nothing_else_or_something_wrong(dataset, add, browser):
    def is_open(answer):
        return '<details class="more" id="upload" open>' in answer.content.decode()

    assert is_open(browser.get(to("detail", dataset.pk)))
    add("red")
    assert not is_open(browser.get(to("detail", dataset.pk)))
    assert is_open(browser.post(to("upload", dataset.pk)))


# --- The plain upload -------------------------------------------------------------------------------------------------
def test_upload_takes_files_and_names_what_is_refused(dataset, draw, browser):
    files = uploaded(("red.png", draw("red")), ("red.txt", b"a red cat"), ("bad.png", b"x"), ("bad.zip", b"x"))
    answer = browser.post(to("upload", dataset.pk), files)
    assert (answer.status_code, answer.url) == (302, to("detail", dataset.pk))
    assert told(answer) == [
        ("success", "Pictures: 1 added."),
        ("error", "bad.png: This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."),
        ("error", "bad.zip: This is not a readable ZIP archive. Create it again and upload the new file."),
    ]
    assert list(dataset.pictures.values_list("original_name", "caption")) == [("red.png", "a red cat")]


def test_upload_form_names_what_is_here_already(dataset, add, draw, browser):
    add("red")
    files = [SimpleUploadedFile(f"copy-{number}.png", draw("red")) for number in range(2)]
    answer = browser.post(to("upload", dataset.pk), {"files": [*files, SimpleUploadedFile("blue.png", draw("blue"))]})
    assert told(answer) == [
        ("success", "Pictures: 1 added, 1 already here."),
        ("info", "Already here: copy-0.png."),
    ]


def test_upload_takes_an_empty_caption(dataset, draw, browser):
    browser.post(to("upload", dataset.pk), uploaded(("red.png", draw("red")), ("red.txt", b"")))
    assert dataset.pictures.get().caption == ""


@pytest.mark.parametrize("sent", [{}, {"files": ""}, {"files": "red.png"}])
def test_upload_without_files_says_so(dataset, browser, everything, sent):
    before = everything()
    answer = browser.post(to("upload", dataset.pk), sent)
    assert (answer.status_code, answer.context["upload_form"].errors) == (
        400,
        {"files": ["Choose at least one file."]},
    )
    assert everything() == before


# --- Captions ---------------------------------------------------------------------------------------------------------
def test_caption_is_saved_in_place(dataset, add, browser):
    red, _ = add("red", "blue")
    answer = browser.post(to("caption", dataset.pk, red.pk), {"caption": "a cat,\r\n asleep"}, headers=HTMX)
    assert answer.status_code == 200
    count = '<span id="missing-count" class="badge" hx-swap-oob="true">All have captions</span>'
    revision = f'<input type="hidden" name="revision" id="revision-{red.pk}" value="2" hx-swap-oob="true">'
    assert page(answer).split("\n") == ["Saved", revision, count, "", ""]
    assert list(dataset.pictures.values_list("caption", flat=True)) == ["a cat, asleep", "a blue picture"]
    emptied = browser.post(to("caption", dataset.pk, red.pk), {"caption": ""}, headers=HTMX)
    assert "1 without caption" in page(emptied)
    assert dataset.pictures.first().caption == ""


def test_caption_is_saved_without_scripts(dataset, picture, browser):
    answer = browser.post(to("caption", dataset.pk, picture.pk), {"caption": "a cat"})
    assert (answer.status_code, answer.url) == (302, f"{to('detail', dataset.pk)}#picture-{picture.pk}")
    assert dataset.pictures.get().caption == "a cat"


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("x" * 5001, "The caption has 5,001 characters; the most is 5,000. Shorten it."),
        ("x" * 10_001, "The caption is too long. Shorten it."),
    ],
)
def test_caption_that_is_refused_says_why_and_changes_nothing(dataset, picture, browser, everything, caption, sentence):
    before, address = everything(), to("caption", dataset.pk, picture.pk)
    answer = browser.post(address, {"caption": caption}, headers=HTMX)
    assert (answer.status_code, f'<span class="error">{sentence}</span>' in page(answer)) == (200, True)
    answer = browser.post(address, {"caption": caption})
    assert (answer.status_code, sentence in page(answer)) == (400, True)
    assert everything() == before


# --- Deleting a picture, and undoing it -------------------------------------------------------------------------------
def test_picture_delete_asks_first(dataset, picture, browser, everything):
    before = everything()
    answer = browser.get(to("picture-delete", dataset.pk, picture.pk))
    assert (answer.status_code, "Delete red.png?" in page(answer)) == (200, True)
    assert everything() == before


@pytest.mark.parametrize(("headers", "template"), [(HTMX, "_deleted.html"), ({}, "picture_deleted.html")])
def test_picture_delete_offers_to_undo(dataset, add, browser, headers, template):
    _, green, _ = add("red", "green", "blue")
    before = list(dataset.pictures.values())
    answer = browser.post(to("picture-delete", dataset.pk, green.pk), headers=headers)
    assert (answer.status_code, answer.templates[0].name) == (200, f"datasets/{template}")
    assert [found.original_name for found in dataset.pictures.all()] == ["red.png", "blue.png"]
    (token,) = re.findall(r'name="token" value="([^"]+)"', page(answer))
    undone = browser.post(to("restore", dataset.pk), {"token": token}, headers=headers)
    if headers:
        assert (undone.status_code, f'id="picture-{green.pk}"' in page(undone)) == (200, True)
    else:
        assert (undone.status_code, undone.url) == (302, f"{to('detail', dataset.pk)}#picture-{green.pk}")
    after = list(dataset.pictures.values())
    for row in (*before, *after):
        del row["updated_at"], row["created_at"]
    assert after == before


def test_restore_twice_is_refused(dataset, picture, browser, everything):
    token = browser.post(to("picture-delete", dataset.pk, picture.pk)).context["token"]
    assert browser.post(to("restore", dataset.pk), {"token": token}).status_code == 302
    before = everything()
    answer = browser.post(to("restore", dataset.pk), {"token": token})
    assert (answer.status_code, "The picture is in the dataset already." in page(answer)) == (409, True)
    assert everything() == before


def test_restore_without_the_file_is_refused(dataset, picture, browser, everything):
    token = browser.post(to("picture-delete", dataset.pk, picture.pk)).context["token"]
    pictures.picture_path(picture.sha256, "png").unlink()
    before = everything()
    answer = browser.post(to("restore", dataset.pk), {"token": token})
    assert (answer.status_code, "The picture&#x27;s file is gone. Upload it again." in page(answer)) == (404, True)
    assert everything() == before


def test_restore_takes_only_what_was_deleted_here_within_an_hour(
    dataset, picture, alice, browser, everything, monkeypatch
):
    other = services.create_dataset(alice, name="Other")
    token = browser.post(to("picture-delete", dataset.pk, picture.pk)).context["token"]
    made_up = signing.TimestampSigner(salt="datasets.restore").sign_object({"sha256": picture.sha256})
    before = everything()
    tries = [(dataset, made_up), (dataset, token[:-1] + "!"), (dataset, "x"), (dataset, ""), (other, token)]
    answers = [browser.post(to("restore", where.pk), {"token": tried}) for where, tried in tries]
    monkeypatch.setattr(views, "UNDO_SECONDS", -1)
    answers.append(browser.post(to("restore", dataset.pk), {"token": token}))
    sentence = "This can no longer be undone. Upload the picture again."
    assert [(answer.status_code, sentence in page(answer)) for answer in answers] == [(400, True)] * 6
    assert everything() == before


# --- Deleting a dataset -----------------------------------------------------------------------------------------------
def test_delete_asks_first_and_says_what_goes(dataset, add, browser, everything):
    add("red", "blue")
    services.pin_version(dataset)
    before = everything()
    seen = page(browser.get(to("delete", dataset.pk)))
    assert "Delete “Cats”?" in seen
    assert "Its 2 pictures with captions go, for everybody it is shared with. This cannot be undone." in seen
    assert "Its 1 version stays with the runs that were trained on it." in seen
    assert everything() == before


def test_delete_takes_the_dataset_and_nothing_else(dataset, add, alice, browser):
    add("red", "blue")
    other = services.create_dataset(alice, name="Other")
    (kept,) = add("red", to=other)
    version = services.pin_version(dataset)
    answer = browser.post(to("delete", dataset.pk))
    assert (answer.status_code, answer.url) == (302, to("list"))
    assert told(answer) == [("success", "The dataset “Cats” is deleted.")]
    assert (Dataset.objects.get(), Picture.objects.get(), DatasetVersion.objects.get()) == (other, kept, version)
    assert pictures.picture_path(kept.sha256, "png").exists()
    assert AuditEntry.objects.get(actor=alice, action="dataset deleted").subject == "Cats"
    assert browser.get(to("detail", dataset.pk)).status_code == 404


# --- The pictures themselves ------------------------------------------------------------------------------------------
async def _joined(blocks):
    return b"".join([block async for block in blocks])


def original_of(browser, *pks, **headers):
    answer = browser.get(to("original", *pks), headers=headers)
    return answer, async_to_sync(_joined)(answer.streaming_content) if answer.streaming else answer.content


@pytest.mark.parametrize(
    ("kind", "extension", "content_type"),
    [("PNG", "png", "image/png"), ("JPEG", "jpg", "image/jpeg"), ("WEBP", "webp", "image/webp")],
)
def test_original_is_sent_byte_for_byte(dataset, draw, bob, staff, client_of, kind, extension, content_type):
    content = draw("red", kind, (600, 300))
    name = f"Kätzchen.{extension}"
    services.import_files(dataset, files=[(name, SimpleUploadedFile(name, content))])
    picture = dataset.pictures.get()
    for user in (dataset.owner, bob, staff):
        answer, received = original_of(client_of(user), dataset.pk, picture.pk)
        assert (answer.status_code, received) == (200, content)
        headers = ("Content-Type", "Content-Length", "ETag", "Cache-Control", "X-Content-Type-Options")
        assert [answer[header] for header in headers] == [
            content_type,
            str(len(content)),
            f'"{hashlib.sha256(content).hexdigest()}"',
            "private, no-cache",
            "nosniff",
        ]
        assert answer["Content-Disposition"] == f"inline; filename*=utf-8''K%C3%A4tzchen.{extension}"


def test_original_larger_than_one_block_is_sent_whole(dataset, draw, browser):
    content = draw("red", "PNG", (512, 512)) + bytes(3 * views.READ_BYTES)  # bytes behind the picture stay with it
    services.import_files(dataset, files=[("red.png", SimpleUploadedFile("red.png", content))])
    answer, received = original_of(browser, dataset.pk, dataset.pictures.get().pk)
    assert (answer.status_code, received) == (200, content)


def test_thumbnail_is_small_and_drawn_again_when_it_is_lost(dataset, picture, browser):
    address, file = to("thumbnail", dataset.pk, picture.pk), pictures.thumbnail_path(picture.sha256)
    first = browser.get(address)
    assert (first.status_code, first["Content-Type"], first.content) == (200, "image/webp", file.read_bytes())
    assert (first["ETag"], first["Cache-Control"]) == (f'"{picture.sha256}"', "private, no-cache")
    named = browser.get(address, {"v": picture.sha256[:12]})
    assert named["Cache-Control"] == "private, max-age=31536000, immutable"
    assert browser.get(address, {"v": "0" * 12})["Cache-Control"] == "private, no-cache"
    file.unlink()
    assert browser.get(address).content == file.read_bytes()


@pytest.mark.parametrize("name", ["thumbnail", "original"])
def test_media_that_the_client_has_are_not_sent_again(dataset, picture, browser, name):
    address, tag = to(name, dataset.pk, picture.pk), f'"{picture.sha256}"'
    for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        answer = browser.get(address, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer["ETag"]) == (304, b"", tag)
    answer = browser.get(address, headers={"If-None-Match": '"other"'})
    assert (answer.status_code, answer["ETag"]) == (200, tag)
    head = browser.head(address)
    assert (head.status_code, head["ETag"]) == (200, tag)


@pytest.mark.parametrize("name", ["thumbnail", "original"])
def test_media_are_not_there_for_strangers_who_know_the_hash(dataset, picture, draw, charlie, browser, client_of, name):
    """Neither the hash, nor the tag of a copy that was seen before, nor a dataset of one's own leads to a picture."""
    stranger, own = client_of(charlie), services.create_dataset(charlie, name="Own")
    address = to(name, dataset.pk, picture.pk)
    assert stranger.get(address, headers={"If-None-Match": f'"{picture.sha256}"'}).status_code == 404
    assert stranger.get(to(name, own.pk, picture.pk)).status_code == 404
    by_hash = [
        address.replace(f"pictures/{picture.pk}/", f"pictures/{picture.sha256}/"),
        f"/datasets/pictures/{picture.sha256[:2]}/{picture.sha256}.png",
        f"/static/{picture.sha256}.png",
    ]
    assert [user.get(found).status_code for user in (stranger, browser) for found in by_hash] == [404] * 6


@pytest.mark.parametrize("name", ["thumbnail", "original"])
def test_media_end_with_the_sharing(dataset, picture, bob, client_of, name):
    member, address = client_of(bob), to(name, dataset.pk, picture.pk)
    assert member.get(address).status_code == 200
    services.share_dataset(dataset, groups=[])
    assert member.get(address, headers={"If-None-Match": f'"{picture.sha256}"'}).status_code == 404


@pytest.mark.parametrize("name", ["thumbnail", "original"])
def test_media_whose_file_is_gone_are_not_found(dataset, picture, browser, name):
    pictures.picture_path(picture.sha256, "png").unlink()
    pictures.thumbnail_path(picture.sha256).unlink()
    assert browser.get(to(name, dataset.pk, picture.pk)).status_code == 404
