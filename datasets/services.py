"""Everything that changes datasets: pages, API, admin and jobs call these and nothing else.

Guarantees: a picture row is only ever written after its file is on the disk; an import of an archive changes nothing
unless all of it is good; a version never changes. File work happens before the transaction, never inside it.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from django.conf import settings
from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction
from django.db.models import F, Max, Q
from django.utils import timezone

from datasets import archives, captions, edits, partials, pictures
from datasets.caption_edits import replace_captions, set_caption
from datasets.models import Dataset, DatasetVersion, Picture, Upload
from datasets.pictures import StagedPicture, picture_path
from lorapilot import jobs
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import JOB_ENDED, Job, User

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
SHA256 = re.compile(r"[0-9a-f]{64}")
STALE_AFTER = timedelta(days=7)
MAX_OPEN_UPLOADS = 100
UPLOAD_ENDINGS = (*pictures.NAME_ENDINGS, ".txt", ".zip")

Report = Callable[[int, int, str], None]


# --- Datasets ---------------------------------------------------------------------------------------------------------
def create_dataset(owner: User, *, name: str, trigger_word: str = "") -> Dataset:
    values = {"name": _checked_name(name), "trigger_word": _checked_trigger_word(trigger_word)}
    try:
        with transaction.atomic():
            return Dataset.objects.create(owner=owner, **values)
    except IntegrityError:
        raise _name_taken(values["name"]) from None


def rename_dataset(dataset: Dataset, *, name: str) -> Dataset:
    dataset.name = _checked_name(name)
    try:
        with transaction.atomic():
            dataset.save(update_fields=["name", "updated_at"])
    except IntegrityError:
        raise _name_taken(dataset.name) from None
    return dataset


@transaction.atomic
def set_trigger_word(dataset: Dataset, *, trigger_word: str) -> Dataset:
    dataset.trigger_word = _checked_trigger_word(trigger_word)
    dataset.save(update_fields=["trigger_word", "updated_at"])
    return dataset


@transaction.atomic
def edit_dataset(dataset: Dataset, *, name: str | None = None, trigger_word: str | None = None) -> Dataset:
    """Name and trigger word, those that are given: both change, or neither."""
    if name is not None:
        rename_dataset(dataset, name=name)
    if trigger_word is not None:
        set_trigger_word(dataset, trigger_word=trigger_word)
    return dataset


@transaction.atomic
def share_dataset(dataset: Dataset, *, groups: Iterable[Group]) -> Dataset:
    """Members of exactly these groups may look at the dataset from now on."""
    dataset.groups.set(groups)
    return dataset


def delete_dataset(dataset: Dataset) -> None:
    """The dataset, its pictures and unfinished uploads. Versions stay, and so do files that a version lists."""
    uploads = list(dataset.uploads.values_list("pk", flat=True))
    for sha256, extension in dataset.pictures.values_list("sha256", "extension"):
        pictures.touch_picture(sha256, extension)
    with transaction.atomic():
        dataset.delete()
    for upload_id in uploads:
        partials.remove_partial(upload_id)


def _checked_name(name: str) -> str:
    name = name.strip()
    if not NAME.fullmatch(name):
        raise UserError(
            "Use 1 to 100 letters (A–Z), digits, spaces, dots, dashes or underscores; begin with a letter or digit.",
            field="name",
        )
    return name


def _checked_trigger_word(word: str) -> str:
    word = " ".join(word.split())
    if len(word) > 100 or "," in word or not word.isprintable():
        raise UserError("Use a trigger word of at most 100 characters, without commas.", field="trigger_word")
    return word


def _name_taken(name: str) -> Conflict:
    return Conflict(f"You already have a dataset named {name}. Choose another name.", field="name")


def _locked(dataset: Dataset) -> Dataset:
    """The row as it is now, for this transaction alone."""
    found: Dataset | None = Dataset.objects.select_for_update().filter(pk=dataset.pk).first()
    if found is None:
        raise Missing("The dataset was deleted meanwhile.")
    return found


def _touch(dataset: Dataset) -> None:
    """`updated_at` follows what is in the dataset, too."""
    Dataset.objects.filter(pk=dataset.pk).update(updated_at=timezone.now())


# --- One picture ------------------------------------------------------------------------------------------------------
RESTORED = (
    *("pk", "sha256", "extension", "width", "height", "bytes", "original_name"),
    *("caption", "revision", "repeats", "edit"),
)


def delete_picture(picture: Picture) -> dict[str, Any]:
    """Take a picture out of its dataset. Returns what `restore_picture` needs; the file stays for at least a day."""
    deleted = {name: getattr(picture, name) for name in RESTORED}
    edits.touch_files(deleted)
    with transaction.atomic():
        picture.delete()
        _touch(picture.dataset)
    return deleted


def restore_picture(dataset: Dataset, *, deleted: dict[str, Any]) -> Picture:
    """Undo `delete_picture`: the same picture at its old place. `deleted` must come from there, unchanged."""
    if not edits.touch_files(deleted):
        raise Missing("The picture's file is gone. Upload it again.")
    try:
        with transaction.atomic():
            picture = Picture.objects.create(dataset=dataset, **deleted)
            _touch(dataset)
    except IntegrityError:
        raise Conflict("The picture is in the dataset already.") from None
    return picture


def remove_unused_pictures() -> int:
    """Delete the files that no dataset and no version lists, and that were not used for a day. Returns how many."""
    used: set[str] = set()
    for row in Picture.objects.values("sha256", "edit").iterator():
        used |= edits.files_of(row)
    for listed in DatasetVersion.objects.values_list("pictures", flat=True).iterator(chunk_size=10):
        for picture in listed:
            used |= edits.files_of(picture)
    return pictures.remove_unused(used)


# --- Import -----------------------------------------------------------------------------------------------------------
@dataclass
class ImportReport:
    """What an import did, by the names of the files."""

    added: list[str] = field(default_factory=list)
    captioned: list[str] = field(default_factory=list)  # pictures that were there, and got a caption
    duplicates: list[str] = field(default_factory=list)  # pictures that were there, left alone
    refused: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __add__(self, other: ImportReport) -> ImportReport:
        return ImportReport(
            self.added + other.added,
            self.captioned + other.captioned,
            self.duplicates + other.duplicates,
            self.refused + other.refused,
        )

    def sentence(self) -> str:
        """What went in, for a person; empty when nothing did."""
        counts = [(len(self.added), "added"), (len(self.captioned), "with a new caption")]
        counts.append((len(self.duplicates), "already here"))
        parts = [f"{number} {what}" for number, what in counts if number]
        return f"Pictures: {', '.join(parts)}." if parts else ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "added": len(self.added),
            "captioned": len(self.captioned),
            "duplicates": len(self.duplicates),
            "refused": [{"name": name, "reason": reason} for name, reason in self.refused],
        }


@dataclass
class _Batch:
    """Checked files of one import. A picture and its caption have the same key: the path without its ending."""

    staged: list[tuple[str, StagedPicture]] = field(default_factory=list)
    captions: dict[str, tuple[str, str]] = field(default_factory=dict)  # key: (file name, text)

    def caption_of(self, key: str) -> str:
        return self.captions.get(key, ("", ""))[1]

    def lone_captions(self) -> dict[str, tuple[str, str]]:
        """Captions whose picture is not part of the import."""
        keys = {key for key, _ in self.staged}
        return {key: caption for key, caption in self.captions.items() if key not in keys}


def import_files(dataset: Dataset, *, files: Sequence[tuple[str, BinaryIO | Path]]) -> ImportReport:
    """Pictures, captions (`cat.txt` belongs to `cat.png`, uploaded now or before) and ZIP archives.

    A file that is no good is refused by name and reason, and the others go in; an archive goes in whole or not at all.
    """
    report = ImportReport()
    batch = _Batch()
    with pictures.staging_folder() as folder:
        for raw_name, source in files:
            name = plain_name(raw_name)
            try:
                if name.lower().endswith(".zip"):
                    report += import_zip(dataset, path=source, filename=name)
                else:
                    _stage_file(batch, name=name, source=source, folder=folder)
            except UserError as error:
                # What is wrong with an archive begins with its name, for the job that imports one alone.
                report.refused.append((name, error.message.removeprefix(f"{name}: ")))
        targets, lone = _find_lone_pictures(dataset, batch)
        report.refused += lone
        return report + _record(dataset, batch, targets)


def import_zip(
    dataset: Dataset, *, path: Path | BinaryIO, filename: str, progress: Report | None = None
) -> ImportReport:
    """All pictures and captions of an archive, or nothing: raises UserError that names the bad entry and the reason."""
    batch = _Batch()
    try:
        with archives.opened_archive(path) as archive, pictures.staging_folder() as folder:
            entries = archives.wanted_entries(archive)
            partials.ensure_room(sum(entry.file_size for entry in entries))
            for done, entry in enumerate(entries):
                if progress:
                    progress(done, len(entries), archives.entry_name(entry))
                _stage_entry(batch, archive, entry, folder)
            targets, lone = _find_lone_pictures(dataset, batch)
            _refuse_lone_captions(lone)
            return _record(dataset, batch, targets, progress)
    except UserError as error:
        raise UserError(f"{plain_name(filename)}: {error.message}") from None


def _stage_file(batch: _Batch, *, name: str, source: BinaryIO | Path, folder: Path) -> None:
    key = name.rpartition(".")[0]
    if name.lower().endswith(".txt"):
        batch.captions[key] = (name, captions.read_caption(_first_bytes(source)))
    elif name.lower().endswith(pictures.NAME_ENDINGS):
        batch.staged.append((key, pictures.stage_picture(source, name=name, folder=folder)))
    else:
        raise UserError("This is neither a PNG, JPEG or WebP picture, nor a .txt caption, nor a ZIP archive.")


def _first_bytes(source: BinaryIO | Path) -> bytes:
    """One byte more than a caption may have, so that a longer one is noticed and never held."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(captions.MAX_FILE_BYTES + 1)
    return source.read(captions.MAX_FILE_BYTES + 1)


