"""Picture files: checked and decoded in a bounded way, stored once by content, with a thumbnail. No database here.

`<workspace>/datasets/pictures/<aa>/<sha256>.<ext>` holds the bytes exactly as they came, or a PNG where they had to be
converted (conversion.py); a file is complete from the moment it has its name (staged, fsynced, renamed).
`<workspace>/cache/thumbnails/<aa>/<sha256>.webp` can be made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from PIL import Image, ImageOps, UnidentifiedImageError

from datasets import conversion
from lorapilot import workspace
from lorapilot.errors import UserError

STORED_FORMATS = ("PNG", "JPEG", "WEBP")
CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
NAME_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
KINDS = "PNG, JPEG, WebP, AVIF, BMP or TIFF"
MAX_FILE_BYTES = 256 * 1024**2
THUMBNAIL_PIXELS = 256
COPY_BYTES = 1024**2
# Nobody needs an unused file for longer: imports finish, and a deleted picture can be restored, well before.
UNUSED_SECONDS = 24 * 3600

Image.MAX_IMAGE_PIXELS = settings.MAX_PICTURE_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class Decoding:
    """Admits pictures to decoding while they have at most `MAX_PICTURE_PIXELS` together: one of 100 megapixels takes
    400 MB, and is decoded alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pixels = 0

    @contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._pixels or self._pixels + pixels <= settings.MAX_PICTURE_PIXELS)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_decoding = Decoding()


@dataclass(frozen=True)
class StagedPicture:
    """A checked picture in a staging folder, not yet stored. `source_sha256` is of the file that came: another than
    `sha256` where it was converted. `notes` tell the user what was done to it."""

    name: str
    path: Path
    thumbnail: Path
    sha256: str
    extension: str
    width: int
    height: int
    bytes: int
    source_sha256: str
    notes: tuple[str, ...] = ()


def picture_path(sha256: str, extension: str) -> Path:
    return workspace.datasets() / "pictures" / sha256[:2] / f"{sha256}.{extension}"


def thumbnail_path(sha256: str) -> Path:
    return workspace.cache() / "thumbnails" / sha256[:2] / f"{sha256}.webp"


@contextmanager
def staging_folder(key: uuid.UUID | None = None) -> Iterator[Path]:
    """A folder on the file system of the pictures; gone at the end, with everything that was not stored.

    Work that starts over gives the same `key` again: what it left behind when it was killed goes first."""
    folder = staging_root() / str(key or uuid.uuid4())
    if key:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def staging_root() -> Path:
    return workspace.datasets() / "incoming"


def stage_picture(source: BinaryIO | Path, *, name: str, folder: Path, flatten: str = "") -> StagedPicture:
    """Copy `source` into a staging folder, check it, convert it if it must be, and make its thumbnail. `flatten`: the
    colour `#rrggbb` to fill transparency with. Raises UserError with the reason."""
    path = folder / str(uuid.uuid4())
    if isinstance(source, Path):
        with source.open("rb") as stream:
            sha256, size = _copy(stream, path)
    else:
        sha256, size = _copy(source, path)
    try:
        return _checked(path, name=name, sha256=sha256, size=size, flatten=flatten)
    except UserError:
        path.unlink(missing_ok=True)
        raise


