"""Pages of the grid and of editing captions: works, wrong method, stranger, bad input, and the database afterwards."""

from __future__ import annotations

import re

import pytest
from django.contrib.messages import get_messages
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from datasets import bulk_edits, caption_edits, caption_urls, services
from datasets.caption_operations import Operation
from datasets.models import Picture, TagList
from datasets.selections import Selection
from lorapilot.models import AuditEntry

HTMX = {"HX-Request": "true"}


def to(name, *args):
    return reverse(f"datasets:{name}", args=args)


def page(answer):
    return re.sub(r"\s+", " ", answer.content.decode())


def told(answer):
    """The last message that the next page will show."""
    return [(message.level_tag, str(message)) for message in get_messages(answer.wsgi_request)][-1:]


def with_undo(sentence, dataset):
    address = to("edit-undo", dataset.pk, dataset.bulk_edits.first().pk)
    return f'{sentence} <button class="button button-small" form="undo-form" formaction="{address}">Undo</button>'


def captions_of(dataset):
    return list(dataset.pictures.order_by("pk").values_list("caption", flat=True))


def hidden(answer):
    """What the form of an answer sends."""
    form = re.search(r'<form class="(card )?stack".*?</form>', answer.content.decode(), re.DOTALL)[0]
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))


@pytest.fixture
def browser(alice, client_of):
    return client_of(alice)


@pytest.fixture
def rows(add):
    return add("red", "green", "blue")


@pytest.fixture
def edit(dataset, rows, alice):
    """A bulk edit that put “, x” behind each caption."""
    return bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=Selection(None), actor=alice).edit


@pytest.fixture
def addresses(dataset, edit, rows):
    of_dataset = ("grid", "caption-tools", "bulk-preview", "bulk-apply", "tag-list", "pictures-delete")
    return (
        {name: to(name, dataset.pk) for name in of_dataset}
        | {name: to(name, dataset.pk, rows[0].pk) for name in ("caption", "caption-undo")}
        | {"edit-undo": to("edit-undo", dataset.pk, edit.pk)}
    )


LOOKED_AT = ("grid", "caption-tools")
CHANGING = ("bulk-preview", "bulk-apply", "pictures-delete", "caption", "caption-undo", "edit-undo")
SENT = {"kind": "add", "text": "y", "scope": "all", "sure": "yes", "caption": "y"}


# --- Who may, and how -------------------------------------------------------------------------------------------------
def test_every_page_is_tested_here(addresses):
    assert {pattern.name for pattern in caption_urls.urlpatterns} == set(addresses)
    assert set(addresses) == {*LOOKED_AT, *CHANGING, "tag-list"}


def test_pages_are_for_owner_team_and_nobody_else(addresses, client, bob, charlie, client_of, everything):
    before, member, stranger = everything(), client_of(bob), client_of(charlie)
    for name, address in addresses.items():
        answers = [user.get(address) if name in LOOKED_AT else user.post(address, SENT) for user in (client, stranger)]
        assert [answer.status_code for answer in answers] == [302, 404], name
        assert answers[0].url == f"{reverse('account_login')}?next={address}"
    assert [member.get(addresses[name]).status_code for name in LOOKED_AT] == [200, 200]
    assert [member.post(addresses[name], SENT).status_code for name in CHANGING] == [403] * 6
    assert everything() == before


def test_pages_refuse_the_wrong_method(addresses, browser, everything):
    before = everything()
    for name, address in addresses.items():
        answers = [browser.put(address), browser.post(address) if name in LOOKED_AT else browser.get(address)]
        assert [answer.status_code for answer in answers] == [405, 405], name
    assert everything() == before


def test_edit_and_picture_are_reached_through_their_own_dataset_only(dataset, rows, edit, bob, client_of, everything):
    own, before = services.create_dataset(bob, name="Own"), everything()
    member = client_of(bob)
    assert member.post(to("edit-undo", own.pk, edit.pk)).status_code == 404
    assert member.post(to("caption-undo", own.pk, rows[0].pk)).status_code == 404
    answer = member.post(to("pictures-delete", own.pk), {"ids": str(rows[0].pk), "sure": "yes"})
    assert answer.status_code == 400
    assert everything() == before


