"""Reads: which base models there are, what their files say now, and what lies in the models folder unregistered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from django.db.models import QuerySet

from lorapilot import workspace
from lorapilot.access import Viewer
from models_registry.models import BaseModel, ModelComponent
from models_registry.recognition import TITLES, Recognised, Unrecognised, recognise

MOST_CANDIDATES = 100
MOST_ENTRIES = 20_000  # of the models folder that one look goes through


@dataclass(frozen=True)
class Candidate:
    """Something in the models folder that could be registered."""

    path: str
    architecture_title: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A registered model as its files are now: what was recognised, or why it is no longer usable."""

    recognised: Recognised | None
    problem: str = ""


def list_base_models(user: Viewer) -> QuerySet[BaseModel]:
    """All registered base models, for everybody who is signed in."""
    return BaseModel.objects.visible_to(user).select_related("hashing", "registered_by")


def absolute_path(base_model: BaseModel) -> Path:
    """Where the model lies. Raises ValueError when a link there has come to lead out of the models folder."""
    return workspace.inside(workspace.models(), base_model.path)


def component_path(component: ModelComponent) -> Path:
    """Where the file lies. Raises ValueError as `absolute_path` does."""
    return workspace.inside(workspace.models(), component.path)


def component_paths(base_model: BaseModel) -> dict[str, Path]:
    return {}


def missing_files(base_model: BaseModel) -> list[str]:
    """A sentence for each file that vanished or changed its size since the model was registered."""
    return [sentence for component in base_model.components.all() if (sentence := _what_is_wrong(component))]


def _what_is_wrong(component: ModelComponent) -> str:
    try:
        found = component_path(component).stat().st_size
    except ValueError:
        return f"{component.path} is now a link that leaves the models folder."
    except OSError:
        return f"{component.path} is missing from the models folder."
    if found != component.bytes:
        return (
            f"{component.path} has {found:,} bytes instead of {component.bytes:,}: it was changed or is being copied."
        )
    return ""


def inspect(base_model: BaseModel) -> Inspection:
    """Read the model's headers and configurations again (milliseconds), for its page."""
    try:
        return Inspection(recognise(absolute_path(base_model), root=workspace.models()))
    except Unrecognised as error:
        return Inspection(None, str(error))
    except (OSError, ValueError):
        return Inspection(None, f"{base_model.path} cannot be read.")


def unregistered_candidates() -> list[Candidate]:
    """Folders and files in the models folder that could be registered, at most 100 of them, by path."""
    root = workspace.models().resolve()
    registered = set(BaseModel.objects.values_list("path", flat=True))
    found = (_candidate(path, root) for path in _models_below(root, registered))
    return list(islice((candidate for candidate in found if candidate), MOST_CANDIDATES))


def _candidate(path: Path, root: Path) -> Candidate | None:
    try:
        found = _summary(path, root) if path.is_dir() else _file_summary(path, path.stat().st_mtime_ns)
    except OSError:
        return None
    return Candidate(path.relative_to(root).as_posix(), *found) if found else None


@lru_cache(maxsize=4096)  # a shelf of a thousand LoRAs is not read again for each look at the page
def _file_summary(path: Path, _changed_at: int) -> tuple[str, int] | None:
    return _summary(path, path.parent)


def _summary(path: Path, root: Path) -> tuple[str, int] | None:
    try:
        recognised = recognise(path, root=root)
    except (Unrecognised, OSError, ValueError):
        return None
    return TITLES[recognised.architecture], recognised.bytes


def _models_below(root: Path, registered: set[str]) -> Iterator[Path]:
    """Diffusers folders and .safetensors files that are not registered; hidden and linked folders are left out."""
    entries = 0
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            return
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = here.relative_to(root).as_posix()
        if "model_index.json" in files and here != root:
            folders.clear()
            if relative not in registered:
                yield here
            continue
        for name in sorted(files):
            path = here / name
            is_new = path.relative_to(root).as_posix() not in registered
            if name.endswith(".safetensors") and is_new and not path.is_symlink():
                yield path


__all__ = [
    "Candidate",
    "Inspection",
    "absolute_path",
    "component_path",
    "inspect",
    "list_base_models",
    "missing_files",
    "unregistered_candidates",
]
