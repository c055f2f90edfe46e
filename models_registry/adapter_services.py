"""Writes of LoRAs: uploads that are checked before they are taken, names, tags, deletion, and what runs make.

Guarantee: a row is written after its file is at its place, whole; a file that is no LoRA changes nothing. Files are
read outside of transactions.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from django.conf import settings
from django.contrib.auth.models import Group
from django.db import transaction
from django.http import HttpRequest

from lorapilot import jobs, partials, uploads, workspace
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import Job, User
from lorapilot.services import record
from lorapilot.uploads import plain_name
from models_registry.adapter_selectors import file_of
from models_registry.lora_recognition import LoraContents, Unrecognised, recognise_lora, refuse_pickle
from models_registry.models import Adapter, AdapterTag, AdapterUpload, BaseModel

FOLDER = "adapters"  # of the workspace: uploaded files, `<key of the upload>.safetensors`
MOST_BYTES = 8 << 30
MOST_TAGS, MOST_TAG_CHARACTERS = 30, 40
READ_BYTES = 4 << 20


# --- Upload -----------------------------------------------------------------------------------------------------------
def start_upload(owner: User, *, filename: str, size: int, sha256: str = "") -> AdapterUpload:
    """An empty upload of a LoRA file of `size` bytes; `sha256` is checked when all are there, if given."""
    name = _checked_filename(filename)
    if size > MOST_BYTES:
        raise UserError(f"A LoRA file has at most {MOST_BYTES >> 30} GiB here.", field="size")
    return uploads.start_upload(AdapterUpload, owner, filename=name, size=size, sha256=sha256)


def _checked_filename(filename: str) -> str:
    name = plain_name(filename)
    try:
        refuse_pickle(name)
    except Unrecognised as error:
        raise UserError(str(error), field="filename") from None
    if not name.lower().endswith(".safetensors"):
        raise UserError("Upload a .safetensors file.", field="filename")
    return name


def finish_upload(upload: AdapterUpload) -> Job:
    """Check that the file arrived whole, and queue its import. Calling it again gives the same job."""
    return uploads.finish_upload(upload, import_adapter, label=f"Add {upload.filename} to the LoRAs")


@jobs.job
def import_adapter(progress: jobs.Progress, *, upload_id: str) -> dict[str, Any]:
    """The job behind `finish_upload`. Started over, it goes on with the file where it is."""
    upload = AdapterUpload.objects.select_related("owner").filter(pk=upload_id).first()
    partial = partials.partial_path(uuid.UUID(upload_id))
    if upload is None or not (partial.exists() or _place_of(upload.pk).exists()):
        raise Missing("The uploaded file is no longer there. Upload it again.")
    try:
        adapter = _take_in(
            upload.owner, partial, upload.filename, key=upload.pk, sha256=upload.sha256, progress=progress
        )
    except UserError:
        partials.remove_partial(upload.pk)
        raise
    return {"adapter": adapter.pk, "name": adapter.name}


def add_file(owner: User, *, filename: str, content: BinaryIO) -> Adapter:
    """A LoRA file that came in one request. Raises UserError (no LoRA), Conflict (there already)."""
    name, key = _checked_filename(filename), uuid.uuid4()
    partials.ensure_room(settings.MAX_BODY_BYTES)
    try:
        with partials.locked_partial(key) as file:
            blocks = iter(lambda: content.read(READ_BYTES), b"")
            partials.write_chunk(file, offset=0, room=MOST_BYTES, chunk=blocks)
        return _take_in(owner, partials.partial_path(key), name, key=key, progress=None)
    finally:
        partials.remove_partial(key)


def remove_stale_uploads() -> int:
    """See `lorapilot.uploads.remove_stale_uploads`."""
    return uploads.remove_stale_uploads(AdapterUpload)


def _take_in(
    owner: User, partial: Path, filename: str, *, key: uuid.UUID, progress: jobs.Progress | None, sha256: str = ""
) -> Adapter:
    """Check the file, move it to its place, and write its row. `sha256`: its checksum, where that was compared."""
    place = _place_of(key)
    source = place if place.exists() else partial
    contents = _contents(source, filename)
    digest = sha256 or workspace.sha256_of(
        source, lambda done: progress(done, contents.bytes, "Computing the checksum") if progress else None
    )
    path = f"{FOLDER}/{place.name}"
    same = Adapter.objects.filter(owner=owner, sha256=digest).exclude(path=path).first()
    if same is not None:
        raise Conflict(f"You have this LoRA already: {same.name}.", field="filename")
    if source == partial:
        _move(partial, place)
    values = {
        "owner": owner,
        "name": filename.rpartition(".")[0][:100] or "LoRA",
        "sha256": digest,
        "trigger_word": contents.said("lorapilot_trigger_word", "modelspec.trigger_phrase")[:100],
        "base_model": _base_model_of(contents),
        "base_model_name": contents.said("lorapilot_base_model", "ss_sd_model_name")[:200],
        "architecture": contents.architecture,
    }
    adapter, _ = Adapter.objects.update_or_create(path=path, defaults=values | facts_of(contents))
    return adapter


def _place_of(key: uuid.UUID) -> Path:
    return workspace.folder(FOLDER) / f"{key}.safetensors"


def _move(partial: Path, place: Path) -> None:
    """Whole or not at all, also when the cache is on another disk."""
    try:
        partial.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(partial, place)
        partial.unlink()


def _copy(partial: Path, place: Path) -> None:
    draft = place.with_name(f".{place.name}.tmp")
    try:
        with partial.open("rb") as source, draft.open("wb") as target:
            shutil.copyfileobj(source, target, READ_BYTES)
            target.flush()
            os.fsync(target.fileno())
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)


def _contents(path: Path, filename: str) -> LoraContents:
    try:
        return recognise_lora(path, name=filename)
    except Unrecognised as error:
        raise UserError(str(error), field="filename") from None


def _base_model_of(contents: LoraContents) -> BaseModel | None:
    """The registered model whose checksum the metadata has."""
    sha256 = contents.said("lorapilot_base_model_sha256", "ss_new_sd_model_hash").lower()
    return BaseModel.objects.filter(sha256=sha256).first() if len(sha256) == 64 else None


def facts_of(contents: LoraContents) -> dict[str, Any]:
    """The fields of a row that the file itself tells."""
    return {
        "bytes": contents.bytes,
        "style": contents.style,
        "algorithm": contents.algorithm,
        "rank": contents.rank,
        "alpha": contents.alpha,
        "dtype": contents.dtype,
        "parameters": contents.parameters,
    }


# --- What runs make ---------------------------------------------------------------------------------------------------
def enter_produced(path: str, *, values: dict[str, Any], otherwise: dict[str, Any], groups: Iterable[Group]) -> Adapter:
    """The LoRA that a run has made, at `path` in the workspace, as a row. `values`: what the run knows; `otherwise`:
    what it was told to train, for what the file does not say or cannot be asked. A row that is there keeps its name,
    trigger word and sharing."""
    try:
        facts = facts_of(recognise_lora(workspace.inside(settings.WORKSPACE, path)))
        told = {name: value for name, value in facts.items() if value not in (None, 0, "")}
    except (Unrecognised, OSError, ValueError):
        told = {}
    fresh = values | otherwise | told
    again = {name: fresh[name] for name in fresh if name not in ("name", "trigger_word")}
    with transaction.atomic():
        adapter, is_new = Adapter.objects.update_or_create(path=path, defaults=again, create_defaults=fresh)
        if is_new:
            adapter.groups.set(groups)
    return adapter


# --- Changes ----------------------------------------------------------------------------------------------------------
@transaction.atomic
def edit_adapter(
    adapter: Adapter,
    *,
    name: str | None = None,
    trigger_word: str | None = None,
    tags: Iterable[str] | None = None,
) -> Adapter:
    """Name, trigger word and tags, those that are given: all change, or none. The others stay as they are by now."""
    changed = ["updated_at"]
    if name is not None:
        adapter.name = _checked_name(name)
        changed.append("name")
    if trigger_word is not None:
        adapter.trigger_word = _checked_trigger_word(trigger_word)
        changed.append("trigger_word")
    if tags is not None:
        words = _checked_tags(tags)
        adapter.tags.exclude(word__in=words).delete()
        AdapterTag.objects.bulk_create(
            [AdapterTag(adapter=adapter, word=word) for word in words], ignore_conflicts=True
        )
    adapter.save(update_fields=changed)
    return adapter


def delete_adapter(adapter: Adapter, *, actor: User, request: HttpRequest | None = None) -> None:
    """An uploaded LoRA and its file; what was published of it stays. Raises Conflict for what a run has made: it goes
    with its run."""
    if adapter.is_produced:
        raise Conflict(f"{adapter.name} was made by a run, and goes when that is deleted.")
    path = file_of(adapter)
    with transaction.atomic():
        record(actor, "LoRA deleted", adapter, request)
        adapter.delete()
    path.unlink(missing_ok=True)


def _checked_name(name: str) -> str:
    name = " ".join(name.split())
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise UserError("Use a name of 1 to 100 characters.", field="name")
    return name


def _checked_trigger_word(word: str) -> str:
    word = " ".join(word.split())
    if len(word) > 100 or not word.isprintable():
        raise UserError("Use at most 100 characters.", field="trigger_word")
    return word


def _checked_tags(tags: Iterable[str]) -> list[str]:
    """In small letters, each once."""
    words = list(dict.fromkeys(word for tag in tags if (word := " ".join(str(tag).lower().split()))))
    if any(len(word) > MOST_TAG_CHARACTERS or not word.isprintable() or "," in word for word in words):
        raise UserError(f"A tag has at most {MOST_TAG_CHARACTERS} characters, and no comma.", field="tags")
    if len(words) > MOST_TAGS:
        raise UserError(f"Use at most {MOST_TAGS} tags.", field="tags")
    return words
