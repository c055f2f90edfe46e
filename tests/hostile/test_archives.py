"""ZIP archives of enemies: more than tests/datasets/test_archives.py has. Nothing changes, and a sentence says why."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest

from datasets import archives, services
from lorapilot.errors import UserError
from tests.hostile.conftest import zipped

MIB = 1024**2
OUTSIDE = "its name points outside of the archive. Create the archive again with plain names."


@pytest.fixture
def refused(dataset, everything, add):
    """refused(content): why the archive was refused, having changed nothing."""
    add("red")

    def reason(content):
        before = everything()
        with pytest.raises(UserError) as error:
            services.import_zip(dataset, path=io.BytesIO(content), filename="x.zip")
        assert everything() == before
        return error.value.message.removeprefix("x.zip: ")

    return reason


@pytest.fixture
def named(dataset):
    """named(content): names of the pictures that went in, with captions, and what was refused."""

    def rows(content):
        report = services.import_zip(dataset, path=io.BytesIO(content), filename="x.zip")
        return list(dataset.pictures.values_list("original_name", "caption")), report.refused

    return rows


def test_hundred_thousand_entries_are_refused_unread(refused, monkeypatch):
    """As many empty entries as fit in 8 MB, announced by ZIP64 records: the table of contents is never loaded."""
    one = zipped(("0.png", b""))
    header, rest = one[: one.index(b"PK\x01\x02")], one[one.index(b"PK\x01\x02") :]
    contents = rest[: rest.index(b"PK\x05\x06")] * 100_000
    zip64 = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 100_000, 100_000, len(contents), len(header))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(header) + len(contents), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(contents), len(header), 0)
    content = header + contents + zip64 + locator + end
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert len(archive.infolist()) == 100_000  # it is a real one
    monkeypatch.setattr(archives.zipfile, "ZipFile", None)
    assert refused(content) == "The archive has more than 50,000 entries. Split it into several."


def test_bomb_in_a_bomb_is_not_opened(dataset, draw, named):
    inner = zipped(("0.png", bytes(50 * MIB)))
    pictures, refusals = named(zipped(("inner.zip", inner), ("a.png", draw())))
    assert pictures == [("a.png", "")]
    assert [name for name, _ in refusals] == ["inner.zip"]


def test_entries_that_share_their_bytes_are_no_bomb(dataset, named):
    """Fifield's bomb: hundreds of entries whose headers point at the same packed bytes."""
    content = bytearray(zipped(*((f"{number}.bmp", bytes(4 * MIB)) for number in range(20))))
    at = content.index(b"PK\x01\x02")
    for _ in range(20):
        struct.pack_into("<L", content, at + 42, 0)
        at = content.find(b"PK\x01\x02", at + 4)
    with pytest.raises(UserError, match=r"Nothing was imported\. 0\.bmp: "):
        named(bytes(content))


def test_archive_that_is_really_encrypted_is_refused(refused, draw):
    """Traditional encryption: the flag, and 12 bytes of header before the data."""
    content = bytearray(zipped(("a.png", draw())))
    for signature, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(signature) + flags_at
        content[at] |= 1
    assert refused(bytes(content)) == (
        "a.png: it is encrypted. Create the archive without a password. Nothing was imported."
    )


def test_link_with_a_picture_name_is_refused(refused):
    content = bytearray(zipped(("a.png", b"/etc/passwd")))
    at = content.index(b"PK\x01\x02")
    content[at + 5] = 3  # made on Unix
    struct.pack_into("<L", content, at + 38, 0o120777 << 16)
    assert refused(bytes(content)).startswith("a.png: it is a link or a device, not a file.")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/b/../../../c.png", "a/b/../../../c.png"),
        ("~/../c.png", "~/../c.png"),
        ("..\\..\\c.png", "..\\..\\c.png"),
        ("//host/share/c.png", "//host/share/c.png"),
        ("\\\\?\\C:\\c.png", "\\\\?\\C:\\c.png"),
        ("d:c.png", "d:c.png"),
    ],
)
def test_name_that_leads_outside_is_refused(refused, draw, name, shown):
    assert refused(zipped((name, draw()))) == f"{shown}: {OUTSIDE} Nothing was imported."


@pytest.mark.parametrize("letter", ["\0", "\n", "\r", "\x1b", "\x07", "\t"])
def test_name_with_control_characters_is_refused(refused, draw, letter):
    assert "its name has control characters." in refused(zipped((f"a{letter}.png", draw())))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("photo\u202egnp.exe.png", "photognp.exe.png"),  # shown right to left: photo…exe.png
        ("a\u200b\u2066\ufeff.png", "a.png"),  # invisible
        ("a\x7f\x85.png", "a.png"),
        ("Ba\u0308r.png", "Bär.png"),  # letters taken apart
        ("ｆｕｌｌ．png.png", "ｆｕｌｌ．png.png"),
        ("…/‥/a.png", "a.png"),  # dots that are none
        ("a／b.png", "a／b.png"),  # a slash that is none
        ("CON.png", "CON.png"),
        ("nul/LPT1.png", "LPT1.png"),
        ("trailing. .png", "trailing. .png"),
        ("🐈‍⬛.png", "🐈⬛.png"),
        ("x" * 5000 + ".png", "x" * 251 + ".png"),
        ("deep/" * 2000 + "a.png", "a.png"),
        ("a'); DROP TABLE datasets_picture;--.png", "a'); DROP TABLE datasets_picture;--.png"),
        ("<img src=x onerror=alert(1)>.png", "<img src=x onerror=alert(1)>.png"),
    ],
)
def test_strange_name_is_shown_and_never_a_path(dataset, draw, named, workspace, name, kept):
    pictures, refusals = named(zipped((name, draw())))
    assert (pictures, refusals) == ([(kept, "")], [])
    picture = dataset.pictures.get()
    files = {path.name for path in (workspace / "datasets").rglob("*") if path.is_file()}
    assert files == {f"{picture.sha256}.png"}


def test_letters_that_look_the_same_are_others(named, draw):
    pictures, refusals = named(zipped(("\u0430.png", draw()), ("a.txt", b"latin")))
    assert pictures == [("\u0430.png", "")]
    assert refusals == [("a.txt", "No picture has the same name. Upload the picture with its caption.")]


def test_names_that_differ_in_case_or_composition(named, draw):
    entries = [("a.png", draw("red")), ("A.png", draw("blue")), ("a.txt", b"small"), ("A.txt", b"large")]
    entries += [("é.png", draw("green")), ("e\u0301.png", draw("white"))]
    pictures, refusals = named(zipped(*entries))
    assert pictures == [("a.png", "small"), ("A.png", "large"), ("é.png", "")]
    assert [reason for _, reason in refusals] == ["Its name is there twice: the first one is read. Rename one of them."]


def test_two_thousand_refusals_are_told_in_part(dataset, draw):
    entries = [("good.png", draw()), *((f"{number}.exe", b"") for number in range(2000))]
    report = services.import_zip(dataset, path=io.BytesIO(zipped(*entries)), filename="x.zip").as_dict()
    assert (report["added"], len(report["refused"])) == (1, 201)
    assert report["refused"][-1] == {"name": "…", "reason": "1,800 more files were refused."}
