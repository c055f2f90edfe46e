"""The automatic score of pilot-tiny: are shape, colour and background right, and are the edges sharp?

Only pixels are read. The border of a picture names the background and the commonest other colour the foreground; every
pixel then lies somewhere between these two, which gives the shape's outline and the width of its edge.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_trainer.pilot_tiny.draw import COLOURS, PIXELS, SHAPES, Scene, shape_mask

BORDER = 6
"""Pixels of the frame that shows the background."""
MIN_AREA = 0.01
"""A foreground that covers less of the picture is none."""
MIN_OVERLAP = 0.85
"""Intersection over union with the shape's drawn outline from which on a shape counts as that shape."""
OUTLINE = 64
"""Outlines are compared at so many pixels square, each stretched to its bounding box."""
MAX_STRETCH = 1.35
"""A shape wider or higher than drawn by more than this factor is not that shape."""
DRAWN_AT_ONCE = 20
"""Pictures in one batch of the pipeline."""
NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float64)

Bits = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What the checker sees in a picture; empty names where it sees nothing."""

    background: str
    foreground: str = ""
    shape: str = ""
    overlap: float = 0.0
    """Intersection over union with the drawn shape, 0 to 1."""
    edge_pixels: float = float("nan")
    """Mean width in pixels of the transition from 10% to 90% at the shape's border."""


def read_picture(image: Image.Image) -> Reading:
    """Name what an RGB picture shows."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    names = _nearest_colours(pixels)
    background = _commonest(_frame(names))
    others = names[names != background]
    if others.size < MIN_AREA * names.size:
        return Reading(NAMES[background])
    foreground = _commonest(others)
    share = _foreground_share(pixels, names == background, names == foreground)
    shape, overlap = _name_shape(share > 0.5)
    return Reading(NAMES[background], NAMES[foreground], shape, overlap, _edge_width(share))


def _nearest_colours(pixels: Numbers) -> NDArray[np.intp]:
    """[height, width, 3] to the index of the nearest named colour, [height, width]."""
    # the square of the distance, without the part that is the same for every colour
    distances = (_PALETTE**2).sum(-1) - 2 * pixels @ _PALETTE.T
    nearest: NDArray[np.intp] = distances.argmin(-1)
    return nearest


def _frame(names: NDArray[np.intp]) -> NDArray[np.intp]:
    inner = np.zeros(names.shape, bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return names[~inner]


def _commonest(names: NDArray[np.intp]) -> int:
    return int(np.bincount(names, minlength=len(NAMES)).argmax())


def _foreground_share(pixels: Numbers, background: Bits, foreground: Bits) -> Numbers:
    """How far every pixel is on the way from the picture's own background colour to its foreground, 0 to 1."""
    start, end = (np.median(pixels[where], axis=0) for where in (background, foreground))
    way = end - start
    share: Numbers = np.clip((pixels - start) @ way / (way @ way), 0, 1)
    return share


def _edge_width(share: Numbers) -> float:
    """Area of the transition over the length of the border, the integral of the gradient's magnitude."""
    down, across = np.diff(share, axis=0)[:, :-1], np.diff(share, axis=1)[:-1, :]
    length = np.hypot(down, across).sum()
    return float(((share > 0.1) & (share < 0.9)).sum() / length) if length else float("nan")


