"""Captions: one line of UTF-8 text a picture. What comes in is refused with a reason, or made into such a line."""

from __future__ import annotations

import codecs

from lorapilot.errors import UserError

ENDINGS = (".txt", ".caption")
MAX_CHARACTERS = 5_000
MAX_FILE_BYTES = 64 * 1024


def is_text(text: str) -> bool:
    """False for null characters and lone surrogates, which JSON can carry but neither a file nor a database can."""
    return "\0" not in text and text.encode(errors="replace").decode() == text


def clean_caption(text: str) -> str:
    """`text` as one line: line breaks become spaces. Raises UserError for what no trainer can read."""
    if not is_text(text):
        raise UserError("The caption has characters that are no text. Remove them and save again.", field="caption")
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    if len(line) > MAX_CHARACTERS:
        raise UserError(
            f"The caption has {len(line):,} characters; the most is {MAX_CHARACTERS:,}. Shorten it.", field="caption"
        )
    return line


def read_caption(raw: bytes) -> str:
    """The caption in the bytes of a .txt or .caption file."""
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"A caption file has at most {MAX_FILE_BYTES // 1024} KiB. Shorten it.")
    return clean_caption(decode(raw))


def decode(raw: bytes) -> str:
    """UTF-8, or UTF-16 where a byte order mark says so, as old editors of Windows write it."""
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("The caption is not UTF-8 text. Save the file as UTF-8 and upload it again.") from None
