"""Single files: what is stored, what is refused and with which reason, and which caption goes where."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib

import pytest
from PIL import Image

from datasets import batches, captions, pictures, services
from datasets.models import Picture
from lorapilot.errors import UserError


def imported(dataset, *files):
    return services.import_files(dataset, files=[(name, io.BytesIO(content)) for name, content in files])


def refusals(report):
    return dict(report.refused)


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_picture_is_stored_byte_for_byte_with_a_thumbnail(dataset, draw, kind, extension):
    content = draw("red", kind, (600, 300))
    report = imported(dataset, (f"cat.{extension}", content))
    assert report.as_dict() == {"added": 1, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    picture = dataset.pictures.get()
    assert (picture.width, picture.height, picture.bytes) == (600, 300, len(content))
    assert (picture.sha256, picture.extension) == (hashlib.sha256(content).hexdigest(), extension)
    assert services.picture_path(picture.sha256, extension).read_bytes() == content
    with Image.open(pictures.thumbnail_path(picture.sha256)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (256, 128))


def test_picture_turned_by_exif_has_the_size_that_is_seen(dataset, draw):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    report = imported(dataset, ("cat.jpg", draw("red", "JPEG", (400, 200), exif=exif)))
    assert report.notes == [("cat.jpg", "It was turned upright, as its EXIF data says.")]
    picture = dataset.pictures.get()
    assert (picture.width, picture.height, picture.extension) == (200, 400, "png")
    with Image.open(pictures.ensure_thumbnail(picture.sha256, "png")) as thumbnail:
        assert thumbnail.size == (128, 256)
    pictures.thumbnail_path(picture.sha256).unlink()
    with Image.open(pictures.ensure_thumbnail(picture.sha256, "png")) as drawn_again:
        assert drawn_again.size == (128, 256)


def test_picture_with_a_foreign_ending_is_stored_as_what_it_is(dataset, draw):
    imported(dataset, ("cat.jpg", draw("red", "PNG")))
    assert dataset.pictures.get().extension == "png"


def huge_png():
    """A valid header that announces 60,000 × 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = zlib.compress(b"")
    idat = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return b"\x89PNG\r\n\x1a\n" + ihdr + idat


def test_bad_pictures_are_refused_by_name_and_the_rest_goes_in(dataset, draw, workspace):
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    file = io.BytesIO()
    noise.save(file, "PNG")
    deep = io.BytesIO()
    Image.new("F", (8, 8)).save(deep, "TIFF")
    report = imported(
        dataset,
        ("cut.png", file.getvalue()[:2000]),
        ("cut.jpg", draw("red", "JPEG", (300, 300))[:-400]),
        ("huge.png", huge_png()),
        ("text.png", b"no picture at all"),
        ("empty.png", b""),
        ("cat.gif", draw("red", "GIF")),
        ("gif.png", draw("red", "GIF")),
        ("deep.png", deep.getvalue()),
        ("good.png", draw("green")),
    )
    assert report.added == ["good.png"]
    damaged = "The picture is damaged or cut off. Save it again and upload the new file."
    foreign = "This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."
    assert refusals(report) == {
        "cut.png": damaged,
        "cut.jpg": damaged,
        "huge.png": "The picture has more than 100 megapixels. Save it smaller.",
        "text.png": foreign,
        "empty.png": foreign,
        "cat.gif": batches.FOREIGN,
        "gif.png": foreign,
        "deep.png": "Pictures of the kind F are not supported. Save it with 8 bits a channel.",
    }
    good = dataset.pictures.get()
    assert files_below(workspace / "datasets") == [f"pictures/{good.sha256[:2]}/{good.sha256}.png"]


def test_picture_above_the_pixel_limit_of_the_settings_is_refused(dataset, draw, settings):
    settings.MAX_PICTURE_PIXELS = 1_000_000
    report = imported(
        dataset, ("big.png", draw("red", size=(1001, 1000))), ("fits.png", draw("red", size=(1000, 1000)))
    )
    assert refusals(report) == {"big.png": "The picture has more than 1 megapixels. Save it smaller."}
    assert report.added == ["fits.png"]


def test_picture_of_too_many_bytes_is_refused(dataset, draw, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 50)
    assert list(refusals(imported(dataset, ("cat.png", draw())))) == ["cat.png"]
    assert dataset.pictures.count() == 0


def test_names_with_paths_are_only_shown(dataset, draw):
    imported(dataset, ("../../etc/cat.png", draw("red")), ("C:\\pictures\\dog\x00.png", draw("blue")))
    assert list(dataset.pictures.values_list("original_name", flat=True)) == ["cat.png", "dog.png"]


# --- Captions ---------------------------------------------------------------------------------------------------------
def test_caption_files_go_to_the_picture_of_the_same_name(dataset, draw):
    imported(dataset, ("cat.png", draw("red")), ("cat.txt", b"a cat,\r\n  asleep\n"), ("dog.png", draw("blue")))
    assert list(dataset.pictures.values_list("original_name", "caption")) == [
        ("cat.png", "a cat, asleep"),
        ("dog.png", ""),
    ]
    later = imported(dataset, ("dog.txt", "ein Hündchen".encode()))
    assert later.captioned == ["dog.png"]
    assert dataset.pictures.get(original_name="dog.png").caption == "ein Hündchen"


