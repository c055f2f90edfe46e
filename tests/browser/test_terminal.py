"""terminal.js against a plain reading of its rules in Python: for any way of cutting the bytes, the same lines."""

from __future__ import annotations

import base64
import codecs
import itertools
import random
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "runs/static/runs/terminal.js"
FEED = """([chunks, most]) => {
  const text = new LogText(most);
  for (const chunk of chunks) text.write(Uint8Array.from(atob(chunk), (character) => character.charCodeAt(0)));
  const [first, lines] = text.endedFrom(0);
  return [first, lines, text.current];
}"""
PIECES = [
    b"step 12/320 loss 0.1234", b" 45%|####     |", b"\n", b"\n", b"\r", b"\r\n", b"\t", b"\x00\x07\x08", b"[0m", b"~",
    "Größe ✓ 画像 🎨".encode(), b"\xff\xfe", b"\xe4\xbd", b"\xf0\x9f", b"\xef\xbb\xbf",
    b"\x1b[31mred\x1b[0m", b"\x1b[2K", b"\x1b[A", b"\x1b(B", b"\x1b]0;title\x07", b"\x1b]8;;http://x\x1b\\",
    b"\x1b", b"\x1b[", b"\x1b[38;5;1", b"\x1b]unfinished",
]  # fmt: skip


@pytest.fixture
def page(chromium):
    page = chromium.new_page()
    page.add_script_tag(path=SCRIPT)
    yield page
    page.close()


def lines_of(data: bytes) -> list[str]:
    """The rules, said once more and without chunks."""
    text = codecs.decode(data, "utf-8", "replace")
    ansi = r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b\r\n]{0,2048}(?:\x07|\x1b\\)|[ -/]{0,8}[0-Z\\^-~])"
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", re.sub(ansi, "", text))
    return [([""] + [piece for piece in line.split("\r") if piece])[-1] for line in text.split("\n")]


def shown(page, data, cuts, most=100_000):
    places = [0, *sorted(cuts), len(data)]
    chunks = [base64.b64encode(data[a:b]).decode() for a, b in itertools.pairwise(places)]
    return page.evaluate(FEED, [chunks, most])


@pytest.mark.chromium
@pytest.mark.parametrize("seed", range(8))
def test_lines_are_the_same_however_the_bytes_are_cut(page, seed):
    dice = random.Random(seed)
    # What a stream still holds back at its end, a plain reading shows: end with text.
    data = b"".join(dice.choices(PIECES, k=400)) + b"\x1b[0m end\n"
    *ended, current = lines_of(data)
    for _ in range(5):
        cuts = dice.sample(range(len(data)), k=dice.choice([0, 1, 20, len(data) // 2]))
        assert shown(page, data, cuts) == [0, ended, current]
    assert shown(page, data, range(1, len(data))) == [0, ended, current]


@pytest.mark.chromium
def test_only_the_last_lines_are_kept(page):
    data = b"".join(b"line %d\n" % number for number in range(1000))
    first, lines, current = shown(page, data, range(0, len(data), 50), most=100)
    assert (first, lines, current) == (900, [f"line {number}" for number in range(900, 1000)], "")


@pytest.mark.chromium
def test_progress_bar_overwrites_its_line(page):
    data = "\r10%|█   |\r50%|██  |\r100%|████|\ndone\r\n".encode()
    assert shown(page, data, [3, 5, 6, 20]) == [0, ["100%|████|", "done"], ""]
