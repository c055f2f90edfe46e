"""What an edit of many captions does to each of them. No database here.

A tag is what stands between commas. Tags are compared without regard to case and to spaces around them; a caption in
which nothing is to be changed stays as it is, byte for byte.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from django.db.models import TextChoices

from datasets.captions import MAX_CHARACTERS, clean_caption, is_text
from lorapilot.errors import UserError

LONGEST_TEXT = 500
REGEX_PROGRAM = Path(__file__).with_name("regex_program.py")
REGEX_SECONDS = 10.0  # wall clock; the program itself ends after 5 of processor time


class Kind(TextChoices):
    ADD = "add", "Add tags"
    REMOVE = "remove", "Remove tags"
    RENAME = "rename", "Replace a tag"
    REPLACE = "replace", "Replace text"
    PREFIX = "prefix", "Put text before"
    SUFFIX = "suffix", "Put text behind"
    REGEX = "regex", "Replace by a regular expression"
    TRIGGER = "trigger", "Put the trigger word first"


@dataclass(frozen=True)
class Operation:
    """`text` is what to look for or to add; `replacement` belongs to rename, replace and regex; `at_start` to add."""

    kind: str
    text: str = ""
    replacement: str = ""
    at_start: bool = False

    def label(self) -> str:
        """What the operation does, for a person."""
        name = Kind(self.kind).label
        if self.kind in (Kind.RENAME, Kind.REPLACE, Kind.REGEX):
            return f"{name}: “{self.text[:70]}” → “{self.replacement[:70]}”"
        return f"{name}: “{self.text[:140]}”"


def checked(operation: Operation, *, trigger_word: str) -> Operation:
    """`operation`, with what the dataset adds to it. Raises UserError that names the input."""
    if operation.kind not in Kind.values:
        raise UserError(f"Choose one of: {', '.join(Kind.values)}.", field="kind")
    if operation.kind == Kind.TRIGGER:
        if not trigger_word:
            raise UserError("The dataset has no trigger word yet. Enter one first.", field="kind")
        return Operation(Kind.TRIGGER, trigger_word)
    for field, text in (("text", operation.text), ("replacement", operation.replacement)):
        if len(text) > LONGEST_TEXT or not is_text(text):
            raise UserError(f"Use at most {LONGEST_TEXT} characters of text.", field=field)
    if not operation.text.strip() and not (operation.text and operation.kind == Kind.REPLACE):
        raise UserError("Enter the text.", field="text")
    if operation.kind in (Kind.ADD, Kind.REMOVE) and not split_tags(operation.text):
        raise UserError("Enter at least one tag.", field="text")
    return operation


def apply(operation: Operation, captions: Sequence[str]) -> list[str]:
    """What becomes of each caption. Raises UserError when one would be no caption, or a pattern is none."""
    if operation.kind == Kind.REGEX:
        changed = _by_regex(operation, captions)
    else:
        changed = [WORK[operation.kind](operation, caption) for caption in captions]
    return [old if new == old else clean_caption(new) for old, new in zip(captions, changed, strict=True)]


# --- Tags and words ---------------------------------------------------------------------------------------------------
def split_tags(text: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(",")) if tag]


def word_pattern(words: Sequence[str], *, inside: bool = False) -> str:
    """A pattern, for Python and for PostgreSQL, of one of `words` alone; `inside`: as a part of a longer word."""
    any_word = "|".join(re.escape(word) for word in words)
    return rf"\w({any_word})|({any_word})\w" if inside else rf"(^|\W)({any_word})(\W|$)"


def has_word(caption: str, word: str) -> bool:
    """Whether `word`, which may be several, stands in the caption by itself, in capitals or not."""
    return re.search(word_pattern([word]), caption, re.IGNORECASE) is not None


def _add(operation: Operation, caption: str) -> str:
    there = {tag.casefold() for tag in split_tags(caption)}
    fresh = []
    for tag in split_tags(operation.text):
        if tag.casefold() not in there:
            there.add(tag.casefold())
            fresh.append(tag)
    if not fresh:
        return caption
    old = [caption.strip().strip(",").strip()] if caption.strip(" ,") else []
    return ", ".join([*fresh, *old] if operation.at_start else [*old, *fresh])


def _remove(operation: Operation, caption: str) -> str:
    unwanted = {tag.casefold() for tag in split_tags(operation.text)}
    tags = split_tags(caption)
    kept = [tag for tag in tags if tag.casefold() not in unwanted]
    return caption if len(kept) == len(tags) else ", ".join(kept)


def _rename(operation: Operation, caption: str) -> str:
    """The new tag takes the place of the old one; where it is there already, the old one goes."""
    old, tags = operation.text.strip().casefold(), split_tags(caption)
    if old not in [tag.casefold() for tag in tags]:
        return caption
    renamed = [operation.replacement.strip() if tag.casefold() == old else tag for tag in tags]
    once: dict[str, str] = {}
    for tag in renamed:
        once.setdefault(tag.casefold(), tag)
    once.pop("", None)
    return ", ".join(once.values())


def _replace(operation: Operation, caption: str) -> str:
    return caption.replace(operation.text, operation.replacement)


def _prefix(operation: Operation, caption: str) -> str:
    if caption.startswith(operation.text.strip()):
        return caption
    return operation.text + _space(operation.text[-1:], caption) + caption


def _suffix(operation: Operation, caption: str) -> str:
    if caption.endswith(operation.text.strip()):
        return caption
    return caption + _space(operation.text[:1], caption) + operation.text


def _space(edge: str, caption: str) -> str:
    return " " if caption and edge not in (" ", ",", ".") else ""


def _trigger(operation: Operation, caption: str) -> str:
    if has_word(caption, operation.text):
        return caption
    return f"{operation.text}, {caption}" if caption else operation.text


WORK: dict[str, Callable[[Operation, str], str]] = {
    Kind.ADD: _add,
    Kind.REMOVE: _remove,
    Kind.RENAME: _rename,
    Kind.REPLACE: _replace,
    Kind.PREFIX: _prefix,
    Kind.SUFFIX: _suffix,
    Kind.TRIGGER: _trigger,
}


# --- Regular expressions ----------------------------------------------------------------------------------------------
def _by_regex(operation: Operation, captions: Sequence[str]) -> list[str]:
    """In a process of its own: Python's `re` neither ends nor lets go once a hostile pattern has begun."""
    asked = {
        "pattern": operation.text,
        "replacement": operation.replacement,
        "captions": captions,
        "longest": MAX_CHARACTERS,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(REGEX_PROGRAM)],
            input=json.dumps(asked),
            capture_output=True,
            encoding="utf-8",
            timeout=REGEX_SECONDS,
            env={},
            check=True,
        )
        answer = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        raise UserError(
            "The pattern takes too long or too much memory. Make it simpler, or select fewer pictures.", field="text"
        ) from None
    if "error" in answer:
        raise UserError(f"The pattern does not work: {answer['error']}.", field="text")
    return list(answer["captions"])
