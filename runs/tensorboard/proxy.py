"""One question to a TensorBoard on a unix socket, and its answer, streamed. HTTP/1.0: the end of the connection is the
end of the answer. Only named headers pass, in either direction: no cookie and no token of ours goes in, none comes out.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, parse_headers
from pathlib import Path

from runs.tensorboard.viewers import short_address

CHUNK_BYTES = 64 * 1024
PATIENCE_SECONDS = 60.0  # until the head of an answer; a start takes about three
PASSED_IN = ("Accept", "Accept-Encoding", "Content-Type", "X-TensorBoard-Feature-Flags", "X-XSRF-Protected")
PASSED_OUT = ("Cache-Control", "Content-Encoding", "Content-Length", "Content-Type", "Expires", "Vary")


class NoAnswer(Exception):
    """TensorBoard has ended, or says nothing."""


class Body:
    """What is left of the answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._reader.read(CHUNK_BYTES):
            yield chunk

    def close(self) -> None:
        """Django calls it when the response is sent, or given up."""
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Body


async def ask(address: Path, method: str, target: str, headers: Mapping[str, str], content: bytes) -> Answer:
    """`target` is a path with its query, percent-encoded. Raises NoAnswer."""
    passed = {name: headers[name] for name in PASSED_IN if name in headers}
    passed |= {"Host": "tensorboard", "Content-Length": str(len(content))}
    lines = [f"{method} {target} HTTP/1.0", *(f"{name}: {value}" for name, value in passed.items()), "", ""]
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            with short_address(address) as path:
                reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write("\r\n".join(lines).encode("latin-1") + content)
                return _answer(await reader.readuntil(b"\r\n\r\n"), Body(reader, writer))
            except BaseException:
                writer.close()
                raise
    except (OSError, EOFError, TimeoutError, ValueError, HTTPException, asyncio.LimitOverrunError) as error:
        raise NoAnswer from error


def _answer(head: bytes, body: Body) -> Answer:
    status, _, rest = head.partition(b"\r\n")
    found = parse_headers(io.BytesIO(rest))
    passed = {name: found[name] for name in PASSED_OUT if name in found}
    return Answer(int(status.split()[1]), passed, body)
