"""Writes: registering base models, attaching further files to them, forgetting them, and hashing in the background.

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
from lorapilot.access import require_staff
from lorapilot.errors import Conflict, UserError
from lorapilot.models import Job, User
from lorapilot.services import record
from models_registry import selectors
from models_registry.enums import ATTACHABLE, ATTACHABLE_AS_FOLDER, describe_role
from models_registry.models import BaseModel, ModelComponent
from models_registry.parts import RecognisedPart, part_files, recognise_part
from models_registry.recognition import Recognised, Unrecognised, recognise

log = logging.getLogger(__name__)

BUNDLED = ("pilot-tiny",)
BUNDLED_FROM = Path(lora_trainer.__file__).parent / "assets"
MOST_PATH_CHARACTERS = 500
STAFF_ONLY = "Only staff can register and remove base models. Ask whoever runs this installation."


def register_base_model(*, path: str, name: str = "", registered_by: User | None = None) -> BaseModel:
    """Register the diffusers folder or .safetensors file at `path`, which is relative to the models folder or
    an absolute path inside it.

    What it is comes from its headers and configurations. Its sha256 follows in the background.
    Raises UserError (not a model that can be trained on), Conflict (path or name is taken), NotAllowed (not staff).
    """
    require_staff(registered_by, STAFF_ONLY)
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
    require_staff(requested_by, STAFF_ONLY)
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
    require_staff(forgotten_by, STAFF_ONLY)
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


def attach_component(
    base_model: BaseModel, *, role: str, path: str, by: User | None = None, request: HttpRequest | None = None
) -> ModelComponent:
    """Let the model be trained with the part at `path`, which is relative to the models folder or absolute inside it:
    a .safetensors file; for a VAE, T5 or language model also a folder with config.json and .safetensors files.

    It takes the place of what was attached as that role. Its sha256 follows in the background; the model's own stays.
    Raises UserError (no such part, or not of that role), Conflict (a file of the model itself), NotAllowed (not staff).
    """
    require_staff(by, STAFF_ONLY)
    if role not in ATTACHABLE:
        known = ", ".join(describe_role(one) for one in ATTACHABLE)
        raise UserError(f"Choose what it is: {known}.", field="role")
    root = workspace.models().resolve()
    found = _place(root, path, what="a file")
    part = _recognised_part(found, role, root)
    relative = _short_enough(found.relative_to(root).as_posix())
    with transaction.atomic():
        locked: BaseModel = BaseModel.objects.select_for_update(of=("self",)).get(pk=base_model.pk)
        locked.components.filter(role=role, is_attached=True).delete()
        if locked.components.filter(path=relative).exists():
            raise Conflict(f"{relative} is a file of {locked.name} already.", field="path")
        component = locked.components.create(
            role=role,
            path=relative,
            bytes=part.bytes,
            dtype=part.dtype,
            parameters=part.parameters,
            is_attached=True,
        )
        if locked.hashing is not None:
            jobs.cancel(locked.hashing)
        _enqueue_hashing(locked, by)
        record(by, "model file attached", f"{locked.name}: {relative}", request)
    return component


def detach_component(component: ModelComponent, *, by: User | None = None, request: HttpRequest | None = None) -> None:
    """The model is no longer trained with that file, which stays where it is. Raises Conflict for the model's own."""
    require_staff(by, STAFF_ONLY)
    base_model = component.base_model
    if not component.is_attached:
        raise Conflict(f"{component.path} belongs to {base_model.name} itself and cannot be taken off it.")
    with transaction.atomic():
        component.delete()
        record(by, "model file detached", f"{base_model.name}: {component.path}", request)


