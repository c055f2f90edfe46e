"""How OpenAI (and servers like it), Gemini and xAI are asked about a picture, and what their answers mean.

Plain data in, plain data out: nothing here opens a connection or touches the database.
OpenAI and xAI: POST <url>/chat/completions, the picture as a data URI in `image_url`. Gemini: POST
<url>/models/<model>:generateContent, the picture as `inlineData`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlsplit

from django.conf import settings

from datasets.captioning.enums import Captioner
from lorapilot.errors import UserError

MOST_REASON_CHARACTERS = 300
# OpenAI and xAI have given `max_tokens` another name; servers like theirs know the old one.
NEW_NAME_HOSTS = {"api.openai.com", "api.x.ai"}


class ProviderError(UserError):
    """The provider refuses, or cannot be reached: nothing on our side is wrong with the request."""

    status = HTTPStatus.FAILED_DEPENDENCY


class PictureDeclined(ProviderError):
    """There is no caption for this picture; another one may get one. Tokens were used all the same."""

    def __init__(self, message: str, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        super().__init__(message)
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens


class RequestRefused(PictureDeclined):
    """The provider does not take the request: because of the picture, or of what all requests have in common."""


@dataclass(frozen=True, slots=True)
class Answer:
    caption: str
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Provider:
    """Whom to ask, in a user's name. The key is never shown, not even in a traceback."""

    captioner: Captioner
    name: str
    model: str
    url: str
    key: str = field(repr=False)
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Protocol:
    path: Callable[[str], str]  # of a model
    headers: Callable[[str], dict[str, str]]  # of a key; none without one
    body: Callable[[Provider, str, bytes, int], dict[str, Any]]  # provider, prompt, JPEG, most tokens
    read: Callable[[Mapping[str, Any]], Answer]


def provider_of(captioner: Captioner, model: str, key: str) -> Provider:
    """Raises UserError when the provider needs a key and there is none."""
    url = settings.CAPTION_URLS[captioner]
    name = NAMES[captioner]
    if not needs_key(captioner):
        name = str(urlsplit(url).hostname)
    elif not key:
        raise UserError(f"Set your key of {name} on your account page first.", field="captioner")
    return Provider(captioner, name, model, url, key, GEMINI if captioner == Captioner.GEMINI else CHAT)


def needs_key(captioner: Captioner) -> bool:
    """Not the operator's own server that speaks as OpenAI does, unless it wants one."""
    return captioner != Captioner.OPENAI or urlsplit(settings.CAPTION_URLS[captioner]).hostname == "api.openai.com"


NAMES = {Captioner.OPENAI: "OpenAI", Captioner.GEMINI: "Google Gemini", Captioner.XAI: "xAI"}


# --- OpenAI, xAI, and servers like them -------------------------------------------------------------------------------
def _chat_body(provider: Provider, prompt: str, jpeg: bytes, max_tokens: int) -> dict[str, Any]:
    picture = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    limit = "max_completion_tokens" if urlsplit(provider.url).hostname in NEW_NAME_HOSTS else "max_tokens"
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": picture}}]
    return {"model": provider.model, "messages": [{"role": "user", "content": content}], limit: max_tokens}


def _read_chat(answer: Mapping[str, Any]) -> Answer:
    usage = answer.get("usage") or {}
    used = {"input_tokens": _count(usage, "prompt_tokens"), "output_tokens": _count(usage, "completion_tokens")}
    choice = answer["choices"][0]
    message = choice["message"]
    if message.get("refusal"):
        raise PictureDeclined(f"The model declines: {_short(message['refusal'])}", **used)
    if choice.get("finish_reason") == "content_filter":
        raise PictureDeclined("The provider's content filter stopped the answer.", **used)
    return _answer(message.get("content"), is_cut=choice.get("finish_reason") == "length", used=used)


# --- Gemini -----------------------------------------------------------------------------------------------------------
def _gemini_body(_provider: Provider, prompt: str, jpeg: bytes, max_tokens: int) -> dict[str, Any]:
    picture = {"inlineData": {"mimeType": "image/jpeg", "data": base64.b64encode(jpeg).decode()}}
    contents = [{"role": "user", "parts": [{"text": prompt}, picture]}]
    return {"contents": contents, "generationConfig": {"maxOutputTokens": max_tokens}}


def _read_gemini(answer: Mapping[str, Any]) -> Answer:
    usage = answer.get("usageMetadata") or {}
    written = _count(usage, "candidatesTokenCount") + _count(usage, "thoughtsTokenCount")
    used = {"input_tokens": _count(usage, "promptTokenCount"), "output_tokens": written}
    blocked = (answer.get("promptFeedback") or {}).get("blockReason")
    if blocked:
        raise PictureDeclined(f"The provider blocks this picture or prompt: {_short(blocked)}.", **used)
    candidate = answer["candidates"][0]
    finish = candidate.get("finishReason", "STOP")
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    if finish not in ("STOP", "MAX_TOKENS"):
        raise PictureDeclined(f"The provider stopped the answer: {_short(finish)}.", **used)
    return _answer(text, is_cut=finish == "MAX_TOKENS", used=used)


# --- Both -------------------------------------------------------------------------------------------------------------
def _answer(text: Any, *, is_cut: bool, used: dict[str, int]) -> Answer:
    caption = text.strip() if isinstance(text, str) else ""
    if caption and not is_cut:
        return Answer(caption, **used)
    if is_cut:
        raise PictureDeclined("The answer was cut off. Allow more tokens, then try again.", **used)
    raise PictureDeclined("The answer is empty.", **used)


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0


def _short(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= MOST_REASON_CHARACTERS else f"{line[:MOST_REASON_CHARACTERS]}…"


def reason_in(answer: Any, key: str) -> str:
    """What the provider says is wrong, without the key, which some repeat."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = str(message or "")
    return _short(text.replace(key, "…") if key else text)


CHAT = Protocol(
    path=lambda _model: "/chat/completions",
    headers=lambda key: {"Authorization": f"Bearer {key}"} if key else {},
    body=_chat_body,
    read=_read_chat,
)
GEMINI = Protocol(
    path=lambda model: f"/models/{quote(model.removeprefix('models/'), safe='')}:generateContent",
    headers=lambda key: {"x-goog-api-key": key} if key else {},
    body=_gemini_body,
    read=_read_gemini,
)
