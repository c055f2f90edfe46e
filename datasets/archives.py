"""ZIP archives of pictures and captions, read without trusting a byte of them. No database here.

Everything that the table of contents says is checked before the first entry is unpacked, and what it says about sizes
and checksums is checked again while unpacking. An archive that has one bad entry is refused as a whole.
"""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from django.conf import settings

from datasets import captions, pictures
from lorapilot.errors import UserError

MAX_ENTRIES = 20_000
MAX_CONTENTS_BYTES = 16 * 1024**2  # of the table of contents, which is held in memory
MAX_RATIO = 200  # unpacked to packed; pictures hardly shrink
RATIO_FROM_BYTES = 1024**2
JUNK_FOLDERS = {"__macosx", ".git", ".ipynb_checkpoints", "@eadir"}
JUNK_FILES = {".ds_store", "thumbs.db", "desktop.ini", ".gitignore", ".gitattributes"}
ENCRYPTED = 0x1 | 0x40 | 0x2000  # classic, strong, and hidden headers
DRIVE = re.compile(r"[A-Za-z]:")


@contextmanager
def opened_archive(source: Path | BinaryIO) -> Iterator[zipfile.ZipFile]:
    """The archive, its table of contents of a bounded size. Raises UserError when there is none."""
    try:
        _refuse_large_contents(source)
        archive = zipfile.ZipFile(source)
    except UserError:
        raise
    except Exception:  # noqa: BLE001 a parser that is fed with damaged or hostile bytes raises anything
        raise UserError("This is not a readable ZIP archive. Create it again and upload the new file.") from None
    with archive:
        yield archive


def _refuse_large_contents(source: Path | BinaryIO) -> None:
    """The very record that ZipFile goes by, read before it loads the table of contents that the record announces."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            record = zipfile._EndRecData(stream)  # type: ignore[attr-defined]  # a second parser could disagree
    else:
        record = zipfile._EndRecData(source)  # type: ignore[attr-defined]  # as above
    if record is None:
        raise UserError("This is not a readable ZIP archive. Create it again and upload the new file.")
    if max(record[3], record[4]) > MAX_ENTRIES or record[5] > MAX_CONTENTS_BYTES:
        raise UserError(f"The archive has more than {MAX_ENTRIES:,} entries. Split it into several.")


def wanted_entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Pictures and captions; junk of file managers and folders left out. Raises UserError that names a bad entry."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise UserError(f"The archive has more than {MAX_ENTRIES:,} entries. Split it into several.")
    for entry in entries:
        _refuse_hostile(entry)
    wanted = [entry for entry in entries if not _is_folder(entry) and not _is_junk(entry)]
    _refuse_twins(wanted)
    for entry in wanted:
        _refuse_foreign(entry)
    if sum(entry.file_size for entry in wanted) > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES // 1024**3
        raise UserError(f"The archive unpacks to more than {limit} GiB. Split it into several.")
    if not wanted:
        raise UserError("The archive has no pictures. Put PNG, JPEG or WebP files into it.")
    return wanted


def _refuse_hostile(entry: zipfile.ZipInfo) -> None:
    """Names that leave the folder, links and devices, encryption, and bombs: whatever the rest of the archive is."""
    name = entry.orig_filename.replace("\\", "/")
    if any(ord(character) < 32 for character in name):
        raise refused(entry, "its name has control characters. Rename it.")
    if name.startswith("/") or DRIVE.match(name) or ".." in PurePosixPath(name).parts:
        raise refused(entry, "its name points outside of the archive. Create the archive again with plain names.")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refused(entry, "it is a link or a device, not a file. Put the file itself into the archive.")
    if entry.flag_bits & ENCRYPTED:
        raise refused(entry, "it is encrypted. Create the archive without a password.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refused(entry, "its compression is not supported. Create the archive as a normal ZIP (deflate).")
    if entry.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size):
        raise refused(entry, f"it unpacks to more than {MAX_RATIO} times its size, as a ZIP bomb does.")


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """Also what has no name at all, which ZipInfo.is_dir cannot take."""
    return not _parts(entry) or entry.is_dir()


def _is_junk(entry: zipfile.ZipInfo) -> bool:
    *folders, name = [part.lower() for part in _parts(entry)]
    return bool(JUNK_FOLDERS.intersection(folders)) or name in JUNK_FILES or name.startswith("._")


def _refuse_twins(entries: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for entry in entries:
        path = "/".join(_parts(entry)).casefold()
        if path in seen:
            raise refused(entry, "its name is there twice. Rename one of them.")
        seen.add(path)


def _refuse_foreign(entry: zipfile.ZipInfo) -> None:
    limit = pictures.MAX_FILE_BYTES
    if is_caption(entry):
        limit = captions.MAX_FILE_BYTES
    elif not entry.filename.lower().endswith(pictures.NAME_ENDINGS):
        raise refused(entry, "it is neither a PNG, JPEG or WebP picture nor a .txt caption. Leave it out.")
    if entry.file_size > limit:
        raise refused(entry, f"it has more than {limit // 1024:,} KiB. Save it smaller.")


def is_caption(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.lower().endswith(".txt")


def entry_stem(entry: zipfile.ZipInfo) -> str:
    """What a picture and its caption have in common: the path without the ending."""
    return "/".join(_parts(entry)).rpartition(".")[0]


def entry_name(entry: zipfile.ZipInfo) -> str:
    return _parts(entry)[-1]


def _parts(entry: zipfile.ZipInfo) -> list[str]:
    return [part for part in entry.filename.replace("\\", "/").split("/") if part not in ("", ".")]


@contextmanager
def opened_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[BinaryIO]:
    """The entry's unpacked bytes: at most as many as announced, the checksum checked at the end."""
    try:
        stream = archive.open(entry)
    except Exception:  # noqa: BLE001 a parser that is fed with damaged or hostile bytes raises anything
        raise _damaged(entry) from None
    try:
        with stream:
            yield stream  # type: ignore[misc]  # it reads as a binary file
    except UserError as error:
        raise refused(entry, error.message[:1].lower() + error.message[1:]) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise _damaged(entry) from None


def _damaged(entry: zipfile.ZipInfo) -> UserError:
    return refused(entry, "it is damaged. Create the archive again.")


def refused(entry: zipfile.ZipInfo, reason: str) -> UserError:
    shown = (
        entry.orig_filename.encode("unicode_escape").decode() if not entry.filename.isprintable() else entry.filename
    )
    return UserError(f"{shown[:200]}: {reason} Nothing was imported.")