def test_caption_without_a_picture_is_refused(dataset):
    report = imported(dataset, ("cat.txt", b"a cat"))
    assert refusals(report) == {"cat.txt": "No picture has the same name. Upload the picture with its caption."}


def test_caption_for_two_pictures_of_one_name_is_refused(dataset, draw):
    imported(dataset, ("a/cat.png", draw("red")))
    imported(dataset, ("b/cat.png", draw("blue")))
    report = imported(dataset, ("cat.txt", b"which one?"))
    assert list(refusals(report)) == ["cat.txt"]
    assert set(dataset.pictures.values_list("caption", flat=True)) == {""}


def test_captions_that_are_no_text_are_refused(dataset, draw):
    report = imported(
        dataset,
        ("latin.txt", "Hündchen".encode("latin-1")),
        ("null.txt", b"a\0b"),
        ("long.txt", b"x" * 5001),
        ("book.txt", b"x" * (captions.MAX_FILE_BYTES + 1)),
        ("mark.png", draw()),
        ("mark.txt", "\ufeffwith a mark".encode()),
    )
    assert refusals(report) == {
        "latin.txt": "The caption is not UTF-8 text. Save the file as UTF-8 and upload it again.",
        "null.txt": "The caption has characters that are no text. Remove them and save again.",
        "long.txt": "The caption has 5,001 characters; the most is 5,000. Shorten it.",
        "book.txt": "A caption file has at most 64 KiB. Shorten it.",
    }
    assert dataset.pictures.get().caption == "with a mark"


def test_duplicate_is_left_alone_and_its_caption_kept_unless_chosen_otherwise(dataset, draw):
    imported(dataset, ("cat.png", draw()))
    filled = imported(dataset, ("cat.png", draw()), ("cat.txt", b"first"))
    assert (filled.captioned, filled.duplicates, dataset.pictures.get().caption) == (["cat.png"], [], "first")
    again = imported(dataset, ("cat.png", draw()))
    assert (again.duplicates, again.notes, dataset.pictures.get().caption) == (["cat.png"], [], "first")
    files = [("copy.png", io.BytesIO(draw())), ("copy.txt", io.BytesIO(b"second"))]
    kept = services.import_files(dataset, files=files)
    assert kept.notes == [("copy.png", "It is here already, and its caption was kept.")]
    assert (kept.duplicates, dataset.pictures.get().caption) == (["copy.png"], "first")
    files = [("copy.png", io.BytesIO(draw())), ("copy.txt", io.BytesIO(b"second"))]
    replaced = services.import_files(dataset, files=files, choices=services.ImportChoices(replaces_captions=True))
    assert (replaced.captioned, dataset.pictures.get().caption) == (["cat.png"], "second")


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 5001])
def test_set_caption_refuses_what_is_no_caption(dataset, add, text):
    (picture,) = add("red")
    with pytest.raises(UserError):
        services.set_caption(picture, caption=text)
    picture.refresh_from_db()
    assert picture.caption == "a red picture"


# --- Deletion ---------------------------------------------------------------------------------------------------------
def test_deleting_one_picture_leaves_the_others_identical(dataset, add):
    rows = add("red", "green", "blue")
    before = list(dataset.pictures.exclude(pk=rows[1].pk).values())
    deleted = services.delete_picture(rows[1])
    assert list(dataset.pictures.values()) == before
    restored = services.restore_picture(dataset, deleted=deleted)
    assert [picture.original_name for picture in dataset.pictures.all()] == ["red.png", "green.png", "blue.png"]
    assert restored.caption == "a green picture"


def test_unused_files_go_after_a_day_and_used_ones_stay(alice, dataset, add):
    red, green, blue, grey = add("red", "green", "blue", "grey")
    services.pin_version(dataset)
    other = services.create_dataset(alice, name="Other")
    add("yellow", "green", to=other)
    for picture in (red, green):
        services.delete_picture(picture)
    late = add("orange")[0]
    services.delete_picture(late)
    services.delete_picture(other.pictures.get(original_name="yellow.png"))
    yellow = next(
        path for path in (pictures.workspace.datasets() / "pictures").rglob("*.png") if is_colour(path, (255, 255, 0))
    )
    for path in (pictures.workspace.datasets() / "pictures").rglob("*.png"):
        if path.stem != late.sha256:
            os.utime(path, (0, 0))
    assert services.remove_unused_pictures() == 1
    assert not yellow.exists()
    assert not pictures.thumbnail_path(yellow.stem).exists()
    for picture in (red, green, blue, grey, late):
        assert services.picture_path(picture.sha256, "png").exists()


def is_colour(path, colour):
    with Image.open(path) as image:
        return image.getpixel((0, 0)) == colour


def test_deleting_the_dataset_keeps_versions_and_their_files(dataset, add):
    (red,) = add("red")
    version = services.pin_version(dataset)
    services.delete_dataset(dataset)
    version.refresh_from_db()
    assert version.dataset is None
    assert Picture.objects.count() == 0
    os.utime(services.picture_path(red.sha256, "png"), (0, 0))
    assert services.remove_unused_pictures() == 0
