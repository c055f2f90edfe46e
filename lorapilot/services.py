"""What the core writes: API tokens, secrets, socket tickets, and the audit trail."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from datetime import timedelta

from allauth.account.adapter import get_adapter
from django.conf import settings
from django.contrib.auth.models import Group
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone
from knox.models import get_digest_token
from knox.settings import CONSTANTS

from lorapilot import vault
from lorapilot.access import SharedToEdit
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import ApiToken, AuditEntry, Secret, SecretName, SocketTicket, TokenScope, User

FIRST_ADMIN = "admin"
TOKEN_DAYS_AT_MOST = 365
TOKENS_AT_MOST = 50  # of one person
SECRET_CHARACTERS_AT_MOST = 500
TICKET_LIFETIME = timedelta(seconds=30)


def record(actor: User | None, action: str, subject: object, request: HttpRequest | None = None) -> AuditEntry:
    """Add a line to the audit trail: who did what to what, and from which address."""
    return AuditEntry.objects.create(
        actor=actor, action=action[:60], subject=str(subject)[:200], address=_address_of(request)
    )


def _address_of(request: HttpRequest | None) -> str | None:
    """The client's address, X-Forwarded-For read as far as TRUSTED_PROXIES says."""
    if request is None:
        return None
    try:
        address: str = get_adapter(request).get_client_ip(request)
    except PermissionDenied:  # no address: a unix socket
        return None
    return address


# --- Sharing ----------------------------------------------------------------------------------------------------------
@transaction.atomic
def share(
    thing: SharedToEdit,
    *,
    groups: Iterable[Group] | None = None,
    editor_groups: Iterable[Group] | None = None,
    actor: User | None = None,
    request: HttpRequest | None = None,
) -> None:
    """From now on members of exactly these groups look at the thing, and those of `editor_groups` also change it.

    What is left out stays: groups that still look keep what they could change, and groups that change also look.
    """
    may_edit = set(thing.editor_groups.all() if editor_groups is None else editor_groups)
    may_look = set(thing.groups.all() if groups is None else groups)
    if editor_groups is None:
        may_edit &= may_look
    may_look |= may_edit
    thing.groups.set(may_look)
    thing.editor_groups.set(may_edit)
    if actor is not None:
        told = sorted(f"{group}{' (edit)' if group in may_edit else ''}" for group in may_look)
        record(actor, f"{thing._meta.verbose_name} shared", f"{thing}: {', '.join(told) or '-'}", request)


# --- API tokens -------------------------------------------------------------------------------------------------------
@transaction.atomic
def create_first_admin() -> str:
    """A superuser `admin` with a random password, where there is no superuser. Returns the password, kept nowhere."""
    if User.objects.filter(is_superuser=True).exists() or User.objects.filter(username=FIRST_ADMIN).exists():
        return ""
    password = secrets.token_urlsafe(12)
    record(None, "first administrator created", User.objects.create_superuser(FIRST_ADMIN, password=password))
    return password


@transaction.atomic
def create_token(
    user: User, *, name: str, scope: str = TokenScope.WRITE, days: int | None = None, request: HttpRequest | None = None
) -> tuple[ApiToken, str]:
    """A new token of `user`'s for `days` days. Returns its row and the token itself, which nobody can read again."""
    days = settings.API_TOKEN_DAYS if days is None else days
    if not name.strip():
        raise UserError("Give the token a name, such as the computer or script that will use it.", field="name")
    if scope not in TokenScope.values:
        raise UserError("The scope is either read or write.", field="scope")
    if not 1 <= days <= TOKEN_DAYS_AT_MOST:
        raise UserError(f"Choose between 1 and {TOKEN_DAYS_AT_MOST} days.", field="days")
    now = timezone.now()
    ApiToken.objects.filter(user=user, expiry__lt=now).delete()
    if ApiToken.objects.filter(user=user).count() >= TOKENS_AT_MOST:
        raise Conflict(f"You have {TOKENS_AT_MOST} tokens. Revoke one that you no longer use.")
    digest, token = get_digest_token()
    row = ApiToken(
        digest=digest,
        token_key=token[: CONSTANTS.TOKEN_KEY_LENGTH],
        user=user,
        name=name.strip(),
        scope=scope,
        expiry=now + timedelta(days=days),
    )
    row.save(force_insert=True)
    record(user, "token created", row, request)
    return row, token


@transaction.atomic
def revoke_token(token: ApiToken, *, actor: User, request: HttpRequest | None = None) -> None:
    """From now on the token opens nothing."""
    record(actor, "token revoked", f"{token} of {token.user}", request)
    token.delete()


# --- Keys of other services -------------------------------------------------------------------------------------------
@transaction.atomic
def set_secret(user: User, *, name: str, value: str, request: HttpRequest | None = None) -> Secret:
    """Keep `user`'s key of another service, in place of the one that was there. Nobody is shown it again.

    Raises Missing (no such service), UserError (not a key).
    """
    _require_secret_name(name)
    value = value.strip()
    if not value:
        raise UserError("Enter the key.", field="value")
    if len(value) > SECRET_CHARACTERS_AT_MOST or not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(
            "This is not a key: it has spaces, characters that keys do not have, or is too long.", field="value"
        )
    secret, _ = Secret.objects.update_or_create(owner=user, name=name, defaults={"value": vault.encrypt(value)})
    record(user, "key of another service set", secret.get_name_display(), request)
    return secret


@transaction.atomic
def delete_secret(user: User, *, name: str, request: HttpRequest | None = None) -> None:
    """Forget the key. Raises Missing when there is none."""
    _require_secret_name(name)
    deleted, _ = Secret.objects.filter(owner=user, name=name).delete()
    if not deleted:
        raise Missing("You have set no key of this service.")
    record(user, "key of another service deleted", SecretName(name).label, request)


def _require_secret_name(name: str) -> None:
    if name not in SecretName.values:
        raise Missing(f"Keys are kept of these services: {', '.join(SecretName.values)}.")


# --- Socket tickets ---------------------------------------------------------------------------------------------------
def issue_ticket(user: User) -> str:
    """A ticket with which an API client may open one websocket as `user` within 30 seconds."""
    now = timezone.now()
    SocketTicket.objects.filter(expires_at__lt=now).delete()
    ticket = secrets.token_urlsafe(32)
    SocketTicket.objects.create(digest=digest_of(ticket), user=user, expires_at=now + TICKET_LIFETIME)
    return ticket


def redeem_ticket(ticket: str) -> User | None:
    """Whose ticket it is, and the end of it: of two who bring the same ticket, one gets the user. None when there is
    no such ticket, it has expired, or its user was deactivated."""
    with transaction.atomic():
        row = SocketTicket.objects.select_related("user").filter(digest=digest_of(ticket)).first()
        if row is None:
            return None
        deleted, _ = SocketTicket.objects.filter(pk=row.pk).delete()
    is_valid = deleted and row.expires_at > timezone.now() and row.user.is_active
    return row.user if is_valid else None


def digest_of(secret: str) -> str:
    """What is kept of a secret that somebody shows once."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
