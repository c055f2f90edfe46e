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
from models_registry.enums import ATTACHABLE, ATTACHABLE_AS_FOLDER, Layout, Role
from models_registry.models import BaseModel, ModelComponent
from models_registry.parts import FOLDER_ENCODERS, is_part_folder, is_sharded, part_files, recognise_part
from models_registry.recognition import TITLES, Recognised, Unrecognised, recognise

MOST_CANDIDATES = 100
MOST_ENTRIES = 20_000  # of the models folder that one look goes through
LORAS = "loras"  # the folder in it that holds LoRAs, often thousands: nothing there is a base model, or a part of one


@dataclass(frozen=True)
class Candidate:
    """Something in the models folder that could be registered."""

    path: str
    architecture_title: str
    bytes: int


@dataclass(frozen=True)
class PartCandidate:
    """A file or folder in the models folder that could be attached to a base model."""

    path: str
    role: Role
    title: str
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


def find_by_path(path: str) -> BaseModel | None:
    """The registered model that lies at `path`: absolute, or relative to the models folder."""
    root = workspace.models().resolve()
    try:
        relative = workspace.inside(root, path).relative_to(root).as_posix()
    except ValueError:
        return None
    return BaseModel.objects.filter(path=relative).first()


def component_paths(base_model: BaseModel) -> dict[Role, Path]:
    """Where the parts of the model lie, by role: what a diffusers folder holds (folders), the file of a single-file
    model, and what is attached (files, or folders of weights), which wins. A folder's text encoders are there twice,
    as `text_encoder` and as what they are (`clip_l`, `t5` and so on). Raises ValueError as `absolute_path` does."""
    components = base_model.components.all()
    paths: dict[Role, Path] = {}
    for component in components:
        if component.role != Role.OTHER and not component.is_attached:
            paths.setdefault(Role(component.role), _part_path(base_model, component))
    for name, role in FOLDER_ENCODERS.get(base_model.architecture, {}).items():
        if Role(name) in paths:
            paths[Role(role)] = paths[Role(name)]
    return paths | {
        Role(component.role): component_path(component) for component in components if component.is_attached
    }


def _part_path(base_model: BaseModel, component: ModelComponent) -> Path:
    """Of a folder's file the part's folder: `sdxl/vae/config.json` of `sdxl` lies in the part `sdxl/vae`."""
    inner = component.path.removeprefix(f"{base_model.path}/")
    if base_model.layout == Layout.FOLDER and "/" in inner:
        return absolute_path(base_model) / inner.partition("/")[0]
    return component_path(component)


def attached_components(base_model: BaseModel) -> list[ModelComponent]:
    return [component for component in base_model.components.all() if component.is_attached]


def component_files(component: ModelComponent) -> list[Path]:
    """The file that the component is, or those of an attached folder. Raises ValueError as `absolute_path` does."""
    path = component_path(component)
    if not path.is_dir():
        return [path]
    root = workspace.models()
    return [workspace.inside(root, file) for file in part_files(path)]


def missing_files(base_model: BaseModel) -> list[str]:
    """A sentence for each file, attached ones too, that vanished or changed its size since it was registered."""
    return [sentence for component in base_model.components.all() if (sentence := _what_is_wrong(component))]


def _what_is_wrong(component: ModelComponent) -> str:
    try:
        found = sum(file.stat().st_size for file in component_files(component))
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


def part_candidates() -> list[PartCandidate]:
    """Recognised VAEs and text encoders in the models folder, outside diffusers folders, at most 100, by path."""
    root = workspace.models().resolve()
    found = (_part_candidate(path, root) for path in _parts_below(root))
    return list(islice((candidate for candidate in found if candidate), MOST_CANDIDATES))


def _part_candidate(path: Path, root: Path) -> PartCandidate | None:
    files = part_files(path) if path.is_dir() else [path]
    if any(file.is_symlink() for file in files):
        return None
    try:
        summary = _part_summary(path, max(file.stat().st_mtime_ns for file in files))
    except OSError:
        return None
    if summary is None or summary[0] not in (ATTACHABLE_AS_FOLDER if path.is_dir() else ATTACHABLE):
        return None
    role, title, size = summary
    return PartCandidate(path.relative_to(root).as_posix(), Role(role), title, size)


@lru_cache(maxsize=4096)
def _part_summary(path: Path, _changed_at: int) -> tuple[str, str, int] | None:
    try:
        part = recognise_part(path)
    except (Unrecognised, OSError, ValueError):
        return None
    return part.role, part.title, part.bytes


def _parts_below(root: Path) -> Iterator[Path]:
    """.safetensors files, and folders with a config.json beside them; not in hidden, linked, diffusers or LoRA
    folders."""
    for here, names, is_pipeline in _folders_below(root):
        if is_pipeline:
            continue
        if here != root and is_part_folder(names):
            yield here
        if not is_sharded(names):
            for name in names:
                if name.endswith(".safetensors"):
                    yield here / name


def _models_below(root: Path, registered: set[str]) -> Iterator[Path]:
    """Diffusers folders and .safetensors files that are not registered; not in hidden, linked or LoRA folders."""
    for here, names, is_pipeline in _folders_below(root):
        if is_pipeline:
            paths = [here]
        else:
            paths = [here / name for name in names if name.endswith(".safetensors") and not (here / name).is_symlink()]
        yield from (path for path in paths if path.relative_to(root).as_posix() not in registered)


def _folders_below(root: Path) -> Iterator[tuple[Path, list[str], bool]]:
    """Folders with the names of their files, and whether they are diffusers folders, whose inside is left out."""
    entries = 0
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        entries += len(folders) + len(files)
        if entries > MOST_ENTRIES:
            return
        is_pipeline = "model_index.json" in files and here != root
        folders[:] = [] if is_pipeline else _worth_a_look(here, root, folders)
        yield here, sorted(filter(_is_text, files)), is_pipeline


def _worth_a_look(here: Path, root: Path, folders: list[str]) -> list[str]:
    visible = (name for name in folders if not name.startswith(".") and _is_text(name))
    return sorted(name for name in visible if (here, name) != (root, LORAS))


def _is_text(name: str) -> bool:
    """Not a name in other bytes than UTF-8, which neither a page nor the database can hold."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


__all__ = [
    "LORAS",
    "Candidate",
    "Inspection",
    "PartCandidate",
    "absolute_path",
    "attached_components",
    "component_files",
    "component_path",
    "component_paths",
    "inspect",
    "list_base_models",
    "missing_files",
    "part_candidates",
    "unregistered_candidates",
]
