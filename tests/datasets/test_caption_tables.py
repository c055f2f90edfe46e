"""Captions from .txt, .caption, JSON and CSV files: which goes to which picture, and what is said of the others."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from datasets import batches, caption_tables, services
from lorapilot.errors import UserError


def imported(dataset, *files):
    return services.import_files(
        dataset,
        files=[
            (name, io.BytesIO(content.encode() if isinstance(content, str) else content)) for name, content in files
        ],
    )


def archive(*entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in entries:
            target.writestr(name, content)
    file.seek(0)
    return file


def captions_of(dataset):
    return dict(dataset.pictures.values_list("original_name", "caption"))


KOHYA = {
    "/home/someone/train/10_cat/red": {"caption": "a red cat", "tags": "cat, red", "train_resolution": [64, 48]},
    "C:\\train\\10_cat\\blue.png": {"tags": ["cat", "blue"]},
    "green": "a green cat",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", json.dumps(KOHYA)),
        (
            "metadata.jsonl",
            (
                '{"file_name": "red.png", "text": "a red cat, cat, red"}\n\n'
                '{"file_name": "blue.png", "caption": "cat, blue", "more": 1}\r\n'
                '{"file_name": "green.png", "prompt": "a green cat"}'
            ),
        ),
        (
            "metadata.csv",
            'file_name,text\nred.png,"a red cat, cat, red"\nblue.png,"cat, blue"\ngreen.png,a green cat\n',
        ),
        (
            "all.json",
            json.dumps(
                [
                    {"image": "red.png", "text": "a red cat", "tags": ["cat", "red"]},
                    {"file": "blue.png", "tags": "cat, blue"},
                    {"file_name": "./green.png", "text": "a green cat"},
                    "other",
                ]
            ),
        ),
    ],
)
@pytest.mark.parametrize("is_archive", [True, False])
def test_table_of_captions_reaches_its_pictures(dataset, draw, name, content, is_archive):
    files = [(f"10_cat/{colour}.png", draw(colour)) for colour in ("red", "blue", "green")]
    files.append((f"10_cat/{name}", content.encode()))
    if is_archive:
        report = services.import_zip(dataset, path=archive(*files), filename="x.zip")
    else:
        report = imported(dataset, *files)
    assert (report.refused, len(report.added)) == ([], 3)
    assert captions_of(dataset) == {
        "red.png": "a red cat, cat, red",
        "blue.png": "cat, blue",
        "green.png": "a green cat",
    }
    assert set(dataset.pictures.values_list("repeats", flat=True)) == {10}


def test_rows_go_by_folder_when_names_are_the_same(dataset, draw):
    rows = [{"file_name": "train/a/1.png", "text": "red"}, {"file_name": "train/b/1.png", "text": "blue"}]
    files = [("set/train/a/1.png", draw("red")), ("set/train/b/1.png", draw("blue"))]
    files.append(("set/metadata.jsonl", "\n".join(map(json.dumps, rows))))
    imported(dataset, *files)
    assert list(dataset.pictures.values_list("caption", flat=True)) == ["red", "blue"]


def test_rows_that_could_mean_two_pictures_are_told(dataset, draw):
    files = [
        ("a/1.png", draw("red")),
        ("b/1.png", draw("blue")),
        ("m.jsonl", '{"file_name": "1.png", "text": "which?"}'),
    ]
    report = imported(dataset, *files)
    assert report.refused == [("m.jsonl", "There is no picture for 1 of its captions: 1")]
    assert set(captions_of(dataset).values()) == {""}


def test_file_beside_the_picture_comes_before_the_table(dataset, draw):
    report = imported(
        dataset,
        ("cat.png", draw()),
        ("meta.json", json.dumps({"cat": {"caption": "table"}})),
        ("cat.json", json.dumps({"caption": "own json"})),
        ("cat.caption", "own caption"),
        ("cat.txt", "own text"),
    )
    assert captions_of(dataset) == {"cat.png": "own text"}
    assert report.refused == [
        ("cat.json", "The picture has its caption from cat.caption."),
        ("cat.caption", "The picture has its caption from cat.txt."),
    ]


@pytest.mark.parametrize("name", ["cat.caption", "cat.json"])
def test_own_file_of_another_kind_is_read(dataset, draw, name):
    content = "a cat" if name.endswith(".caption") else json.dumps({"caption": "a cat"})
    imported(dataset, ("cat.png", draw()), (name, content))
    assert captions_of(dataset) == {"cat.png": "a cat"}


def test_table_fills_what_is_there_and_keeps_the_rest(dataset, draw, add):
    add("red")
    imported(dataset, ("blue.png", draw("blue")))
    rows = [{"file_name": f"{colour}.png", "text": f"new {colour}"} for colour in ("red", "blue", "grey", "white")]
    report = imported(dataset, ("metadata.jsonl", "\n".join(map(json.dumps, rows))))
    assert captions_of(dataset) == {"red.png": "a red picture", "blue.png": "new blue"}
    assert (report.captioned, report.duplicates) == (["blue.png"], ["red.png"])
    assert report.notes == [("red.png", "It is here already, and its caption was kept.")]
    told = "There is no picture for 2 of its captions: grey, white"
    assert report.refused == [("metadata.jsonl", told)]


def test_name_that_macos_takes_apart_is_the_same_name(dataset, draw):
    imported(dataset, ("Bär.png", draw()), ("Ba\u0308r.txt", "a bear"))
    assert captions_of(dataset) == {"Bär.png": "a bear"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are_are_read(dataset, draw, encoding):
    imported(dataset, ("cat.png", draw()), ("cat.txt", "ein Hündchen".encode(encoding)))
    assert captions_of(dataset) == {"cat.png": "ein Hündchen"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "It is not valid JSON. Correct the file and upload it again."),
        ("a.json", "[" * 100_000, "It is not valid JSON. Correct the file and upload it again."),
        ("a.json", "[" * 300_000, "It has more than 200,000 objects. Split it."),
        ("a.json", "1" * 10_000, "It is not valid JSON. Correct the file and upload it again."),
        ("a.json", "null", caption_tables.NO_CAPTIONS),
        ("a.json", '{"version": 3, "nodes": [1, 2]}', caption_tables.NO_CAPTIONS),
        (
            "a.jsonl",
            '{"file_name": "a.png", "text": "x"}\nno json',
            "Line 2 is not valid JSON. Correct the file and upload it again.",
        ),
        ("a.csv", "name,price\ncat,1\n", caption_tables.NO_CAPTIONS),
        (
            "a.csv",
            "file_name,text\na.png," + "x" * 200_000,
            "It is not a valid CSV file. Correct it and upload it again.",
        ),
        (
            "a.jsonl",
            "ü".encode("latin-1"),
            "The caption is not UTF-8 text. Save the file as UTF-8 and upload it again.",
        ),
        ("a.json", b" " * (16 * 1024**2 + 1), "A file of captions has at most 16 MiB. Split it."),
    ],
)
def test_file_that_has_no_captions_is_refused(dataset, everything, name, content, reason):
    before = everything()
    assert imported(dataset, (name, content)).refused == [(name, reason)]
    assert everything() == before


@pytest.mark.parametrize("text", ["x" * 5001, "a\0b", "\ud800"])
def test_bad_caption_in_a_table_is_named_and_the_others_go_in(dataset, draw, text):
    rows = json.dumps([{"file_name": "red.png", "text": text}, {"file_name": "blue.png", "text": "blue"}])
    report = imported(dataset, ("red.png", draw("red")), ("blue.png", draw("blue")), ("all.json", rows))
    assert captions_of(dataset) == {"red.png": "", "blue.png": "blue"}
    assert [name for name, _ in report.refused] == ["all.json"]
    assert report.refused[0][1].startswith("red.png: The caption has ")


@pytest.mark.parametrize(
    ("path", "repeats"),
    [
        ("a.png", 1),
        ("10_cat/a.png", 10),
        ("train\\10_cat\\a.png", 10),
        ("10_cat/5_dog/a.png", 5),
        ("10_cat/faces/a.png", 10),
        ("2024_holiday/a.png", 1),
        ("0_cat/a.png", 1),
        ("1000_cat/a.png", 1000),
        ("10_/a.png", 1),
        ("10cat/a.png", 1),
        ("10_cat.png", 1),
    ],
)
def test_repeats_are_those_of_the_nearest_folder(path, repeats):
    assert batches.repeats_of(path) == repeats


@pytest.mark.parametrize(
    ("path", "is_junk"),
    [("a.png", False), (".a.png", True), ("a/.b/c.png", True), ("__MACOSX/a.png", True), ("x/Thumbs.db", True)],
)
def test_hidden_files_are_junk(path, is_junk):
    assert batches.is_junk(path) == is_junk


def test_hidden_file_that_was_chosen_is_named(dataset, everything):
    before = everything()
    assert imported(dataset, (".a.png", b"")).refused == [(".a.png", batches.HIDDEN)]
    assert everything() == before


def test_read_table_refuses_with_sentences():
    with pytest.raises(UserError):
        caption_tables.read_table(b"", name="a.csv")
