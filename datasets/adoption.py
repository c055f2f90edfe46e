"""Kohya's folders that somebody put into `<workspace>/datasets/` by hand: found, and copied into a dataset.

The folder itself is never changed. Staff only: it is theirs to say whose a folder of the server is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.db import transaction

from datasets import batches, services
from datasets.models import Dataset
from lorapilot import jobs, workspace
from lorapilot.access import require_staff
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import Job, User

MAX_FILES = 100_000
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9 ._-]+")


@dataclass(frozen=True)
class FoundFolder:
    """`folder` lies in `<workspace>/datasets/`; `name` is what its dataset will be called."""

    folder: str
    name: str
    repeats: int
    pictures: int
    captions: int


def found_folders(staff: User) -> list[FoundFolder]:
    """Those of `folder_names` with what is in them: each file is looked at."""
    return [_looked_at(name) for name in folder_names(staff)]


def folder_names(staff: User) -> list[str]:
    """Folders `<repeats>_<name>` of which no dataset was made yet. Raises NotAllowed for others than staff."""
    require_staff(staff, "Only staff adopt folders of the server. Ask one of them, or upload the folder.")
    adopted = set(Dataset.objects.exclude(adopted_from="").values_list("adopted_from", flat=True))
    with os.scandir(workspace.datasets()) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    return [name for name in names if _is_kohya(name) and name not in adopted]


def _is_kohya(name: str) -> bool:
    found = batches.KOHYA_FOLDER.fullmatch(name)
    return found is not None and 1 <= int(found[1]) <= batches.MAX_REPEATS and name.isprintable()


def _looked_at(folder: str) -> FoundFolder:
    files = [path for path, _ in _files_of(folder)]
    captions = sum(map(batches.is_caption, files))
    repeats = int(folder.partition("_")[0])
    return FoundFolder(folder, _dataset_name(folder), repeats, sum(map(batches.is_picture, files)), captions)


def _dataset_name(folder: str) -> str:
    name = folder.partition("_")[2]
    return NOT_IN_A_NAME.sub("-", name)[:80].strip(" ._-") or "adopted"


def _files_of(folder: str) -> Iterator[tuple[str, Path]]:
    """(path from the datasets folder, file) of each plain file; hidden ones, links and devices left out."""
    root = workspace.datasets()
    count = 0
    for where, folders, names in os.walk(root / folder):  # links to folders are not followed
        folders.sort()
        for name in sorted(names):
            path = Path(where) / name
            relative = str(path.relative_to(root))
            if path.is_symlink() or not path.is_file() or batches.is_junk(relative):
                continue
            count += 1
            if count > MAX_FILES:
                return
            yield relative, path


def adopt_folder(staff: User, *, folder: str, owner: User | None = None) -> tuple[Dataset, Job]:
    """A dataset of `owner`'s (or the staff member's own), which a job fills from the folder.

    Raises NotAllowed, Missing (no such folder), Conflict (it was adopted already)."""
    is_found = folder in folder_names(staff)
    if not is_found and Dataset.objects.filter(adopted_from=folder).exclude(adopted_from="").exists():
        raise Conflict("There is a dataset of this folder already.", field="folder")
    if not is_found:
        raise Missing("There is no such folder of Kohya's kind (<repeats>_<name>) in the datasets folder.")
    with transaction.atomic():
        dataset = _created(owner or staff, _dataset_name(folder))
        dataset.adopted_from = folder
        dataset.save(update_fields=["adopted_from"])
        job = jobs.enqueue(import_folder, label=f"Adopt {folder}"[:200], owner=staff, dataset_id=dataset.pk)
    return dataset, job


def _created(owner: User, name: str) -> Dataset:
    """Called `name`, or with a number when the owner has one of this name."""
    number = 1
    while True:
        try:
            return services.create_dataset(owner, name=name if number == 1 else f"{name}-{number}")
        except Conflict:
            number += 1


@jobs.job
def import_folder(progress: jobs.Progress, *, dataset_id: int) -> dict[str, Any]:
    """The job behind it. Started over, it finds what it imported and leaves that alone."""
    dataset = Dataset.objects.filter(pk=dataset_id).first()
    if dataset is None:
        raise Missing("The dataset was deleted meanwhile.")
    files = [file for file in _files_of(dataset.adopted_from) if not file[0].lower().endswith(".zip")]
    if not files:
        raise UserError("The folder is empty, or gone.")
    return services.import_files(dataset, files=files, progress=progress).as_dict()
