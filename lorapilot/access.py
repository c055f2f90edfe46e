"""The one way from (user, id) to an object: the owner, members of the groups it is shared with, and staff see it;
the owner, staff, and members of groups that may edit it change it; the owner and staff share and delete it; for
everybody else it does not exist (404)."""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar, cast

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser, Group
from django.core.exceptions import ValidationError
from django.db import models
from django.http import Http404, HttpRequest

from lorapilot.errors import NotAllowed
from lorapilot.models import User

Viewer = AbstractBaseUser | AnonymousUser


def signed_in(request: HttpRequest) -> User:
    """The user of a request that was let in: LoginRequiredMiddleware and the API's permissions see to it."""
    return cast("User", request.user)


def require_staff(user: User | None, refusal: str) -> None:
    """Raises NotAllowed for others. None is the installation itself: its start, its commands."""
    if user is not None and not user.is_staff:
        raise NotAllowed(refusal)


def is_number(text: str) -> bool:
    """A number that any database can compare with an id."""
    return text.isascii() and text.isdigit() and len(text) < 19


class SharedQuerySet(models.QuerySet[Any]):
    def visible_to(self, user: Viewer) -> Self:
        if not user.is_authenticated or not user.is_active:
            return self.none()
        if getattr(user, "is_staff", False):
            return self
        shared = self.model._default_manager.filter(groups__user=user).values("pk")
        return self.filter(models.Q(owner=user) | models.Q(pk__in=shared))


class Shared(models.Model):
    """Something that a user owns and may share with groups, who then may look at it."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    groups = models.ManyToManyField(Group, blank=True, related_name="+", help_text="Members of these groups can look.")

    class Meta:
        abstract = True

    def is_owned_by(self, user: Viewer) -> bool:
        """The owner, and staff in their stead: who may share and delete it."""
        return user.is_active and (getattr(user, "is_staff", False) or self.owner_id == user.pk)

    def is_editable_by(self, user: Viewer) -> bool:
        return self.is_owned_by(user)


class SharedToEdit(Shared):
    """The same, which groups may also change. Those are among `groups`: `lorapilot.services.share` sees to it."""

    editor_groups = models.ManyToManyField(
        Group, blank=True, related_name="+", help_text="Of those groups, these can also change it."
    )

    class Meta:
        abstract = True

    def is_editable_by(self, user: Viewer) -> bool:
        if self.is_owned_by(user):
            return True
        return user.is_active and self.editor_groups.filter(user=user).exists()


class HasVisibleTo(Protocol):
    def visible_to(self, user: Any) -> Any: ...


T = TypeVar("T", bound=models.Model)


def get_visible(model: type[T], user: Viewer, **lookup: Any) -> T:
    """The object that `lookup` names, when `user` may look at it. Raises Http404 otherwise, whatever the reason."""
    manager: HasVisibleTo = model._default_manager  # type: ignore[assignment]  # every model passed here has one
    try:
        found: T | None = manager.visible_to(user).filter(**lookup).first()
    except (TypeError, ValueError, ValidationError):  # an address with something that no key can be
        found = None
    if found is None:
        raise Http404
    return found


def get_editable(model: type[T], user: Viewer, **lookup: Any) -> T:
    """As `get_visible`; raises NotAllowed when `user` may look at the object but not change it."""
    found = get_visible(model, user, **lookup)
    if not found.is_editable_by(user):  # type: ignore[attr-defined]  # as above
        raise NotAllowed("Only the owner and staff can change this. Ask the owner, or make a copy of your own.")
    return found


def get_owned(model: type[T], user: Viewer, **lookup: Any) -> T:
    """As `get_editable`; raises NotAllowed also for members of groups that may change the object: they neither share
    nor delete it."""
    found = get_editable(model, user, **lookup)
    if not found.is_owned_by(user):  # type: ignore[attr-defined]  # as above
        raise NotAllowed("Only the owner and staff can share and delete this. Ask the owner.")
    return found