# --- The grid ---------------------------------------------------------------------------------------------------------
def test_card_shows_repeats(dataset, rows, browser, bob, client_of):
    dataset.pictures.filter(pk=rows[0].pk).update(repeats=3)
    for user in (browser, client_of(bob)):
        seen = page(user.get(to("grid", dataset.pk)))
        assert re.findall(r'title="Repeats: comes (\d+) times an epoch">(.*?)</span>', seen) == [("3", "×3")]


def filled(dataset, count):
    common = {"dataset": dataset, "extension": "png", "width": 1, "height": 1, "bytes": 1, "original_name": "a.png"}
    start = dataset.pictures.count()
    Picture.objects.bulk_create(
        Picture(**common, sha256=f"{n:064x}", caption=f"tag {n % 7}, big") for n in range(start, count)
    )


def test_grid_is_read_on_until_its_end(dataset, browser):
    filled(dataset, 130)
    seen, address = [], to("detail", dataset.pk) + "?sort=-arrival&tag=big"
    while address:
        text = browser.get(address).content.decode()
        seen += re.findall(r'data-picture="(\d+)"', text)
        following = re.search(r'hx-get="([^"]+)" hx-trigger="intersect once"', text)
        address = following and following[1].replace("&amp;", "&")
    assert seen == [str(pk) for pk in dataset.pictures.order_by("-pk").values_list("pk", flat=True)]


@pytest.mark.parametrize(
    "query",
    ["", "?sort=name", "?q=tag", "?tag=big&sort=-length", "?show=no-trigger", "?show=alike", "?bucket=1024x1024"],
)
def test_grid_takes_as_many_queries_for_1000_as_for_100(dataset, browser, query):
    def queries():
        found = []
        for name in ("detail", "grid", "caption-tools"):
            with CaptureQueriesContext(connection) as asked:
                assert browser.get(to(name, dataset.pk) + query).status_code == 200
            found.append(len(asked))
        return found

    filled(dataset, 100)
    queries()
    few = queries()
    filled(dataset, 1000)
    assert queries() == few


def test_grid_shows_what_the_filter_finds_and_says_how_many(dataset, rows, browser):
    seen = page(browser.get(to("detail", dataset.pk) + "?q=GREEN&sort=-name"))
    assert re.findall(r'id="picture-(\d+)"', seen) == [str(rows[1].pk)]
    assert tuple(part for part in ("1 match.", 'value="GREEN"', '<option value="-name" selected>') if part in seen) == (
        "1 match.",
        'value="GREEN"',
        '<option value="-name" selected>',
    )
    assert "No picture matches" in page(browser.get(to("detail", dataset.pk) + "?q=cyan"))


def test_captions_of_the_grid_are_named_without_labels(dataset, rows, browser):
    """Chromium's autofill compares all labels of a page with all of its forms: seconds at a thousand cards."""
    part = page(browser.get(to("grid", dataset.pk)))
    named = [f"Caption of {name}.png" for name in ("red", "green", "blue")]
    assert (re.findall(r'<textarea [^>]*aria-label="([^"]*)"', part), part.count("<label")) == (named, 0)


