"""What every API endpoint shares: token scopes, pages, and errors as `{"detail": …}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.utils import timezone
from knox.auth import TokenAuthentication
from rest_framework.pagination import PageNumberPagination
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request
from rest_framework.response import Response

from lorapilot.errors import UserError
from lorapilot.models import ApiToken, TokenScope

if TYPE_CHECKING:
    from rest_framework.views import APIView


class ScopedTokenAuthentication(TokenAuthentication):
    """knox, plus the time of last use (written at most once a minute)."""

    def authenticate_credentials(self, token: bytes) -> tuple[Any, Any]:
        user, found = super().authenticate_credentials(token)
        now = timezone.now()
        if found.last_used_at is None or (now - found.last_used_at).total_seconds() > 60:
            ApiToken.objects.filter(pk=found.pk).update(last_used_at=now)
        return user, found


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


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """A UserError as its status and one `detail` sentence, with the field it belongs to."""
    from rest_framework.views import exception_handler as default_exception_handler  # it imports this module

    if isinstance(error, UserError):
        body = {"detail": error.message} | ({"field": error.field} if error.field else {})
        return Response(body, status=error.status)
    return default_exception_handler(error, context)
