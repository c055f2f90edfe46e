"""Writes: registering base models, forgetting them, and hashing their files in the background.

Nothing here ever changes or deletes a model's file. Files are read before a transaction starts, never inside one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import ProtectedError
from django.http import HttpRequest

import lora_trainer
from lorapilot import jobs, workspace
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.models import Job, User
from lorapilot.services import record
from models_registry import selectors
from models_registry.models import BaseModel, ModelComponent
from models_registry.recognition import Recognised, Unrecognised, recognise

log = logging.getLogger(__name__)

BUNDLED = ("pilot-tiny",)
BUNDLED_FROM = Path(lora_trainer.__file__).parent / "assets"
READ_BYTES = 4 * 1024**2
MOST_PATH_CHARACTERS = 500
STAFF_ONLY = "Only staff can register and remove base models. Ask whoever runs this installation."


def register_base_model(*, path: str, name: str = "", registered_by: User | None = None) -> BaseModel:
    """Register the diffusers folder or .safetensors file at `path`, which is relative to the models folder or
    an absolute path inside it.

    What it is comes from its headers and configurations. Its sha256 follows in the background.
    Raises UserError (not a model that can be trained on), Conflict (path or name is taken), NotAllowed (not staff).
    """
    _require_staff(registered_by)
    root = workspace.models().resolve()
    found = _place(root, path)
    relative = found.relative_to(root).as_posix()
    _refuse_taken(relative, name)
    try:
        recognised = recognise(found, root=root)
    except Unrecognised as error:
        raise UserError(str(error), field="path") from None
    title = _checked_name(name.strip() or found.name.removesuffix(".safetensors"))
    components = _components(recognised, found, root)
    try:
        with transaction.atomic():
            return _save(recognised, components, relative, title, registered_by)
    except IntegrityError:
        _refuse_taken(relative, title)
        raise


def rehash_base_model(base_model: BaseModel, *, requested_by: User | None = None) -> BaseModel:
    """Forget the model's checksums and compute them again. Raises Conflict while that is under way."""
    _require_staff(requested_by)
    with transaction.atomic():
        locked: BaseModel = (
            BaseModel.objects.select_for_update(of=("self",)).select_related("hashing").get(pk=base_model.pk)
        )
        if locked.is_hashing:
            raise Conflict(f"The checksums of {locked.name} are being computed already.")
        locked.components.update(sha256="")
        locked.sha256 = ""
        _enqueue_hashing(locked, requested_by)
    return locked


def forget_base_model(
    base_model: BaseModel, *, forgotten_by: User | None = None, request: HttpRequest | None = None
) -> None:
    """Remove the model from the list. Its files stay where they are. Raises Conflict while runs use it."""
    _require_staff(forgotten_by)
    name, hashing = base_model.name, base_model.hashing
    try:
        with transaction.atomic():
            base_model.delete()
            if hashing is not None:
                jobs.cancel(hashing)
            record(forgotten_by, "base model removed", name, request)
    except ProtectedError as error:
        count = len(error.protected_objects)
        using = "a run uses it" if count == 1 else f"{count} runs use it"
        raise Conflict(
            f"{name} cannot be removed: {using}. Delete {'that run' if count == 1 else 'them'} first."
        ) from None


def register_bundled_models() -> list[BaseModel]:
    """Put the models that come with LoRA Pilot into the models folder and register them. Safe to call at every start.

    What lies there already is never overwritten; when it cannot be registered, that is logged and the start goes on.
    """
    registered = []
    for name in BUNDLED:
        existing = BaseModel.objects.filter(path=name).first()
        try:
            _place_bundled(name)
            registered.append(existing or register_base_model(path=name, name=name))
        except (UserError, OSError) as error:
            log.warning("The bundled model %s is not registered: %s", name, error)
    return registered


@jobs.job
def hash_base_model(progress: Callable[..., None], *, base_model_id: int) -> dict[str, Any]:
    """The job: sha256 of each file, then of the model. Started over, it goes on behind the files that are done."""
    components = list(ModelComponent.objects.filter(base_model=base_model_id))
    total = sum(component.bytes for component in components)
    done = sum(component.bytes for component in components if component.sha256)
    for component in components:
        if component.sha256:
            continue
        component.sha256 = _sha256(component, partial(_tell, progress, done, total))
        ModelComponent.objects.filter(pk=component.pk).update(sha256=component.sha256)
        done += component.bytes
    if not components:  # the model was removed meanwhile
        return {}
    sha256 = combined_sha256([component.sha256 for component in components])
    BaseModel.objects.filter(pk=base_model_id).update(sha256=sha256)
    return {"sha256": sha256, "bytes": total}


