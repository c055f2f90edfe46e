"""The files of one import: which are pictures, which captions, and what belongs together. No database here.

A file is known by its path within what was given (a folder that was dropped, an archive, a folder on the server). The
path is looked at, never used: nothing here opens a file by it.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from datasets import caption_tables, captions, pictures
from datasets.pictures import StagedPicture
from lorapilot.errors import UserError

JUNK_FOLDERS = {"__macosx", "@eadir"}
JUNK_FILES = {"thumbs.db", "desktop.ini"}
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
KOHYA_FOLDER = re.compile(r"([0-9]{1,4})_.+")
MAX_REPEATS = 1000  # as in the settings of a run; a folder called 2024_holiday has a year in its name
MAX_WORKERS = 4
FOREIGN = f"It is neither a picture ({pictures.KINDS}) nor a caption file (.txt, .caption, .json, .jsonl, .csv)."
HIDDEN = "Hidden files and those of file managers are left out."

T = TypeVar("T")


# --- Choices ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImportChoices:
    """`flatten`: the colour `#rrggbb` that fills transparency, or empty to keep it. `replaces_captions`: whether
    captions that come take the place of captions that are there."""

    flatten: str = ""
    replaces_captions: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"flatten": self.flatten, "replaces_captions": self.replaces_captions}


def checked_choices(*, flatten: str = "", replaces_captions: bool = False) -> ImportChoices:
    if flatten and not COLOUR.fullmatch(flatten):
        raise UserError("Give the colour as six hexadecimal digits, such as #ffffff.", field="flatten")
    return ImportChoices(flatten.lower(), replaces_captions)


# --- Paths ------------------------------------------------------------------------------------------------------------
def path_parts(path: str) -> list[str]:
    """The parts of a client's path for people to read, composed (NFC), since macOS takes letters apart."""
    parts = unicodedata.normalize("NFC", path).replace("\\", "/").split("/")
    shown = ("".join(filter(str.isprintable, part)) for part in parts)
    return [part for part in shown if part.strip() not in ("", ".", "..")]


def plain_name(path: str) -> str:
    """The last part of a client's file name, for people to read; nothing here uses it as a path."""
    return (path_parts(path) or ["unnamed"])[-1][-255:]


def is_junk(path: str) -> bool:
    """Hidden files, and what file managers leave everywhere."""
    parts = [part.casefold() for part in path_parts(path)]
    hidden = any(part.startswith(".") for part in parts)
    return hidden or bool(JUNK_FOLDERS.intersection(parts[:-1])) or parts[-1:] in [[name] for name in JUNK_FILES]


def key_of(path: str) -> str:
    """What a picture and its caption have in common: the path without the ending."""
    return "/".join(path_parts(path)).rpartition(".")[0]


def repeats_of(path: str) -> int:
    """As the nearest folder of Kohya's kind says, `<repeats>_<name>`; 1 without one."""
    for folder in reversed(path_parts(path)[:-1]):
        found = KOHYA_FOLDER.fullmatch(folder)
        if found and 1 <= int(found[1]) <= MAX_REPEATS:
            return int(found[1])
    return 1


def is_picture(name: str) -> bool:
    return name.lower().endswith(pictures.NAME_ENDINGS)


def is_caption(name: str) -> bool:
    return name.lower().endswith(captions.ENDINGS)


def is_table(name: str) -> bool:
    return name.lower().endswith(caption_tables.ENDINGS)


def most_bytes(name: str) -> int:
    """What a file of this name may have; 0 when its kind is not read here."""
    if is_picture(name):
        return pictures.MAX_FILE_BYTES
    if is_caption(name):
        return captions.MAX_FILE_BYTES
    return caption_tables.MAX_FILE_BYTES if is_table(name) else 0


# --- The files --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Found:
    """One file of the batch, staged or read: a picture, or the bytes of a caption file."""

    path: str
    picture: StagedPicture | None = None
    raw: bytes = b""


@dataclass(frozen=True)
class Caption:
    file: str  # that it came in
    text: str


