"""The endpoint of one chunked upload. Apps say how it is found, and what happens when all bytes are there."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, TypeVar

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from rest_framework.parsers import BaseParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot import uploads
from lorapilot.errors import Conflict, UserError
from lorapilot.models import ChunkedUpload

READ_BYTES = 1024**2
OFFSET = re.compile(r"[0-9]{1,19}")
CHECKSUM = re.compile(r"sha256 ([A-Za-z0-9+/]{43}=)")  # as in the tus protocol
CHUNK = "application/offset+octet-stream"

V = TypeVar("V", bound=type[APIView])


class ChunkParser(BaseParser):
    """Leaves the body where it is: the view reads it in blocks."""

    media_type = CHUNK

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        return stream


class ChunksView(APIView):
    """GET, PATCH and DELETE of an upload. A subclass has `serializer_class`, `find` and `finish`."""

    parser_classes = (ChunkParser,)
    serializer_class: Any

    def find(self, request: Request, upload_id: Any) -> ChunkedUpload:
        """The upload of this user. Raises Http404."""
        raise NotImplementedError

    def finish(self, upload: Any) -> None:
        """All bytes are there: check them, and queue the job."""
        raise NotImplementedError

    def get(self, request: Request, upload_id: Any) -> Response:
        return self._answer(self.find(request, upload_id))

    def patch(self, request: Request, upload_id: Any) -> Response:
        upload = self.find(request, upload_id)
        try:
            if not upload.finished_at:
                offset, sha256 = _given_offset(request), _given_checksum(request)
                uploads.append_chunk(upload, chunk=_blocks(request), offset=offset, sha256=sha256)
            if upload.offset < upload.size:
                return Response(status=HTTPStatus.NO_CONTENT, headers=offset_headers(upload.offset))
            self.finish(upload)
        except Conflict as error:
            upload.refresh_from_db()
            body = {"detail": error.message, "offset": upload.offset}
            return Response(body, status=error.status, headers=offset_headers(upload.offset))
        return self._answer(upload)

    def delete(self, request: Request, upload_id: Any) -> Response:
        uploads.cancel_upload(self.find(request, upload_id))
        return Response(status=HTTPStatus.NO_CONTENT)

    def _answer(self, upload: ChunkedUpload) -> Response:
        return Response(self.serializer_class(upload).data, headers=offset_headers(upload.offset))


def chunks_schema(serializer: Any) -> Callable[[V], V]:
    """How the OpenAPI schema describes a ChunksView with this serializer."""
    return extend_schema_view(
        get=extend_schema(responses=serializer, description="How many bytes have arrived, and how the job goes."),
        delete=extend_schema(responses={204: None}, description="Cancel: forget the upload and its bytes."),
        patch=extend_schema(
            request={CHUNK: OpenApiTypes.BINARY},
            parameters=[
                _header("Upload-Offset", "Where the bytes begin.", type_=int, required=True),
                _header("Upload-Checksum", "`sha256`, a space, the piece's in base64."),
            ],
            responses={200: serializer, 204: None},
            description="Add bytes. 204 while some are missing; 200 with the job after the last; 409 with the right "
            "`Upload-Offset` when they begin elsewhere.",
        ),
    )


def _header(name: str, description: str, *, type_: type = str, required: bool = False) -> OpenApiParameter:
    return OpenApiParameter(name, type_, OpenApiParameter.HEADER, required=required, description=description)


def _given_offset(request: Request) -> int:
    value = request.headers.get("Upload-Offset", "")
    if not OFFSET.fullmatch(value):
        raise UserError("Send the header Upload-Offset: the place of the chunk's first byte.", field="offset")
    return int(value)


def _given_checksum(request: Request) -> str:
    """Of the piece, hexadecimal; empty when the client sent none."""
    value = request.headers.get("Upload-Checksum", "")
    if not value:
        return ""
    found = CHECKSUM.fullmatch(value)
    if not found:
        raise UserError("Send the header Upload-Checksum as sha256, a space, and the checksum in base64.")
    return base64.b64decode(found[1]).hex()


def _blocks(request: Request) -> Iterator[bytes]:
    stream: Any = request.data or io.BytesIO()  # as ChunkParser left it; without a body there is no stream
    while block := stream.read(READ_BYTES):
        yield block


def offset_headers(offset: int) -> dict[str, str]:
    return {"Upload-Offset": str(offset), "Cache-Control": "no-store"}