def _stage_entry(batch: _Batch, archive: Any, entry: Any, folder: Path) -> None:
    key = archives.entry_stem(entry)
    with archives.opened_entry(archive, entry) as stream:
        if archives.is_caption(entry):
            batch.captions[key] = (archives.entry_name(entry), captions.read_caption(stream.read()))
        else:
            name = plain_name(archives.entry_name(entry))
            batch.staged.append((key, pictures.stage_picture(stream, name=name, folder=folder)))


def _find_lone_pictures(dataset: Dataset, batch: _Batch) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """For captions that came without their picture: the caption of each picture in the dataset that one belongs to,
    and what cannot be placed, as (file name, reason)."""
    by_stem: dict[str, list[int]] = {}
    lone = batch.lone_captions()
    if lone:
        for pk, name in dataset.pictures.values_list("pk", "original_name"):
            by_stem.setdefault(name.rpartition(".")[0], []).append(pk)
    targets: dict[int, str] = {}
    refused: list[tuple[str, str]] = []
    for key, (name, text) in lone.items():
        found = by_stem.get(key.rpartition("/")[2], [])
        if len(found) == 1:
            targets[found[0]] = text
        elif found:
            refused.append((name, "Several pictures of the dataset have this name. Edit their captions on the page."))
        else:
            refused.append((name, "No picture has the same name. Upload the picture with its caption."))
    return targets, refused


