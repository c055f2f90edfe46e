"""A LoRA file that a run saved, put where ComfyUI, InvokeAI, Forge and A1111 find it: `<workspace>/models/loras`.

Beside `<name>.safetensors` lie `<name>.json`, which says what the file is and where it comes from, and `<name>.png`, a
sample, where there is one of that step. The JSON has the keys that A1111, Forge and InvokeAI read (`activation text`,
`description`, …), and ours under `lorapilot`. What is published is told by these files alone; no table repeats it.

Guarantee: nothing is overwritten, and only what was made here is removed. The LoRA comes last, whole, and with the
sha256 that the JSON names; what a kill leaves behind is cleared away by the next try.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.http import HttpRequest

from lorapilot import workspace
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import User
from lorapilot.services import record
from models_registry.enums import Architecture
from models_registry.selectors import LORAS
from runs.models import OWN_OUTPUTS, Checkpoint, Run
from runs.stacks.collecting import digest_of

MOST_SIDECAR_BYTES = 1 << 20
KINDS = ("safetensors", "json", "png")  # A1111, Forge, InvokeAI and ComfyUI all find `<name>.png`
# The names of A1111 and Forge for what a LoRA is for. Without one they look into the file.
SD_VERSIONS = {
    Architecture.SD15: "SD1",
    Architecture.SD2: "SD2",
    Architecture.SDXL: "SDXL",
    Architecture.SD3: "SD3",
    Architecture.FLUX: "Flux",
}


@dataclass(frozen=True, slots=True)
class Published:
    """A LoRA in the loras folder that its JSON traces to a checkpoint."""

    name: str
    sha256: str
    is_new: bool = False

    @property
    def path(self) -> str:
        """Relative to the models folder."""
        return f"{LORAS}/{self.name}.safetensors"

    @property
    def sidecar(self) -> str:
        return f"{LORAS}/{self.name}.json"


# --- Reads ------------------------------------------------------------------------------------------------------------
def default_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is published as when nobody says otherwise; whether it is free is another question."""
    step = "" if checkpoint.is_final else f"-step{checkpoint.step}"
    return f"{checkpoint.run.output_name[: 100 - len(step)]}{step}"


def proposed_name(checkpoint: Checkpoint) -> str:
    """The name that it has in the loras folder, or one that is free there."""
    there = find_published(checkpoint)
    return there.name if there else free_name(default_name(checkpoint))