def test_grid_of_a_bucket_keeps_its_settings(dataset, rows, browser):
    seen = page(browser.get(to("detail", dataset.pk) + "?bucket=80x56&resolution=64&step=8&minimum=16"))
    assert re.findall(r'id="picture-(\d+)"', seen) == []
    assert "<option selected>80x56</option>" in seen
    seen = page(browser.get(to("detail", dataset.pk) + "?bucket=72x56&resolution=64&minimum=16&upscale=off"))
    assert ("3 matches." in seen, len(re.findall(r'id="picture-(\d+)"', seen))) == (False, 0)
    seen = page(browser.get(to("detail", dataset.pk) + "?bucket=64x48&resolution=64&minimum=16&upscale=off"))
    assert ("3 matches." in seen, len(re.findall(r'id="picture-(\d+)"', seen))) == (True, 3)
    assert '<input id="filter-resolution" name="resolution" type="number" min="64" max="4096"' in seen
    kept = {("bucket", "64x48"), ("resolution", "64"), ("minimum", "16"), ("upscale", "off")}
    assert kept <= set(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', seen))
    sent = {"kind": "add", "text": "y", "scope": "all"} | dict(kept)
    asked = browser.post(to("bulk-preview", dataset.pk), sent)
    assert kept <= set(hidden(asked).items())
    assert browser.post(to("bulk-apply", dataset.pk), hidden(asked)).status_code == 302
    assert set(dataset.pictures.values_list("caption", flat=True)) == {
        "a red picture, y", "a green picture, y", "a blue picture, y"
    }  # fmt: skip


@pytest.mark.parametrize("query", ["show=x", "sort=x", "below=x", "after=x"])
def test_grid_refuses_what_is_no_filter(dataset, browser, query):
    for name in ("grid", "detail"):
        assert browser.get(to(name, dataset.pk) + f"?{query}").status_code == 400


# --- One caption ------------------------------------------------------------------------------------------------------
def test_caption_conflict_shows_both_texts(dataset, rows, bob, staff, browser, everything):
    caption_edits.set_caption(rows[0], caption="theirs <b>", actor=staff)
    before, address = everything(), to("caption", dataset.pk, rows[0].pk)
    for headers in (HTMX, {}):
        answer = browser.post(address, {"caption": "mine", "revision": 1}, headers=headers)
        assert (answer.status_code, "staff changed this caption" in page(answer)) == (409, True)
        assert "theirs &lt;b&gt;" in page(answer)
    assert ('name="caption">mine</textarea>' in page(answer), hidden(answer)["revision"]) == (True, "2")
    assert everything() == before
    answer = browser.post(address, {"caption": "mine", "revision": 2})
    assert (answer.status_code, captions_of(dataset)[0]) == (302, "mine")


@pytest.mark.parametrize("revision", ["0", "x", "9" * 40])
def test_caption_with_a_revision_that_is_none_is_refused(dataset, rows, browser, everything, revision):
    before = everything()
    sent = {"caption": "mine", "revision": revision}
    answer = browser.post(to("caption", dataset.pk, rows[0].pk), sent)
    assert (answer.status_code, everything()) == (400 if revision != "9" * 40 else 409, before)


def test_caption_undo_brings_back_the_one_before(dataset, rows, browser):
    address = to("caption-undo", dataset.pk, rows[0].pk)
    caption_edits.set_caption(rows[0], caption="new")
    answer = browser.post(address, {"revision": "2"}, headers=HTMX)
    assert (answer.status_code, captions_of(dataset)[0]) == (200, "a red picture")
    assert "a red picture</textarea>" in page(answer)
    again = browser.post(address, headers=HTMX)
    assert "No earlier caption of this picture is kept." in page(again)
    assert browser.post(address).status_code == 409
    caption_edits.set_caption(rows[0], caption="new")
    assert browser.post(address, {"revision": "1"}, headers=HTMX).status_code == 409
    assert browser.post(address).url == f"{to('detail', dataset.pk)}#picture-{rows[0].pk}"
    assert captions_of(dataset)[0] == "a red picture"


# --- Many captions ----------------------------------------------------------------------------------------------------
def test_bulk_edit_is_shown_applied_and_undone(dataset, rows, alice, browser):
    sent = {"kind": "replace", "text": "picture", "replacement": "<b>", "ids": f"{rows[0].pk},{rows[2].pk}"}
    before = captions_of(dataset)
    preview = browser.post(to("bulk-preview", dataset.pk), sent, headers=HTMX)
    assert "2 of 2 captions change" in page(preview)
    assert "<td>a red picture</td><td>a red &lt;b&gt;</td>" in page(preview)
    assert captions_of(dataset) == before
    applied = browser.post(to("bulk-apply", dataset.pk), sent | {"fingerprint": hidden(preview)["fingerprint"]})
    sentence = with_undo("2 captions changed.", dataset)
    assert (applied.url, told(applied)) == (to("detail", dataset.pk), [("success", sentence)])
    assert captions_of(dataset) == ["a red <b>", "a green picture", "a blue <b>"]
    caption_edits.set_caption(Picture.objects.get(pk=rows[0].pk), caption="mine")
    undone = browser.post(to("edit-undo", dataset.pk, dataset.bulk_edits.get().pk))
    sentence = "1 caption back. 1 stays as it is: it was changed meanwhile."
    assert told(undone) == [("success", sentence)]
    assert captions_of(dataset) == ["mine", "a green picture", "a blue picture"]
    assert browser.post(to("edit-undo", dataset.pk, dataset.bulk_edits.get().pk)).status_code == 409
    assert AuditEntry.objects.filter(actor=alice, action="captions edited").count() == 2


def test_bulk_edit_without_scripts_takes_the_ticked_boxes(dataset, rows, browser):
    sent = {"kind": "add", "text": "x", "scope": "picked", "picture": [rows[1].pk, rows[2].pk]}
    preview = browser.post(to("bulk-preview", dataset.pk), sent)
    assert (preview.status_code, hidden(preview)["ids"]) == (200, f"{rows[1].pk},{rows[2].pk}")
    browser.post(to("bulk-apply", dataset.pk), hidden(preview))
    assert captions_of(dataset) == ["a red picture", "a green picture, x", "a blue picture, x"]


def test_bulk_edit_of_all_that_match_goes_back_to_the_filter(dataset, rows, browser):
    sent = {"kind": "prefix", "text": "seen:", "scope": "all", "q": "een", "sort": "-name"}
    preview = browser.post(to("bulk-preview", dataset.pk), sent)
    applied = browser.post(to("bulk-apply", dataset.pk), hidden(preview))
    assert applied.url == f"{to('detail', dataset.pk)}?q=een&sort=-name"
    assert captions_of(dataset) == ["a red picture", "seen: a green picture", "a blue picture"]


def test_bulk_edit_of_an_outdated_preview_is_shown_again(dataset, rows, browser):
    sent = {"kind": "add", "text": "x", "scope": "all"}
    preview = browser.post(to("bulk-preview", dataset.pk), sent)
    caption_edits.set_caption(rows[0], caption="mine")
    before = captions_of(dataset)
    answer = browser.post(to("bulk-apply", dataset.pk), hidden(preview))
    assert (answer.status_code, "The captions have changed since this preview." in page(answer)) == (409, True)
    assert captions_of(dataset) == before
    assert browser.post(to("bulk-apply", dataset.pk), hidden(answer)).status_code == 302
    assert captions_of(dataset)[0] == "mine, x"


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ({"kind": "add", "text": "x"}, "Select at least one picture."),
        ({"kind": "add", "text": "x", "ids": "99999"}, "Select at least one picture."),
        ({"kind": "add", "text": "x", "ids": "1,y"}, "A picture&#x27;s id is a number."),
        ({"kind": "add", "text": "x", "scope": "all", "q": "nothing"}, "No picture matches."),
        ({"kind": "add", "scope": "all"}, "Enter the text."),
        ({"kind": "eat", "scope": "all"}, "Select a valid choice."),
        ({"kind": "regex", "text": "(", "scope": "all"}, "The pattern does not work"),
        ({"kind": "add", "text": "x", "scope": "all", "show": "x"}, "Show one of"),
    ],
)
def test_bulk_edit_that_is_none_says_why_and_changes_nothing(dataset, rows, browser, everything, sent, sentence):
    before = everything()
    answer = browser.post(to("bulk-preview", dataset.pk), sent, headers=HTMX)
    assert (answer.status_code, sentence in page(answer)) == (200, True)
    for name in ("bulk-preview", "bulk-apply"):
        assert browser.post(to(name, dataset.pk), sent).status_code == 400
    assert everything() == before


