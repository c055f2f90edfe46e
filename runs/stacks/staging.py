"""A run's pictures as the folders that external trainers read: links to the originals, captions beside them.

The folder belongs to the run and is the same for all its attempts, so that what a trainer caches there is used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runs.stacks.base import TrainingJob

FOLDER = "_data"


def staged_folders(job: TrainingJob) -> tuple[dict[int, Path], Mapping[Path, Path], Mapping[Path, str]]:
    """Folders by the repeats of their pictures (those of the dataset times those of the run), links, and captions."""
    folders: dict[int, Path] = {}
    links: dict[Path, Path] = {}
    captions: dict[Path, str] = {}
    for number, picture in enumerate(job.pictures, 1):
        repeats = picture.repeats * job.spec.repeats
        folder = folders.setdefault(repeats, job.folder / FOLDER / f"{repeats}x")
        staged = folder / f"{number:06d}{Path(picture.image).suffix.lower()}"
        links[staged] = Path(picture.image)
        captions[staged.with_suffix(".txt")] = picture.caption
    return dict(sorted(folders.items())), links, captions
