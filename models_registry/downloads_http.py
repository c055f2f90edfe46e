"""Files from the network onto the disk: from allowed hosts, resumable, checked, complete or absent.

- Only https, and only hosts of DOWNLOAD_HOSTS, at every redirect anew; a token goes to the host that it is for and to
  no other. DOWNLOAD_LOCAL_HOSTS names exceptions by `host:port`.
- A name is looked up once: all its addresses have to be public, and the connection goes to one of those very addresses.
- What arrives is kept in `<name>.part`, with the server's ETag beside it. After a break, or a kill, the rest is asked
  for with Range and If-Range; a server that knows no Range, or has another file by now, means: from the start.
- Size and checksum are compared before the file gets its name. What is there already is never overwritten.

Runs in jobs and commands, in several threads; nothing here touches the database.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

from django.conf import settings

from lorapilot import workspace
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.outbound import Connection, Interrupted, Place, find_place

MOST_REDIRECTS = 5
MOST_JSON_BYTES = 32 * 1024**2
MOST_STARTS = 3  # of one file that turns out to be another one each time
MOST_ENDS = 3  # at the same byte, before it was all
CHUNK_BYTES = 1024**2
PAUSES = (1, 2, 5, 10, 30)  # seconds before another try; what has arrived starts them anew
RETRIED = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
# Civitai's front refuses Python's own name.
USER_AGENT = "LoRA-Pilot/1.0 (model download)"

Tell = Callable[[int], None]
T = TypeVar("T")


class Stopped(Exception):
    """Somebody called `Client.stop`."""


class Denied(NotAllowed):
    """The server wants a token, or another one: 401 or 403."""


@dataclass(frozen=True, slots=True)
class Remote:
    """One file on a server, and what is known about it before it arrives."""

    url: str
    size: int
    sha256: str = ""
    git_sha1: str = ""  # of a small file on the hub: git's name of its content
    is_of_manifest: bool = False  # the checksum is written in the manifest, the server knows nothing of it


# --- Who may be asked -------------------------------------------------------------------------------------------------
def place_of(url: str) -> Place:
    """Look the address up. Raises UserError when it may not be asked, Interrupted when the name cannot be found now."""
    return find_place(url, local_hosts=settings.DOWNLOAD_LOCAL_HOSTS, check_host=_require_allowed)


def _require_allowed(host: str) -> None:
    if not is_allowed_host(host):
        raise UserError(
            f"{host} is not among the hosts that models come from (setting DOWNLOAD_HOSTS). Whoever runs this "
            "installation can add it."
        )


def is_allowed_host(host: str) -> bool:
    """`example.org` is itself alone, `*.example.org` all names below it. The hub's mirror counts as named."""
    patterns = [*settings.DOWNLOAD_HOSTS, urlsplit(settings.HF_ENDPOINT).hostname or ""]
    return any(fnmatchcase(host, pattern.lower()) for pattern in patterns if pattern)