def _copy(stream: BinaryIO, path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        while block := stream.read(COPY_BYTES):
            size += len(block)
            if size > MAX_FILE_BYTES:
                raise UserError(f"The picture has more than {MAX_FILE_BYTES // 1024**2} MiB. Save it smaller.")
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _checked(path: Path, *, name: str, sha256: str, size: int, flatten: str) -> StagedPicture:
    """A picture that decodes to its last pixel, with its thumbnail."""
    thumbnail = path.with_suffix(".webp")
    source_sha256 = sha256
    try:
        with Image.open(path, formats=conversion.READ_FORMATS) as image:
            _refuse_huge(image)
            image.verify()
        with (
            Image.open(path, formats=conversion.READ_FORMATS) as image,
            _decoding.admit(image.width * image.height),
        ):
            converted = conversion.convert(image, flatten=flatten)
            extension = conversion.KEPT_FORMATS.get(image.format or "", "png")
            width, height = converted.image.size
            if converted.changes:
                extension = "png"
                sha256, size = _save_converted(conversion.plain(converted.image), path)
            _save_thumbnail(converted.image, thumbnail)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"This is not a {KINDS} picture.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels() from None
    except Exception:  # noqa: BLE001 a decoder that is fed with damaged or hostile bytes raises anything
        raise UserError("The picture is damaged or cut off. Save it again and upload the new file.") from None
    notes = (*converted.changes, *converted.notes)
    return StagedPicture(name, path, thumbnail, sha256, extension, width, height, size, source_sha256, notes)


def _save_converted(image: Image.Image, path: Path) -> tuple[str, int]:
    """In place of what came. Returns its checksum and size."""
    converted = path.with_suffix(".png")
    image.save(converted, "PNG", compress_level=3)
    with converted.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    size = converted.stat().st_size
    converted.replace(path)
    return digest.hexdigest(), size


def _refuse_huge(image: Image.Image) -> None:
    """Before a pixel is decoded."""
    if image.width * image.height > settings.MAX_PICTURE_PIXELS:
        raise _too_many_pixels()


def _too_many_pixels() -> UserError:
    return UserError(f"The picture has more than {settings.MAX_PICTURE_PIXELS // 10**6} megapixels. Save it smaller.")


def _save_thumbnail(image: Image.Image, path: Path) -> None:
    wanted = "RGBA" if image.has_transparency_data else "RGB"
    full = image if image.mode == wanted else image.convert(wanted)
    scale = min(1.0, THUMBNAIL_PIXELS / max(full.size))
    size = (max(1, round(full.width * scale)), max(1, round(full.height * scale)))
    full.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0).save(path, "WEBP", quality=80)


def store_picture(staged: StagedPicture) -> None:
    """Move a staged picture to its place by content. One that is there already counts as used from now on."""
    target = picture_path(staged.sha256, staged.extension)
    if not touch_picture(staged.sha256, staged.extension):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.path.replace(target)
        workspace.sync_folder(target.parent)
    thumbnail = thumbnail_path(staged.sha256)
    thumbnail.parent.mkdir(parents=True, exist_ok=True)
    # Copied beside its place first: the cache may be on another disk.
    partial = thumbnail.with_suffix(f".{staged.path.name}")
    shutil.copyfile(staged.thumbnail, partial)
    partial.replace(thumbnail)


def touch_picture(sha256: str, extension: str) -> bool:
    """Restart the time after which an unused file is removed. False when there is no such file."""
    try:
        os.utime(picture_path(sha256, extension))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A stored picture, once there is memory to decode it. Raises OSError when it is gone or is no such picture."""
    with Image.open(path, formats=STORED_FORMATS) as image, _decoding.admit(image.width * image.height):
        yield image


def ensure_thumbnail(sha256: str, extension: str) -> Path:
    """The thumbnail of a stored picture, drawn when the cache lost it. Raises FileNotFoundError without the picture."""
    thumbnail = thumbnail_path(sha256)
    if thumbnail.exists():
        return thumbnail
    thumbnail.parent.mkdir(parents=True, exist_ok=True)
    partial = thumbnail.with_suffix(f".{uuid.uuid4()}")
    with opened(picture_path(sha256, extension)) as image:
        image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
        _save_thumbnail(ImageOps.exif_transpose(image), partial)
    partial.replace(thumbnail)
    return thumbnail


def remove_unused(used: set[str]) -> int:
    """Delete stored pictures whose hash is not in `used` and that nobody touched for a day. Returns how many."""
    removed = 0
    for path in (workspace.datasets() / "pictures").glob("??/*"):
        if path.stem not in used and time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            path.unlink(missing_ok=True)
            thumbnail_path(path.stem).unlink(missing_ok=True)
            removed += 1
    return removed
