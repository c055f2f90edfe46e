"""A LoRA file, saved by a run or uploaded, put where ComfyUI, InvokeAI, Forge and A1111 find it:
`<workspace>/models/loras`.

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
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from django.http import HttpRequest

from lorapilot import workspace
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import User
from lorapilot.services import record
from models_registry.adapter_selectors import file_of
from models_registry.enums import Architecture
from models_registry.models import Adapter
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


# --- What can be published --------------------------------------------------------------------------------------------
Origin = tuple[str, int, str, str]  # "run" or "adapter" and its key; path and sha256 of the file


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file that can be published, whatever it came from."""

    origin: Origin
    default_name: str
    owner: str  # what has the file: "the run", "the library"
    may_be_linked: bool
    find_file: Callable[[], Path]
    find_picture: Callable[[], Path | None]
    describe: Callable[[str], dict[str, Any]]  # the JSON beside it, by its name there

    @property
    def path(self) -> str:
        return self.origin[2]

    @property
    def sha256(self) -> str:
        return self.origin[3]


def of_checkpoint(checkpoint: Checkpoint) -> Lora:
    run = checkpoint.run
    return Lora(
        origin=("run", run.pk, checkpoint.path, checkpoint.sha256),
        default_name=default_name(checkpoint),
        owner="the run",
        may_be_linked=run.stack
        not in OWN_OUTPUTS,  # else its trainer may write into the file again, and so into a link
        find_file=lambda: workspace.inside(run.folder, checkpoint.path),
        find_picture=lambda: _picture(checkpoint),
        describe=lambda name: sidecar_of(checkpoint, name),
    )


def of_adapter(adapter: Adapter) -> Lora:
    """An uploaded LoRA."""
    return Lora(
        origin=("adapter", adapter.pk, f"{adapter.name}.safetensors", adapter.sha256),
        default_name=_safe_name(adapter.name),
        owner="the library",
        may_be_linked=True,
        find_file=lambda: file_of(adapter),
        find_picture=lambda: None,
        describe=lambda name: adapter_sidecar_of(adapter, name),
    )


def _safe_name(name: str) -> str:
    """The name of a file that says the same as far as it can."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:95]
    return plain if workspace.is_safe_name(plain) else "lora"


# --- Reads ------------------------------------------------------------------------------------------------------------
def default_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is published as when nobody says otherwise; whether it is free is another question."""
    step = "" if checkpoint.is_final else f"-step{checkpoint.step}"
    return f"{checkpoint.run.output_name[: 100 - len(step)]}{step}"


def proposed_name(lora: Lora) -> str:
    """The name that it has in the loras folder, or one that is free there."""
    there = find_published(lora)
    return there.name if there else free_name(lora.default_name)


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
    return {origin[2:]: found for origin, found in _published("run", run.pk).items()}


def _published(kind: str, key: int) -> dict[Origin, Published]:
    try:
        folder = _folder()
        found = list(_sidecars(folder, kind, key))
    except (OSError, UserError):
        return {}
    return {origin: Published(name, origin[3]) for name, origin in found if (folder / f"{name}.safetensors").is_file()}


def find_published(lora: Lora) -> Published | None:
    """An uploaded LoRA may have been renamed since: its checksum tells it."""
    kind, key, _, sha256 = lora.origin
    found = _published(kind, key)
    if kind == "adapter":
        return next((one for origin, one in found.items() if origin[3] == sha256), None)
    return found.get(lora.origin)


def get_published(lora: Lora) -> Published:
    """Raises Missing when it is not published."""
    found = find_published(lora)
    if found is None:
        raise Missing(f"{lora.path} is not published.")
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


