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
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from zipfile import ZipInfo

from django.db import IntegrityError, transaction
from django.db.models import Max

from datasets import archives, batches, edits, pictures
from datasets.batches import Batch, Caption, Found, ImportChoices, plain_name
from datasets.caption_edits import lock_dataset, replace_captions, set_caption, touch
from datasets.models import Dataset, DatasetVersion, Picture, Upload
from datasets.pictures import StagedPicture, picture_path
from lorapilot import jobs, partials, uploads
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import Job, User
from lorapilot.services import share
from lorapilot.uploads import WrongOffset, append_chunk, cancel_upload

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
DEFAULT = ImportChoices()

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


def share_dataset(dataset: Dataset, **sharing: Any) -> Dataset:
    """See `lorapilot.services.share`."""
    share(dataset, **sharing)
    return dataset


def delete_dataset(dataset: Dataset) -> None:
    """The dataset, its pictures and unfinished uploads. Versions stay, and so do files that a version lists."""
    uploads = list(dataset.uploads.values_list("pk", flat=True))
    for sha256, extension in dataset.pictures.values_list("sha256", "extension"):
        pictures.touch_picture(sha256, extension)
    with transaction.atomic():
        lock_dataset(dataset.pk)
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


# --- One picture ------------------------------------------------------------------------------------------------------
RESTORED = (
    *("pk", "sha256", "source_sha256", "extension", "width", "height", "bytes", "original_name"),
    *("caption", "revision", "repeats", "edit"),
)


def delete_picture(picture: Picture) -> dict[str, Any]:
    """Take a picture out of its dataset. Returns what `restore_picture` needs; the file stays for at least a day."""
    deleted = {name: getattr(picture, name) for name in RESTORED}
    edits.touch_files(deleted)
    with transaction.atomic():
        lock_dataset(picture.dataset_id)
        picture.delete()
        touch(picture.dataset_id)
    return deleted


def restore_picture(dataset: Dataset, *, deleted: dict[str, Any]) -> Picture:
    """Undo `delete_picture`: the same picture at its old place. `deleted` must come from there, unchanged."""
    if not edits.touch_files(deleted):
        raise Missing("The picture's file is gone. Upload it again.")
    try:
        with transaction.atomic():
            lock_dataset(dataset.pk)
            picture = Picture.objects.create(dataset=dataset, **deleted)
            touch(dataset.pk)
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
LISTED_AT_MOST = 200  # of the refused files and of the notes: a job's result is read whole
IS_NOTHING = "Nothing was imported."
IS_HERE = "It is here already."


@dataclass
class ImportReport:
    """What an import did, by the names of the files."""

    added: list[str] = field(default_factory=list)
    captioned: list[str] = field(default_factory=list)  # pictures that were there, and got a caption
    duplicates: list[str] = field(default_factory=list)  # pictures that were there, left alone
    refused: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    notes: list[tuple[str, str]] = field(default_factory=list)  # name, what was done to the picture, or kept

    def __add__(self, other: ImportReport) -> ImportReport:
        return ImportReport(
            self.added + other.added,
            self.captioned + other.captioned,
            self.duplicates + other.duplicates,
            self.refused + other.refused,
            self.notes + other.notes,
        )

    def sentence(self) -> str:
        """What went in, for a person; empty when nothing did."""
        counts = [(len(self.added), "added"), (len(self.captioned), "with a new caption")]
        counts.append((len(self.duplicates), "already here"))
        parts = [f"{number} {what}" for number, what in counts if number]
        return f"Pictures: {', '.join(parts)}." if parts else ""

    def reasons(self) -> str:
        """Why nothing went in: the first few of the refused files."""
        told = [f"{name}: {reason}" for name, reason in self.refused[:3]]
        more = len(self.refused) - len(told)
        return " ".join([IS_NOTHING, *told, *([f"And {more:,} more files."] if more else [])])

    def names_here(self) -> list[str]:
        """Of pictures that were there already: those that no note is about."""
        told = {name for name, _ in self.notes}
        return [name for name in self.duplicates if name not in told]

    def as_dict(self) -> dict[str, Any]:
        here = [(name, IS_HERE) for name in self.names_here()]
        return {
            "added": len(self.added),
            "captioned": len(self.captioned),
            "duplicates": len(self.duplicates),
            "refused": _in_part(self.refused, "files were refused"),
            "notes": _in_part(self.notes + here, "notes"),
        }


