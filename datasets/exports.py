"""What a dataset or a version holds, as a ZIP archive or as a folder for other trainers.

The archive is written while it is sent: a piece of one file is in memory, nothing on the disk. The same content gives
the same bytes. Pictures are as stored, byte for byte; a caption is `<name>.txt` beside its picture, where there is one.
Names end up on anybody's computer, so what some system cannot store in a name is replaced, and no two are the same.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import unicodedata
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, StreamingHttpResponse
from django.utils.http import content_disposition_header

from datasets import pictures
from datasets.batches import MAX_REPEATS
from datasets.models import Dataset, DatasetVersion
from datasets.selectors import pictures_of
from lorapilot import jobs, partials, workspace
from lorapilot.errors import Missing
from lorapilot.models import Job, User

READ_BYTES = 256 * 1024
LONG_AGO = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # the first moment that ZIP can express: an archive tells content, not when it was made
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f]')  # to Windows, whatever else can store it
MAX_STEM_BYTES = 200  # of the 255 that file systems take, with an ending and a number to come
ENDINGS = {"png": (".png",), "jpg": (".jpg", ".jpeg"), "webp": (".webp",)}
LISTED = ("sha256", "extension", "caption", "repeats", "original_name")


@dataclass(frozen=True)
class Exported:
    """One file of an export: its path there, and the stored file or the text that it holds."""

    path: str
    source: Path | None = None
    text: str = ""


# --- What is in it, and under which names ---------------------------------------------------------------------------
def dataset_files(dataset: Dataset, *, is_kohya: bool) -> list[Exported]:
    """Raises Missing when the dataset is empty, or a picture's file is gone."""
    rows = list(pictures_of(dataset).values(*LISTED))
    return _named(rows, folder_name=dataset.name, is_kohya=is_kohya)


def version_files(version: DatasetVersion, *, is_kohya: bool) -> list[Exported]:
    """The same of a version."""
    rows = [picture | {"original_name": picture["name"]} for picture in version.pictures]
    return _named(rows, folder_name=version.name, is_kohya=is_kohya)


def _named(rows: Iterable[Mapping[str, Any]], *, folder_name: str, is_kohya: bool) -> list[Exported]:
    found: list[Exported] = []
    taken: set[str] = set()
    for row in rows:
        source = pictures.picture_path(row["sha256"], row["extension"])
        if not source.is_file():
            raise Missing(f"The file of {row['original_name']} is gone from the server. Delete or upload the picture.")
        folder = f"{min(row['repeats'], MAX_REPEATS)}_{_safe(folder_name)}/" if is_kohya else ""
        stem, ending = _free_name(row, folder, taken)
        found.append(Exported(f"{folder}{stem}{ending}", source))
        if row["caption"]:
            found.append(Exported(f"{folder}{stem}.txt", text=row["caption"]))
    if not found:
        raise Missing("There are no pictures here to export.")
    return found


def _free_name(row: Mapping[str, Any], folder: str, taken: set[str]) -> tuple[str, str]:
    """Stem and ending of a picture. No two have the same stem, since that is what a caption goes by."""
    stem, dot, ending = row["original_name"].rpartition(".")
    stem, ending = (stem, f".{ending}") if dot else (row["original_name"], "")
    if ending.lower() not in ENDINGS[row["extension"]]:  # it was converted, cropped, or always called something else
        ending = f".{row['extension']}"
    wanted = stem = _safe(stem)
    number = 1
    while _same(folder, stem) in taken:
        number += 1
        stem = f"{wanted}_{number}"
    taken.add(_same(folder, stem))
    return stem, ending


def _same(folder: str, stem: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", f"{folder}{stem}").casefold()


def _safe(name: str) -> str:
    """A name that every system can store, and none takes for a hidden file, a device, or a path."""
    name = UNSAFE.sub("_", "".join(letter if letter.isprintable() else "_" for letter in name))
    name = name.encode()[:MAX_STEM_BYTES].decode(errors="ignore").rstrip(". ")
    name = re.sub(r"^[.\s]", "_", name) or "unnamed"
    return f"_{name}" if name.split(".", maxsplit=1)[0].lower() in workspace.RESERVED else name


# --- As an archive --------------------------------------------------------------------------------------------------
class _Outlet:
    """What zipfile writes to: it cannot be rewound, and is emptied after each piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        pieces, self.pieces = self.pieces, []
        return b"".join(pieces)


def zip_stream(files: Iterable[Exported]) -> Iterator[bytes]:
    """The archive in pieces, uncompressed: pictures do not shrink."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]  # it needs no more
        for file in files:
            entry = zipfile.ZipInfo(file.path, LONG_AGO)
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w") as target:
                for piece in _content(file):
                    target.write(piece)
                    yield outlet.taken()
    yield outlet.taken()


def _content(file: Exported) -> Iterator[bytes]:
    if file.source is None:
        yield file.text.encode()
        return
    with file.source.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            yield piece


async def _in_threads(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def zip_response(request: HttpRequest, files: list[Exported], *, name: str) -> StreamingHttpResponse:
    """The archive as a download called `<name>.zip`. Under ASGI it is read in threads, at the client's pace."""
    pieces = zip_stream(files)
    response = StreamingHttpResponse(_in_threads(pieces) if isinstance(request, ASGIRequest) else pieces)
    response["Content-Type"] = "application/zip"
    filename = f"{_safe(name)}.zip"
    response["Content-Disposition"] = content_disposition_header(as_attachment=True, filename=filename) or "attachment"
    response["Cache-Control"] = "private, no-store"
    return response


# --- As a folder on the server --------------------------------------------------------------------------------------
def exports_root() -> Path:
    return workspace.datasets() / "exports"


def start_folder_export(user: User, *, dataset: Dataset) -> Job:
    """Copy the dataset to `<workspace>/datasets/exports/`, as a job whose result is the folder's `path`."""
    files = dataset_files(dataset, is_kohya=True)
    partials.ensure_room(sum(file.source.stat().st_size for file in files if file.source))
    return jobs.enqueue(export_folder, label=f"Export {dataset.name}"[:200], owner=user, dataset_id=dataset.pk)


@jobs.job
def export_folder(progress: jobs.Progress, *, dataset_id: int) -> dict[str, Any]:
    """The job behind it: a new folder, complete from the moment it has its name. What is there stays as it is."""
    dataset = Dataset.objects.filter(pk=dataset_id).first()
    if dataset is None:
        raise Missing("The dataset was deleted meanwhile.")
    files = dataset_files(dataset, is_kohya=True)
    with pictures.staging_folder() as staging:
        for done, file in enumerate(files):
            progress(done, len(files), Path(file.path).name)
            target = staging / "export" / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.source is None:
                target.write_text(file.text, encoding="utf-8", newline="")
            else:
                # A copy, not a link: what somebody does to an exported file must never reach the stored picture.
                shutil.copyfile(file.source, target)
        return {"path": str(_placed(staging / "export", _safe(dataset.name)).relative_to(workspace.datasets().parent))}


def _placed(folder: Path, name: str) -> Path:
    exports_root().mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        target = exports_root() / (name if number == 1 else f"{name}-{number}")
        number += 1
        try:
            target.mkdir()  # ours from here on; a rename takes its place, as long as it is empty
        except FileExistsError:
            continue
        os.replace(folder, target)  # noqa: PTH105 the same, said as what it does
        return target
