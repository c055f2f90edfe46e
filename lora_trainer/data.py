"""Pictures and captions: reading them, setting some aside for validation, and the order in which they are used.

Torch-free: the dry run reports on a dataset in a fraction of a second. Pictures are decoded elsewhere (encoding.py).
"""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_trainer.buckets import Placement, Size, place
from lora_trainer.config import TrainingConfig
from lora_trainer.errors import DatasetError
from lora_trainer.picture_files import picture_digest, picture_size
from lora_trainer.sources import Entry, Notice, folder_entries, manifest_entries


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
    is_regularisation: bool = False


@dataclass
class Dataset:
    """The pictures that will be used, and what was noticed while reading them."""

    pictures: list[Picture] = field(default_factory=list)
    """Those to learn from, then the regularisation pictures with the repeats that balance them."""
    notices: list[Notice] = field(default_factory=list)
    dropped: list[Path] = field(default_factory=list)
    regularisation: list[Picture] = field(default_factory=list)
    """All that were found, with the repeats of their folders."""

    @property
    def images_per_epoch(self) -> int:
        """Pictures counted with their repeats."""
        return _count(self.pictures)

    def bucket_counts(self) -> Counter[Size]:
        """Bucket -> pictures in it, counted with their repeats."""
        counts: Counter[Size] = Counter()
        for picture in self.pictures:
            counts[picture.placement.bucket] += picture.repeats
        return counts


def _count(pictures: Iterable[Picture]) -> int:
    return sum(picture.repeats for picture in pictures)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_dataset(config: TrainingConfig) -> Dataset:
    """Read what the configuration names; raises DatasetError when nothing, or something unreadable, is there."""
    dataset = Dataset()
    entries = list(_entries(config, dataset.notices))
    for entry in entries:
        _add(dataset, entry, config)
    _check_that_something_is_there(dataset, config)
    _notice_captions(dataset.notices, entries, dataset.dropped)
    return _balanced(dataset)


def _entries(config: TrainingConfig, notices: list[Notice]) -> Iterator[Entry]:
    ending = config.caption_extension
    if config.dataset_manifest:
        yield from manifest_entries(Path(config.dataset_manifest))
    else:
        yield from folder_entries(Path(config.train_data_dir), ending, notices)
    if config.reg_data_dir:
        yield from folder_entries(Path(config.reg_data_dir), ending, notices, is_regularisation=True)


def _add(dataset: Dataset, entry: Entry, config: TrainingConfig) -> None:
    size = picture_size(entry.path)
    placement = place(size, config.bucket_rules)
    if placement:
        picture = Picture(
            entry.path, entry.caption, entry.repeats, entry.group, size, placement, entry.is_regularisation
        )
        (dataset.regularisation if entry.is_regularisation else dataset.pictures).append(picture)
        return
    dataset.dropped.append(entry.path)
    message = f"{entry.path.name} ({size[0]}x{size[1]}) is smaller than one bucket step and was left out."
    dataset.notices.append(Notice("picture_dropped", message))


def _check_that_something_is_there(dataset: Dataset, config: TrainingConfig) -> None:
    dropped = f" ({len(dataset.dropped)} were too small)" if dataset.dropped else ""
    if not dataset.pictures:
        source = config.dataset_manifest or config.train_data_dir
        raise DatasetError(f"The dataset {source} has no pictures to train on{dropped}. Add some and start again.")
    if config.reg_data_dir and not dataset.regularisation:
        raise DatasetError(
            f"The folder {config.reg_data_dir} has no regularisation pictures{dropped}. "
            "Add some, or leave 'reg_data_dir' out."
        )


def _notice_captions(notices: list[Notice], entries: list[Entry], dropped: list[Path]) -> None:
    used = [entry for entry in entries if entry.path not in set(dropped)]
    empty = [entry for entry in used if not entry.caption]
    unnamed = [entry for entry in used if entry.is_named_by_folder and not entry.is_regularisation]
    longer = [entry for entry in used if entry.has_more_lines]
    if empty:
        message = f"No caption: {_some_names(empty)}. They are trained with an empty one."
        notices.append(Notice("caption_missing", message))
    if unnamed:
        message = f"No caption file: {_some_names(unnamed)}. They are trained with the name of their folder."
        notices.append(Notice("caption_missing", message))
    if longer:
        message = f"More than one line of caption: {_some_names(longer)}. Only the first one is trained."
        notices.append(Notice("caption_lines", message))


def _some_names(entries: list[Entry]) -> str:
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return ", ".join(entry.path.name for entry in entries[:3]) + more


# --- regularisation ---------------------------------------------------------------------------------------------------