def _in_part(told: list[tuple[str, str]], what: str) -> list[dict[str, str]]:
    rows = [{"name": name, "reason": reason} for name, reason in told[:LISTED_AT_MOST]]
    more = len(told) - len(rows)
    return [*rows, *([{"name": "…", "reason": f"{more:,} more {what}."}] if more else [])]


def import_files(
    dataset: Dataset,
    *,
    files: Sequence[tuple[str, BinaryIO | Path]],
    choices: ImportChoices = DEFAULT,
    progress: Report | None = None,
    key: uuid.UUID | None = None,
) -> ImportReport:
    """Pictures, captions (`cat.txt` belongs to `cat.png`, uploaded now or before), and ZIP archives.

    A name may have folders: those of Kohya's kind set repeats. A file that is no good is refused by name and reason,
    and the others go in together. Work that starts over gives the same `key` again.
    """
    report = ImportReport()
    batch = Batch(choices)
    with pictures.staging_folder(key) as folder:
        wanted = [file for file in files if not batches.is_junk(file[0])]
        is_archive = [path.lower().endswith(".zip") for path, _ in wanted]
        single = [file for file, packed in zip(wanted, is_archive, strict=True) if not packed]
        _stage(batch, single, lambda file: batch.read(*file, folder), lambda file: file[0], progress)
        for (path, source), packed in zip(wanted, is_archive, strict=True):
            if packed:
                report += _import_archive(dataset, batch, path, source)
        for path, _ in files:
            if batches.is_junk(path):
                batch.refuse(path, batches.HIDDEN)
        return report + _finish(dataset, batch, progress)


def _import_archive(dataset: Dataset, batch: Batch, path: str, source: BinaryIO | Path) -> ImportReport:
    """One among other files: what refuses it is told with theirs."""
    name = plain_name(path)
    try:
        return import_zip(dataset, path=source, filename=name, choices=batch.choices)
    except UserError as error:
        # What is wrong with an archive begins with its name, for the job that imports one alone.
        batch.refuse(name, error.message.removeprefix(f"{name}: "))
        return ImportReport()


def import_zip(
    dataset: Dataset,
    *,
    path: Path | BinaryIO,
    filename: str,
    choices: ImportChoices = DEFAULT,
    progress: Report | None = None,
    key: uuid.UUID | None = None,
) -> ImportReport:
    """All pictures and captions of an archive that are good; the others are named with the reason.

    Raises UserError, having changed nothing, when the archive is hostile or unreadable, or when nothing in it is good.
    """
    batch = Batch(choices)
    try:
        with archives.opened_archive(path) as archive, pictures.staging_folder(key) as folder:
            entries, batch.refused = archives.wanted_entries(archive)
            partials.ensure_room(sum(entry.file_size for entry in entries))

            def read(entry: ZipInfo) -> Found:
                with archives.opened_entry(archive, entry) as stream:
                    return batch.read(entry.filename, stream, folder)

            _stage(batch, entries, read, archives.shown, progress)
            batch.require_something()
            report = _finish(dataset, batch, progress)
    except UserError as error:
        raise UserError(f"{plain_name(filename)}: {error.message}") from None
    if not report.sentence():
        raise UserError(f"{plain_name(filename)}: {report.reasons()}")
    return report


Item = TypeVar("Item")


