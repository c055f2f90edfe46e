"""People at the door: sign-up is closed unless SIGNUP_OPEN opens it, failed attempts are limited on every way in,
and who came and went is in the audit trail."""

from __future__ import annotations

from typing import Any, cast

from allauth.account.adapter import DefaultAccountAdapter, get_adapter
from django.conf import settings
from django.contrib.auth import signals
from django.db.models import Q
from django.dispatch import receiver
from django.http import HttpRequest
from django.urls import reverse

from lorapilot.models import User
from lorapilot.services import record


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.SIGNUP_OPEN)

    def get_password_change_redirect_url(self, request: HttpRequest) -> str:
        return reverse("account")


def signup(_request: HttpRequest) -> dict[str, bool]:
    """Context processor: whether the sign-in page offers to sign up."""
    return {"is_signup_open": bool(settings.SIGNUP_OPEN)}


def find_person(request: HttpRequest, *, username: str, password: str) -> User | None:
    """The active user of that name (or e-mail address) and password.

    Counts failed attempts together with the sign-in page; raises Django's ValidationError after too many.
    """
    user = get_adapter(request).authenticate(request, username=username, password=password)
    return cast("User", user) if user is not None and user.is_active else None


@receiver(signals.user_logged_in)
def record_sign_in(request: HttpRequest, user: User, **_kwargs: Any) -> None:
    record(user, "signed in", user.username, request)


@receiver(signals.user_logged_out)
def record_sign_out(request: HttpRequest, user: User | None, **_kwargs: Any) -> None:
    if user is not None:
        record(user, "signed out", user.username, request)


@receiver(signals.user_login_failed)
def record_failed_sign_in(credentials: dict[str, Any], request: HttpRequest | None = None, **_kwargs: Any) -> None:
    """Names only people who exist: what was typed instead of a name may be somebody's password."""
    name = credentials.get("username") or credentials.get("email") or ""
    known = User.objects.filter(Q(username__iexact=name) | Q(email__iexact=name)).first() if name else None
    record(None, "sign-in failed", known.username if known else "(unknown name)", request)
