"""ZIP archives of pictures and captions, read without trusting a byte of them. No database here.

Everything that the table of contents says is checked before the first entry is unpacked, and what it says about sizes
and checksums is checked again while unpacking. An archive that somebody built to do harm is refused as a whole; an
entry that is merely no good, or of a foreign kind, is named, and the others are read.
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

from datasets import batches
from lorapilot.errors import UserError

MAX_ENTRIES = 50_000
MAX_CONTENTS_BYTES = 16 * 1024**2  # of the table of contents, which is held in memory
MAX_RATIO = 200  # unpacked to packed; pictures hardly shrink
RATIO_FROM_BYTES = 1024**2
# Kinds that shrink without bound when they are of one colour. They are bounded like all: in bytes, pixels and together.
SHRINKING = (".bmp", ".tif", ".tiff")
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


def wanted_entries(archive: zipfile.ZipFile) -> tuple[list[zipfile.ZipInfo], list[tuple[str, str]]]:
    """Pictures and captions, and what is refused besides (name, reason); junk of file managers and folders left out.
    Raises UserError that names the entry for which the whole archive is refused."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise UserError(f"The archive has more than {MAX_ENTRIES:,} entries. Split it into several.")
    for entry in entries:
        _refuse_hostile(entry)
    wanted: list[zipfile.ZipInfo] = []
    refused: list[tuple[str, str]] = []
    seen: set[tuple[str, ...]] = set()
    for entry in entries:
        if _is_folder(entry) or batches.is_junk(entry.filename):
            continue
        path = tuple(batches.path_parts(entry.filename))
        reason = _reason_against(entry, is_twin=path in seen)
        seen.add(path)
        if reason:
            refused.append((shown(entry), reason))
        else:
            wanted.append(entry)
    if sum(entry.file_size for entry in wanted) > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES // 1024**3
        raise UserError(f"The archive unpacks to more than {limit} GiB. Split it into several.")
    return wanted, refused


def _reason_against(entry: zipfile.ZipInfo, *, is_twin: bool) -> str:
    if is_twin:
        return "Its name is there twice: the first one is read. Rename one of them."
    limit = batches.most_bytes(entry.filename)
    if not limit:
        return batches.FOREIGN
    return f"It has more than {limit // 1024:,} KiB. Save it smaller." if entry.file_size > limit else ""


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
    is_bomb = entry.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size)
    if is_bomb and not name.lower().endswith(SHRINKING):
        raise refused(entry, f"it unpacks to more than {MAX_RATIO} times its size, as a ZIP bomb does.")


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """Also what has no name at all, which ZipInfo.is_dir cannot take."""
    return not batches.path_parts(entry.filename) or entry.is_dir()


@contextmanager
def opened_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[BinaryIO]:
    """The entry's unpacked bytes: at most as many as announced, the checksum checked at the end."""
    try:
        stream = archive.open(entry)
    except Exception:  # noqa: BLE001 a parser that is fed with damaged or hostile bytes raises anything
        raise _damaged() from None
    try:
        with stream:
            yield stream  # type: ignore[misc]  # it reads as a binary file
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise _damaged() from None


def _damaged() -> UserError:
    return UserError("It is damaged. Create the archive again.")


def refused(entry: zipfile.ZipInfo, reason: str) -> UserError:
    return UserError(f"{shown(entry)}: {reason} Nothing was imported.")


def shown(entry: zipfile.ZipInfo) -> str:
    """The entry's name for people; what is not printable in it is written out."""
    name = entry.filename if entry.filename.isprintable() else entry.orig_filename.encode("unicode_escape").decode()
    return name[:200]
