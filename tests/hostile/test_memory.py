"""Imports of enemies in a process that may have little memory: it ends with a sentence, never without."""

from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from tests.hostile.conftest import zipped

MIB = 1024**2
# Pillow's formats, Django and the database are there before the limit; what comes on top is the import's.
PROGRAM = """
import json, resource, sys
from pathlib import Path
from datasets import services
from datasets.models import Dataset
from lorapilot.errors import UserError
from PIL import AvifImagePlugin, Image, ImageCms
Image.init()
dataset = Dataset.objects.get(pk=sys.argv[1])
more = int(sys.argv[3])
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
answers = {}
for path in sorted(Path(sys.argv[2]).iterdir()):
    before = sorted(dataset.pictures.values_list("sha256", "caption"))
    try:
        if path.suffix == ".zip":
            report = services.import_zip(dataset, path=path, filename=path.name)
        else:
            report = services.import_files(dataset, files=[(path.name, path)])
        answers[path.name] = [len(report.added), [reason for _, reason in report.refused]]
    except UserError as error:
        answers[path.name] = [0, [error.message]]
    if not answers[path.name][0]:
        assert sorted(dataset.pictures.values_list("sha256", "caption")) == before
print(json.dumps(answers))
"""


def flat_png(width, height, depth, colour):
    """One colour in few bytes: `depth` bits a channel, of PNG's colour type `colour` (2: RGB, 6: RGBA)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = b"\0" + bytes(width * depth // 8 * (4 if colour == 6 else 3))
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def answers(installation, tmp_path):
    def imported(more, **files):
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_bytes(content)
        arguments = (str(installation.datasets[0]), str(tmp_path), str(more))
        found = installation.facts(PROGRAM, *arguments, MAX_PICTURE_MEGAPIXELS="9")
        assert list((installation.workspace / "datasets" / "incoming").iterdir()) == []
        return found

    return imported


def test_bombs_take_no_memory_and_the_largest_pictures_fit(answers):
    """At the limit of 9 megapixels (36 MB decoded) pictures are deep, transparent, turned, and several at once."""
    rgb = io.BytesIO()
    Image.new("RGB", (8, 8)).save(rgb, "BMP")
    huge = bytearray(rgb.getvalue())
    struct.pack_into("<2l", huge, 18, 60_000, 60_000)
    table = json.dumps([{"file_name": f"{number}.png", "text": "x" * 60} for number in range(170_000)]).encode()
    noise = Image.effect_noise((3000, 3000), 50)
    turned, cmyk = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("RGB").save(turned, "JPEG", exif=exif)
    Image.merge("CMYK", [noise] * 4).save(cmyk, "JPEG")
    found = answers(
        350 * MIB,
        a_zip=zipped(*((f"{number}.png", bytes(64 * MIB)) for number in range(3))),
        b_zip=zipped(*((f"{number}.bmp", bytes(64 * MIB)) for number in range(3))),
        c_bmp=bytes(huge),
        d_json=table[: 15 * MIB],
        e_json=b'{"a":' * 150_000,
        f_txt=b"x" * 10 * MIB,
        g_jsonl=b'{"file_name": "a.png", "text": "' + b"x" * 10 * MIB + b'"}',
        h_png=flat_png(20_000, 500, 8, 2),
        i_json=b"[" + b"[]," * 190_000 + b"0]",
        j_png=flat_png(3000, 3000, 16, 6),
        k_jpg=turned.getvalue(),
        l_jpg=cmyk.getvalue(),
        m_zip=zipped(*((f"{n}.png", flat_png(3000, 3000 - n, 8, 2)) for n in range(1, 4))),
    )
    assert {name: told[0].split(". ")[0] for name, (_, told) in found.items() if told} == {
        "a.zip": "a.zip: 0.png: it unpacks to more than 200 times its size, as a ZIP bomb does",
        "b.zip": "b.zip: Nothing was imported",
        "c.bmp": "The picture has more than 9 megapixels",
        "d.json": "It is not valid JSON",
        "e.json": "It is not valid JSON",
        "f.txt": "A caption file has at most 64 KiB",
        "g.jsonl": "a.png: The caption has 10,485,760 characters; the most is 5,000",
        "h.png": "The picture has more than 9 megapixels",
        "i.json": "It has no captions in a form that is read here: Kohya's metadata, or file_name and text.",
    }
    added = {name: number for name, (number, _) in found.items() if number}
    assert added == {"j.png": 1, "k.jpg": 1, "l.jpg": 1, "m.zip": 3}
