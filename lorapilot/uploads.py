"""Files of any size, in chunks that continue where they stopped. Apps keep the rows (ChunkedUpload) and say what the
job at the end does; what is checked, and where the bytes wait, is the same for all.

Guarantee: the offset moves only once the bytes are on the disk; of two writers one wins; a finished upload has one job.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from lorapilot import jobs, partials
from lorapilot.errors import Conflict, UserError
from lorapilot.models import JOB_ENDED, ChunkedUpload, Job, User

SHA256 = re.compile(r"[0-9a-f]{64}")
STALE_AFTER = timedelta(days=7)
MAX_OPEN_UPLOADS = 100  # of one person, of one kind

U = TypeVar("U", bound=ChunkedUpload)


class WrongOffset(Conflict):
    """The chunk does not begin where the upload ends. `offset` is where it does."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"{offset} bytes have arrived. Go on from there.", field="offset")
        self.offset = offset


def start_upload(model: type[U], owner: User, *, size: int, sha256: str = "", **values: Any) -> U:
    """An empty upload of `size` bytes; `sha256` (hex) is checked when all are there, if given. `values` are further
    fields of the row."""
    if not 1 <= size <= settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES // 1024**3
        raise UserError(f"A file has between 1 byte and {limit} GiB. Split a larger archive.", field="size")
    if sha256 and not SHA256.fullmatch(sha256.lower()):
        raise UserError("The checksum is not a sha256: 64 hexadecimal digits.", field="sha256")
    partials.ensure_room(size)
    with transaction.atomic():
        if model._default_manager.filter(owner=owner, finished_at=None).count() >= MAX_OPEN_UPLOADS:
            raise Conflict(f"You have {MAX_OPEN_UPLOADS} unfinished uploads. Finish or cancel some first.")
        return model._default_manager.create(owner=owner, size=size, sha256=sha256.lower(), **values)


def append_chunk(upload: U, *, offset: int, chunk: Iterable[bytes], sha256: str = "") -> U:
    """Add bytes at `offset`, which must be where the upload ends; of two writers, one wins and one gets Conflict.

    The offset moves only once the bytes are on the disk, so a client that lost the answer asks for it and goes on.
    """
    rows = type(upload)._default_manager
    with partials.locked_partial(upload.pk) as file:
        upload.refresh_from_db()
        if upload.finished_at or offset != upload.offset:
            raise WrongOffset(upload.offset)
        size = partials.write_chunk(file, offset=offset, room=upload.size - offset, chunk=chunk, sha256=sha256)
        moved = rows.filter(pk=upload.pk, offset=offset, finished_at=None).update(offset=F("offset") + size)
        if not moved:
            upload.refresh_from_db()
            raise WrongOffset(upload.offset)
    upload.offset = offset + size
    return upload


def finish_upload(upload: ChunkedUpload, work: jobs.Work, *, label: str) -> Job:
    """Check that the file arrived whole, and queue `work(progress, upload_id)`. Calling it again gives the same job."""
    rows = type(upload)._default_manager
    upload.refresh_from_db()
    if upload.job:
        return upload.job
    if upload.offset != upload.size:
        raise WrongOffset(upload.offset)
    if upload.sha256 and partials.hash_partial(upload.pk) != upload.sha256:
        rows.filter(pk=upload.pk, finished_at=None).update(offset=0)
        raise UserError(
            "The file arrived damaged: its checksum differs. Upload it again from the start.", field="sha256"
        )
    with transaction.atomic():
        locked = rows.select_for_update().get(pk=upload.pk)
        if not locked.job:
            locked.job = jobs.enqueue(work, label=label[:200], owner=locked.owner, upload_id=str(upload.pk))
            locked.finished_at = timezone.now()
            locked.save(update_fields=["job", "finished_at"])
    upload.job, upload.finished_at = locked.job, locked.finished_at
    return locked.job


def cancel_upload(upload: ChunkedUpload) -> None:
    """Forget an upload and its bytes. A job that works on it is asked to stop; what it has done stays."""
    if upload.job and upload.job.status not in JOB_ENDED:
        jobs.cancel(upload.job)
    upload_id = upload.pk  # deletion takes it away
    upload.delete()
    partials.remove_partial(upload_id)


def remove_stale_uploads(model: type[ChunkedUpload]) -> int:
    """Remove uploads that began more than 7 days ago, and the bytes of those whose job ended. Returns how many
    uploads."""
    rows = model._default_manager
    stale = rows.filter(created_at__lt=timezone.now() - STALE_AFTER)
    found = list(stale.filter(Q(job=None) | Q(job__status__in=JOB_ENDED)).values_list("pk", flat=True))
    rows.filter(pk__in=found).delete()
    ended = rows.filter(pk__in=partials.kept_uploads(), job__status__in=JOB_ENDED)
    for upload_id in (*found, *ended.values_list("pk", flat=True)):
        partials.remove_partial(upload_id)
    partials.remove_older_than(partials.uploads_root(), seconds=STALE_AFTER.total_seconds())
    return len(found)


def plain_name(name: str) -> str:
    """The last part of a client's file name, for people to read; nothing here uses it as a path."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(character for character in last if character.isprintable())[-255:] or "unnamed"
