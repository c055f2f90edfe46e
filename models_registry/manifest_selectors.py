"""Reads: the manifest beside what lies in the models folder, and how far pulls are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from lorapilot import workspace
from lorapilot.models import JobStatus, User
from models_registry import manifest
from models_registry.manifest import Entry
from models_registry.models import BaseModel, Pull

MOST_FILES = 2_000  # of a repository's folder that one look goes through


@dataclass(frozen=True)
class ManifestRow:
    """A model of the manifest as it is here."""

    name: str
    kind: str
    source: str
    subdir: str
    include: str
    expected_size_bytes: int | None
    category: str
    installed: bool
    size_bytes: int
    target_path: str  # absolute for staff, else in the models folder
    licence: str
    gated: bool
    architecture: str
    stacks: tuple[str, ...]
    role: str
    entry: Entry
    path: str  # in the models folder
    pull: Pull | None
    base_model: BaseModel | None  # when it is registered


@dataclass(frozen=True)
class PullStatus:
    name: str
    state: str  # idle | running | done | error
    progress_pct: float
    last_line: str
    error: str


def manifest_rows(user: User, entries: Iterable[Entry] | None = None) -> list[ManifestRow]:
    """Every model of the manifest, in its order, or only these `entries` of it: each is looked for on the disk."""
    entries = manifest.load().entries if entries is None else entries
    pulls = {pull.name: pull for pull in Pull.objects.select_related("job")}
    registered = {base_model.path: base_model for base_model in BaseModel.objects.visible_to(user)}
    return [_row(user, entry, pulls.get(entry.name), registered) for entry in entries]


def manifest_row(user: User, name: str) -> ManifestRow:
    """One model of the manifest. Raises Missing."""
    entry = manifest.find(name)
    pull = Pull.objects.select_related("job").filter(name=name).first()
    found = BaseModel.objects.visible_to(user).filter(path=target_of(entry, pull)).first()
    return _row(user, entry, pull, {found.path: found} if found else {})


def pull_status(user: User, name: str) -> PullStatus:  # noqa: ARG001 selectors take the user first
    """How far the last pull of that model is; everybody who is signed in may know. Raises Missing."""
    entry = manifest.find(name)
    pull = Pull.objects.select_related("job").filter(name=entry.name).first()
    return status_of(entry.name, pull)


def status_of(name: str, pull: Pull | None) -> PullStatus:
    job = pull.job if pull else None
    if job is None:
        return PullStatus(
            name, "done" if pull and pull.files else "idle", 100.0 if pull and pull.files else 0.0, "", ""
        )
    state = STATES.get(job.status, "running")
    if state == "done":
        return PullStatus(name, state, 100.0, "Installed.", "")
    percent = round(100 * job.done / job.total, 1) if job.total else 0.0
    is_ending = state == "running" and job.cancel_requested_at is not None  # it hears of that at its next look
    line = "Being cancelled" if is_ending else job.message
    return PullStatus(name, state, percent, line, job.message if state == "error" else "")


STATES: dict[str, str] = {JobStatus.SUCCEEDED: "done", JobStatus.FAILED: "error", JobStatus.CANCELLED: "idle"}


def target_of(entry: Entry, pull: Pull | None) -> str:
    """Where the model is, or would be put, in the models folder: the last pull may have chosen another folder."""
    return entry.target(pull.subdir if pull else "")


def installed_bytes(entry: Entry, pull: Pull | None) -> int | None:
    """How large the model is here; None when it is not here as a whole."""
    root = workspace.models()
    try:
        target = workspace.inside(root, target_of(entry, pull))
    except (ValueError, OSError):
        return None
    if entry.kind != "hf_repo":
        return target.stat().st_size if target.is_file() else None
    if pull is None:
        return _copied_bytes(entry, target)
    return _pulled_bytes(pull, root)


def _pulled_bytes(pull: Pull, root: Path) -> int | None:
    """None until the pull is done, and when a file that it brought has gone or changed since."""
    try:
        sizes = [workspace.inside(root, path).stat().st_size for path, _ in pull.files]
    except (OSError, ValueError):
        return None
    return sum(sizes) if pull.files and sizes == [size for _, size in pull.files] else None


def _copied_bytes(entry: Entry, folder: Path) -> int | None:
    """Of a repository that somebody copied here: each of its patterns names a file."""
    files = dict(islice(_files_below(folder), MOST_FILES))
    wanted = entry.include or ("*",)
    if not files or any(path.endswith(".part") for path in files):
        return None
    is_whole = all(any(fnmatchcase(path, pattern) for path in files) for pattern in wanted)
    return sum(files.values()) if is_whole else None


def _files_below(folder: Path) -> Iterator[tuple[str, int]]:
    for here, _folders, names in os.walk(folder):
        for name in names:
            path = Path(here) / name
            try:
                yield path.relative_to(folder).as_posix(), path.stat().st_size
            except OSError:  # a broken link, or gone by now
                continue


def _row(user: User, entry: Entry, pull: Pull | None, registered: dict[str, BaseModel]) -> ManifestRow:
    size = installed_bytes(entry, pull)
    path = target_of(entry, pull)
    return ManifestRow(
        name=entry.name,
        kind=entry.kind,
        source=entry.source,
        subdir=(pull.subdir if pull else "") or entry.subdir,
        include=",".join(entry.include),
        expected_size_bytes=entry.expected_size_bytes,
        category=entry.category,
        installed=size is not None,
        size_bytes=size or 0,
        target_path=str(workspace.models() / path) if user.is_staff else path,
        licence=entry.licence,
        gated=entry.is_gated,
        architecture=entry.architecture,
        stacks=entry.stacks,
        role=entry.role,
        entry=entry,
        path=path,
        pull=pull,
        base_model=registered.get(path),
    )