@dataclass
class Batch:
    """`staged` pictures by key; captions by the same key, or by what a table calls the picture. `refused`: (file,
    reason)."""

    choices: ImportChoices = field(default_factory=ImportChoices)
    staged: list[tuple[str, int, StagedPicture]] = field(default_factory=list)  # key, repeats, picture
    captions: dict[str, Caption] = field(default_factory=dict)
    tables: list[tuple[str, list[caption_tables.Row]]] = field(default_factory=list)  # path of the table, its rows
    refused: list[tuple[str, str]] = field(default_factory=list)

    def require_something(self) -> None:
        """Raises UserError when nothing at all was found."""
        if not (self.refused or self.staged or self.captions or self.tables):
            raise UserError("The archive has no pictures. Put some into it.")

    def refuse(self, path: str, reason: str) -> None:
        self.refused.append(("/".join(path_parts(path))[-255:] or "unnamed", reason))

    def read(self, path: str, source: BinaryIO | Path, folder: Path) -> Found:
        """Stage or read one file. Safe in several threads: it changes nothing of the batch."""
        if is_picture(path):
            name = plain_name(path)
            staged = pictures.stage_picture(source, name=name, folder=folder, flatten=self.choices.flatten)
            return Found(path, staged)
        if not most_bytes(path):
            raise UserError(FOREIGN)
        return Found(path, raw=_first_bytes(source, most_bytes(path) + 1))

    def add(self, found: Found) -> None:
        """Raises UserError for a caption file that cannot be read."""
        key = key_of(found.path)
        if found.picture:
            self.staged.append((key, repeats_of(found.path), found.picture))
        elif is_caption(found.path):
            self._add_caption(key, found.path, captions.read_caption(found.raw))
        else:
            rows = caption_tables.read_table(found.raw, name=found.path)
            if isinstance(rows, str):
                self._add_caption(key, found.path, captions.clean_caption(rows))
            else:
                self.tables.append((found.path, rows))

    def _add_caption(self, key: str, path: str, text: str) -> None:
        """Of several files for one picture, .txt comes before .caption, and that before .json."""
        there = self.captions.get(key)
        if there is None or _rank(path) < _rank(there.file):
            self.captions[key], path = Caption("/".join(path_parts(path)), text), there.file if there else ""
        if path:
            self.refuse(path, f"The picture has its caption from {plain_name(self.captions[key].file)}.")

    def take_tables(self) -> None:
        """Give each row of the tables to its picture; a picture's own caption file comes first."""
        by_name: dict[str, list[str]] = {}
        for key, _, _ in self.staged:
            by_name.setdefault(key.rpartition("/")[2], []).append(key)
        for path, rows in self.tables:
            folder = path_parts(path)[:-1]
            for reference, text in rows:
                key = _key_of_row(folder, reference, by_name)
                try:
                    caption = Caption("/".join(path_parts(path)), captions.clean_caption(text))
                except UserError as error:
                    self.refuse(path, f"{plain_name(reference)}: {error.message}")
                    continue
                self.captions.setdefault(key, caption)

    def lone_captions(self) -> dict[str, Caption]:
        """Captions whose picture is not part of the import."""
        keys = {key for key, _, _ in self.staged}
        return {key: caption for key, caption in self.captions.items() if key not in keys}


def _rank(path: str) -> int:
    endings = (*captions.ENDINGS, *caption_tables.ENDINGS)
    return next(rank for rank, ending in enumerate(endings) if path.lower().endswith(ending))


def _first_bytes(source: BinaryIO | Path, most: int) -> bytes:
    """One byte more than the file may have, so that a longer one is noticed and never held."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(most)
    return source.read(most)


def _key_of_row(folder: list[str], reference: str, by_name: dict[str, list[str]]) -> str:
    """Of the picture that a row means: below the table's folder, or, as Kohya writes full paths, by the longest end of
    the path that tells it. The row's own path where there is no such picture in the import."""
    parts = path_parts(reference)
    if is_picture(reference):
        parts[-1:] = [parts[-1].rpartition(".")[0]]
    if not parts:
        return reference
    near = by_name.get(parts[-1], [])
    wanted = "/".join([*folder, *parts])
    if wanted in near:
        return wanted
    matching = [key for key in near if f"/{'/'.join(parts)}".endswith(f"/{key}") or f"/{key}".endswith(f"/{wanted}")]
    for found in (matching, near):
        if len(found) == 1:
            return found[0]
    return "/".join(parts)


def in_parallel(work: Callable[[T], Found], items: Iterable[T]) -> Iterator[tuple[T, Found | UserError]]:
    """`work` on each, in a few threads (decoding lets the others run); results in the order of the items."""

    def tried(item: T) -> tuple[T, Found | UserError]:
        try:
            return item, work(item)
        except UserError as error:
            return item, error

    with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
        try:
            yield from pool.map(tried, items)
        finally:
            pool.shutdown(cancel_futures=True)