def _name_shape(outline: Bits) -> tuple[str, float]:
    """The drawn shape that the outline matches best and by how much; no name when it matches none."""
    rows, columns = np.unique(outline.nonzero()[0]), np.unique(outline.nonzero()[1])
    if not len(rows):
        return "", 0.0
    cut = outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    overlaps = {shape: _overlap(cut, _template(shape)) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    return (shape if overlaps[shape] >= MIN_OVERLAP else ""), overlaps[shape]


def _overlap(outline: Bits, template: Bits) -> float:
    """Intersection over union after both are stretched to one size; 0 when the proportions differ too much."""
    stretch = (outline.shape[1] / outline.shape[0]) / (template.shape[1] / template.shape[0])
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        return 0.0
    ours, drawn = _resized(outline), _resized(template)
    return float((ours & drawn).sum() / (ours | drawn).sum())


def _resized(bits: Bits) -> Bits:
    image = Image.fromarray(bits.astype(np.uint8) * 255).resize((OUTLINE, OUTLINE), Image.Resampling.BOX)
    return np.asarray(image) > 127


@cache
def _template(shape: str) -> Bits:
    """The drawn shape cut to its bounding box."""
    mask = shape_mask(shape, 128, 128, 100, 256)
    return np.asarray(mask.crop(mask.getbbox())) > 127


@dataclass(frozen=True)
class Score:
    """How many of the pictures show what their prompts say, and how sharply."""

    total: int
    right: int
    """Shape, foreground and background all right."""
    shapes: int
    foregrounds: int
    backgrounds: int
    by_shape: dict[str, tuple[int, int]]
    """(right, asked) for every name, likewise below."""
    by_foreground: dict[str, tuple[int, int]]
    by_background: dict[str, tuple[int, int]]
    overlap: float
    """Mean intersection over union of the shapes that are right."""
    edge_pixels: float
    """Mean width of their edges in pixels."""
    mistakes: list[tuple[int, Scene, Reading]]
    """With the number of the picture."""


def scenes_to_ask(count: int) -> list[Scene]:
    """The scenes to ask for: each sixty show every shape in every colour, over backgrounds that take turns."""
    scenes = []
    for number in range(count):
        foreground = number // len(SHAPES) % len(NAMES)
        # never 0, so that no shape has the colour of its background
        distance = 1 + (number * 7 + number // 60) % (len(NAMES) - 1)
        background = NAMES[(foreground + distance) % len(NAMES)]
        scenes.append(Scene(background, NAMES[foreground], SHAPES[number % len(SHAPES)]))
    return scenes


def score_pictures(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> Score:
    """Compare each picture with the scene that it should show."""
    readings = [read_picture(picture) for picture in pictures]
    pairs = list(zip(scenes, readings, strict=True))
    shapes, foregrounds, backgrounds = (
        [getattr(scene, part) == getattr(reading, part) for scene, reading in pairs]
        for part in ("shape", "foreground", "background")
    )
    right = [all(parts) for parts in zip(shapes, foregrounds, backgrounds, strict=True)]
    named = [reading for reading, is_right in zip(readings, shapes, strict=True) if is_right]
    return Score(
        total=len(pairs),
        right=sum(right),
        shapes=sum(shapes),
        foregrounds=sum(foregrounds),
        backgrounds=sum(backgrounds),
        by_shape=_tally([scene.shape for scene in scenes], right),
        by_foreground=_tally([scene.foreground for scene in scenes], right),
        by_background=_tally([scene.background for scene in scenes], right),
        overlap=mean([reading.overlap for reading in named] or [0.0]),
        edge_pixels=mean([reading.edge_pixels for reading in named] or [float("nan")]),
        mistakes=[(number, *pair) for number, pair in enumerate(pairs) if not right[number]],
    )


def _tally(names: Sequence[str], right: Sequence[bool]) -> dict[str, tuple[int, int]]:
    asked, correct = Counter(names), Counter(name for name, is_right in zip(names, right, strict=True) if is_right)
    return {name: (correct[name], asked[name]) for name in asked}


def draw_with(pipeline: Any, prompts: Sequence[str], *, steps: int, guidance: float, seed: int) -> list[Image.Image]:
    """A picture for each prompt, from the seed plus the prompt's number."""
    import torch

    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), DRAWN_AT_ONCE):
        some = list(prompts[first : first + DRAWN_AT_ONCE])
        pictures += pipeline(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=PIXELS,
            height=PIXELS,
            generator=[torch.Generator().manual_seed(seed + first + number) for number in range(len(some))],
        ).images
    return pictures


def score_report(score: Score) -> str:
    """For people: the totals, the tallies by name, and every mistake."""
    lines = [
        f"{score.right} of {score.total} right",
        f"  shapes {score.shapes}, foregrounds {score.foregrounds}, backgrounds {score.backgrounds}",
        f"  overlap {score.overlap:.3f}, edges {score.edge_pixels:.2f} px",
    ]
    tallies = {"shape": score.by_shape, "foreground": score.by_foreground, "background": score.by_background}
    for part, tally in tallies.items():
        lines.append(f"  by {part}: " + ", ".join(f"{name} {a}/{b}" for name, (a, b) in tally.items()))
    for number, scene, reading in score.mistakes:
        seen = f"{reading.foreground or 'nothing'} {reading.shape or '?'} on {reading.background}"
        lines.append(f"  picture {number}, {scene.prompt}: {seen}, overlap {reading.overlap:.2f}")
    return "\n".join(lines)