def test_pictures_delete_asks_and_is_undone(dataset, rows, alice, browser):
    sent = {"ids": f"{rows[0].pk},{rows[2].pk}"}
    for headers in (HTMX, {}):
        answer = browser.post(to("pictures-delete", dataset.pk), sent, headers=headers)
        assert (answer.status_code, "Delete 2 pictures?" in page(answer)) == (200, True)
    assert dataset.pictures.count() == 3
    answer = browser.post(to("pictures-delete", dataset.pk), hidden(answer))
    assert told(answer) == [("success", with_undo("2 pictures deleted.", dataset))]
    assert captions_of(dataset) == ["a green picture"]
    assert AuditEntry.objects.get(actor=alice, action="pictures deleted").subject == "Cats: 2"
    answer = browser.post(to("edit-undo", dataset.pk, dataset.bulk_edits.get().pk))
    assert told(answer) == [("success", "2 pictures back.")]
    assert captions_of(dataset) == ["a red picture", "a green picture", "a blue picture"]


def test_undo_beside_the_message_also_works_when_no_picture_is_left(dataset, rows, browser, bob, client_of):
    browser.post(to("pictures-delete", dataset.pk), {"scope": "all", "sure": "yes"})
    seen = page(browser.get(to("detail", dataset.pk)))
    assert 'form="undo-form"' in seen  # the button
    assert '<form id="undo-form" method="post" hidden>' in seen
    assert "undo-form" not in page(client_of(bob).get(to("detail", dataset.pk)))


