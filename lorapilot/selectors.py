"""What the core reads for a user. Jobs: lorapilot.jobs.visible_jobs."""

from __future__ import annotations

from django.contrib.auth.models import Group
from django.db.models import Q, QuerySet
from django.http import Http404

from lorapilot import vault
from lorapilot.access import Shared
from lorapilot.models import ApiToken, Secret, User


def tokens_of(user: User) -> QuerySet[ApiToken]:
    """The user's own tokens, newest first; expired ones too, until the next one is made."""
    return ApiToken.objects.filter(user=user).order_by("-created")


def get_token(user: User, token_key: str) -> ApiToken:
    """The user's own token that starts so. Raises Http404 for everybody else's."""
    found = tokens_of(user).filter(token_key=token_key).first()
    if found is None:
        raise Http404
    return found


def secrets_of(user: User) -> QuerySet[Secret]:
    """Which keys of other services the user has set, and when."""
    return Secret.objects.filter(owner=user)


def reveal_secret(user: User | None, name: str) -> str:
    """The user's key of another service, for a process that works for them; empty when none is set or it can no
    longer be read. Never for a page or an answer of the API."""
    found = Secret.objects.filter(owner=user, name=name).first() if user else None
    return (vault.decrypt(found.value) or "") if found else ""


def shareable_groups(user: User, *, thing: Shared) -> QuerySet[Group]:
    """The groups that `user` may pick: their own, those that see the thing already, and all for staff."""
    if user.is_staff:
        return Group.objects.order_by("name")
    mine = Q(pk__in=user.groups.values("pk")) | Q(pk__in=thing.groups.values("pk"))
    return Group.objects.filter(mine).order_by("name")
