"""What every API endpoint shares: tokens and their scopes, pages, the body's limit, and errors as `{"detail": …}`.

The core's own endpoints are in api_views.py: REST framework imports this module for its settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import IO, TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import RequestDataTooBig, TooManyFieldsSent, TooManyFilesSent
from django.core.validators import ProhibitNullCharactersValidator
from django.http import Http404
from django.utils import timezone
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.plumbing import build_bearer_security_scheme_object
from knox.auth import TokenAuthentication
from knox.crypto import hash_token
from rest_framework.exceptions import APIException, AuthenticationFailed, ParseError, ValidationError
from rest_framework.pagination import PageNumberPagination
from rest_framework.parsers import JSONParser
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.validators import ProhibitSurrogateCharactersValidator

from lorapilot.errors import UserError
from lorapilot.models import ApiToken, TokenScope, User

if TYPE_CHECKING:
    from drf_spectacular.openapi import AutoSchema
    from rest_framework.views import APIView

TOKEN = re.compile(rb"lp_[0-9a-f]{64}")


class ScopedTokenAuthentication(TokenAuthentication):
    """knox's header and hashes, our own look-up: by hash, expired tokens kept and told apart from unknown ones, and the
    time of last use written at most once a minute."""

    def authenticate_credentials(self, token: bytes) -> tuple[User, ApiToken]:
        digest = hash_token(token.decode()) if TOKEN.fullmatch(token) else ""
        found = ApiToken.objects.select_related("user").filter(digest=digest).first()
        if found is None:
            raise AuthenticationFailed("This token is unknown or was revoked. Create one on the account page.")
        now = timezone.now()
        if found.expiry is not None and found.expiry <= now:
            raise AuthenticationFailed("This token has expired. Create a new one on the account page.")
        if not found.user.is_active:
            raise AuthenticationFailed("This account is deactivated. Ask the operator.")
        if found.last_used_at is None or (now - found.last_used_at).total_seconds() > 60:
            ApiToken.objects.filter(pk=found.pk).update(last_used_at=now)
        return found.user, found


class TokenScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]  # its metaclass has no types
    """How the OpenAPI schema describes our tokens."""

    target_class = "lorapilot.api.ScopedTokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: AutoSchema) -> dict[str, Any]:
        return build_bearer_security_scheme_object(header_name="Authorization", token_prefix="Token")  # noqa: S106


class TokenScopePermission(BasePermission):
    """A token with scope `read` only reads. Sessions may do what their user may."""

    message = "This token can only read. Create one with scope `write` on the account page."

    def has_permission(self, request: Request, view: APIView) -> bool:
        token = request.auth
        if request.method in SAFE_METHODS or not isinstance(token, ApiToken):
            return True
        return token.scope == TokenScope.WRITE


class Pages(PageNumberPagination):
    page_size_query_param = "page_size"
    max_page_size = 500


class BodyTooLarge(APIException):
    status_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    default_detail = "That is more than one request may carry."


class BoundedJSONParser(JSONParser):
    """REST framework reads a JSON body without a limit; ours has one. Deep nesting is bad input, not a crash; so is a
    text that no database keeps and no answer can repeat, since fields without a check of their own take any."""

    def parse(
        self, stream: IO[Any], media_type: str | None = None, parser_context: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        length = int((parser_context or {})["request"].META.get("CONTENT_LENGTH") or 0)
        if length > settings.MAX_JSON_BYTES:
            raise BodyTooLarge(f"A JSON body may have at most {settings.MAX_JSON_BYTES:,} bytes.")
        try:
            data: Any = super().parse(stream, media_type, parser_context)
            for field, value in data.items() if isinstance(data, dict) else [("", data)]:
                if refused := _wrong_character(field):
                    raise ValidationError(refused)
                if refused := _wrong_character(value):
                    raise ValidationError({field: [refused]} if field else refused)
        except RecursionError:
            raise ParseError("This JSON is nested too deeply.") from None
        return data  # type: ignore[no-any-return]  # what a client sends


def _wrong_character(value: Any) -> str:
    """The first null character, or half of a character, in a text anywhere in `value`: REST framework's sentence."""
    if isinstance(value, str):
        if "\0" in value:
            return str(ProhibitNullCharactersValidator.message)
        half = None if value.isascii() else next((c for c in value if "\ud800" <= c <= "\udfff"), None)
        return ProhibitSurrogateCharactersValidator.message.format(code_point=ord(half)) if half else ""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((refused for one in inner if (refused := _wrong_character(one))), "")


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """Every error is `{"detail": "a sentence"}`; bad input also has `errors`: `{field: ["a sentence", …]}`."""
    from rest_framework.views import exception_handler as default_exception_handler  # it imports this module

    if isinstance(error, UserError):
        errors: dict[str, list[str]] = {}
        for one in error.all:
            if one.field:
                errors.setdefault(one.field, []).append(one.message)
        return Response({"detail": error.message} | ({"errors": errors} if errors else {}), status=error.status)
    if isinstance(error, RequestDataTooBig | TooManyFieldsSent | TooManyFilesSent):
        error = BodyTooLarge()
    elif isinstance(error, Http404):
        error = Http404("There is no such thing, or it is not shared with you.")
    response = default_exception_handler(error, context)
    if response is not None and isinstance(error, ValidationError):
        response.data = _validation_errors(error.detail)
    return response


def _validation_errors(detail: Any) -> dict[str, Any]:
    errors = detail if isinstance(detail, dict) else {"non_field_errors": detail}
    field, found = next(iter(errors.items()))
    sentence = _first_sentence(found)
    return {"detail": sentence if field == "non_field_errors" else f"{field}: {sentence}", "errors": errors}


def _first_sentence(found: Any) -> str:
    """The first message of nested lists and objects; empty ones stand for rows without errors."""
    while isinstance(found, dict | list):
        rows = found.values() if isinstance(found, dict) else found
        found = next((row for row in rows if row), "This is not valid.")
    return str(found)
