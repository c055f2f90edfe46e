"""Which runs a viewer shows: those that its user may see and that have written events, whatever trained them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings

from lorapilot.models import User
from runs import selectors
from runs.models import Run

EVENTS = "events.out.tfevents."
DEPTH = 3  # folders below a run's that are looked into
MOST_RUNS = 500  # the newest; TensorBoard holds all that it shows in memory
NOTHING = "None of your runs has written TensorBoard events yet. They appear with the first logged step."
PROFILES_ONLY = "trainpilot"  # not a stack: runs of any stack that a profile filled in
STACKS = {"kohya": "kohya", "ai-toolkit": "ai_toolkit", "diffpipe": "diffusion_pipe"}  # a source, and its stack's key
NAMES = {"trainpilot": "TrainPilot", "kohya": "Kohya", "ai-toolkit": "AI Toolkit", "diffpipe": "Diffusion Pipe"}


def event_folders(run: Run) -> list[Path]:
    """The folders at or below the run's own that hold event files; what lies below one of them belongs to it.

    In the order of their names: a trainer that begins a folder at each start names it by the time.
    """
    found = []
    top = str(run.folder)
    for folder, below, files in os.walk(top):
        if any(name.startswith(EVENTS) for name in files):
            found.append(Path(folder))
            below.clear()
        elif os.path.relpath(folder, top).count(os.sep) >= DEPTH - 1 and folder != top:
            below.clear()
        below.sort()
    return found


@dataclass(frozen=True, slots=True)
class Source:
    """A run that TensorBoard can show."""

    run: Run
    folders: list[Path]


def runs_with_events(user: User) -> list[Source]:
    """The newest first."""
    runs = selectors.list_runs(user).order_by("-pk")[:MOST_RUNS]
    return [Source(run, folders) for run in runs if (folders := event_folders(run))]


def tensorboard_sources(user: User) -> dict[str, dict[str, Any]]:
    """Of each kind of run: is there anything to show, where (the newest one's folder in the workspace), and why not."""
    found = runs_with_events(user)
    return {
        name: _state(name, [source for source in found if _is_of(source.run, name)])
        for name in (PROFILES_ONLY, *STACKS)
    }


def _is_of(run: Run, name: str) -> bool:
    return bool(run.profile) if name == PROFILES_ONLY else run.stack == STACKS[name]


def _state(name: str, found: list[Source]) -> dict[str, Any]:
    if not found:
        reason = f"No {NAMES[name]} run of yours has written TensorBoard events yet."
        return {"ready": False, "path": "", "reason": reason}
    return {"ready": True, "path": os.path.relpath(found[0].folders[-1], settings.WORKSPACE), "reason": ""}


def link_runs(user: User, folder: Path) -> bool:
    """Make `folder` hold one link for each event folder of the user's runs. True when one of before is gone.

    A link is named as its run; further folders of a run have `~2`, `~3` after it, which no run's name has.
    """
    wanted = {
        f"{source.run.output_name}{f'~{number}' if number > 1 else ''}": target
        for source in runs_with_events(user)
        for number, target in enumerate(source.folders, 1)
    }
    stale = [link for link in folder.iterdir() if wanted.get(link.name) != link.readlink()]
    for link in stale:
        link.unlink()
    for name in wanted.keys() - {link.name for link in folder.iterdir()}:
        (folder / name).symlink_to(wanted[name], target_is_directory=True)
    return bool(stale)
