"""People at the door: sign-up is closed unless SIGNUP_OPEN or an invitation opens it, failed attempts are limited on
every way in, and who came and went is in the audit trail."""

from __future__ import annotations

from typing import Any, cast

from allauth.account.adapter import DefaultAccountAdapter, get_adapter
from django.conf import settings
from django.contrib.auth import signals
from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.db.models import Q
from django.dispatch import receiver
from django.forms import BaseForm
from django.http import HttpRequest
from django.urls import reverse

from lorapilot import invitations
from lorapilot.errors import Conflict
from lorapilot.models import User
from lorapilot.services import record

INVITATION = "invitation"  # in a session: the hash of the secret that its browser has brought


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.SIGNUP_OPEN) or invitations.find_open(request.session.get(INVITATION, "")) is not None

    def save_user(
        self,
        request: HttpRequest,
        user: AbstractBaseUser,
        form: BaseForm,
        commit: bool = True,  # noqa: FBT001, FBT002 allauth's signature
    ) -> AbstractBaseUser:
        """The new account, in the groups of the invitation that it uses up. Raises Conflict when that has just lost
        its force, and sign-up is closed."""
        with transaction.atomic():
            made: AbstractBaseUser = super().save_user(request, user, form, commit)
            digest = request.session.pop(INVITATION, "")
            has_joined = bool(digest) and invitations.redeem(digest, cast("User", made), request=request)
            if not has_joined and not settings.SIGNUP_OPEN:
                raise Conflict("This invitation can no longer be used. Ask for a new one.")
        return made

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