def _sidecars(folder: Path, kind: str, key: int) -> Iterator[tuple[str, Origin]]:
    """Name and origin of each JSON that names the run or uploaded LoRA."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                origin = _origin(entry.path, status.st_mtime_ns, status.st_size)
                if origin and origin[:2] == (kind, key):
                    yield entry.name.removesuffix(".json"), origin


@lru_cache(maxsize=4096)  # a shelf of a thousand LoRAs is not read again for each look at a page
def _origin(path: str, _changed_at: int, size: int) -> Origin | None:
    """None for a JSON that is not ours."""
    if size > MOST_SIDECAR_BYTES:
        return None
    try:
        facts = _facts(Path(path))
        kind = "run" if "run" in facts else "adapter"
        return kind, int(facts[kind]["id"]), str(facts["checkpoint"]), str(facts["sha256"])
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
def publish_lora(lora: Lora, *, actor: User, name: str = "", request: HttpRequest | None = None) -> Published:
    """Put the LoRA into the loras folder as `name`. Repeating it changes nothing. The caller has checked who asks.

    Raises UserError (not a name), Missing (the file is gone), Conflict (the name is taken, the LoRA is published under
    another name, the file is not what was saved, or the folder cannot be written to).
    """
    name = name.strip().removesuffix(".safetensors")
    if name and not workspace.is_safe_name(name):
        raise UserError(
            "Use letters, digits, '.', '_' and '-' only, at most 100 of them, and start with a letter or digit.",
            field="name",
        )
    with _alone():
        if there := find_published(lora):
            if name and name != there.name:
                raise Conflict(f"It is published as {there.path}. Unpublish it first to rename it.", field="name")
            return there
        try:
            found = _publish(lora, name or lora.default_name)
        except OSError as error:
            raise Conflict(f"It cannot be written to models/{LORAS}: {error.strerror or error}.") from error
    record(actor, "LoRA published", found.path, request)
    return found


def publish_checkpoint(checkpoint: Checkpoint, *, actor: User, **options: Any) -> Published:
    """See `publish_lora`."""
    return publish_lora(of_checkpoint(checkpoint), actor=actor, **options)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One change of the loras folder at a time, on all hosts that share the workspace."""
    with (workspace.folder("locks") / "loras.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(lora: Lora, name: str) -> Published:
    folder = _folder()
    folder.mkdir(exist_ok=True)
    _clear_away(lora, folder, name)
    target, draft = folder / f"{name}.safetensors", folder / f".{name}.safetensors.tmp"
    taken = _names_in(folder)
    has_lora = not target.is_symlink() and f"{name}.json".lower() not in taken and _digest(target) == lora.sha256
    if not has_lora and not _is_free(name, taken):
        raise _taken(name)
    made: list[Path] = []
    try:
        if not has_lora:
            _bring(lora, draft)
        _describe(lora, folder, name, made=made, is_ours=not has_lora)
        if not has_lora:
            draft.replace(target)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        draft.unlink(missing_ok=True)
    return Published(name, lora.sha256, is_new=not has_lora)


def _taken(name: str) -> Conflict:
    return Conflict(
        f"There is something else called {name!r} in models/{LORAS}, and nothing is overwritten. "
        f"{free_name(name)!r} is free.",
        field="name",
    )


def _clear_away(lora: Lora, folder: Path, name: str) -> None:
    """What is left of this very publication when its LoRA was deleted by hand, or never came."""
    ours = (name, lora.origin)
    if ours in _sidecars(folder, *lora.origin[:2]) and not (folder / f"{name}.safetensors").exists():
        _remove(folder, name)


def _bring(lora: Lora, draft: Path) -> None:
    """The file as `draft`: a hard link, or a copy where that cannot be."""
    source = lora.find_file()
    if not source.is_file():
        raise Missing(f"{lora.path} is no longer in {lora.owner}'s folder.")
    draft.unlink(missing_ok=True)
    _link_or_copy(source, draft, may_be_linked=lora.may_be_linked)
    if _digest(draft) != lora.sha256:
        raise Conflict(f"{lora.path} has changed since {lora.owner} saved it: its sha256 is another.")


def _link_or_copy(source: Path, target: Path, *, may_be_linked: bool) -> None:
    if may_be_linked:
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
def _describe(lora: Lora, folder: Path, name: str, *, made: list[Path], is_ours: bool) -> None:
    """Write the JSON and the picture. `made` grows by each file that is begun, so that the caller can remove it."""
    sidecar, preview = folder / f"{name}.json", folder / f"{name}.png"
    picture = None if preview.exists() else lora.find_picture()
    files = {f"{name}.safetensors": lora.sha256} if is_ours else {}
    if picture is not None:
        files[preview.name] = _digest(picture)
    content = lora.describe(name)
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


def adapter_sidecar_of(adapter: Adapter, name: str) -> dict[str, Any]:
    """The same of an uploaded LoRA: what its file and its people say."""
    base_name = adapter.base_model.name if adapter.base_model else adapter.base_model_name
    title = "" if adapter.architecture == Architecture.UNKNOWN else f" for {adapter.get_architecture_display()}"
    base = f" Base model: {base_name}." if base_name else ""
    return {
        "description": f"LoRA{title}, from the library of LoRA Pilot.",
        "activation text": adapter.trigger_word,
        "sd version": SD_VERSIONS.get(Architecture(adapter.architecture), ""),
        "preferred weight": 0,
        "notes": f"{adapter.name}, uploaded by {adapter.owner}.{base}",
        "lorapilot": {
            "name": name,
            "trigger_word": adapter.trigger_word,
            "sha256": adapter.sha256,
            "base_model": {
                "name": base_name,
                "sha256": adapter.base_model.sha256 if adapter.base_model else "",
                "architecture": adapter.architecture,
            },
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "adapter": {"id": adapter.pk, "name": adapter.name, "owner": str(adapter.owner)},
            "checkpoint": f"{adapter.name}.safetensors",
            "tags": [tag.word for tag in adapter.tags.all()],
            "created_at": adapter.created_at.isoformat(),
        },
    }


# --- Unpublish --------------------------------------------------------------------------------------------------------
def unpublish_lora(lora: Lora, *, actor: User, request: HttpRequest | None = None) -> Published:
    """Remove from the loras folder what publishing made. The file stays where it came from. The caller has asked.

    Raises Missing (it is not published), Conflict (the LoRA was changed there, or cannot be removed).
    """
    with _alone():
        found = get_published(lora)
        if _digest(_folder() / f"{found.name}.safetensors") != found.sha256:
            raise Conflict(f"{found.path} was changed since it was published, so it is left alone. Delete it by hand.")
        try:
            _remove(_folder(), found.name)
        except OSError as error:
            raise Conflict(f"{found.path} cannot be removed: {error.strerror or error}.") from error
    record(actor, "LoRA unpublished", found.path, request)
    return found


def unpublish_checkpoint(checkpoint: Checkpoint, *, actor: User, request: HttpRequest | None = None) -> Published:
    """See `unpublish_lora`."""
    return unpublish_lora(of_checkpoint(checkpoint), actor=actor, request=request)


def _remove(folder: Path, name: str) -> None:
    """The files that the JSON says we made, while they are what we made; at last the JSON."""
    sidecar = folder / f"{name}.json"
    files = _facts(sidecar).get("files")
    made = files if isinstance(files, dict) else {}
    for path in (folder / f"{name}.safetensors", folder / f"{name}.png"):  # no other name, whatever the JSON says
        if path.name in made and _digest(path) == made[path.name]:
            path.unlink()
    sidecar.unlink()