# --- Asking -----------------------------------------------------------------------------------------------------------
class Client:
    """Asks servers, for one pull. `tokens`: host → token; one goes to that host alone."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = tokens or {}
        self.received = 0  # bytes of files over the network, by all threads
        self._stopped = threading.Event()
        self._open: set[Connection] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Ends what other threads are doing at once; what has arrived is kept."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                connection.hang_up()

    def json(self, url: str) -> Any:
        """A short JSON answer. Raises UserError."""
        return self._retry(lambda: self._json(url))

    def size(self, url: str) -> int:
        """How many bytes the file has. Raises UserError when the server does not say."""
        return self._retry(lambda: self._size(url))

    def fetch(self, remote: Remote, target: Path, tell: Tell) -> None:
        """Bring the file to `target`, which exists then, complete and checked. `tell` hears how many bytes are there.

        Raises UserError (a sentence why not), Stopped. What has arrived is kept for the next try.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _accept_existing(remote, target, tell, self._check_stopped)
            return
        with _Part.locked(target, remote, tell) as part:
            self._fill(remote, part)
            part.become(target)

    # --- one file
    def _fill(self, remote: Remote, part: _Part) -> None:
        failures = 0
        while part.size < remote.size:
            before = part.size
            try:
                self._continue(remote, part)
            except Interrupted as error:
                self._check_stopped()
                failures = 0 if part.size > before else failures + 1
                self._pause(failures, error)
        part.check()

    def _continue(self, remote: Remote, part: _Part) -> None:
        """Ask for what is missing, and write it down until the connection ends."""
        headers = {"Range": f"bytes={part.size}-", "If-Range": part.etag} if part.size and part.etag else {}
        with self._ask(remote.url, headers) as response:
            if not _goes_on(response, part, remote):
                _refuse_shorter(response, part, remote)
                part.restart(response.headers.get("ETag", ""))
                _refuse_other_size(response, remote)
            while chunk := self._read(response):
                if part.size + len(chunk) > remote.size:
                    raise UserError(f"The server sends more than the {remote.size:,} bytes that it announced.")
                part.write(chunk)
                with self._lock:
                    self.received += len(chunk)
        if part.size < remote.size:
            part.note_end()
            raise Interrupted(f"The connection to {urlsplit(remote.url).hostname} broke.")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        self._check_stopped()
        try:
            return response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(f"The connection broke: {error}.") from error

    # --- one answer
    def _json(self, url: str) -> Any:
        with self._ask(url, {}) as response:
            body = b""
            while chunk := self._read(response):
                body += chunk
                if len(body) > MOST_JSON_BYTES:
                    raise UserError(f"{urlsplit(url).hostname} sends a list that is too long.")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise UserError(
                f"{urlsplit(url).hostname} does not answer as the hub does (setting HF_ENDPOINT)."
            ) from None

    def _size(self, url: str) -> int:
        with self._ask(url, {}) as response:  # GET: presigned addresses of storages know no HEAD
            length, is_page = _length(response), response.headers.get_content_type() == "text/html"
        if is_page:  # a sign-in page: Civitai sends there who has no token
            raise Denied(
                f"{urlsplit(url).hostname} sends a page instead of the file: it wants a token that may have it."
            )
        if length is None:
            raise UserError(f"{urlsplit(url).hostname} does not say how large the file is, so it is not pulled.")
        return length

    @contextlib.contextmanager
    def _ask(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to GET, with redirects followed. Raises UserError, Denied, Interrupted."""
        first: tuple[str, str, int] | None = None
        for _ in range(MOST_REDIRECTS + 1):
            place = place_of(url)
            first = first or place.origin
            with self._send(place, {**headers, **self._token_for(place, first)}) as response:
                if response.status not in REDIRECTS:
                    _refuse(response, place)
                    yield response
                    return
                url = urljoin(url, response.headers.get("Location", ""))
        raise UserError(f"{place.host} sends from address to address, more than {MOST_REDIRECTS} times.")

    def _token_for(self, place: Place, first: tuple[str, str, int]) -> dict[str, str]:
        token = self.tokens.get(place.host) if place.origin == first else None
        return {"Authorization": f"Bearer {token}"} if token else {}

    @contextlib.contextmanager
    def _send(self, place: Place, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        connection = Connection(place)
        with self._lock:
            self._open.add(connection)
        try:
            self._check_stopped()
            try:
                sent = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
                connection.request("GET", place.target, headers=sent)
                response = connection.getresponse()
            except ssl.SSLCertVerificationError:
                raise UserError(f"{place.host} has no valid certificate.") from None
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(f"{place.host} does not answer: {error}.") from error
            with response:  # it may outlive its connection
                yield response
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    # --- trying again
    def _retry(self, ask: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                return ask()
            except Interrupted as error:
                self._check_stopped()
                failures += 1
                self._pause(failures, error)

    def _pause(self, failures: int, error: Interrupted) -> None:
        if failures > len(PAUSES):
            raise UserError(f"{error} Try again later: what has arrived is kept.") from None
        self._stopped.wait(PAUSES[max(0, failures - 1)])
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped


def _refuse(response: http.client.HTTPResponse, place: Place) -> None:
    """Raises what an answer other than the file means."""
    status = response.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        return
    if status in RETRIED:
        raise Interrupted(f"{place.host} answers {status} {response.reason}.")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise Denied(f"{place.host} does not give this file out without a token that may have it.")
    if status == HTTPStatus.NOT_FOUND:
        raise UserError(f"{place.host} has no such file or repository.")
    raise UserError(f"{place.host} answers {status} {response.reason}.")


def _goes_on(response: http.client.HTTPResponse, part: _Part, remote: Remote) -> bool:
    """Does the answer continue what we have? Otherwise the file begins anew."""
    if response.status == HTTPStatus.OK or not (part.size and part.etag):
        return False
    begins = f"bytes {part.size}-{remote.size - 1}/{remote.size}"
    return response.headers.get("Content-Range") == begins and response.headers.get("ETag") in (part.etag, None)


def _refuse_shorter(response: http.client.HTTPResponse, part: _Part, remote: Remote) -> None:
    """What is there is all that the server has: it says so when it is asked for the rest."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status != HTTPStatus.OK and total == str(part.size):
        raise _sent_less(remote, part.size)


def _sent_less(remote: Remote, sent: int) -> UserError:
    server = urlsplit(remote.url).hostname
    return UserError(
        f"{server} announced {remote.size:,} bytes and sent {sent:,}: the file there is not what it is said to be. "
        "Tell whoever runs that server, or name another source in the manifest."
    )


def _refuse_other_size(response: http.client.HTTPResponse, remote: Remote) -> None:
    if response.status != HTTPStatus.OK:
        raise Interrupted("The server has another file by now.")
    length = _length(response)
    if length is not None and length != remote.size:
        raise UserError(
            f"The server's file has {length:,} bytes instead of {remote.size:,}: it was changed. Start again."
        )


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdigit() else None


# --- On the disk ------------------------------------------------------------------------------------------------------
class _Part:
    """`<name>.part`: the beginning of a file, and what is needed to go on with it. One process has it at a time."""

    def __init__(self, file: BinaryIO, path: Path, remote: Remote, tell: Tell) -> None:
        self.file = file
        self.path = path
        self.etag_path = path.with_name(f"{path.name}.etag")
        self.remote = remote
        self.tell = tell
        self.size = 0
        self.etag = ""
        self.starts = 0
        self.ends: Counter[tuple[str, int]] = Counter()
        self.digests = _Digests(remote)

    @classmethod
    @contextlib.contextmanager
    def locked(cls, target: Path, remote: Remote, tell: Tell) -> Iterator[_Part]:
        path = target.with_name(f"{target.name}.part")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Conflict(f"{target.name} is being pulled already.") from None
            if not _is_still_at(file, path):  # who had the lock until now has finished, and the file its name
                raise Conflict(f"{target.name} is being pulled already.")
            part = cls(file, path, remote, tell)
            part.resume()
            yield part

    def resume(self) -> None:
        """Take over what an earlier try has left, when the server can be asked whether it still fits."""
        try:
            self.etag = self.etag_path.read_text()
        except OSError:
            self.etag = ""
        size = os.fstat(self.file.fileno()).st_size
        if not is_strong(self.etag) or size > self.remote.size:
            self._empty()
            return
        while chunk := self.file.read(CHUNK_BYTES):
            self._count(chunk)

    def restart(self, etag: str) -> None:
        """From the first byte, of the file that the server calls `etag`."""
        self.starts += 1
        if self.starts > MOST_STARTS:
            raise UserError("The server's file keeps changing while it is pulled. Try again later.")
        self._empty()
        self.etag = etag if is_strong(etag) else ""
        self.etag_path.write_text(self.etag)

    def note_end(self) -> None:
        """The server closed before everything was there. Raises UserError when it always does so at the same byte."""
        end = self.etag, self.size
        self.ends[end] += 1
        if self.ends[end] >= MOST_ENDS:
            raise _sent_less(self.remote, self.size)

    def _empty(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.size = 0
        self.digests = _Digests(self.remote)
        self.tell(0)

    def write(self, chunk: bytes) -> None:
        try:
            self.file.write(chunk)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError("The disk is full. Delete what is no longer needed, then go on.") from None
        self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self.digests.update(chunk)
        self.size += len(chunk)
        self.tell(self.size)

    def check(self) -> None:
        """Raises UserError, and starts over next time, when the content is not what it should be."""
        if self.digests.match(self.remote):
            return
        found = self.digests.sha256.hexdigest() if self.digests.sha256 else ""
        self._empty()
        self.etag_path.unlink(missing_ok=True)
        if self.remote.is_of_manifest:
            raise UserError(
                f"{self.path.stem} does not have the checksum that the manifest names: its sha256 is {found}. "
                "Check the manifest's line; if that is right, the server has another file."
            )
        raise UserError(f"{self.path.stem} arrived damaged: its checksum is not the expected one. Pull it again.")

    def become(self, target: Path) -> None:
        """The file has its name from here on, on the disk for sure."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if target.exists():
            raise Conflict(f"{target.name} has appeared meanwhile. Move it away, or keep it.")
        self.path.rename(target)
        self.etag_path.unlink(missing_ok=True)
        workspace.sync_folder(target.parent)


def _is_still_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


class _Digests:
    """The checksums that are known of a file, computed while it arrives."""

    def __init__(self, remote: Remote) -> None:
        self.sha256 = hashlib.sha256() if remote.sha256 else None
        header = f"blob {remote.size}\0".encode()
        self.git_sha1 = hashlib.sha1(header, usedforsecurity=False) if remote.git_sha1 else None

    def update(self, chunk: bytes) -> None:
        for digest in (self.sha256, self.git_sha1):
            if digest is not None:
                digest.update(chunk)

    def match(self, remote: Remote) -> bool:
        found = (self.sha256.hexdigest() if self.sha256 else "", self.git_sha1.hexdigest() if self.git_sha1 else "")
        return found == (remote.sha256, remote.git_sha1)


def is_strong(etag: str) -> bool:
    """Only a strong ETag says that two answers are parts of the same bytes (RFC 9110, 13.1.5)."""
    return len(etag) > 2 and etag.startswith('"') and etag.endswith('"') and etag.isascii() and etag.isprintable()


def _accept_existing(remote: Remote, target: Path, tell: Tell, check_stopped: Callable[[], None]) -> None:
    """A file of that name is there: fine when it is the same one."""
    digests, size = _Digests(remote), 0
    if target.is_file() and target.stat().st_size == remote.size:
        with target.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                check_stopped()
                digests.update(chunk)
                size += len(chunk)
                tell(size)
        if digests.match(remote):
            return
    raise Conflict(f"{target.name} is there already, and is another file. Move it away first.")