# --- Tags and the trigger word ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("captions", "kind", "changed"),
    [
        (["ohwx, cat", "OHWX", "a dog"], "rename", ["sks &, cat", "sks &", "a dog"]),
        (["ohwx, cat", "an ohwx man", ""], "replace", ["sks &, cat", "an sks & man", ""]),
    ],
)
def test_new_trigger_word_is_offered_for_the_old_one(dataset, rows, browser, captions, kind, changed):
    for picture, caption in zip(rows, captions, strict=True):
        dataset.pictures.filter(pk=picture.pk).update(caption=caption)
    answer = browser.post(to("edit", dataset.pk), {"name": "Cats", "trigger_word": "sks &"})
    link = f"{to('detail', dataset.pk)}?kind={kind}&text=ohwx&replacement=sks+%26#bulk"
    [(_, message)] = told(answer)
    assert message == (
        f'Saved. 2 captions still have “ohwx”: <a href="{link.replace("&", "&amp;")}">replace it by “sks &amp;”…</a>'
    )
    seen = page(browser.get(link))
    assert '<details class="more" id="bulk" open>' in seen
    assert f'<option value="{kind}" selected>' in seen
    assert ('value="ohwx"' in seen, 'value="sks &amp;"' in seen) == (True, True)
    assert '<input type="radio" name="scope" value="all" checked>' in seen
    sent = {"scope": "all", "kind": kind, "text": "ohwx", "replacement": "sks &"}
    browser.post(to("bulk-apply", dataset.pk), sent)
    assert captions_of(dataset) == changed


@pytest.mark.parametrize("word", ["", "OHWX", "sks"])
def test_nothing_is_offered_where_nothing_is_to_be_replaced(dataset, rows, browser, word):
    answer = browser.post(to("edit", dataset.pk), {"name": "Cats", "trigger_word": word})
    assert told(answer) == [("success", "Saved.")]


def test_tools_show_tags_and_what_the_trigger_word_lacks(dataset, rows, alice, browser, bob, client_of):
    caption_edits.set_caption(rows[0], caption="ohwx, big & red, big")
    caption_edits.set_caption(rows[1], caption="ohwxy, big & red")
    seen = page(browser.get(to("caption-tools", dataset.pk)))
    assert (
        f'href="{to("detail", dataset.pk)}?tag=big%20%26%20red#pictures">big &amp; red <span class="number">2' in seen
    )
    assert "2 captions without" in seen
    assert "1 caption with the trigger word inside another word" in seen
    assert "<li>ohwx, big &amp; red</li>" in seen
    assert "Put it first" not in page(client_of(bob).get(to("caption-tools", dataset.pk)))


def test_tag_list_is_kept_replaced_and_deleted(dataset, alice, bob, browser, client_of):
    def sent(user, content):
        return user.post(to("tag-list", dataset.pk), {"file": SimpleUploadedFile("booru.csv", content)})

    answer = sent(browser, b"cat,5\ndog,9\n")
    assert (answer.status_code, told(answer)) == (302, [("success", "2 tags are proposed from now on.")])
    assert sent(client_of(bob), b"bird").status_code == 302
    assert (TagList.objects.get(owner=alice).tags, TagList.objects.get(owner=bob).tags) == ("dog,9\ncat,5", "bird,0")
    assert sent(browser, b"\xff").status_code == 400
    assert browser.post(to("tag-list", dataset.pk)).status_code == 400
    assert "booru.csv: 2 tags" in page(browser.get(to("caption-tools", dataset.pk)))
    browser.post(to("tag-list", dataset.pk), {"delete": "yes"})
    assert list(TagList.objects.values_list("owner__username", flat=True)) == ["bob"]
