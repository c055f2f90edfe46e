"""One question to a provider over the network, and every way in which it can go wrong, told apart:

`Busy` (another try may work), `PictureDeclined` (of this picture alone), `ProviderError` (of every picture).
Redirects are not followed: a key goes to the host that the operator named, and to no other.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from django.conf import settings

from datasets.captioning.providers import Answer, Provider, ProviderError, RequestRefused, reason_in
from lorapilot.errors import UserError
from lorapilot.outbound import Connection, Interrupted, find_place

TIMEOUT_SECONDS = 90  # a model that thinks takes its time
MOST_ANSWER_BYTES = 4 * 1024**2
LONGEST_PAUSE_SECONDS = 600
USER_AGENT = "LoRA-Pilot/1.0 (captions)"
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
WITHOUT_CREDIT = {"insufficient_quota", "billing_hard_limit_reached"}


Headers = http.client.HTTPMessage | dict[str, str]


class Busy(Exception):
    """Another try may work, after `after_seconds` if the provider says when."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class Asker:
    """Asks one provider, from several threads."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._open: set[Connection] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Ends what other threads are asking, at once."""
        with self._lock:
            self._stopped = True
            for connection in self._open:
                connection.hang_up()

    def ask(self, prompt: str, jpeg: bytes, max_tokens: int) -> Answer:
        """Raises Busy, PictureDeclined, ProviderError."""
        provider = self.provider
        body = json.dumps(provider.protocol.body(provider, prompt, jpeg, max_tokens)).encode()
        status, headers, raw = self._post(body)
        answer = _parsed(raw)
        if status != HTTPStatus.OK:
            raise _refusal(provider, status, headers, answer)
        if not isinstance(answer, dict):
            raise Busy(f"{provider.name} sends an answer that is not JSON.")
        try:
            return provider.protocol.read(answer)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Busy(f"{provider.name} sends an answer without a caption in it.") from None

    def _post(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        provider = self.provider
        try:
            place = find_place(
                provider.url + provider.protocol.path(provider.model), local_hosts=settings.CAPTION_LOCAL_HOSTS
            )
        except UserError as error:
            raise ProviderError(f"{error.message} Whoever runs this installation can change it.") from None
        except Interrupted as error:
            raise Busy(str(error)) from None
        with self._connected(Connection(place, timeout=TIMEOUT_SECONDS)) as connection:
            sent = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": USER_AGENT}
            try:
                connection.request("POST", place.target, body, sent | provider.protocol.headers(provider.key))
                response = connection.getresponse()
                raw = response.read(MOST_ANSWER_BYTES + 1)
            except ssl.SSLCertVerificationError:
                raise ProviderError(f"{place.host} has no valid certificate.") from None
            except (OSError, http.client.HTTPException):
                raise Busy(f"{place.host} does not answer, or broke off.") from None
        if len(raw) > MOST_ANSWER_BYTES:
            raise Busy(f"{place.host} sends an answer that is too long.")
        return response.status, response.headers, raw

    @contextlib.contextmanager
    def _connected(self, connection: Connection) -> Iterator[Connection]:
        with self._lock:
            if self._stopped:
                raise Busy("Stopped.")
            self._open.add(connection)
        try:
            yield connection
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _refusal(provider: Provider, status: int, headers: Headers, answer: Any) -> Exception:
    """What an answer other than 200 means."""
    name, reason = provider.name, reason_in(answer, provider.key)
    said = f": {_sentence(reason)}" if reason else f" (status {status})."
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or _is_about_the_key(answer, reason):
        return ProviderError(f"{name} does not accept your key{said} You can set another on your account page.")
    if status == HTTPStatus.PAYMENT_REQUIRED or _code_of(answer) in WITHOUT_CREDIT:
        return ProviderError(f"Your account at {name} has no credit left{said}")
    if status in RETRIED:
        return _busy(name, status, said, _seconds_to_wait(headers, answer))
    if status == HTTPStatus.NOT_FOUND:
        return ProviderError(f"{name} has no model called {provider.model} for you{said}")
    of_request = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
    kind = RequestRefused if status in of_request else ProviderError
    return kind(f"{name} refuses{said}")


def _sentence(reason: str) -> str:
    """What the provider says, with a full stop: ours go on behind it."""
    return reason if reason.endswith((".", "!", "?", "…")) else f"{reason}."


def _busy(name: str, status: int, said: str, after: float | None) -> Exception:
    if after is not None and after > LONGEST_PAUSE_SECONDS:
        return ProviderError(f"{name} wants to be asked again in {after / 60:.0f} minutes only{said}")
    return Busy(f"{name} is busy or has a fault (status {status}){said if said.startswith(':') else '.'}", after)


def _error_in(answer: Any) -> dict[str, Any]:
    error = answer.get("error") if isinstance(answer, dict) else None
    return error if isinstance(error, dict) else {}


def _code_of(answer: Any) -> str:
    return str(_error_in(answer).get("code"))


def _is_about_the_key(answer: Any, reason: str) -> bool:
    """Gemini and xAI answer 400 to a wrong key."""
    return "API_KEY_INVALID" in json.dumps(_error_in(answer).get("details")) or "incorrect api key" in reason.lower()


def _seconds_to_wait(headers: Headers, answer: Any) -> float | None:
    """Retry-After in seconds or as a date; else Gemini's `retryDelay`, such as "34s"."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    for detail in _error_in(answer).get("details") or []:
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        with contextlib.suppress(ValueError):
            if isinstance(delay, str) and delay.endswith("s"):
                return max(0.0, float(delay[:-1]))
    return None
