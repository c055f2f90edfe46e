"""How pictures look, as 152 bits, and which look alike. No database here.

A fingerprint is 128 bits that say where the picture gets darker from left to right and from top to bottom (the
"difference hash" on an 8 × 8 grid, both ways), and its mean colour: flat pictures differ in that alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image

GRID = 8
NOISE = 2  # levels of 255 that JPEG and scaling change in a flat area
MOST_BITS = 12  # of 128 that differ between two that look alike
MOST_COLOUR = 16  # levels of 255 that their mean colours differ by, in each channel
_BITS = 2 * GRID * GRID

Colour = tuple[int, int, int]


def fingerprint(thumbnail: Path) -> str:
    """38 hexadecimal digits: 32 of the grid, 6 of the mean colour. A thumbnail of 256 pixels says as much as the
    picture."""
    with Image.open(thumbnail) as image:
        colours = image.convert("RGB")
    grey = colours.convert("L")
    wide = grey.resize((GRID + 1, GRID), Image.Resampling.BOX).tobytes()
    high = grey.resize((GRID, GRID + 1), Image.Resampling.BOX).tobytes()
    rows = [wide[place] > wide[place + 1] + NOISE for place in range(len(wide)) if (place + 1) % (GRID + 1)]
    columns = [high[place] > high[place + GRID] + NOISE for place in range(GRID * GRID)]
    bits = int("".join("01"[bit] for bit in (*rows, *columns)), 2)
    mean = colours.resize((1, 1), Image.Resampling.BOX).tobytes()
    return f"{bits:0{_BITS // 4}x}{mean.hex()}"


@lru_cache(maxsize=16)
def alike(fingerprints: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Groups of places whose pictures look alike, each of two or more. An empty fingerprint is like no other.

    Only those of about the same green are compared with each other: 10,000 pictures take seconds.
    """
    known = sorted((colour[1], bits, colour, place) for place, bits, colour in _parsed(fingerprints))
    greens, grids = [green for green, *_ in known], [bits for _, bits, *_ in known]
    seen = {text: place for place, text in reversed(list(enumerate(fingerprints)))}
    first = [seen[text] if text else place for place, text in enumerate(fingerprints)]
    for number, (green, bits, colour, place) in enumerate(known):
        end = bisect_right(greens, green + MOST_COLOUR)
        near = [later for later in range(number + 1, end) if (bits ^ grids[later]).bit_count() <= MOST_BITS]
        for _, _, other_colour, other in (known[later] for later in near):
            if _same_colour(colour, other_colour):
                _join(first, place, other)
    return _groups(first)


def _parsed(fingerprints: tuple[str, ...]) -> Iterator[tuple[int, int, Colour]]:
    """Each different fingerprint once, at its first place."""
    for text, place in {text: place for place, text in reversed(list(enumerate(fingerprints)))}.items():
        if text:
            red, green, blue = bytes.fromhex(text[32:])
            yield place, int(text[:32], 16), (red, green, blue)


def _same_colour(one: Colour, other: Colour) -> bool:
    return max(abs(mine - theirs) for mine, theirs in zip(one, other, strict=True)) <= MOST_COLOUR


def _join(first: list[int], one: int, other: int) -> None:
    """Both places now lead to the same first one."""
    one, other = sorted((_first_of(first, one), _first_of(first, other)))
    first[other] = one


def _first_of(first: list[int], place: int) -> int:
    while first[place] != place:
        first[place] = place = first[first[place]]
    return place


def _groups(first: list[int]) -> tuple[tuple[int, ...], ...]:
    groups: dict[int, list[int]] = {}
    for place in range(len(first)):
        groups.setdefault(_first_of(first, place), []).append(place)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