def _refuse_lone_captions(lone: list[tuple[str, str]]) -> None:
    for name, reason in lone:
        raise UserError(f"{name}: {reason} Nothing was imported.")


def _record(dataset: Dataset, batch: _Batch, targets: dict[int, str], progress: Report | None = None) -> ImportReport:
    """Store the staged files, then write all rows in one transaction."""
    for done, (_, staged) in enumerate(batch.staged):
        if progress:
            progress(done, len(batch.staged), "Storing the pictures")
        pictures.store_picture(staged)
    report = ImportReport()
    with transaction.atomic():
        _locked(dataset)
        there = {
            sha256: row["pk"] for row in dataset.pictures.values("pk", *edits.OF) for sha256 in edits.files_of(row)
        }
        fresh: dict[str, Picture] = {}
        for key, staged in batch.staged:
            caption = batch.caption_of(key)
            if staged.sha256 in fresh or (staged.sha256 in there and not caption):
                report.duplicates.append(staged.name)
            elif staged.sha256 in there:
                targets[there[staged.sha256]] = caption
            else:
                fresh[staged.sha256] = _new_picture(dataset, staged, caption)
                report.added.append(staged.name)
        Picture.objects.bulk_create(fresh.values(), batch_size=500)
        report.captioned += replace_captions(dataset, captions=targets, label="Captions of an import", actor=None)
        _touch(dataset)
    return report