def _balanced(dataset: Dataset) -> Dataset:
    """The dataset with as many uses of regularisation pictures as of those to learn from."""
    training = [picture for picture in dataset.pictures if not picture.is_regularisation]
    used = _as_often(dataset.regularisation, _count(training))
    notices = [notice for notice in dataset.notices if notice.code != "regularisation_unused"]
    unused = len(dataset.regularisation) - len(used)
    if unused:
        message = f"{unused} regularisation pictures are not used: the others are enough for the training pictures."
        notices.append(Notice("regularisation_unused", message))
    return replace(dataset, pictures=training + used, notices=notices)


def _as_often(pictures: list[Picture], wanted: int) -> list[Picture]:
    """As sd-scripts does it: pictures are taken in order with their own repeats until there are `wanted` uses; if all
    of them are too few, each in turn gets one more. The last one taken may bring a few uses too many.
    """
    used: list[Picture] = []
    missing = wanted
    for picture in pictures:
        if missing <= 0:
            return used
        used.append(picture)
        missing -= picture.repeats
    rounds, rest = divmod(max(0, missing), max(1, len(used)))
    return [replace(picture, repeats=picture.repeats + rounds + (index < rest)) for index, picture in enumerate(used)]


# --- validation -------------------------------------------------------------------------------------------------------


def split_validation(dataset: Dataset, config: TrainingConfig) -> tuple[Dataset, Dataset]:
    """The dataset to train on, and the one that is kept out of training: `validation_split` of the pictures, each once.

    At least one picture is kept out and at least one trained; regularisation pictures are never kept out. Each
    picture's bytes and the seed give it a number, and those with the lowest are kept out: neither names nor order
    matter, and adding or removing a picture moves at most one other.
    """
    if not config.validation_split:
        return dataset, Dataset()
    pictures = [picture for picture in dataset.pictures if not picture.is_regularisation]
    if len(pictures) < 2:
        raise DatasetError("The dataset has only one picture, so none can be kept for validation. Add pictures.")
    kept_out = _lowest(pictures, config.validation_split, config.noise_seed_of_validation)
    training = [picture for index, picture in enumerate(pictures) if index not in kept_out]
    validation = [replace(picture, repeats=1) for index, picture in enumerate(pictures) if index in kept_out]
    return _balanced(replace(dataset, pictures=training)), Dataset(validation)


def _lowest(pictures: list[Picture], share: float, seed: int) -> set[int]:
    """Indices of the pictures that are kept out."""

    def number(index: int) -> str:
        return hashlib.sha256(f"{seed}/{picture_digest(pictures[index].path)}".encode()).hexdigest()

    count = min(len(pictures) - 1, max(1, round(len(pictures) * share)))
    return set(sorted(range(len(pictures)), key=number)[:count])


# --- order ------------------------------------------------------------------------------------------------------------


class BatchOrder:
    """Which pictures share a batch, and in which order, for every epoch: a function of the seed and the epoch alone.

    So the place in the data is two numbers, and a resumed run goes on with the very batch that it would have had.
    The last batch of a bucket may be short, as in sd-scripts. Several processes take turns with the epoch's batches;
    the first ones come again at the end where the number does not divide evenly.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._members: dict[Size, list[int]] = {}
        for index, picture in enumerate(dataset.pictures):
            self._members.setdefault(picture.placement.bucket, []).extend([index] * picture.repeats)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        batches = sum(-(-len(members) // batch_size) for members in self._members.values())
        self.batches_per_epoch = -(-batches // world_size)  # of each process

    def epoch(self, number: int) -> list[list[int]]:
        """This process's batches of the epoch, each a list of indices into the dataset's pictures."""
        batches = self._batches_of_all(number)
        places = range(self._rank, self.batches_per_epoch * self._world_size, self._world_size)
        return [batches[place % len(batches)] for place in places]

    def images_before(self, epoch: int, batch: int) -> int:
        """Pictures that all processes together use in the epoch before this one of each process's batches."""
        return sum(map(len, self._batches_of_all(epoch)[: batch * self._world_size]))

    def batch_after(self, epoch: int, images: int) -> int:
        """The first batch of each process before which they use at least so many pictures of the epoch. Inverse of
        `images_before` in the same order; in one of other batches, it is rounded up to a whole batch."""
        used = itertools.accumulate(map(len, self._batches_of_all(epoch)), initial=0)
        batches = next(number for number, total in enumerate(used) if total >= images)
        return -(-batches // self._world_size)

    def _batches_of_all(self, number: int) -> list[list[int]]:
        generator = random.Random(f"{self._seed}/{number}")  # noqa: S311 - reproducible, not secret
        batches: list[list[int]] = []
        for members in self._members.values():
            order = generator.sample(members, len(members))
            batches += [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        generator.shuffle(batches)
        return batches
