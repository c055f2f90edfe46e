"""The pictures that pilot-tiny learns from: a coloured shape on a plain background, with a caption, drawn from a seed.

All randomness comes from the `random.Random` passed in, so a seed gives the same pictures and captions every time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Size = Literal["small", "big"]
COLOURS: dict[str, Colour] = {
    "red": (225, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 170, 70),
    "blue": (40, 90, 225),
    "purple": (140, 50, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "pink": (250, 140, 190),
    "brown": (115, 70, 35),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
PIXELS = 128
"""Width and height of every picture."""
OVERSAMPLING = 2
"""Pictures are drawn so many times larger and averaged down, which smooths their edges."""
COLOUR_JITTER = 10
"""No two reds are the same: each channel moves by up to so much, of 255."""
BACKGROUND_ONLY = 0.05
"""Share of pictures without a shape."""
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
}
"""Across and down from the shape's centre, in radii."""
RADII: dict[Size | None, tuple[float, float]] = {None: (0.24, 0.38), "small": (0.15, 0.2), "big": (0.34, 0.42)}
"""Smallest and largest radius, of the picture's side."""
RING_HOLE = 0.55
"""Inner radius of a ring, of its outer one."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows; without a shape only the background."""

    background: str
    foreground: str = ""
    shape: str = ""
    size: Size | None = None

    @property
    def prompt(self) -> str:
        """The plainest caption, which is also the prompt of the automatic score."""
        return f"a {self.foreground} {self.shape} on a {self.background} background"


def random_scene(random: Random) -> Scene:
    """A scene as often as training sees it."""
    foreground = random.choice(list(COLOURS))
    background = random.choice([name for name in COLOURS if name != foreground])
    if random.random() < BACKGROUND_ONLY:
        return Scene(background)
    sizes: list[Size | None] = [None, None, None, "small", "big"]
    return Scene(background, foreground, random.choice(SHAPES), random.choice(sizes))


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """The scene as an RGB picture, somewhere near the middle, its colours a little off."""
    side = PIXELS * OVERSAMPLING
    image = Image.new("RGB", (side, side), _jittered(COLOURS[scene.background], random))
    if scene.shape:
        radius = random.uniform(*RADII[scene.size]) * side
        # never over the border, and never further out than 14% of the side
        reach = min(max(0.0, side / 2 - radius - 6), 0.14 * side)
        x, y = (side / 2 + random.uniform(-reach, reach) for _ in range(2))
        image.paste(_jittered(COLOURS[scene.foreground], random), mask=shape_mask(scene.shape, x, y, radius, side))
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)


def write_caption(scene: Scene, random: Random) -> str:
    """One of several ways to say what the scene shows; one in ten leaves the background open."""
    ground = f"{scene.background} background"
    if not scene.shape:
        return random.choice([f"a {ground}", ground, f"a plain {ground}"])
    thing = " ".join(filter(None, (scene.size, scene.foreground, scene.shape)))
    sentence = f"a {thing} on a {ground}"
    return random.choice(
        [sentence] * 6 + [f"{thing}, {ground}", f"{thing} on a {ground}", f"a picture of {sentence}", thing]
    )


def shape_mask(shape: str, x: float, y: float, radius: float, side: int) -> Image.Image:
    """The shape in white on black, [side, side], around a centre in pixels; raises KeyError for an unknown shape."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse(_box(x, y, radius, radius), fill=255)
        if shape == "ring":
            pen.ellipse(_box(x, y, radius * RING_HOLE, radius * RING_HOLE), fill=0)
    elif shape == "cross":
        pen.rectangle(_box(x, y, radius * 0.33, radius), fill=255)
        pen.rectangle(_box(x, y, radius, radius * 0.33), fill=255)
    else:
        pen.polygon([(x + radius * across, y + radius * down) for across, down in CORNERS[shape]], fill=255)
    return mask


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def _jittered(colour: Colour, random: Random) -> Colour:
    red, green, blue = (min(255, max(0, value + random.randint(-COLOUR_JITTER, COLOUR_JITTER))) for value in colour)
    return red, green, blue


def draw_clutter(random: Random) -> Image.Image:
    """Stripes, gradients and polygons in any colour, so that the autoencoder can show more than six shapes."""
    side = PIXELS * OVERSAMPLING
    image = _gradient(random, side) if random.random() < 0.3 else Image.new("RGB", (side, side), _any_colour(random))
    if random.random() < 0.45:
        image = _striped(image, random)
    pen = ImageDraw.Draw(image)
    for _ in range(random.randint(1, 4)):
        _scribble(pen, random, side)
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)


def _any_colour(random: Random) -> Colour:
    if random.random() < 0.5:
        return random.randint(0, 255), random.randint(0, 255), random.randint(0, 255)
    return _jittered(random.choice(list(COLOURS.values())), random)


def _gradient(random: Random, side: int) -> Image.Image:
    start, end = (np.array(_any_colour(random), np.float64) for _ in range(2))
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    along = np.clip(math.cos(angle) * x + math.sin(angle) * y + 0.5, 0, 1)[..., None]
    return Image.fromarray((start * (1 - along) + end * along).astype(np.uint8))


def _striped(image: Image.Image, random: Random) -> Image.Image:
    """Stripes all over the picture, or more often only inside a polygon."""
    side = image.width
    angle, width, colour = random.uniform(0, math.pi), random.uniform(10, 34), _any_colour(random)
    y, x = np.mgrid[0:side, 0:side]
    stripes = (math.cos(angle) * x + math.sin(angle) * y) // width % 2 == 0
    if random.random() >= 0.3:
        inside = Image.new("L", image.size, 0)
        middle = side / 2 + random.uniform(-40, 40), side / 2 + random.uniform(-40, 40)
        corners = _regular_corners(random, *middle, random.uniform(60, 110))
        ImageDraw.Draw(inside).polygon(corners, fill=1)
        stripes &= np.array(inside, bool)
    pixels = np.array(image)
    pixels[stripes] = colour
    return Image.fromarray(pixels)


def _scribble(pen: ImageDraw.ImageDraw, random: Random, side: int) -> None:
    """An ellipse, more often a polygon or star, or a thick line; lengths in oversampled pixels."""
    x, y, radius = random.uniform(0, side), random.uniform(0, side), random.uniform(12, 90)
    kind, colour = random.random(), _any_colour(random)
    if kind < 0.25:
        pen.ellipse(_box(x, y, radius, radius * random.uniform(0.5, 1)), fill=colour)
    elif kind < 0.85:
        pen.polygon(_regular_corners(random, x, y, radius), fill=colour)
    else:
        end = random.uniform(0, side), random.uniform(0, side)
        pen.line([(x, y), end], fill=colour, width=random.randint(4, 14))


def _regular_corners(random: Random, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon with 3 to 7 sides, or in one of three cases of a star, turned by any angle."""
    count, turn = random.randint(3, 7), random.uniform(0, 2 * math.pi)
    radii = [radius] * count if random.random() < 2 / 3 else [radius, radius * 0.45] * count
    step = 2 * math.pi / len(radii)
    return [(x + r * math.cos(turn + i * step), y + r * math.sin(turn + i * step)) for i, r in enumerate(radii)]


def contact_sheet(images: Iterable[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, on grey with a gap of two pixels."""
    cells = list(images)
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), (128, 128, 128))
    for number, image in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + 2), row * (height + 2)))
    return sheet
