"""Captions of many pictures in one file. No database here.

Read are Kohya's metadata (`{"<path>": {"caption": …, "tags": …}}`, as its finetuning scripts write it), Hugging Face's
`metadata.jsonl` and `metadata.csv` (`file_name` and `text`), a list of such rows, and the JSON of one picture.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from datasets import captions
from lorapilot.errors import UserError

ENDINGS = (".json", ".jsonl", ".csv")
MAX_FILE_BYTES = 16 * 1024**2
MAX_CONTAINERS = 200_000  # objects and lists of a JSON file: 60 bytes or more each, for 2 in the file
FILE_KEYS = ("file_name", "image_path", "image", "file", "path")
TEXT_KEYS = ("text", "caption", "prompt")
NO_CAPTIONS = "It has no captions in a form that is read here: Kohya's metadata, or file_name and text."

Row = tuple[str, str]  # which picture, as the file names it; its caption


def read_table(raw: bytes, *, name: str) -> list[Row] | str:
    """The rows of a file, or the one caption of the picture with the file's own name. Raises UserError."""
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"A file of captions has at most {MAX_FILE_BYTES // 1024**2} MiB. Split it.")
    text = captions.decode(raw)
    if name.lower().endswith(".csv"):
        rows = list(_of_csv(text))
    else:
        if text.count("{") + text.count("[") > MAX_CONTAINERS:
            raise UserError(f"It has more than {MAX_CONTAINERS:,} objects. Split it.")
        found = _parsed(text, is_lines=name.lower().endswith(".jsonl"))
        if isinstance(found, dict) and _text_of(found) is not None and not _file_of(found):
            return _text_of(found) or ""
        rows = list(_of_json(found))
    if not rows:
        raise UserError(NO_CAPTIONS)
    return rows


def _parsed(text: str, *, is_lines: bool) -> Any:
    if not is_lines:
        return _json(text, "It")
    lines = enumerate(text.split("\n"), 1)
    return [_json(line, f"Line {number}") for number, line in lines if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not valid JSON. Correct the file and upload it again.") from None


def _of_csv(text: str) -> Iterator[Row]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline="")):
            yield from _row(row)
    except csv.Error:
        raise UserError("It is not a valid CSV file. Correct it and upload it again.") from None


def _of_json(found: Any) -> Iterator[Row]:
    if isinstance(found, list):
        for row in found:
            yield from _row(row)
    elif isinstance(found, dict) and _file_of(found):
        yield from _row(found)
    elif isinstance(found, dict):
        for file, entry in found.items():
            caption = entry if isinstance(entry, str) else _text_of(entry)
            if caption is not None:
                yield file, caption


def _row(row: Any) -> Iterator[Row]:
    file, caption = _file_of(row), _text_of(row)
    if file and caption is not None:
        yield file, caption


def _file_of(row: Any) -> str:
    found = [row[key] for key in FILE_KEYS if isinstance(row.get(key), str)] if isinstance(row, dict) else []
    return found[0] if found else ""


def _text_of(row: Any) -> str | None:
    """Caption and tags as Kohya joins them; None where there is neither."""
    if not isinstance(row, dict):
        return None
    parts = [row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)][:1]
    tags = row.get("tags")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    if isinstance(tags, str):
        parts.append(tags)
    return ", ".join(part for part in parts if part.strip()) if parts else None
