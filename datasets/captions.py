"""Captions: one line of UTF-8 text a picture. What comes in is refused with a reason, or made into such a line."""

from __future__ import annotations

from lorapilot.errors import UserError

MAX_CHARACTERS = 5_000
MAX_FILE_BYTES = 64 * 1024


def clean_caption(text: str) -> str:
    """`text` as one line: line breaks become spaces. Raises UserError for what no trainer can read."""
    if "\0" in text or not _is_encodable(text):
        raise UserError("The caption has characters that are no text. Remove them and save again.", field="caption")
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part)
    if len(line) > MAX_CHARACTERS:
        raise UserError(
            f"The caption has {len(line):,} characters; the most is {MAX_CHARACTERS:,}. Shorten it.", field="caption"
        )
    return line


def read_caption(raw: bytes) -> str:
    """The caption in the bytes of a .txt file."""
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"A caption file has at most {MAX_FILE_BYTES // 1024} KiB. Shorten it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("The caption is not UTF-8 text. Save the file as UTF-8 and upload it again.") from None
    return clean_caption(text)


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can carry but neither a file nor a database can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
