"""Files to the browser: any size, resumable, without a copy in memory.

`send_file` answers GET and HEAD with ETag and Last-Modified, 304 for what the client has, 206 for one range (several
ranges get the whole file, which the standard allows), 416 for one outside the file. The caller has checked who asks.
Under ASGI the file is read in threads, 256 KiB at a time, while lorapilot/server.py waits for slow clients. Behind
nginx (X_ACCEL_PREFIX) nginx sends it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import get_conditional_response
from django.utils.http import content_disposition_header, http_date, parse_http_date_safe

CHUNK_BYTES = 256 * 1024
ONE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class OutsideError(Exception):
    """The range that the client asks for is not in the file."""


class Body:
    """`size` bytes of an open file, read in threads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.left = size

    def read(self) -> bytes:
        chunk = self.file.read(min(CHUNK_BYTES, self.left))
        self.left -= len(chunk)
        return chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await asyncio.to_thread(self.read):
            yield chunk

    def close(self) -> None:
        """Django calls it when the response is sent, or given up."""
        self.file.close()


class SyncBody(Body):
    """The same for a handler without an event loop, such as Django's test client."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")


def send_file(
    request: HttpRequest, path: Path, *, filename: str = "", content_type: str, as_attachment: bool = True
) -> HttpResponseBase:
    """The response for one file, from views of either kind. Raises Http404 when there is no such file."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Http404 from None
    status = os.fstat(file.fileno())
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",  # kept by the browser, but asked about: access may end
        "Content-Disposition": content_disposition_header(as_attachment, filename or path.name) or "inline",
        "Content-Type": content_type,
        "ETag": f'"{status.st_size:x}-{status.st_mtime_ns:x}"',
        "Last-Modified": http_date(status.st_mtime),
    }
    response = _respond(request, file, status.st_size, headers) if not settings.X_ACCEL_PREFIX else None
    if isinstance(response, StreamingHttpResponse):
        return response
    file.close()
    return response or HttpResponse(headers=headers | {"X-Accel-Redirect": _internal_address(path)})


def _respond(request: HttpRequest, file: BinaryIO, size: int, headers: dict[str, str]) -> HttpResponseBase:
    """A streaming response takes the file over; with any other the file is not needed."""
    whole = HttpResponse(headers=headers | {"Content-Length": str(size)})
    modified = parse_http_date_safe(headers["Last-Modified"])
    checked = get_conditional_response(request, headers["ETag"], modified, whole)
    if checked is not whole or request.method == "HEAD":
        return checked or whole
    try:
        wanted = _wanted_range(request, headers, size)
    except OutsideError:
        outside = {"Content-Range": f"bytes */{size}"}
        return HttpResponse(status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=outside)
    first, last = wanted or (0, size - 1)
    length = last - first + 1
    file.seek(first)
    body = Body(file, length) if isinstance(request, ASGIRequest) else SyncBody(file, length)
    headers = headers | {"Content-Length": str(length)}
    if wanted is None:
        return StreamingHttpResponse(body, headers=headers)
    headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
    return StreamingHttpResponse(body, status=HTTPStatus.PARTIAL_CONTENT, headers=headers)


def _wanted_range(request: HttpRequest, headers: dict[str, str], size: int) -> tuple[int, int] | None:
    """First and last byte of the one range asked for; None: the whole file. Raises OutsideError."""
    found = ONE_RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
    if not found or found.groups() == ("", ""):
        return None
    if request.headers.get("If-Range", headers["ETag"]) not in (headers["ETag"], headers["Last-Modified"]):
        return None  # the file has changed since the client got its part
    start, end = found.groups()
    if start:
        first, last = int(start), min(int(end or size - 1), size - 1)
        if end and int(end) < first:
            return None  # not a valid range: as if it were not there
    else:
        first, last = max(size - int(end), 0), size - 1
    if first >= size or first > last:
        raise OutsideError
    return first, last


def _internal_address(path: Path) -> str:
    """Where nginx finds the file: below the prefix, as it lies below the workspace."""
    relative = path.resolve().relative_to(settings.WORKSPACE.resolve())
    return f"{settings.X_ACCEL_PREFIX.rstrip('/')}/{quote(relative.as_posix())}"