def _new_picture(dataset: Dataset, staged: StagedPicture, caption: str) -> Picture:
    return Picture(
        dataset=dataset,
        sha256=staged.sha256,
        extension=staged.extension,
        width=staged.width,
        height=staged.height,
        bytes=staged.bytes,
        original_name=staged.name,
        caption=caption,
    )


def plain_name(name: str) -> str:
    """The last part of a client's file name, for people to read; nothing here uses it as a path."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable())[-255:] or "unnamed"


# --- Versions ---------------------------------------------------------------------------------------------------------
LISTED = ("sha256", "extension", "width", "height", "bytes", "caption", "repeats")


def pin_version(dataset: Dataset) -> DatasetVersion:
    """The immutable version of what the dataset holds now. The same content is the same row, whoever pins it again.

    The content is the trigger word and, of each picture, its file, caption and repeats; see `version_digest`.
    """
    # One query, so that pictures and trigger word are of the same moment.
    rows = list(dataset.pictures.order_by("sha256").values("dataset__trigger_word", "original_name", "edit", *LISTED))
    if not rows:
        raise UserError("The dataset has no pictures yet. Upload some, then try again.", field="dataset")
    trigger_word = rows[0]["dataset__trigger_word"]
    listed = [_listed(row) for row in rows]
    digest = version_digest(trigger_word, listed)
    with transaction.atomic():
        locked = _locked(dataset)
        found = locked.versions.filter(digest=digest).first()
        if found:
            return found
        latest = locked.versions.aggregate(latest=Max("number"))["latest"] or 0
        return DatasetVersion.objects.create(
            dataset=locked,
            owner=locked.owner,
            name=locked.name,
            trigger_word=trigger_word,
            number=latest + 1,
            digest=digest,
            pictures=listed,
        )


def _listed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A picture as versions keep it."""
    listed = {key: row[key] for key in LISTED} | {"name": row["original_name"]}
    return listed | {"edit": row["edit"]} if row["edit"] else listed


def list_pictures(dataset: Dataset) -> list[dict[str, Any]]:
    """What a version of the dataset would list now."""
    rows = dataset.pictures.order_by("sha256").values("original_name", "edit", *LISTED)
    return [_listed(row) for row in rows]


