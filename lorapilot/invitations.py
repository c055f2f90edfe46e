"""Invitations: links with which one person each makes an account, though sign-up is closed. Staff make them.

Guarantee: of several who sign up with one link, one gets an account. An invitation that was used, was revoked or has
expired opens nothing. The secret of a link exists in the link alone: its row has a hash.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import timedelta

from django.contrib.auth.models import Group
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone

from lorapilot.access import require_staff
from lorapilot.errors import Conflict, UserError
from lorapilot.models import Invitation, User
from lorapilot.services import digest_of, record

DAYS, DAYS_AT_MOST = 7, 90
OPEN_AT_MOST = 500
STAFF_ONLY = "Only staff invite people."


def list_invitations(user: User) -> QuerySet[Invitation]:
    """All of them, for staff. Raises NotAllowed."""
    require_staff(user, STAFF_ONLY)
    return Invitation.objects.select_related("invited_by", "used_by").prefetch_related("groups")


@transaction.atomic
def create_invitation(
    staff: User,
    *,
    note: str = "",
    days: int = DAYS,
    groups: Iterable[Group] = (),
    request: HttpRequest | None = None,
) -> tuple[Invitation, str]:
    """An invitation for one person, who will be in `groups`. Returns its row and the secret of its link, which nobody
    can read again. Raises NotAllowed, UserError, Conflict."""
    require_staff(staff, STAFF_ONLY)
    if not 1 <= days <= DAYS_AT_MOST:
        raise UserError(f"Choose between 1 and {DAYS_AT_MOST} days.", field="days")
    if _open().count() >= OPEN_AT_MOST:
        raise Conflict(f"{OPEN_AT_MOST} invitations are open. Revoke some first.")
    secret = secrets.token_urlsafe(32)
    invitation = Invitation.objects.create(
        digest=digest_of(secret),
        note=note.strip(),
        invited_by=staff,
        expires_at=timezone.now() + timedelta(days=days),
    )
    invitation.groups.set(groups)
    record(staff, "invitation created", invitation, request)
    return invitation, secret


def revoke_invitation(invitation: Invitation, *, actor: User, request: HttpRequest | None = None) -> Invitation:
    """From now on its link opens nothing. Raises NotAllowed, and Conflict when it was used or revoked already."""
    require_staff(actor, STAFF_ONLY)
    unused = Invitation.objects.filter(pk=invitation.pk, used_at=None, revoked_at=None)
    with transaction.atomic():
        if not unused.update(revoked_at=timezone.now()):
            raise Conflict("This invitation was used or revoked already.")
        record(actor, "invitation revoked", invitation, request)
    invitation.refresh_from_db()
    return invitation


def find_open(digest: str) -> Invitation | None:
    """The invitation whose secret has this hash, while it can be used."""
    return _open().filter(digest=digest).first()


def redeem(digest: str, user: User, *, request: HttpRequest | None = None) -> bool:
    """Use the invitation up for this new account, which joins its groups. False when it cannot be used. The caller
    makes the account in the same transaction."""
    invitation = find_open(digest)
    if invitation is None or not _open().filter(pk=invitation.pk).update(used_at=timezone.now(), used_by=user):
        return False
    user.groups.add(*invitation.groups.all())
    record(user, "invitation used", invitation, request)
    return True


def _open() -> QuerySet[Invitation]:
    return Invitation.objects.filter(used_at=None, revoked_at=None, expires_at__gt=timezone.now())