def _stage(
    batch: Batch,
    items: Sequence[Item],
    read: Callable[[Item], Found],
    name_of: Callable[[Item], str],
    progress: Report | None,
) -> None:
    """Read all items into the batch; those that are no good are refused by name."""
    for done, (item, found) in enumerate(batches.in_parallel(read, items)):
        if progress:
            progress(done, len(items), plain_name(name_of(item)))
        try:
            if isinstance(found, UserError):
                raise found
            batch.add(found)
        except UserError as error:
            batch.refuse(name_of(item), error.message)


def _finish(dataset: Dataset, batch: Batch, progress: Report | None) -> ImportReport:
    batch.take_tables()
    targets = _find_lone_pictures(dataset, batch)
    report = _record(dataset, batch, targets, progress)
    report.refused += batch.refused
    return report


def _find_lone_pictures(dataset: Dataset, batch: Batch) -> dict[int, Caption]:
    """For captions that came without their picture: the caption of each picture in the dataset that one belongs to.
    What cannot be placed is refused."""
    by_stem: dict[str, list[int]] = {}
    lone = batch.lone_captions()
    if lone:
        for pk, name in dataset.pictures.values_list("pk", "original_name"):
            by_stem.setdefault(batches.key_of(name), []).append(pk)
    targets: dict[int, Caption] = {}
    strays: dict[str, list[str]] = {}  # file that the captions came in: names of the pictures that are not there
    for key, caption in lone.items():
        name = key.rpartition("/")[2]
        found = by_stem.get(name, [])
        if len(found) == 1:
            targets[found[0]] = caption
        elif found:
            reason = "Several pictures of the dataset have this name. Edit their captions on the page."
            batch.refuse(caption.file, reason if batches.is_caption(caption.file) else f"{name}: {reason}")
        else:
            strays.setdefault(caption.file, []).append(name)
    for file, names in strays.items():
        batch.refuse(file, _stray_reason(file, names))
    return targets


def _stray_reason(file: str, names: list[str]) -> str:
    if len(names) == 1 and batches.key_of(file).rpartition("/")[2] == names[0]:
        return "No picture has the same name. Upload the picture with its caption."
    some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"There is no picture for {len(names):,} of its captions: {some}"


def _record(
    dataset: Dataset, batch: Batch, targets: dict[int, Caption], progress: Report | None = None
) -> ImportReport:
    """Store the staged files, then write all rows in one transaction."""
    for done, (_, _, staged) in enumerate(batch.staged):
        if progress:
            progress(done, len(batch.staged), "Storing the pictures")
        pictures.store_picture(staged)
    report = ImportReport()
    with transaction.atomic():
        lock_dataset(dataset.pk)
        there: dict[str, int] = {}
        for row in dataset.pictures.values("pk", "source_sha256", *edits.OF):
            there |= dict.fromkeys((*edits.files_of(row), row["source_sha256"] or row["sha256"]), row["pk"])
        fresh: dict[str, Picture] = {}
        added: list[Picture] = []
        known: dict[int, str] = {}  # pictures of the dataset that came again, by what they are called in the import
        for key, repeats, staged in batch.staged:
            caption = batch.captions.get(key)
            pk = there.get(staged.source_sha256) or there.get(staged.sha256)
            twin = fresh.get(staged.source_sha256) or fresh.get(staged.sha256)
            if pk:
                known.setdefault(pk, staged.name)
                if caption:
                    targets.setdefault(pk, caption)
            elif twin:
                report.duplicates.append(staged.name)
                _caption_twin(twin, staged, caption, report)
            else:
                picture = _new_picture(dataset, staged, caption.text if caption else "", repeats)
                fresh |= {staged.sha256: picture, staged.source_sha256: picture}
                added.append(picture)
                report.notes += [(staged.name, note) for note in staged.notes]
        Picture.objects.bulk_create(added, batch_size=500)
        report.added = [picture.original_name for picture in added]
        _caption_pictures(dataset, targets, known, batch, report)
        if report.added or report.captioned:
            touch(dataset.pk)
    return report


