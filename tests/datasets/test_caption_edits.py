"""Captions are saved, undone and edited many at once, and nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from datasets import bulk_edits, caption_edits, picture_removal, pictures, services, tag_lists, thumbnails
from datasets.caption_edits import CaptionConflict
from datasets.caption_operations import Operation
from datasets.models import BulkEdit, CaptionChange, Picture
from datasets.picture_filters import PictureFilter
from datasets.quality import bucket_counts, report_on
from datasets.quality_forms import rules_of
from datasets.selections import Selection
from datasets.trigger_words import trigger_report
from lorapilot import jobs
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import Job

ALL = Selection(None)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def many(dataset):
    """many("a cat", "a dog"): pictures with these captions and no files."""

    def made(*captions, **columns):
        start = dataset.pictures.count()
        common = {"dataset": dataset, "extension": "png", "width": 64, "height": 48, "bytes": 1} | columns
        return Picture.objects.bulk_create(
            Picture(**common, sha256=f"{start + n:064x}", original_name=f"{start + n}.png", caption=caption)
            for n, caption in enumerate(captions)
        )

    return made


def captions_of(dataset):
    return list(dataset.pictures.order_by("pk").values_list("caption", flat=True))


# --- One caption ------------------------------------------------------------------------------------------------------
def test_caption_is_undone_step_by_step(many, alice):
    (picture,) = many("one")
    for text in ("two", "three"):
        caption_edits.set_caption(picture, caption=text, actor=alice)
    assert caption_edits.undo_caption(picture).caption == "two"
    caption_edits.set_caption(picture, caption="four", actor=alice)
    assert [caption_edits.undo_caption(picture).caption for _ in range(2)] == ["two", "one"]
    with pytest.raises(Conflict, match=r"No earlier caption of this picture is kept\."):
        caption_edits.undo_caption(picture)
    kept = [(change.before, change.after, change.is_undone) for change in caption_edits.history_of(picture)]
    assert kept == [("two", "four", True), ("two", "three", True), ("one", "two", True)]
    assert Picture.objects.get().revision == 7


def test_caption_of_a_past_revision_is_a_conflict_and_nothing_is_lost(many, alice, bob):
    (_picture,) = many("one")
    mine, theirs = Picture.objects.get(), Picture.objects.get()
    caption_edits.set_caption(theirs, caption="theirs", revision=1, actor=bob)
    with pytest.raises(CaptionConflict) as conflict:
        caption_edits.set_caption(mine, caption="mine", revision=1, actor=alice)
    found = conflict.value
    assert (found.picture.caption, found.picture.revision, found.yours) == ("theirs", 2, "mine")
    assert (mine.caption, Picture.objects.get().caption) == ("one", "theirs")
    assert caption_edits.set_caption(mine, caption="theirs", revision=1).revision == 2  # the same text is no conflict
    with pytest.raises(CaptionConflict):
        caption_edits.undo_caption(mine, revision=1)
    assert caption_edits.set_caption(mine, caption="mine", revision=2, actor=alice).revision == 3
    assert caption_edits.undo_caption(mine).caption == "theirs"


def test_caption_of_a_deleted_picture_is_missing(many):
    (picture,) = many("one")
    Picture.objects.all().delete()
    with pytest.raises(Missing):
        caption_edits.set_caption(picture, caption="two")


def test_history_keeps_the_last_changes(many, monkeypatch):
    monkeypatch.setattr(caption_edits, "KEPT_CHANGES", 3)
    first, second = many("0", "0")
    for number in range(1, 7):
        caption_edits.set_caption(first, caption=str(number))
    caption_edits.set_caption(second, caption="1")
    assert [change.after for change in caption_edits.history_of(first)] == ["6", "5", "4"]
    assert [change.after for change in caption_edits.history_of(second)] == ["1"]


def test_import_that_brings_a_caption_can_be_undone(dataset, add, draw):
    import io

    (red,) = add("red")
    caption_edits.set_caption(red, caption="")
    services.import_files(dataset, files=[("red.txt", io.BytesIO(b"new"))])
    red.refresh_from_db()
    assert (red.caption, red.revision) == ("new", 3)
    assert [caption_edits.undo_caption(red).caption for _ in range(2)] == ["", "a red picture"]


def test_import_of_many_captions_is_undone_as_a_whole(dataset, many):
    rows = many(*"abcdefghijklmnopqrstuvwxyz")
    done = caption_edits.replace_captions(dataset, captions={row.pk: "new" for row in rows[1:]}, label="L", actor=None)
    assert (len(done), captions_of(dataset)) == (25, ["a", *["new"] * 25])
    assert bulk_edits.undo_edit(dataset.bulk_edits.get()) == (25, 0)
    assert captions_of(dataset) == list("abcdefghijklmnopqrstuvwxyz")


# --- Many captions ----------------------------------------------------------------------------------------------------
def test_edit_changes_the_selection_and_is_undone_as_a_whole(dataset, many, alice):
    rows = many("a cat", "a dog", "a cat, big", "")
    before = list(dataset.pictures.values("pk", "caption", "created_at", "original_name"))
    selection = Selection.of([rows[0].pk, rows[1].pk, rows[3].pk, 99_999])
    done = bulk_edits.apply_edit(dataset, operation=Operation("add", "big"), selection=selection, actor=alice)
    assert (done.changed, done.left_alone) == (3, 0)
    assert captions_of(dataset) == ["a cat, big", "a dog, big", "a cat, big", "big"]
    assert list(dataset.pictures.values_list("revision", flat=True)) == [2, 2, 1, 2]
    assert (done.edit.label, done.edit.actor) == ("Add tags: “big”", alice)
    assert bulk_edits.undo_edit(done.edit) == (3, 0)
    assert list(dataset.pictures.values("pk", "caption", "created_at", "original_name")) == before
    with pytest.raises(Conflict, match=r"This was undone already\."):
        bulk_edits.undo_edit(done.edit)


def test_undo_leaves_alone_what_was_changed_since(dataset, many, alice):
    first, _second, third = many("a", "b", "c")
    edit = bulk_edits.apply_edit(dataset, operation=Operation("suffix", "x"), selection=ALL, actor=alice).edit
    caption_edits.set_caption(first, caption="mine")
    third.delete()
    assert bulk_edits.undo_edit(edit) == (1, 2)
    assert captions_of(dataset) == ["mine", "b"]
    assert caption_edits.undo_caption(first).caption == "a x"


def test_one_picture_of_an_edit_is_undone_alone(dataset, many, alice):
    first, _ = many("a", "b")
    edit = bulk_edits.apply_edit(dataset, operation=Operation("suffix", "x"), selection=ALL, actor=alice).edit
    assert caption_edits.undo_caption(first).caption == "a"
    assert bulk_edits.undo_edit(edit) == (1, 1)
    assert captions_of(dataset) == ["a", "b"]


def test_edit_leaves_alone_what_somebody_changed_meanwhile(dataset, many, alice):
    first, second, _third = many("a", "b", "c")
    plan = bulk_edits.plan_edit(dataset, operation=Operation("add", "x"), selection=ALL)
    caption_edits.set_caption(first, caption="mine")
    second.delete()
    edit, left = caption_edits.change_captions(dataset, wanted=plan.changes, label="x", actor=alice)
    assert (edit.picture_count, left, captions_of(dataset)) == (1, 2, ["mine", "c, x"])


def test_edit_of_a_preview_that_no_longer_holds_is_refused(dataset, many, alice, everything):
    (first,) = many("a")
    plan = bulk_edits.plan_edit(dataset, operation=Operation("add", "x"), selection=ALL)
    caption_edits.set_caption(first, caption="mine")
    before = everything()
    with pytest.raises(Conflict):
        bulk_edits.apply_edit(
            dataset, operation=Operation("add", "x"), selection=ALL, actor=alice, fingerprint=plan.fingerprint
        )
    assert everything() == before


def test_edit_that_changes_nothing_leaves_nothing_behind(dataset, many, alice, everything):
    many("a, x")
    before = everything()
    done = bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=ALL, actor=alice)
    assert (done.edit, done.changed, everything()) == (None, 0, before)


def test_edit_that_makes_one_caption_too_long_changes_none(dataset, many, alice, everything):
    many("a", "b" * 4999)
    before = everything()
    with pytest.raises(UserError):
        bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=ALL, actor=alice)
    assert everything() == before


def test_last_edits_are_kept(dataset, many, alice, monkeypatch):
    monkeypatch.setattr(caption_edits, "KEPT_EDITS", 2)
    many("a")
    for text in "xyz":
        bulk_edits.apply_edit(dataset, operation=Operation("add", text), selection=ALL, actor=alice)
    assert [edit.label for edit in dataset.bulk_edits.all()] == ["Add tags: “z”", "Add tags: “y”"]
    assert CaptionChange.objects.count() == 2


def test_edit_of_many_takes_as_many_queries_as_of_few_but_for_the_history(dataset, many, alice):
    def queries():
        with CaptureQueriesContext(connection) as asked:
            edit = bulk_edits.apply_edit(dataset, operation=Operation("suffix", "x"), selection=ALL, actor=alice).edit
            bulk_edits.undo_edit(edit)
        return [query["sql"] for query in asked if "captionchange" not in query["sql"][:40]]

    many("a")
    few = queries()
    many(*["b"] * 900)
    assert len(queries()) == len(few)


KILLED = """
import os, signal, sys
import django
django.setup()
from django.db import connection
from datasets import bulk_edits
from datasets.caption_operations import Operation
from datasets.models import BulkEdit, CaptionChange, Dataset, Picture
from datasets.selections import Selection
from lorapilot.models import User