def version_digest(trigger_word: str, listed: Iterable[dict[str, Any]]) -> str:
    """sha256 over UTF-8 JSON with sorted keys and no spaces:
    `{"pictures":[{"caption","repeats","sha256"}, …],"trigger_word"}`, the pictures sorted by sha256."""
    content = {
        "trigger_word": trigger_word,
        "pictures": [{key: picture[key] for key in ("sha256", "caption", "repeats")} for picture in listed],
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# --- Uploads in chunks ------------------------------------------------------------------------------------------------
class WrongOffset(Conflict):
    """The chunk does not begin where the upload ends. `offset` is where it does."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"{offset} bytes have arrived. Go on from there.", field="offset")
        self.offset = offset


def start_upload(owner: User, *, dataset: Dataset, filename: str, size: int, sha256: str = "") -> Upload:
    """An empty upload of `size` bytes; `sha256` (hex) is checked when all are there, if given."""
    name = plain_name(filename)
    if not name.lower().endswith(UPLOAD_ENDINGS):
        raise UserError("Upload a ZIP archive, a PNG, JPEG or WebP picture, or a .txt caption.", field="filename")
    if not 1 <= size <= settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES // 1024**3
        raise UserError(f"A file has between 1 byte and {limit} GiB. Split a larger archive.", field="size")
    if sha256 and not SHA256.fullmatch(sha256.lower()):
        raise UserError("The checksum is not a sha256: 64 hexadecimal digits.", field="sha256")
    partials.ensure_room(size)
    with transaction.atomic():
        if Upload.objects.filter(owner=owner, finished_at=None).count() >= MAX_OPEN_UPLOADS:
            raise Conflict(f"You have {MAX_OPEN_UPLOADS} unfinished uploads. Finish or cancel some first.")
        return Upload.objects.create(owner=owner, dataset=dataset, filename=name, size=size, sha256=sha256.lower())


def append_chunk(upload: Upload, *, offset: int, chunk: Iterable[bytes]) -> Upload:
    """Add bytes at `offset`, which must be where the upload ends; of two writers, one wins and one gets Conflict.

    The offset moves only once the bytes are on the disk, so a client that lost the answer asks for it and goes on.
    """
    with partials.locked_partial(upload.pk) as file:
        upload.refresh_from_db()
        if upload.finished_at or offset != upload.offset:
            raise WrongOffset(upload.offset)
        size = partials.write_chunk(file, offset=offset, room=upload.size - offset, chunk=chunk)
        moved = Upload.objects.filter(pk=upload.pk, offset=offset, finished_at=None).update(offset=F("offset") + size)
        if not moved:
            upload.refresh_from_db()
            raise WrongOffset(upload.offset)
    upload.offset = offset + size
    return upload


def finish_upload(upload: Upload) -> Job:
    """Check that the file arrived whole, and queue its import. Calling it again gives the same job."""
    upload.refresh_from_db()
    if upload.job:
        return upload.job
    if upload.offset != upload.size:
        raise WrongOffset(upload.offset)
    if upload.sha256 and partials.hash_partial(upload.pk) != upload.sha256:
        Upload.objects.filter(pk=upload.pk, finished_at=None).update(offset=0)
        raise UserError(
            "The file arrived damaged: its checksum differs. Upload it again from the start.", field="sha256"
        )
    with transaction.atomic():
        locked = Upload.objects.select_for_update().get(pk=upload.pk)
        if not locked.job:
            locked.job = jobs.enqueue(
                import_upload, label=f"Import {upload.filename}"[:200], owner=locked.owner, upload_id=str(upload.pk)
            )
            locked.finished_at = timezone.now()
            locked.save(update_fields=["job", "finished_at"])
    upload.job, upload.finished_at = locked.job, locked.finished_at
    return locked.job


def cancel_upload(upload: Upload) -> None:
    """Forget an upload and its bytes. One that is being imported is asked to stop; what it imported stays."""
    if upload.job and upload.job.status not in JOB_ENDED:
        jobs.cancel(upload.job)
    upload_id = upload.pk  # deletion takes it away
    upload.delete()
    partials.remove_partial(upload_id)


@jobs.job
def import_upload(progress: jobs.Progress, *, upload_id: str) -> dict[str, Any]:
    """The job behind `finish_upload`. Started over, it finds what it imported and leaves that alone."""
    upload = Upload.objects.select_related("dataset").filter(pk=upload_id).first()
    path = partials.partial_path(uuid.UUID(upload_id))
    if upload is None or not path.exists():
        raise Missing("The uploaded file is no longer there. Look at the dataset, and upload what is missing.")
    try:
        if upload.filename.lower().endswith(".zip"):
            report = import_zip(upload.dataset, path=path, filename=upload.filename, progress=progress)
        else:
            report = import_files(upload.dataset, files=[(upload.filename, path)])
    except UserError:
        partials.remove_partial(upload.pk)
        raise
    partials.remove_partial(upload.pk)
    return report.as_dict()


def remove_stale_uploads() -> int:
    """Remove uploads that began more than 7 days ago, and the bytes of imports that ended. Returns how many uploads."""
    stale = Upload.objects.filter(created_at__lt=timezone.now() - STALE_AFTER)
    found = list(stale.filter(Q(job=None) | Q(job__status__in=JOB_ENDED)).values_list("pk", flat=True))
    Upload.objects.filter(pk__in=found).delete()
    ended = Upload.objects.filter(pk__in=partials.kept_uploads(), job__status__in=JOB_ENDED)
    for upload_id in (*found, *ended.values_list("pk", flat=True)):
        partials.remove_partial(upload_id)
    partials.remove_older_than(partials.uploads_root(), seconds=STALE_AFTER.total_seconds())
    partials.remove_older_than(pictures.staging_root(), seconds=STALE_AFTER.total_seconds())
    return len(found)


__all__ = [
    "ImportReport",
    "WrongOffset",
    "append_chunk",
    "cancel_upload",
    "create_dataset",
    "delete_dataset",
    "delete_picture",
    "edit_dataset",
    "finish_upload",
    "import_files",
    "import_upload",
    "import_zip",
    "list_pictures",
    "picture_path",
    "pin_version",
    "remove_stale_uploads",
    "remove_unused_pictures",
    "rename_dataset",
    "restore_picture",
    "set_caption",
    "set_trigger_word",
    "share_dataset",
    "start_upload",
    "version_digest",
]
