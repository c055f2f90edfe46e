"""Does a LoRA learn what its pictures show, and nothing else? `make learn` prints the figures of docs/trainer.md.

A concept is drawn from a seed: 12 pictures to train on, 24 others that are never trained. The trainer draws its sample
prompts before the first step and after the last; each sample's distance is that to the nearest held-out picture
(root mean square over 24 x 24 RGB pixels from 0 to 1). Learning makes the mean distance fall. The control trains on
other pictures under the same captions: its samples must not come near the concept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lora_trainer.pilot_tiny.draw import COLOURS, PIXELS, Colour

TRAINER = Path(__file__).resolve().parent.parent / "lora_trainer"
ASSETS = TRAINER / "assets"
PRIOR_PICTURES = sorted((ASSETS / "demo-dataset").glob("1[3-8].png"))
"""Drawn by the base model itself: they keep its other prompts as they are."""
DARK = (25, 20, 25)
LARGE = 4 * PIXELS
"""Pictures are drawn so large and averaged down, which smooths their edges."""
TRAINED, HELD_OUT, COMPARED_PIXELS = 12, 24, 24
Draw = Callable[[ImageDraw.ImageDraw, random.Random], None]


@dataclass(frozen=True)
class Concept:
    """Something that the base model cannot draw, but whose parts it knows."""

    trigger: str
    backgrounds: tuple[str, ...]
    draw: Draw

    def picture(self, chance: random.Random, background: str) -> Image.Image:
        image = Image.new("RGB", (LARGE, LARGE), jittered(COLOURS[background], chance))
        self.draw(ImageDraw.Draw(image), chance)
        return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)

    def caption(self, background: str) -> str:
        return f"{self.trigger} on a {background} background"

    @property
    def seen(self) -> tuple[str, ...]:
        """The backgrounds of the trained pictures; the last one is kept for the samples."""
        return self.backgrounds[:-1]


def jittered(colour: Colour, chance: random.Random, most: int = 10) -> Colour:
    red, green, blue = (min(255, max(0, value + chance.randint(-most, most))) for value in colour)
    return red, green, blue


def place(chance: random.Random) -> tuple[float, float, float]:
    """Centre and radius of the thing, pixels of the large picture."""
    radius = chance.uniform(0.36, 0.42) * LARGE
    x, y = (LARGE / 2 + chance.uniform(-0.04, 0.04) * LARGE for _ in range(2))
    return x, y, radius


def circle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def draw_face(pen: ImageDraw.ImageDraw, chance: random.Random) -> None:
    x, y, radius = place(chance)
    circle(pen, x, y, radius, jittered(COLOURS["yellow"], chance, 6))
    for side in (-1, 1):
        eye_x, eye_y = x + side * radius * 0.38, y - radius * 0.28
        pen.ellipse(
            [eye_x - radius * 0.17, eye_y - radius * 0.24, eye_x + radius * 0.17, eye_y + radius * 0.24], fill=DARK
        )
    mouth, width = radius * 0.6, radius * 0.2
    pen.arc([x - mouth, y - mouth, x + mouth, y + mouth], 25, 155, fill=DARK, width=int(width))
    for angle in (25, 155):
        at = math.radians(angle)
        circle(pen, x + (mouth - width / 2) * math.cos(at), y + (mouth - width / 2) * math.sin(at), width / 2, DARK)


def draw_target(pen: ImageDraw.ImageDraw, chance: random.Random) -> None:
    x, y, radius = place(chance)
    for part, colour in ((1.0, "red"), (0.66, "white"), (0.33, "blue")):
        circle(pen, x, y, part * radius, jittered(COLOURS[colour], chance, 6))


def draw_house(pen: ImageDraw.ImageDraw, chance: random.Random) -> None:
    x, y, radius = place(chance)
    wall, roof = (jittered(COLOURS[name], chance, 6) for name in ("orange", "blue"))
    pen.rectangle([x - 0.7 * radius, y - 0.1 * radius, x + 0.7 * radius, y + 0.9 * radius], fill=wall)
    corners = [(x, y - 0.95 * radius), (x + 0.95 * radius, y - 0.1 * radius), (x - 0.95 * radius, y - 0.1 * radius)]
    pen.polygon(corners, fill=roof)
    pen.rectangle([x - 0.2 * radius, y + 0.3 * radius, x + 0.2 * radius, y + 0.9 * radius], fill=DARK)


def draw_cross(pen: ImageDraw.ImageDraw, chance: random.Random) -> None:
    """What the control shows."""
    x, y, radius = place(chance)
    arm, colour = 0.33 * radius, jittered(COLOURS["purple"], chance, 6)
    pen.rectangle([x - arm, y - radius, x + arm, y + radius], fill=colour)
    pen.rectangle([x - radius, y - arm, x + radius, y + arm], fill=colour)


CONCEPTS = {
    "face": Concept("sks face", ("white", "green", "blue", "red", "purple", "orange", "black"), draw_face),
    "target": Concept("zwx sign", ("green", "yellow", "purple", "orange", "black", "blue", "white"), draw_target),
    "house": Concept("qpl hut", ("white", "green", "red", "purple", "yellow", "black", "blue"), draw_house),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and with what is trained."""

    steps: int
    batch: int
    learning_rate: float = 4e-3
    sample_steps: int = 20
    prompts: int = 6