owner = User.objects.create_user("alice")
dataset = Dataset.objects.create(owner=owner, name="cats")
common = {"dataset": dataset, "extension": "png", "width": 1, "height": 1, "bytes": 1, "original_name": "a.png"}
Picture.objects.bulk_create(Picture(**common, sha256=f"{n:064}", caption=f"picture {n}") for n in range(1500))

def state():
    rows = list(Picture.objects.order_by("pk").values())
    return rows, list(BulkEdit.objects.values()), list(CaptionChange.objects.order_by("pk").values())

def edit():
    return bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=Selection(None), actor=owner).edit

def killed_after(statement, work):
    connection.close()
    child = os.fork()
    if not child:
        def killer(execute, sql, params, many, context):
            result = execute(sql, params, many, context)
            if sql.startswith(statement):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        with connection.execute_wrapper(killer):
            work()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, statement

before = state()
for statement in ('INSERT INTO "datasets_captionchange"', 'UPDATE "datasets_picture"', 'UPDATE "datasets_dataset"'):
    killed_after(statement, edit)
    assert state() == before, statement
done = edit()
after = state()
assert [row["caption"] for row in after[0]] == [f"{row['caption']}, x" for row in before[0]]
for statement in ('UPDATE "datasets_bulkedit"', 'UPDATE "datasets_picture"'):
    killed_after(statement, lambda: bulk_edits.undo_edit(done))
    assert state() == after, statement