def _tell(progress: Callable[..., None], done_before: int, total: int, read: int) -> None:
    progress(done_before + read, total, "Computing checksums")


def combined_sha256(digests: list[str]) -> str:
    """A single file's digest is its own; a folder's is the sha256 of its sorted component digests, one on each line."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in sorted(digests)).encode()).hexdigest()


def _sha256(component: ModelComponent, tell: Callable[[int], None]) -> str:
    digest, read = hashlib.sha256(), 0
    try:
        with selectors.component_path(component).open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                read += len(chunk)
                tell(read)
    except (OSError, ValueError):
        raise UserError(f"{component.path} cannot be read. Put it back, or remove the model from the list.") from None
    if read != component.bytes:
        raise UserError(
            f"{component.path} was changed after it was registered. Remove the model and register it again."
        )
    return digest.hexdigest()


def _require_staff(user: User | None) -> None:
    """None is the installation itself: its start, its commands."""
    if user is not None and not user.is_staff:
        raise NotAllowed(STAFF_ONLY)


def _place(root: Path, path: str) -> Path:
    """The existing file or folder that the user means, with links followed, inside the models folder."""
    text = path.strip()
    if not text:
        raise UserError("Enter the path of a model inside the models folder.", field="path")
    try:
        found = workspace.inside(root, Path(text).expanduser() if text.startswith("~") else text)
        exists = found.exists()
    except (ValueError, OSError, RuntimeError):  # outside, impossible names, links in a circle
        raise UserError(
            f"{text[:200]} is outside the models folder {root}. Copy the model there first.", field="path"
        ) from None
    if not exists:
        raise UserError(f"There is no {text[:200]} in the models folder {root}.", field="path")
    if found == root:
        raise UserError("That is the models folder itself. Name a model inside it.", field="path")
    return found


def _checked_name(name: str) -> str:
    if len(name) > 100 or not name.isprintable():
        raise UserError("Choose a name of at most 100 characters.", field="name")
    if BaseModel.objects.filter(name__iexact=name).exists():
        raise Conflict(f"A base model called {name} exists already. Choose another name.", field="name")
    return name


def _refuse_taken(path: str, name: str) -> None:
    taken = BaseModel.objects.filter(path=path).first()
    if taken is not None:
        raise Conflict(f"{path} is registered already, as {taken.name}.", field="path")
    if name.strip():
        _checked_name(name.strip())


def _components(recognised: Recognised, found: Path, root: Path) -> list[ModelComponent]:
    base = found if found.is_dir() else found.parent
    return [
        ModelComponent(
            role=component.role,
            path=_short_enough((base / component.path).relative_to(root).as_posix()),
            bytes=component.bytes,
            dtype=component.dtype,
            parameters=component.parameters,
        )
        for component in recognised.components
    ]


def _short_enough(path: str) -> str:
    if len(path) > MOST_PATH_CHARACTERS:
        raise UserError(f"The path is too long: {MOST_PATH_CHARACTERS} characters are the most.", field="path")
    return path


def _save(
    recognised: Recognised, components: list[ModelComponent], path: str, name: str, registered_by: User | None
) -> BaseModel:
    base_model = BaseModel.objects.create(
        name=name,
        path=path,
        layout=recognised.layout,
        architecture=recognised.architecture,
        resolution=recognised.resolution,
        prediction_type=recognised.prediction_type,
        bytes=recognised.bytes,
        registered_by=registered_by,
    )
    for component in components:
        component.base_model = base_model
    ModelComponent.objects.bulk_create(components)
    _enqueue_hashing(base_model, registered_by)
    return base_model


def _enqueue_hashing(base_model: BaseModel, owner: User | None) -> Job:
    base_model.hashing = jobs.enqueue(
        hash_base_model, label=f"Checksums of {base_model.name}", owner=owner, base_model_id=base_model.pk
    )
    base_model.save(update_fields=["hashing", "sha256"])
    return base_model.hashing


def _place_bundled(name: str) -> None:
    """Make `<models>/<name>` from the copy in our package, whole or not at all, unless it exists."""
    target = workspace.models() / name
    if target.exists():
        return
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=workspace.models()))
    try:
        shutil.copytree(BUNDLED_FROM / name, building / name, copy_function=_link_or_copy)
        (building / name).rename(target)
    except OSError:
        if not target.exists():  # else another process of ours was quicker
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