def _recognised_part(found: Path, role: str, root: Path) -> RecognisedPart:
    """The part at `found`, when it is one of that role and wholly inside the models folder."""
    if found.is_dir() and not all(file.resolve().is_relative_to(root) for file in part_files(found)):
        raise UserError(
            f"{found.name} holds a link that leaves the models folder. Copy the file itself there.", field="path"
        )
    try:
        part = recognise_part(found)
    except Unrecognised as error:
        raise UserError(str(error), field="path") from None
    if part.role != role:
        kind = "folder" if found.is_dir() else "file"
        raise UserError(f"This {kind} is a {_what(part)}, not a {_inside_a_sentence(role)}.", field="path")
    if found.is_dir() and role not in ATTACHABLE_AS_FOLDER:
        raise UserError(f"A {_inside_a_sentence(role)} is one .safetensors file. Name that file.", field="path")
    return part


def _what(part: RecognisedPart) -> str:
    return _inside_a_sentence(part.role) if part.role in ATTACHABLE else f"{part.title} text encoder"


def _inside_a_sentence(role: str) -> str:
    """VAE stays as it is, Language model begins small."""
    title = describe_role(role)
    return title[0].lower() + title[1:] if title[1].islower() else title


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
    """The job: sha256 of each file, of the model, then of what is attached to it. Started over, it goes on behind the
    files that are done."""
    components = list(ModelComponent.objects.filter(base_model=base_model_id).order_by("is_attached", "role", "path"))
    if not components:  # the model was removed meanwhile
        return {}
    own = [component for component in components if not component.is_attached]
    total = sum(component.bytes for component in components)
    done = _hash(own, progress, 0, total)
    sha256 = combined_sha256([component.sha256 for component in own])
    BaseModel.objects.filter(pk=base_model_id).update(sha256=sha256)
    _hash(components[len(own) :], progress, done, total)
    return {"sha256": sha256, "bytes": total}


def _hash(components: list[ModelComponent], progress: Callable[..., None], done: int, total: int) -> int:
    """Fill in the digests that are missing. Returns how many bytes are done with these."""
    done_before = done + sum(component.bytes for component in components if component.sha256)
    for component in components:
        if not component.sha256:
            component.sha256 = _sha256(component, progress, done_before, total)
            ModelComponent.objects.filter(pk=component.pk).update(sha256=component.sha256)
            done_before += component.bytes
    return done_before


def _tell(progress: Callable[..., None], done_before: int, total: int, read: int) -> None:
    progress(done_before + read, total, "Computing checksums")


def combined_sha256(digests: list[str]) -> str:
    """A single file's digest is its own; a folder's is the sha256 of its sorted component digests, one on each line."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in sorted(digests)).encode()).hexdigest()


def _sha256(component: ModelComponent, progress: Callable[..., None], done_before: int, total: int) -> str:
    """Of a file; of an attached folder that of its files, combined as those of a model are."""
    digests, read = [], 0
    try:
        for path in selectors.component_files(component):
            digests.append(workspace.sha256_of(path, partial(_tell, progress, done_before + read, total)))
            read += path.stat().st_size
    except (OSError, ValueError):
        raise UserError(f"{component.path} cannot be read. Put it back, or {_take_off(component)}.") from None
    if read != component.bytes:
        again = "add" if component.is_attached else "register"
        raise UserError(
            f"{component.path} was changed after it was registered. "
            f"{_take_off(component).capitalize()} and {again} it again."
        )
    return combined_sha256(digests)


def _take_off(component: ModelComponent) -> str:
    return "take it off the model" if component.is_attached else "remove the model from the list"


def _place(root: Path, path: str, *, what: str = "a model") -> Path:
    """The existing file or folder that the user means, with links followed, inside the models folder."""
    text = path.strip()
    if not text:
        raise UserError(f"Enter the path of {what} inside the models folder.", field="path")
    try:
        found = workspace.inside(root, Path(text).expanduser() if text.startswith("~") else text)
        exists = found.exists()
    except (ValueError, OSError, RuntimeError):  # outside, impossible names, links in a circle
        raise UserError(
            f"{text[:200]} is outside the models folder {root}. Copy it there first.", field="path"
        ) from None
    if not exists:
        raise UserError(f"There is no {text[:200]} in the models folder {root}.", field="path")
    if found == root:
        raise UserError(f"That is the models folder itself. Name {what} inside it.", field="path")
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