def free_name(name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that no file in the loras folder has."""
    taken = _names_in(_folder())
    number, candidate = 2, name
    while not _is_free(candidate, taken):
        candidate = f"{name[:95]}-{number}"
        number += 1
    return candidate


def published_of(run: Run) -> dict[tuple[str, str], Published]:
    """What of the run is published, by path and sha256 of the checkpoint. One look at the loras folder."""
    try:
        folder = _folder()
        found = list(_sidecars(folder, run.pk))
    except (OSError, UserError):
        return {}
    return {key: Published(name, key[1]) for name, key in found if (folder / f"{name}.safetensors").is_file()}


def find_published(checkpoint: Checkpoint) -> Published | None:
    return published_of(checkpoint.run).get((checkpoint.path, checkpoint.sha256))


def get_published(checkpoint: Checkpoint) -> Published:
    """Raises Missing when it is not published."""
    found = find_published(checkpoint)
    if found is None:
        raise Missing(f"{checkpoint.path} is not published.")
    return found


def artifact_rows(run: Run) -> list[tuple[Checkpoint, Published | None]]:
    """The LoRA files of the run, the final and then the newest first, and what each is published as."""
    published = published_of(run)
    checkpoints = run.checkpoints.order_by("-is_final", "-step")
    return [(checkpoint, published.get((checkpoint.path, checkpoint.sha256))) for checkpoint in checkpoints]


def _folder() -> Path:
    try:
        return workspace.inside(workspace.models(), LORAS)
    except ValueError:
        raise Conflict(f"{LORAS} is a link that leaves the models folder: make it a folder.") from None


def _sidecars(folder: Path, run_id: int) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name, (path, sha256) of the checkpoint) of each JSON that names the run."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                origin = _origin(entry.path, status.st_mtime_ns, status.st_size)
                if origin and origin[0] == run_id:
                    yield entry.name.removesuffix(".json"), origin[1]


@lru_cache(maxsize=4096)  # a shelf of a thousand LoRAs is not read again for each look at a page
def _origin(path: str, _changed_at: int, size: int) -> tuple[int, tuple[str, str]] | None:
    """The run's key, and path and sha256 of the checkpoint; None for a JSON that is not ours."""
    if size > MOST_SIDECAR_BYTES:
        return None
    try:
        facts = _facts(Path(path))
        return int(facts["run"]["id"]), (str(facts["checkpoint"]), str(facts["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _facts(sidecar: Path) -> dict[str, Any]:
    """Our part of a JSON. Raises OSError, ValueError, KeyError, TypeError for one that is not ours."""
    facts: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))["lorapilot"]
    return facts


def _names_in(folder: Path) -> set[str]:
    """In small letters: the folder is often shared with a system that does not tell them from capitals."""
    return {entry.name.lower() for entry in folder.iterdir()} if folder.is_dir() else set()


def _is_free(name: str, taken: set[str]) -> bool:
    return not any(f"{name}.{kind}".lower() in taken for kind in KINDS)


# --- Publish ----------------------------------------------------------------------------------------------------------
def publish_checkpoint(
    checkpoint: Checkpoint, *, actor: User, name: str = "", request: HttpRequest | None = None
) -> Published:
    """Put the LoRA into the loras folder as `name`. Repeating it changes nothing. The caller has checked who asks.

    Raises UserError (not a name), Missing (the run has lost the file), Conflict (the name is taken, the LoRA is
    published under another name, the file is not what was saved, or the folder cannot be written to).
    """
    name = name.strip().removesuffix(".safetensors")
    if name and not workspace.is_safe_name(name):
        raise UserError(
            "Use letters, digits, '.', '_' and '-' only, at most 100 of them, and start with a letter or digit.",
            field="name",
        )
    with _alone():
        if there := find_published(checkpoint):
            if name and name != there.name:
                raise Conflict(f"It is published as {there.path}. Unpublish it first to rename it.", field="name")
            return there
        try:
            found = _publish(checkpoint, name or default_name(checkpoint))
        except OSError as error:
            raise Conflict(f"It cannot be written to models/{LORAS}: {error.strerror or error}.") from error
    record(actor, "LoRA published", found.path, request)
    return found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One change of the loras folder at a time, on all hosts that share the workspace."""
    with (workspace.folder("locks") / "loras.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(checkpoint: Checkpoint, name: str) -> Published:
    folder = _folder()
    folder.mkdir(exist_ok=True)
    _clear_away(checkpoint, folder, name)
    lora, draft = folder / f"{name}.safetensors", folder / f".{name}.safetensors.tmp"
    taken = _names_in(folder)
    has_lora = not lora.is_symlink() and f"{name}.json".lower() not in taken and _digest(lora) == checkpoint.sha256
    if not has_lora and not _is_free(name, taken):
        raise _taken(name)
    made: list[Path] = []
    try:
        if not has_lora:
            _bring(checkpoint, draft)
        _describe(checkpoint, folder, name, made=made, is_ours=not has_lora)
        if not has_lora:
            draft.replace(lora)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        draft.unlink(missing_ok=True)
    return Published(name, checkpoint.sha256, is_new=not has_lora)


def _taken(name: str) -> Conflict:
    return Conflict(
        f"There is something else called {name!r} in models/{LORAS}, and nothing is overwritten. "
        f"{free_name(name)!r} is free.",
        field="name",
    )


def _clear_away(checkpoint: Checkpoint, folder: Path, name: str) -> None:
    """What is left of this very publication when its LoRA was deleted by hand, or never came."""
    ours = (name, (checkpoint.path, checkpoint.sha256))
    if ours in _sidecars(folder, checkpoint.run_id) and not (folder / f"{name}.safetensors").exists():
        _remove(folder, name)


def _bring(checkpoint: Checkpoint, draft: Path) -> None:
    """The checkpoint as `draft`: a hard link, or a copy where that cannot be."""
    source = workspace.inside(checkpoint.run.folder, checkpoint.path)
    if not source.is_file():
        raise Missing(f"{checkpoint.path} is no longer in the run's folder.")
    draft.unlink(missing_ok=True)
    _link_or_copy(checkpoint.run, source, draft)
    if _digest(draft) != checkpoint.sha256:
        raise Conflict(f"{checkpoint.path} has changed since the run saved it: its sha256 is another.")


def _link_or_copy(run: Run, source: Path, target: Path) -> None:
    if run.stack not in OWN_OUTPUTS:  # else its trainer may write into the file again, and so into a link
        try:
            target.hardlink_to(source)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    found = digest_of(path)
    return found.sha256 if found else ""


# --- What it says -----------------------------------------------------------------------------------------------------
def _describe(checkpoint: Checkpoint, folder: Path, name: str, *, made: list[Path], is_ours: bool) -> None:
    """Write the JSON and the picture. `made` grows by each file that is begun, so that the caller can remove it."""
    sidecar, preview = folder / f"{name}.json", folder / f"{name}.png"
    picture = None if preview.exists() else _picture(checkpoint)
    files = {f"{name}.safetensors": checkpoint.sha256} if is_ours else {}
    if picture is not None:
        files[preview.name] = _digest(picture)
    content = sidecar_of(checkpoint, name)
    content["lorapilot"]["files"] = files
    try:
        with sidecar.open("x", encoding="utf-8") as file:
            made.append(sidecar)
            json.dump(content, file, indent=2, ensure_ascii=False)
    except FileExistsError:  # another program was quicker
        raise _taken(name) from None
    if picture is not None:
        made.append(preview)
        shutil.copyfile(picture, preview)


def _picture(checkpoint: Checkpoint) -> Path | None:
    """The newest sample of the checkpoint's step."""
    sample = checkpoint.run.samples.filter(step=checkpoint.step, path__endswith=".png").order_by("pk").last()
    path = workspace.inside(checkpoint.run.folder, sample.path) if sample else None
    return path if path and path.is_file() else None


def sidecar_of(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON beside a published LoRA."""
    run, version, base = checkpoint.run, checkpoint.run.dataset_version, checkpoint.run.trained_model
    made = f"Run {run.output_name} of {run.owner}, step {checkpoint.step}"
    return {
        "description": f"LoRA for {base.get_architecture_display()}, trained with LoRA Pilot.",
        "activation text": version.trigger_word,
        "sd version": SD_VERSIONS.get(Architecture(base.architecture), ""),
        "preferred weight": 0,  # A1111's word for: as the user has set it
        "notes": f"{made}. Base model: {base.name}. Dataset: {version}.",
        "lorapilot": {
            "name": name,
            "trigger_word": version.trigger_word,
            "sha256": checkpoint.sha256,
            "base_model": {"name": base.name, "sha256": base.sha256, "architecture": base.architecture},
            "rank": run.spec.get("rank"),
            "alpha": run.spec.get("alpha"),
            "run": {"id": run.pk, "name": run.output_name, "owner": str(run.owner)},
            "checkpoint": checkpoint.path,
            "step": checkpoint.step,
            "dataset": {"name": version.name, "version": version.number, "digest": version.digest},
            "stack": run.stack,
            "options": run.options,
            "sample_prompts": run.spec.get("sample_prompts", []),
            "created_at": checkpoint.created_at.isoformat(),
        },
    }


# --- Unpublish --------------------------------------------------------------------------------------------------------
def unpublish_checkpoint(checkpoint: Checkpoint, *, actor: User, request: HttpRequest | None = None) -> Published:
    """Remove from the loras folder what publishing made. The run keeps its file. The caller has asked the user.

    Raises Missing (it is not published), Conflict (the LoRA was changed there, or cannot be removed).
    """
    with _alone():
        found = get_published(checkpoint)
        if _digest(_folder() / f"{found.name}.safetensors") != found.sha256:
            raise Conflict(f"{found.path} was changed since it was published, so it is left alone. Delete it by hand.")
        try:
            _remove(_folder(), found.name)
        except OSError as error:
            raise Conflict(f"{found.path} cannot be removed: {error.strerror or error}.") from error
    record(actor, "LoRA unpublished", found.path, request)
    return found


def _remove(folder: Path, name: str) -> None:
    """The files that the JSON says we made, while they are what we made; at last the JSON."""
    sidecar = folder / f"{name}.json"
    files = _facts(sidecar).get("files")
    made = files if isinstance(files, dict) else {}
    for path in (folder / f"{name}.safetensors", folder / f"{name}.png"):  # no other name, whatever the JSON says
        if path.name in made and _digest(path) == made[path.name]:
            path.unlink()
    sidecar.unlink()