def _caption_twin(twin: Picture, staged: StagedPicture, caption: Caption | None, report: ImportReport) -> None:
    """The same picture twice in one import: the first caption that there is goes in, and another one is told."""
    if caption and not twin.caption:
        twin.caption = caption.text
    elif caption and caption.text != twin.caption:
        report.notes.append((staged.name, f"It is the same picture as {twin.original_name}, whose caption was taken."))


def _new_picture(dataset: Dataset, staged: StagedPicture, caption: str, repeats: int) -> Picture:
    return Picture(
        dataset=dataset,
        sha256=staged.sha256,
        extension=staged.extension,
        width=staged.width,
        height=staged.height,
        bytes=staged.bytes,
        original_name=staged.name,
        source_sha256=staged.source_sha256,
        caption=caption,
        repeats=repeats,
    )


def _caption_pictures(
    dataset: Dataset, targets: dict[int, Caption], known: dict[int, str], batch: Batch, report: ImportReport
) -> None:
    """Captions for pictures here already: an empty one is filled; another is kept unless the user chose otherwise."""
    changed: dict[int, str] = {}
    for picture in dataset.pictures.filter(pk__in=targets):
        text = targets[picture.pk].text
        name = known.setdefault(picture.pk, picture.original_name)
        if text and text != picture.caption and (batch.choices.replaces_captions or not picture.caption):
            changed[picture.pk] = text
            del known[picture.pk]
        elif text != picture.caption:
            report.notes.append((name, "It is here already, and its caption was kept."))
    report.captioned += replace_captions(dataset, captions=changed, label="Captions of an import", actor=None)
    report.duplicates += known.values()


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
        locked = lock_dataset(dataset.pk)
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
def start_upload(
    owner: User, *, dataset: Dataset, filename: str, size: int, sha256: str = "", choices: ImportChoices = DEFAULT
) -> Upload:
    """An empty upload of `size` bytes; `sha256` (hex) is checked when all are there, if given. `filename` may have
    folders, which set repeats."""
    parts = batches.path_parts(filename)
    name = plain_name(filename)
    if not parts or not (name.lower().endswith(".zip") or batches.most_bytes(name)):
        raise UserError("Upload a ZIP archive, a picture, or a caption file.", field="filename")
    options = choices.as_dict() | {"folders": parts[:-1]}
    return uploads.start_upload(
        Upload, owner, dataset=dataset, filename=name, size=size, sha256=sha256, options=options
    )


def finish_upload(upload: Upload) -> Job:
    """Check that the file arrived whole, and queue its import. Calling it again gives the same job."""
    return uploads.finish_upload(upload, import_upload, label=f"Import {upload.filename}")


@jobs.job
def import_upload(progress: jobs.Progress, *, upload_id: str) -> dict[str, Any]:
    """The job behind `finish_upload`. Started over, it finds what it imported and leaves that alone."""
    upload = Upload.objects.select_related("dataset").filter(pk=upload_id).first()
    path = partials.partial_path(uuid.UUID(upload_id))
    if upload is None or not path.exists():
        raise Missing("The uploaded file is no longer there. Look at the dataset, and upload what is missing.")
    options = dict(upload.options)
    name = "/".join([*options.pop("folders", []), upload.filename])
    given: dict[str, Any] = {"choices": ImportChoices(**options), "progress": progress, "key": upload.pk}
    try:
        if upload.filename.lower().endswith(".zip"):
            report = import_zip(upload.dataset, path=path, filename=upload.filename, **given)
        else:
            report = import_files(upload.dataset, files=[(name, path)], **given)
    except UserError:
        partials.remove_partial(upload.pk)
        raise
    partials.remove_partial(upload.pk)
    return report.as_dict()


def remove_stale_uploads() -> int:
    """Remove uploads that began more than 7 days ago, and the bytes of imports that ended. Returns how many uploads."""
    partials.remove_older_than(pictures.staging_root(), seconds=uploads.STALE_AFTER.total_seconds())
    return uploads.remove_stale_uploads(Upload)


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
