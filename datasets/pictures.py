"""Picture files: checked and decoded in a bounded way, stored once by content, with a thumbnail. No database here.

`<workspace>/datasets/pictures/<aa>/<sha256>.<ext>` holds the bytes exactly as they came; a file is complete from the
moment it has its name (staged, fsynced, renamed). `<workspace>/cache/thumbnails/<aa>/<sha256>.webp` can be made again.
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

from lorapilot import workspace
from lorapilot.errors import UserError

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: a phone's JPEG with an extra picture
CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
NAME_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
READABLE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
MAX_FILE_BYTES = 256 * 1024**2
THUMBNAIL_PIXELS = 256
COPY_BYTES = 1024**2
# Nobody needs an unused file for longer: imports finish, and a deleted picture can be restored, well before.
UNUSED_SECONDS = 24 * 3600

Image.MAX_IMAGE_PIXELS = settings.MAX_PICTURE_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# A picture of 100 megapixels takes 400 MB while it is decoded: a process decodes one at a time.
_decoding = threading.Lock()


@dataclass(frozen=True)
class StagedPicture:
    """A checked picture in a staging folder, not yet stored. Width and height are as it is shown (EXIF applied)."""

    name: str
    path: Path
    thumbnail: Path
    sha256: str
    extension: str
    width: int
    height: int
    bytes: int


def picture_path(sha256: str, extension: str) -> Path:
    return workspace.datasets() / "pictures" / sha256[:2] / f"{sha256}.{extension}"


def thumbnail_path(sha256: str) -> Path:
    return workspace.cache() / "thumbnails" / sha256[:2] / f"{sha256}.webp"


@contextmanager
def staging_folder() -> Iterator[Path]:
    """A folder on the file system of the pictures; gone at the end, with everything that was not stored."""
    folder = staging_root() / str(uuid.uuid4())
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def staging_root() -> Path:
    return workspace.datasets() / "incoming"


def stage_picture(source: BinaryIO | Path, *, name: str, folder: Path) -> StagedPicture:
    """Copy `source` into a staging folder, check it, and make its thumbnail. Raises UserError with the reason."""
    path = folder / str(uuid.uuid4())
    thumbnail = path.with_suffix(".webp")
    if isinstance(source, Path):
        with source.open("rb") as stream:
            sha256, size = _copy(stream, path)
    else:
        sha256, size = _copy(source, path)
    with _decoding:
        extension, width, height = _check_and_draw(path, thumbnail)
    return StagedPicture(name, path, thumbnail, sha256, extension, width, height, size)


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


def _check_and_draw(path: Path, thumbnail: Path) -> tuple[str, int, int]:
    """Extension, width and height of a picture that decodes to its last pixel."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            _refuse_unsuitable(image)
            image.verify()
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            extension = EXTENSIONS[image.format or ""]
            shown = ImageOps.exif_transpose(image)
            width, height = shown.size
            _save_thumbnail(shown, thumbnail)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("This is not a PNG, JPEG or WebP picture.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels() from None
    except Exception:  # noqa: BLE001 a decoder that is fed with damaged or hostile bytes raises anything
        raise UserError("The picture is damaged or cut off. Save it again and upload the new file.") from None
    return extension, width, height


def _refuse_unsuitable(image: Image.Image) -> None:
    """Before a pixel is decoded: too many of them, several pictures in one, or a kind that no trainer reads."""
    if image.width * image.height > settings.MAX_PICTURE_PIXELS:
        raise _too_many_pixels()
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UserError("Animated pictures cannot be trained on. Save one frame as a picture.")
    if image.mode not in READABLE_MODES:
        raise UserError(f"Pictures of the kind {image.mode} are not supported. Save it with 8 bits a channel.")


def _too_many_pixels() -> UserError:
    return UserError(f"The picture has more than {settings.MAX_PICTURE_PIXELS // 10**6} megapixels. Save it smaller.")


def _save_thumbnail(image: Image.Image, path: Path) -> None:
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    small.save(path, "WEBP", quality=80)


def store_picture(staged: StagedPicture) -> None:
    """Move a staged picture to its place by content. One that is there already counts as used from now on."""
    target = picture_path(staged.sha256, staged.extension)
    if not touch_picture(staged.sha256, staged.extension):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.path.replace(target)
        _sync_folder(target.parent)
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_thumbnail(sha256: str, extension: str) -> Path:
    """The thumbnail of a stored picture, drawn when the cache lost it. Raises FileNotFoundError without the picture."""
    thumbnail = thumbnail_path(sha256)
    if thumbnail.exists():
        return thumbnail
    thumbnail.parent.mkdir(parents=True, exist_ok=True)
    partial = thumbnail.with_suffix(f".{uuid.uuid4()}")
    with _decoding, Image.open(picture_path(sha256, extension), formats=("PNG", "JPEG", "WEBP")) as image:
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
