"""ZIP archives: what goes in, that a bad entry is named and the rest goes in, and that a hostile archive leaves
database and disk as they were."""

from __future__ import annotations

import functools
import io
import random
import stat
import struct
import zipfile

import pytest

from datasets import batches, services
from lorapilot import partials
from lorapilot.errors import UserError

MIB = 1024**2
END = b"PK\x05\x06"  # of the archive: the record that announces the table of contents


def zipped(*entries, compression=zipfile.ZIP_DEFLATED, **told):
    """The bytes of an archive. `told` is what its table of contents says of the last entry, true or not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # exactly; ZipInfo itself cuts names at a NUL
            archive.writestr(info, content, compression)
        for key, value in told.items():
            setattr(archive.filelist[-1], key, value)
    return file.getvalue()


def end_record(content, **told):
    """`content` with another number of entries, or size of the table of contents, in its last record."""
    at = content.rindex(END)
    changed = bytearray(content)
    if "entries" in told:
        struct.pack_into("<2H", changed, at + 8, told["entries"], told["entries"])
    if "contents_bytes" in told:
        struct.pack_into("<L", changed, at + 12, told["contents_bytes"])
    return bytes(changed)


def imported(dataset, content, **choices):
    choices = services.ImportChoices(**choices)
    return services.import_zip(dataset, path=io.BytesIO(content), filename="pictures.zip", choices=choices)


def refusal(dataset, content):
    with pytest.raises(UserError) as refused:
        imported(dataset, content)
    return refused.value.message


def rows(dataset):
    return list(dataset.pictures.values_list("original_name", "extension", "caption"))


# --- What goes in -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_with_folders_and_captions_goes_in(dataset, draw, compression):
    content = zipped(
        ("cats/", b""),
        ("cats/01.png", draw("red")),
        ("cats/01.txt", b"a red cat\n"),
        ("dogs/01.JPG", draw("blue", "JPEG")),
        ("dogs/01.txt", "ein blaues Hündchen".encode()),
        ("bird.webp", draw("green", "WEBP")),
        compression=compression,
    )
    report = imported(dataset, content)
    assert report.as_dict() == {"added": 3, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    assert report.sentence() == "Pictures: 3 added."
    assert rows(dataset) == [
        ("01.png", "png", "a red cat"),
        ("01.JPG", "jpg", "ein blaues Hündchen"),
        ("bird.webp", "webp", ""),
    ]
    for picture in dataset.pictures.all():
        assert services.picture_path(picture.sha256, picture.extension).stat().st_size == picture.bytes


def test_archive_of_an_old_windows_goes_in(dataset, draw):
    imported(dataset, zipped(("cats\\a.png", draw("red")), ("cats\\a.txt", b"a cat")))
    assert rows(dataset) == [("a.png", "png", "a cat")]


def test_archive_junk_of_file_managers_is_passed_over(dataset, draw):
    junk = [
        "__MACOSX/._a.png",
        "__MACOSX/cats/._a.txt",
        ".DS_Store",
        "cats/Thumbs.db",
        "desktop.ini",
        "._a.png",
        ".git/config",
        ".ipynb_checkpoints/a.png",
        "@eaDir/a.png",
        "./",
        ".",
        "",
    ]
    report = imported(dataset, zipped(*((name, b"junk") for name in junk), ("./cats/a.png", draw())))
    assert report.as_dict() == {"added": 1, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    assert rows(dataset) == [("a.png", "png", "")]


def test_archive_with_captions_alone_captions_what_is_there(dataset, add):
    add("red", "blue")
    archive = zipped(("captions/red.txt", b"a better caption"))
    report = imported(dataset, archive)
    assert (report.captioned, report.duplicates) == ([], ["red.png"])
    assert report.notes == [("red.png", "It is here already, and its caption was kept.")]
    report = imported(dataset, archive, replaces_captions=True)
    assert (report.captioned, report.duplicates, report.notes) == (["red.png"], [], [])
    assert rows(dataset) == [("red.png", "png", "a better caption"), ("blue.png", "png", "a blue picture")]


def test_archive_imported_again_finds_everything_there(dataset, draw, everything):
    content = zipped(("a.png", draw("red")), ("b.png", draw("blue")), ("copy-of-b.png", draw("blue")))
    first = imported(dataset, content)
    assert (first.added, first.duplicates) == (["a.png", "b.png"], ["copy-of-b.png"])
    pictures, (_, files, staging) = list(dataset.pictures.values()), everything()
    again = imported(dataset, content)
    assert again.duplicates == ["a.png", "b.png"]
    assert again.sentence() == "Pictures: 2 already here."
    assert list(dataset.pictures.values()) == pictures
    assert everything()[1:] == (files, staging)


def test_archive_tells_how_far_it_is(dataset, draw):
    told = []
    content = zipped(("a.png", draw("red")), ("b.png", draw("blue")))
    services.import_zip(
        dataset, path=io.BytesIO(content), filename="x.zip", progress=lambda *progress: told.append(progress)
    )
    assert told == [(0, 2, "a.png"), (1, 2, "b.png"), (0, 2, "Storing the pictures"), (1, 2, "Storing the pictures")]


def test_archive_that_is_refused_is_named_once_and_other_files_go_in(dataset, draw):
    files = [("bad.zip", io.BytesIO(zipped(("notes.pdf", b"")))), ("cat.png", io.BytesIO(draw()))]
    report = services.import_files(dataset, files=files)
    assert report.added == ["cat.png"]
    assert report.refused == [("bad.zip", f"Nothing was imported. notes.pdf: {FOREIGN}")]


# --- What is refused --------------------------------------------------------------------------------------------------
OUTSIDE = "its name points outside of the archive. Create the archive again with plain names."
CONTROL = "its name has control characters. Rename it."
LINK = "it is a link or a device, not a file. Put the file itself into the archive."
ENCRYPTED = "it is encrypted. Create the archive without a password."
COMPRESSION = "its compression is not supported. Create the archive as a normal ZIP (deflate)."
BOMB = "it unpacks to more than 200 times its size, as a ZIP bomb does."
TWIN = "Its name is there twice: the first one is read. Rename one of them."
FOREIGN = batches.FOREIGN
NO_PICTURE = "This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."
DAMAGED = "It is damaged. Create the archive again."
UNREADABLE = "This is not a readable ZIP archive. Create it again and upload the new file."
TOO_MANY = "The archive has more than 50,000 entries. Split it into several."
NOTHING = "The archive has no pictures. Put some into it."


@pytest.fixture
def good(draw, add):
    """Entries that would change the dataset: a new picture, and another caption for one that is there."""
    add("red")
    return [("good.png", draw("green")), ("red.txt", b"another caption")]


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        ("../bad.png", "../bad.png", OUTSIDE),
        ("a/../../bad.png", "a/../../bad.png", OUTSIDE),
        ("..\\bad.png", "..\\bad.png", OUTSIDE),
        ("../", "../", OUTSIDE),
        ("/etc/bad.png", "/etc/bad.png", OUTSIDE),
        ("\\\\server\\bad.png", "\\\\server\\bad.png", OUTSIDE),
        ("C:/bad.png", "C:/bad.png", OUTSIDE),
        ("c:\\bad.png", "c:\\bad.png", OUTSIDE),
        ("c:bad.png", "c:bad.png", OUTSIDE),
        ("__MACOSX/../../bad.png", "__MACOSX/../../bad.png", OUTSIDE),
        ("ba\nd.png", "ba\\nd.png", CONTROL),
        ("ba\x1b[2Jd.png", "ba\\x1b[2Jd.png", CONTROL),
        ("bad.png\0.exe", "bad.png", CONTROL),
    ],
)
def test_archive_is_refused_for_the_name_of_an_entry(dataset, good, everything, name, shown, reason):
    before = everything()
    assert refusal(dataset, zipped(*good, (name, b"no picture"))) == (
        f"pictures.zip: {shown}: {reason} Nothing was imported."
    )
    assert everything() == before


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, LINK),
        ({"external_attr": (stat.S_IFCHR | 0o666) << 16}, LINK),
        ({"external_attr": (stat.S_IFBLK | 0o666) << 16}, LINK),
        ({"external_attr": (stat.S_IFIFO | 0o666) << 16}, LINK),
        ({"external_attr": (stat.S_IFSOCK | 0o666) << 16}, LINK),
        ({"flag_bits": 0x1}, ENCRYPTED),
        ({"flag_bits": 0x41}, ENCRYPTED),
        ({"flag_bits": 0x2000}, ENCRYPTED),
        ({"compress_type": 99}, COMPRESSION),  # AES, without a flag
        ({"file_size": 300 * MIB}, BOMB),
    ],
)
def test_archive_is_refused_for_what_the_contents_say_of_an_entry(dataset, good, draw, everything, told, reason):
    before = everything()
    message = refusal(dataset, zipped(*good, ("bad.png", draw("blue")), **told))
    assert message == f"pictures.zip: bad.png: {reason} Nothing was imported."
    assert everything() == before


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entry_of_a_rare_compression_is_refused(dataset, good, everything, compression):
    before = everything()
    message = refusal(dataset, zipped(*good, compression=compression))
    assert message == f"pictures.zip: good.png: {COMPRESSION} Nothing was imported."
    assert everything() == before


def test_bomb_is_refused_before_it_is_unpacked(dataset, good, everything):
    before = everything()
    content = zipped(*good, ("bomb.png", bytes(20 * MIB)))
    assert len(content) < 50_000
    assert refusal(dataset, content) == f"pictures.zip: bomb.png: {BOMB} Nothing was imported."
    assert everything() == before


def named(dataset, content):
    """What the import refused of an archive whose good picture went in; the caption that is there was kept."""
    report = imported(dataset, content)
    assert (report.added, report.duplicates) == (["good.png"], ["red.png"])
    assert rows(dataset) == [("red.png", "png", "a red picture"), ("good.png", "png", "")]
    return report.refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("good.png", TWIN),
        (".//good.png", TWIN),
        ("bad.gif", FOREIGN),
        ("bad.zip", FOREIGN),
        ("bad.png.exe", FOREIGN),
        ("png", FOREIGN),
        ("bad.png", NO_PICTURE),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")  # told by zipfile, as it writes one
def test_entry_that_is_no_good_is_named_and_the_rest_goes_in(dataset, good, name, reason):
    assert named(dataset, zipped(*good, (name, b"no picture"))) == [(name, reason)]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"file_size": 300 * MIB, "compress_size": 2 * MIB}, "It has more than 262,144 KiB. Save it smaller."),
        ({"file_size": 20}, DAMAGED),
        ({"CRC": 0}, DAMAGED),
        ({"header_offset": 1}, DAMAGED),
        ({"flag_bits": 0x20}, DAMAGED),  # "patched data", which nothing reads
    ],
)
def test_entry_that_is_not_what_the_contents_say_is_named(dataset, good, draw, told, reason):
    assert named(dataset, zipped(*good, ("bad.png", draw("blue")), **told)) == [("bad.png", reason)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"x" * (64 * 1024 + 1), "It has more than 64 KiB. Save it smaller."),
        (b"x" * 5001, "The caption has 5,001 characters; the most is 5,000. Shorten it."),
        (b"a\0b", "The caption has characters that are no text. Remove them and save again."),
        ("ü".encode("latin-1"), "The caption is not UTF-8 text. Save the file as UTF-8 and upload it again."),
    ],
)
def test_bad_caption_is_named_and_its_picture_goes_in(dataset, good, content, reason):
    archive = zipped(*good, ("good.txt", content), compression=zipfile.ZIP_STORED)
    assert named(dataset, archive) == [("good.txt", reason)]


@pytest.mark.parametrize("name", ["bad.txt", "elsewhere/good.txt"])
def test_caption_without_its_picture_is_named(dataset, good, name):
    alone = "No picture has the same name. Upload the picture with its caption."
    assert named(dataset, zipped(*good, (name, b"whose?"))) == [(name, alone)]


def test_picture_that_is_cut_off_is_named(dataset, good, draw):
    reason = "The picture is damaged or cut off. Save it again and upload the new file."
    cut = draw("red", "JPEG", (300, 300))[:-400]
    assert named(dataset, zipped(*good, ("cut.jpg", cut))) == [("cut.jpg", reason)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_byte_is_noticed(dataset, good, draw, compression):
    content = bytearray(zipped(*good, ("bad.bmp.png", draw("blue", "BMP")), compression=compression))
    content[content.index(b"bad.bmp.png") + 20] ^= 1
    assert named(dataset, bytes(content)) == [("bad.bmp.png", DAMAGED)]


def test_damaged_name_is_noticed(dataset, good, draw):
    content = zipped(*good, ("bäd.png", draw("blue"))).replace("bäd".encode(), b"b\xff\xffd", 1)
    assert named(dataset, content) == [("bäd.png", DAMAGED)]


def test_archive_without_its_first_bytes_gives_what_is_left(dataset, good):
    report = imported(dataset, zipped(*good)[10:])
    assert report.refused == [("good.png", DAMAGED)]


def test_archive_of_which_nothing_is_good_is_refused(dataset, add, everything):
    before = everything()
    bad = [(f"{number}.gif", b"x") for number in range(5)]
    told = " ".join(f"{number}.gif: {FOREIGN}" for number in range(3))
    assert refusal(dataset, zipped(*bad)) == f"pictures.zip: Nothing was imported. {told} And 2 more files."
    assert everything() == before


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[:-30],
        lambda content: content[: len(content) // 2],
        lambda content: content[-22:],
        lambda content: end_record(content, contents_bytes=1),
        lambda content: b"",
        lambda content: b"PK\x03\x04",
        lambda content: b"no archive at all" * 100,
    ],
)
def test_file_that_is_no_whole_archive_is_refused(dataset, good, everything, damaged):
    before = everything()
    assert refusal(dataset, damaged(zipped(*good))) == f"pictures.zip: {UNREADABLE}"
    assert everything() == before


@functools.cache
def crowded():
    """50,001 entries."""
    return zipped(*((f"{number}.txt", b"") for number in range(50_001)))


@pytest.mark.parametrize(
    "content",
    [
        crowded,
        lambda: end_record(crowded(), entries=1),
        lambda: end_record(zipped(("a.png", b"")), entries=50_001),
        lambda: end_record(zipped(("a.png", b"")), contents_bytes=16 * MIB + 1),
    ],
)
def test_archive_with_too_many_entries_is_refused(dataset, good, everything, content):
    before = everything()
    assert refusal(dataset, content()) == f"pictures.zip: {TOO_MANY}"
    assert everything() == before


@pytest.mark.parametrize(
    "entries", [[], [("cats/", b"")], [(".DS_Store", b"x"), ("__MACOSX/a.png", b"x")], [("", b"")]]
)
def test_archive_without_pictures_is_refused(dataset, good, everything, entries):
    before = everything()
    assert refusal(dataset, zipped(*entries)) == f"pictures.zip: {NOTHING}"
    assert everything() == before


def test_archive_that_unpacks_to_too_much_is_refused(dataset, good, everything, settings):
    settings.MAX_UPLOAD_BYTES = 1024**3
    before = everything()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", b"")
            archive.filelist[-1].file_size = archive.filelist[-1].compress_size = 250 * MIB
    assert refusal(dataset, file.getvalue()) == (
        "pictures.zip: The archive unpacks to more than 1 GiB. Split it into several."
    )
    assert everything() == before


def test_archive_for_which_the_disk_has_no_room_is_refused(dataset, good, everything, monkeypatch):
    monkeypatch.setattr(partials, "SPARE_BYTES", 2**60)
    before = everything()
    assert refusal(dataset, zipped(*good)) == (
        "pictures.zip: The server's disk has no room for this file. Ask the operator to free some."
    )
    assert everything() == before


def test_archive_with_any_damage_goes_in_whole_or_is_refused_with_a_sentence(dataset, good, draw):
    """Whatever bytes come, the answer is a report or a UserError; anything else fails this test."""
    content = zipped(*good, ("cats/ä.png", draw("blue")), ("cats/ä.txt", b"blue"), compression=zipfile.ZIP_STORED)
    contents_at = content.index(b"PK\x01\x02")
    chance = random.Random(1)
    answers = {"in": 0, "refused": 0}
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 2, 4])):
            at = chance.randrange(contents_at if chance.random() < 0.7 else 0, len(damaged))
            damaged[at] = chance.choice([0, 255, damaged[at] ^ 1 << chance.randrange(8)])
        there = dataset.pictures.count()
        try:
            imported(dataset, bytes(damaged))
            answers["in"] += 1
        except UserError:
            answers["refused"] += 1
            assert dataset.pictures.count() == there
    assert min(answers.values()) > 10
