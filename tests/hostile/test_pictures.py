"""Pictures of enemies: refused with a sentence, or kept as what they are; nothing else in the dataset changes."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import pytest
from PIL import Image

from datasets import services
from tests.hostile.conftest import zipped

TOO_LARGE = "The picture has more than 100 megapixels. Save it smaller."
DAMAGED = "The picture is damaged or cut off. Save it again and upload the new file."
NONE = "This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, rows=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def small_png(*chunks):
    return png(2, 2, *chunks, rows=(b"\0" + b"\xff\0\0" * 2) * 2)


def canvas(kind):
    """A header that announces 60,000 × 60,000 pixels."""
    made = bytearray(saved(Image.new("RGB", (16, 16)), kind))
    if kind == "BMP":
        struct.pack_into("<2l", made, 18, 60_000, 60_000)
    elif kind == "JPEG":
        struct.pack_into(">2H", made, made.index(b"\xff\xc0") + 5, 60_000, 60_000)
    elif kind == "TIFF":
        for tag in (256, 257):  # width, height
            at = made.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in made else -1
            at = at if at >= 0 else made.index(struct.pack("<HH", tag, 3))
            struct.pack_into("<HHLL", made, at, tag, 4, 1, 60_000)
    return bytes(made)


@pytest.fixture
def result(dataset, add, everything):
    """result(content): the reason of a refusal, before which nothing changed; or the stored picture and its notes."""
    add("grey")

    def tried(content, name="x.png"):
        before = everything()
        report = services.import_files(dataset, files=[(name, io.BytesIO(content))])
        if report.refused:
            assert everything() == before
            return report.refused[0][1]
        return dataset.pictures.latest("pk"), [note for _, note in report.notes]

    return tried


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "TIFF"])
def test_huge_canvas_is_refused_before_it_is_decoded(result, kind):
    assert result(canvas(kind)) == TOO_LARGE


def test_huge_png_with_real_data_is_refused(result):
    assert result(png(20_000, 20_000, rows=bytes(10**6))) == TOO_LARGE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_picture_that_is_cut_off_is_refused(result, kind, part):
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    content = saved(noise, kind)
    assert result(content[: int(len(content) * part)]) in (DAMAGED, NONE)


@pytest.mark.parametrize("tail", [zipped(("evil.png", b"x")), b"<script>alert(1)</script>", b"%PDF-1.4", b"\0" * 1000])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_polyglot_is_kept_and_served_as_the_picture_that_it_is(result, dataset, alice, client_of, kind, tail):
    content = saved(Image.new("RGB", (16, 16), "red"), kind) + tail
    picture, _ = result(content, "x.html.png")
    assert picture.sha256 == hashlib.sha256(content).hexdigest()
    answer = client_of(alice).get(f"/datasets/{dataset.pk}/pictures/{picture.pk}/original/")
    assert answer["Content-Type"] == f"image/{kind.lower()}"
    assert answer["X-Content-Type-Options"] == "nosniff"
    answer.close()


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a" + bytes(50),
        b"\0\0\x01\0" + bytes(50),
        b"P6 10 10 255 " + bytes(300),
        b"8BPS" + bytes(50),
    ],
)
def test_formats_with_large_parsers_are_never_opened(result, content):
    assert result(content) == NONE


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80 * 1024**2))),
        chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80 * 1024**2))),
        chunk(b"iTXt", b"x\0\x01\0\0\0" + zlib.compress(bytes(80 * 1024**2))),
    ],
    ids=["profile", "text", "international text"],
)
def test_chunk_that_unpacks_to_much_more_is_refused_or_ignored(result, extra):
    assert len(extra) < 100_000
    found = result(small_png(extra))
    assert found == DAMAGED or found[0].width == 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it is corrupt, and Pillow says so
@pytest.mark.parametrize(
    "exif",
    [
        b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + struct.pack("<HHLL", 0x0112, 3, 2**32 - 1, 8) * 4000,
        b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHLL", 0x8769, 4, 1, 8) + struct.pack("<L", 8),
        b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHLL", 0x0112, 2, 4, 0x41414141) + bytes(4),
        b"MM\0*\0\0\0\x08" + struct.pack(">H", 1) + struct.pack(">HHLHH", 0x0112, 3, 1, 250, 0) + bytes(4),
    ],
    ids=["many entries", "loop", "letters", "no such turn"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_bomb_is_ignored(result, exif, kind):
    content = saved(Image.new("RGB", (16, 8), "red"), kind, exif=b"Exif\0\0" + exif)
    picture, notes = result(content)
    assert (picture.width, picture.height, notes) == (16, 8, [])


@pytest.mark.parametrize("size", [127, 128, 5000, 5 * 1024**2])
def test_profile_of_garbage_is_ignored(result, size):
    garbage = hashlib.shake_256(b"profile").digest(size)
    garbage = garbage[:36] + b"acsp" + garbage[40:]
    _, notes = result(saved(Image.new("RGB", (16, 8), "red"), "JPEG" if size < 10**6 else "WEBP", icc_profile=garbage))
    assert notes == ["Its colour profile is unreadable and was ignored."]


def test_pages_without_end_are_not_counted(result):
    """A TIFF whose second page is its own successor."""
    content = bytearray(
        saved(Image.new("RGB", (4, 4), "red"), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))])
    )
    first = struct.unpack_from("<L", content, 4)[0]
    count = struct.unpack_from("<H", content, first)[0]
    second = struct.unpack_from("<L", content, first + 2 + 12 * count)[0]
    entries = struct.unpack_from("<H", content, second)[0]
    struct.pack_into("<L", content, second + 2 + 12 * entries, second)
    _, notes = result(bytes(content))
    assert notes == ["It has several frames: the first was taken.", "TIFF was converted to PNG."]


def test_picture_of_one_pixel_or_a_thin_line_has_a_thumbnail(result):
    for size in ((1, 1), (1, 20_000), (20_000, 1)):
        picture, _ = result(saved(Image.new("RGB", size, "red"), "PNG"))
        assert (picture.width, picture.height) == size


@pytest.mark.parametrize(
    "content", [b"x" * (10 * 1024**2), "ü".encode("latin-1"), b"\xff\xfe\x00", b"\0\0\xfe\xff\0\0", b"a\0b"]
)
def test_caption_of_an_enemy_is_refused(result, content):
    assert result(content, "grey.txt") in (
        "A caption file has at most 64 KiB. Shorten it.",
        "The caption is not UTF-8 text. Save the file as UTF-8 and upload it again.",
        "The caption has characters that are no text. Remove them and save again.",
    )