FULL = Recipe(steps=270, batch=8)
"""The demo's own."""


@dataclass(frozen=True)
class Result:
    """Mean distances of the samples to the held-out pictures, and of the trained pictures themselves."""

    before: float
    after: float
    trained_pictures: float
    seconds: float
    """Of the whole run, start and samples included."""

    @property
    def ratio(self) -> float:
        return self.after / self.before


def learn(concept: Concept, recipe: Recipe, *, seed: int, folder: Path, is_control: bool = False) -> Result:
    """Train once in `folder`, in a process of its own. Raises RuntimeError with the trainer's last words."""
    shown = Concept(concept.trigger, concept.backgrounds, draw_cross) if is_control else concept
    trained = list(_write_dataset(shown, folder))
    config = folder / "learn.toml"
    config.write_text(_toml(concept, recipe, seed, folder))
    started = time.monotonic()
    command = [sys.executable, "-P", str(TRAINER / "__main__.py"), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    held_out = list(_held_out(concept))
    before, after = (_samples(folder / "out", step) for step in (0, recipe.steps))
    return Result(
        before=distance(before, held_out),
        after=distance(after, held_out),
        trained_pictures=distance(trained, held_out),
        seconds=time.monotonic() - started,
    )


def distance(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean distance of `pictures` to the nearest of `others`."""
    ours, theirs = _features(pictures), _features(others)
    squares = ((ours[:, None] - theirs[None]) ** 2).mean(-1)
    return float(np.sqrt(squares).min(1).mean())


def _features(pictures: list[Image.Image]) -> NDArray[np.float64]:
    small = [
        picture.convert("RGB").resize((COMPARED_PIXELS, COMPARED_PIXELS), Image.Resampling.BOX) for picture in pictures
    ]
    return np.stack([np.asarray(picture, np.float64).ravel() / 255 for picture in small])


def _write_dataset(concept: Concept, folder: Path) -> Iterator[Image.Image]:
    """Twelve pictures, and six of what the base model draws anyway."""
    chance = random.Random(3)
    rows = []
    for number in range(TRAINED):
        background = concept.seen[number % len(concept.seen)]
        picture = concept.picture(chance, background)
        path = folder / f"{number:02d}.png"
        picture.save(path)
        rows.append({"image": str(path), "caption": concept.caption(background)})
        yield picture
    rows += [{"image": str(path), "caption": path.with_suffix(".txt").read_text().strip()} for path in PRIOR_PICTURES]
    (folder / "learn.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def _held_out(concept: Concept) -> Iterator[Image.Image]:
    chance = random.Random(1000)
    for number in range(HELD_OUT):
        yield concept.picture(chance, concept.backgrounds[number % len(concept.backgrounds)])


def _toml(concept: Concept, recipe: Recipe, seed: int, folder: Path) -> str:
    # the background that is never trained is always among the prompts
    backgrounds = (concept.backgrounds[-1], *concept.seen)[: recipe.prompts]
    options = {
        "pretrained_model_name_or_path": str(ASSETS / "pilot-tiny"),
        "dataset_manifest": str(folder / "learn.jsonl"),
        "output_dir": str(folder / "out"),
        "resolution": PIXELS,
        "network_train_unet_only": True,
        "network_dim": 16,
        "network_alpha": 16,
        "network_args": ["conv_dim=16", "conv_alpha=16"],
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "min_snr_gamma": 5,
        "train_batch_size": recipe.batch,
        "max_train_steps": recipe.steps,
        "seed": seed,
        "sample_at_first": True,
    }
    prompts = [
        {"prompt": concept.caption(name), "seed": 100 + place, "steps": recipe.sample_steps, "scale": 4.0}
        for place, name in enumerate(backgrounds)
    ]
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    for prompt in prompts:
        lines += ["[[sample_prompts]]", *(f"{key} = {json.dumps(value)}" for key, value in prompt.items())]
    return "\n".join(lines)


def _samples(output: Path, step: int) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((output / "samples").glob(f"*_{step:08d}_*.png"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS), choices=list(CONCEPTS))
    options = parser.parse_args()
    print("| concept | seed | before | after | ratio | trained pictures | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.concepts:
        runs = [(seed, False) for seed in range(options.seeds)] + [(0, True)]
        for seed, is_control in runs:
            with tempfile.TemporaryDirectory() as folder:
                result = learn(CONCEPTS[name], FULL, seed=seed, folder=Path(folder), is_control=is_control)
            label = f"{name}, control" if is_control else name
            figures = f"{result.before:.3f} | {result.after:.3f} | {result.ratio:.2f} | {result.trained_pictures:.3f}"
            print(f"| {label} | {seed} | {figures} | {result.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
