"""What a configuration names as its dataset: the lines of a manifest and the pictures of Kohya's folders. Torch-free.

Kohya's folders are called `<repeats>_<name>`. A picture without a caption file gets the folder's name as its caption,
as in sd-scripts, and a caption is the first line of its text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_trainer.errors import DatasetError
from lora_trainer.picture_files import PICTURE_ENDINGS


@dataclass(frozen=True)
class Notice:
    """Something about the dataset that the user should know but that need not stop the run."""

    code: str
    message: str


@dataclass(frozen=True)
class Entry:
    """A picture that a source names; the file has not been looked at."""

    path: Path
    caption: str
    repeats: int
    group: str
    is_regularisation: bool = False
    has_more_lines: bool = False
    """The caption's text goes on after the line that is used."""
    is_named_by_folder: bool = False
    """There is no caption file."""


def manifest_entries(path: Path) -> list[Entry]:
    """The lines of a JSON-lines file; relative picture paths count from the file's folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The dataset manifest {path} cannot be read: {error}.") from error
    return [_manifest_entry(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _manifest_entry(line: str, path: Path, number: int) -> Entry:
    where = f"Line {number} of {path}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise DatasetError(f'{where} must be an object with an "image" path.')
    caption, repeats, is_regularisation = (
        row.get("caption", ""),
        row.get("repeats", 1),
        row.get("regularisation", False),
    )
    if not isinstance(caption, str) or type(repeats) is not int or repeats < 1:
        raise DatasetError(f'{where}: "caption" must be a text and "repeats" a whole number of at least 1.')
    if not isinstance(is_regularisation, bool):
        raise DatasetError(f'{where}: "regularisation" must be true or false.')
    first, more = _first_line(caption)
    group = "regularisation" if is_regularisation else "dataset"
    return Entry(path.parent / row["image"], first, repeats, group, is_regularisation, has_more_lines=more)


def folder_entries(
    parent: Path, caption_ending: str, notices: list[Notice], *, is_regularisation: bool = False
) -> Iterator[Entry]:
    """The pictures in the `<repeats>_<name>` folders of `parent`; other folders become notices."""
    if not parent.is_dir():
        raise DatasetError(f"The dataset folder {parent} does not exist.")
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        number, _, name = folder.name.partition("_")
        if not number.isdecimal() or int(number) < 1 or not name:
            message = (
                f"The folder {folder.name} was ignored: its name is not <repeats>_<name>, such as 10_{folder.name}."
            )
            notices.append(Notice("folder_ignored", message))
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PICTURE_ENDINGS:
                text = _caption_beside(path, caption_ending)
                caption, more = _first_line(name if text is None else text)
                yield Entry(path, caption, int(number), folder.name, is_regularisation, more, text is None)


def _caption_beside(picture: Path, ending: str) -> str | None:
    path = picture.with_suffix(ending if ending.startswith(".") else f".{ending}")
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The caption {path} cannot be read as UTF-8 text.") from error


def _first_line(text: str) -> tuple[str, bool]:
    """The first line that says something, and whether others follow."""
    first, _, rest = text.strip().partition("\n")
    return first.strip(), bool(rest.strip())
