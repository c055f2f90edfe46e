"""A tagger of WD14's kind: `model.onnx` and `selected_tags.csv` in one folder.

Input: one picture, [1, side, side, 3], BGR, 0 to 255, padded with white to a square. Output: [1, tags], the probability
of each line of the CSV file. Its column `category`: 0 general, 4 character, 9 rating; ratings are never captions.
Source: the model cards of SmilingWolf's wd-v1-4 and wd-v3 taggers.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from lora_trainer.captioning.order import Order
from lora_trainer.errors import ModelError

GENERAL, CHARACTER = 0, 4


class Tagger:
    """Captions are tags with commas between them: characters first, then general ones, the surest first."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.excluded = {_spelled(tag) for tag in order.exclude}
        folder = Path(order.model)
        self.tags = read_tags(folder / "selected_tags.csv")
        self.session = _session(folder / "model.onnx", order.device)
        found = self.session.get_inputs()[0]
        self.name, shape = found.name, found.shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise ModelError(f"{folder.name} is no tagger of WD14's kind: its input is {shape}.")
        self.side = int(shape[1])

    def caption(self, image: Image.Image) -> str:
        """`image` is RGB."""
        probabilities = self.session.run(None, {self.name: prepared(image, self.side)})[0][0]
        if len(probabilities) != len(self.tags):
            raise ModelError(
                f"The model knows {len(probabilities)} tags, and selected_tags.csv names {len(self.tags)}: "
                "the two files are not of one tagger."
            )
        thresholds = {CHARACTER: self.order.character_threshold, GENERAL: self.order.general_threshold}
        found = [
            (category != CHARACTER, -float(probability), name)
            for (name, category), probability in zip(self.tags, probabilities, strict=True)
            if category in thresholds and probability >= thresholds[category] and _spelled(name) not in self.excluded
        ]
        return ", ".join(self._shown(name) for _, _, name in sorted(found))

    def _shown(self, name: str) -> str:
        return _with_spaces(name) if self.order.underscores_to_spaces else name


def read_tags(path: Path) -> list[tuple[str, int]]:
    """(name, category) of each tag, in the order of the model's output."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a list of tags: {error}.") from None


def prepared(image: Image.Image, side: int) -> Any:
    """float32 [1, side, side, 3], BGR."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1])


def _session(path: Path, device: str) -> Any:
    wanted = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # noqa: BLE001 - its own classes, which have no base of their own
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0][:300]}") from None


def _with_spaces(name: str) -> str:
    """Faces such as `o_o` and `>_<` keep their underscores: no part of them has two letters."""
    is_face = all(sum(character.isalpha() for character in part) <= 1 for part in name.split("_"))
    return name if is_face else name.replace("_", " ")


def _spelled(tag: str) -> str:
    """However a person writes it."""
    return tag.strip().replace(" ", "_").casefold()
