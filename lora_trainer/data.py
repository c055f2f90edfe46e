"""Pictures and captions: reading them from a manifest or from Kohya's folders, and the order in which they are used.

Torch-free: the dry run reports on a dataset in a fraction of a second. Pictures are decoded elsewhere (cache.py).
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from lora_trainer.buckets import Placement, Size, place
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import DatasetError

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """One picture of the dataset, in the bucket where it is trained."""

    path: Path
    caption: str
    repeats: int
    group: str
    """Name of the folder or manifest that it comes from."""
    size: Size
    """(width, height) of the file in pixels, upright."""
    placement: Placement


@dataclass(frozen=True)
class Notice:
    """Something about the dataset that the user should know but that need not stop the run."""

    code: str
    message: str


@dataclass
class Dataset:
    """The pictures that will be trained, and what was noticed while reading them."""

    pictures: list[Picture] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    dropped: list[Path] = field(default_factory=list)

    @property
    def images_per_epoch(self) -> int:
        """Pictures counted with their repeats."""
        return sum(picture.repeats for picture in self.pictures)

    def bucket_counts(self) -> Counter[Size]:
        """Bucket -> pictures in it, counted with their repeats."""
        counts: Counter[Size] = Counter()
        for picture in self.pictures:
            counts[picture.placement.bucket] += picture.repeats
        return counts


@dataclass(frozen=True)
class _Entry:
    path: Path
    caption: str
    repeats: int
    group: str


def read_dataset(config: TrainingConfig) -> Dataset:
    """Read what the configuration names; raises DatasetError when nothing, or something unreadable, is there."""
    dataset = Dataset()
    if config.dataset_manifest:
        source, entries = config.dataset_manifest, _manifest_entries(Path(config.dataset_manifest))
    else:
        source, entries = config.train_data_dir, _folder_entries(config, dataset.notices)
    for entry in entries:
        _add(dataset, entry, config)
    if not dataset.pictures:
        dropped = f" ({len(dataset.dropped)} were too small)" if dataset.dropped else ""
        raise DatasetError(f"The dataset {source} has no pictures to train on{dropped}. Add some and start again.")
    _notice_missing_captions(dataset)
    return dataset


def _add(dataset: Dataset, entry: _Entry, config: TrainingConfig) -> None:
    size = picture_size(entry.path)
    placement = place(size, config.bucket_rules)
    if placement:
        dataset.pictures.append(
            Picture(entry.path, entry.caption, entry.repeats, entry.group, size, placement),
        )
        return
    dataset.dropped.append(entry.path)
    message = f"{entry.path.name} ({size[0]}x{size[1]}) is smaller than one bucket step and was left out."
    dataset.notices.append(Notice("picture_dropped", message))


def _notice_missing_captions(dataset: Dataset) -> None:
    bare = [picture.path.name for picture in dataset.pictures if not picture.caption]
    if bare:
        more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
        message = f"No caption: {', '.join(bare[:3])}{more}. They are trained with an empty one."
        dataset.notices.append(Notice("caption_missing", message))


def picture_size(path: Path) -> Size:
    """(width, height) as a viewer shows it; reads only the header."""
    with open_picture(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else (image.width, image.height)


def open_picture(path: Path) -> Image.Image:
    """Open a picture file, or say which one is at fault."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DatasetError(f"The picture {path} does not exist.") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"The picture {path} cannot be read; replace or remove it.") from error


def upright_rgb(path: Path) -> Image.Image:
    """The decoded picture, turned as its camera says."""
    with open_picture(path) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DatasetError(f"The picture {path} is damaged; replace or remove it.") from error


def _manifest_entries(path: Path) -> Iterator[_Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The dataset manifest {path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _manifest_entry(line, path, number)


def _manifest_entry(line: str, path: Path, number: int) -> _Entry:
    where = f"Line {number} of {path}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise DatasetError(f'{where} must be an object with an "image" path.')
    caption, repeats = row.get("caption", ""), row.get("repeats", 1)
    if not isinstance(caption, str) or type(repeats) is not int or repeats < 1:
        raise DatasetError(f'{where}: "caption" must be a text and "repeats" a whole number of at least 1.')
    return _Entry(path.parent / row["image"], caption.strip(), repeats, "dataset")


def _folder_entries(config: TrainingConfig, notices: list[Notice]) -> Iterator[_Entry]:
    parent = Path(config.train_data_dir)
    if not parent.is_dir():
        raise DatasetError(f"The dataset folder {parent} does not exist.")
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        number, _, name = folder.name.partition("_")
        if not number.isdecimal() or int(number) < 1 or not name:
            message = (
                f"The folder {folder.name} was ignored: its name is not <repeats>_<name>, such as 10_{folder.name}."
            )
            notices.append(Notice("folder_ignored", message))
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PICTURE_ENDINGS:
                yield _Entry(path, _caption_beside(path, config.caption_extension), int(number), folder.name)


def _caption_beside(picture: Path, ending: str) -> str:
    path = picture.with_suffix(ending if ending.startswith(".") else f".{ending}")
    try:
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The caption {path} cannot be read as UTF-8 text.") from error


class BatchOrder:
    """Which pictures share a batch, and in which order, for every epoch: a function of the seed and the epoch alone.

    So the place in the data is two numbers, and a resumed run goes on with the very batch that it would have had.
    The last batch of a bucket may be short, as in sd-scripts.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self._members: dict[Size, list[int]] = {}
        for index, picture in enumerate(dataset.pictures):
            self._members.setdefault(picture.placement.bucket, []).extend([index] * picture.repeats)
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._members.values())

    def epoch(self, number: int) -> list[list[int]]:
        """The epoch's batches, each a list of indices into the dataset's pictures."""
        generator = random.Random(f"{self._seed}/{number}")  # noqa: S311 - reproducible, not secret
        batches: list[list[int]] = []
        for members in self._members.values():
            order = generator.sample(members, len(members))
            batches += [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        generator.shuffle(batches)
        return batches

    def from_batch(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, batch) without end, starting after `position` batches."""
        epoch, skipped = divmod(position, self.batches_per_epoch)
        while True:
            for batch in self.epoch(epoch)[skipped:]:
                yield epoch, batch
            epoch, skipped = epoch + 1, 0