assert bulk_edits.undo_edit(done) == (1500, 0)
assert [row["caption"] for row in state()[0]] == [row["caption"] for row in before[0]]
print("whole")
"""


def test_server_killed_in_the_middle_of_an_edit_leaves_all_or_nothing(tmp_path):
    environment = os.environ | {"LORAPILOT_WORKSPACE": str(tmp_path), "DJANGO_SETTINGS_MODULE": "lorapilot.settings"}
    for command in (["manage.py", "migrate", "--verbosity=0"], ["-c", KILLED]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "whole\n"


# --- Deleting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", range(4))
def test_deleting_one_picture_leaves_the_others_as_they_are(dataset, many, k):
    rows = many("a", "b, c", "", "d")
    before = list(dataset.pictures.order_by("pk").values())
    services.delete_picture(rows[k])
    assert list(dataset.pictures.order_by("pk").values()) == before[:k] + before[k + 1 :]


def test_deleting_many_leaves_the_others_and_is_undone(dataset, add, alice):
    rows = add("red", "green", "blue", "white")
    before = list(dataset.pictures.order_by("pk").values())
    chosen = Selection.of([rows[1].pk, rows[3].pk])
    edit = picture_removal.remove_pictures(dataset, selection=chosen, actor=alice)
    assert list(dataset.pictures.order_by("pk").values()) == [before[0], before[2]]
    assert bulk_edits.undo_edit(edit) == (2, 0)
    after = list(dataset.pictures.order_by("pk").values())
    for row in (*before, *after):
        del row["created_at"], row["updated_at"]
    assert after == before


def test_deleted_pictures_that_cannot_come_back_are_told(dataset, add, alice, draw):
    import io

    red, _green, _blue = add("red", "green", "blue")
    edit = picture_removal.remove_pictures(dataset, selection=ALL, actor=alice)
    pictures.picture_path(red.sha256, "png").unlink()
    services.import_files(dataset, files=[("again.png", io.BytesIO(draw("green")))])
    assert bulk_edits.undo_edit(edit) == (1, 2)
    assert sorted(dataset.pictures.values_list("original_name", flat=True)) == ["again.png", "blue.png"]


# --- Which pictures ---------------------------------------------------------------------------------------------------
def found(dataset, **query):
    return [picture.original_name[0] for picture in PictureFilter.from_query(query).pictures(dataset)]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({}, "01234"),
        ({"q": "CAT"}, "024"),
        ({"q": "3.PNG"}, "3"),
        ({"tag": "cat"}, "04"),
        ({"tag": "big (red)"}, "4"),
        ({"tag": ".*"}, ""),
        ({"show": "missing"}, "3"),
        ({"show": "short"}, "0123"),
        ({"show": "no-trigger"}, "0134"),
        ({"show": "leaking"}, "14"),
        ({"below": "64"}, "0124"),
        ({"below": "48"}, ""),
        ({"q": "cat", "show": "short", "sort": "-arrival"}, "20"),
        ({"sort": "length"}, "30124"),
        ({"sort": "-length"}, "42103"),
        ({"sort": "-name"}, "43210"),
        ({"sort": "-size"}, "34210"),
    ],
)
def test_filter_finds(dataset, many, alice, query, names):
    services.create_dataset(alice, name="Other", trigger_word="sks")
    many("cat", "ohwxy", "ohwx, cats")
    many("", width=640, height=640)
    many("a sks thing, Cat , big (red), and so on")
    assert "".join(found(dataset, **query)) == names


def test_filter_finds_what_looks_alike_of_what_was_checked(dataset, many):
    many(*["a cat"] * 5)
    grid = "5" * 32
    looks = [f"{grid}808080", f"{grid[:-1]}4808080", f"{grid}ffffff", "", ""]
    for picture, look in zip(dataset.pictures.order_by("pk"), looks, strict=True):
        dataset.pictures.filter(pk=picture.pk).update(fingerprint=look)
    assert found(dataset, show="alike") == ["0", "1"]
    assert found(dataset, show="alike", q="1.png") == ["1"]


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"resolution": "512"},
        {"buckets": "off"},
        {"upscale": "off", "resolution": "768"},
        {"minimum": "256", "maximum": "1088", "step": "32", "upscale": "on"},
    ],
)
def test_filter_by_bucket_finds_what_the_report_has_there(dataset, many, alice, chosen):
    chance = random.Random(str(chosen))
    for _ in range(60):
        many("", width=chance.randint(8, 3000), height=chance.randint(8, 3000))
    many("", "", width=1, height=2**31 - 1)
    many("", width=10**5, height=10**5)
    report = report_on(alice, dataset, rules_of(chosen))
    there = {bucket.name: bucket.placed for bucket in report.buckets} | {"dropped": report.dropped}
    for name, placed in there.items():
        wanted = PictureFilter.from_query(chosen | {"bucket": name})
        assert list(wanted.pictures(dataset)) == [one.picture for one in placed]
        assert PictureFilter.from_query(wanted.as_query()) == wanted
    counts = {name: len(placed) for name, placed in there.items() if placed}
    assert bucket_counts(dataset, report.rules) == counts
    assert found(dataset, bucket="8x8") == []


@pytest.mark.parametrize("sort", ["arrival", "-arrival", "name", "-name", "size", "-size", "length", "-length"])
def test_pages_of_every_order_have_each_picture_once(dataset, many, sort):
    for number in range(23):
        many("x" * (number % 3), width=10 + number % 4)
    wanted = PictureFilter.from_query({"sort": sort})
    seen, cursor = [], ""
    while True:
        rows, cursor = wanted.page(dataset, after=cursor, size=5)
        seen += rows
        if not cursor:
            break
    assert seen == list(wanted.pictures(dataset))
    assert len(seen) == 23


@pytest.mark.parametrize(
    "query",
    [
        *({"below": below} for below in ("-1", "x", "9" * 30, "9" * 5000, "²")),
        *({"bucket": bucket} for bucket in ("x", "1x", "1x1x1", "-1x1", "²x²", "9" * 5000 + "x1", "1x1\n")),
        *({"resolution": resolution} for resolution in ("x", "63", "9" * 5000)),
        {"show": "x"},
        {"sort": "x"},
    ],
)
def test_filter_that_is_none_is_refused(query):
    with pytest.raises(UserError):
        PictureFilter.from_query(query)


@pytest.mark.parametrize("picked", ["x", "-1", "²", "9" * 19, "9" * 5000])
def test_selection_of_what_is_no_id_is_refused(picked):
    with pytest.raises(UserError, match="A picture's id is a number"):
        Selection.from_form({"ids": "1"}, [picked])


@pytest.mark.parametrize(
    ("sort", "cursor"), [("arrival", "x"), ("size", "1"), ("size", "1~x"), ("name", "~a"), ("name", "1~\0")]
)
def test_cursor_that_is_none_is_refused(dataset, sort, cursor):
    with pytest.raises(UserError):
        PictureFilter(sort=sort).page(dataset, after=cursor, size=5)


# --- Tags and the trigger word ----------------------------------------------------------------------------------------
def test_tags_are_counted_by_picture(dataset, many):
    many("cat, big, cat", "cat", "", "  , dog ")
    assert tag_lists.tag_counts(dataset) == [("cat", 2), ("big", 1), ("dog", 1)]


def test_tags_are_proposed_from_the_dataset_and_the_own_list(dataset, many, alice, bob):
    many("long hair, cat", "cat, concatenated")
    tag_lists.set_tag_list(alice, name="booru.csv", content=b"cat_ears,0,900,x\nlong_hair,0,5000\n:d,7\ncat,1\nnew,")
    proposed = [
        (one.tag, one.count, one.is_own) for one in tag_lists.find_tags(alice, dataset=dataset, text="CAT", limit=9)
    ]
    assert proposed == [("cat", 2, False), ("concatenated", 1, False), ("cat ears", 900, True)]
    assert [one.tag for one in tag_lists.find_tags(alice, dataset=dataset, text="long_h", limit=9)] == ["long hair"]
    assert [one.tag for one in tag_lists.find_tags(bob, dataset=dataset, text="cat", limit=1)] == ["cat"]
    assert tag_lists.tag_list_of(alice).tag_count == 5
    tag_lists.delete_tag_list(alice)
    assert tag_lists.tag_list_of(alice) is None


@pytest.mark.parametrize("content", [b"", b"\n,\n", b"\xff", b"x" * 201, b"a\x07b", b"x" * (16 * 1024**2 + 1)])
def test_tag_list_that_is_none_is_refused(alice, content):
    with pytest.raises(UserError):
        tag_lists.set_tag_list(alice, name="x", content=content)
    assert tag_lists.tag_list_of(alice) is None


def test_trigger_word_is_reported_and_applied(dataset, many, alice, bob):
    services.create_dataset(alice, name="Other", trigger_word="sks")
    services.create_dataset(alice, name="Same", trigger_word="OHWX")
    services.create_dataset(bob, name="Bobs", trigger_word="cat")
    many("a cat, big", "ohwx, big", "ohwxy", "sks, ohwx", "")
    report = trigger_report(dataset, tags=tag_lists.tag_counts(dataset))
    assert (report.missing, report.leaking, report.foreign) == (3, 2, ["sks"])
    assert report.sample_prompts == ["ohwx", "ohwx, big"]
    bulk_edits.apply_edit(dataset, operation=Operation("trigger"), selection=ALL, actor=alice)
    assert captions_of(dataset) == ["ohwx, a cat, big", "ohwx, big", "ohwx, ohwxy", "sks, ohwx", "ohwx"]
    assert trigger_report(dataset, tags=[]).missing == 0
    services.set_trigger_word(dataset, trigger_word="")
    dataset.refresh_from_db()
    assert trigger_report(dataset, tags=[]).missing == 0
    assert trigger_report(dataset, tags=[]).sample_prompts == []


# --- Thumbnails -------------------------------------------------------------------------------------------------------
def test_lost_thumbnails_are_drawn_by_one_job(dataset, add, many):
    red, blue = add("red", "blue")
    many("no file")
    thumbnails.draw_lost_thumbnails(dataset.pictures.all())
    assert Job.objects.count() == 0
    for picture in (red, blue):
        pictures.thumbnail_path(picture.sha256).unlink()
    for _ in range(2):
        thumbnails.draw_lost_thumbnails(dataset.pictures.all())
    job = Job.objects.get()
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (job.status, job.result) == ("succeeded", {"drawn": 2})
    assert [pictures.thumbnail_path(picture.sha256).exists() for picture in (red, blue)] == [True, True]
    assert BulkEdit.objects.count() == 0
