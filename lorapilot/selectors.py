"""What the core reads for a user. Jobs: lorapilot.jobs.visible_jobs."""

from __future__ import annotations

from django.db.models import QuerySet
from django.http import Http404

from lorapilot.models import ApiToken, User


def tokens_of(user: User) -> QuerySet[ApiToken]:
    """The user's own tokens, newest first; expired ones too, until the next one is made."""
    return ApiToken.objects.filter(user=user).order_by("-created")


def get_token(user: User, token_key: str) -> ApiToken:
    """The user's own token that starts so. Raises Http404 for everybody else's."""
    found = tokens_of(user).filter(token_key=token_key).first()
    if found is None:
        raise Http404
    return found
