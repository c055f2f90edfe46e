"""The admin: what services own is shown, and changed only by actions that call those services.

`ServiceOwnedAdmin` is the base of every ModelAdmin of ours.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from django.contrib import admin, messages
from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.admin import UserAdmin
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest

from lorapilot import jobs
from lorapilot.access import signed_in
from lorapilot.accounts import find_person
from lorapilot.models import JOB_ENDED, ApiToken, AuditEntry, Invitation, Job, Secret, SocketTicket, User
from lorapilot.services import revoke_token

M = TypeVar("M", bound=models.Model)


class LimitedAuthenticationForm(AdminAuthenticationForm):
    """The admin's own sign-in, with the limit on failed attempts that the sign-in page has."""

    def clean(self) -> dict[str, Any]:
        username, password = self.cleaned_data.get("username"), self.cleaned_data.get("password")
        if self.request and username and password:
            self.user_cache = find_person(self.request, username=username, password=password)
            if self.user_cache is None:
                raise self.get_invalid_login_error()
            self.confirm_login_allowed(self.user_cache)
        return self.cleaned_data


admin.site.login_form = LimitedAuthenticationForm
admin.site.site_header = admin.site.site_title = "LoRA Pilot"


class ServiceOwnedAdmin(admin.ModelAdmin[M]):
    """Rows that services own. The admin adds none; it changes only the fields in `editable`, and deletes only where
    `is_deletable` (override `delete_model` when a service does that). Actions that call services ask for
    `permissions=["operate"]`: Django's change permission of the model."""

    editable: ClassVar[tuple[str, ...]] = ()
    is_deletable: ClassVar[bool] = False

    def get_readonly_fields(self, request: HttpRequest, obj: M | None = None) -> list[str]:
        names = [field.name for field in (*self.opts.fields, *self.opts.many_to_many)]
        return [name for name in (*names, *self.readonly_fields) if name not in self.editable]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return bool(self.editable) and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: M | None = None) -> bool:
        return self.is_deletable and super().has_delete_permission(request, obj)

    def has_operate_permission(self, request: HttpRequest) -> bool:
        return super().has_change_permission(request)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[M]) -> None:
        """One by one, so that `delete_model` and its service see each."""
        for row in queryset:
            self.delete_model(request, row)


admin.site.register(User, UserAdmin)


@admin.register(ApiToken)
class ApiTokenAdmin(ServiceOwnedAdmin[ApiToken]):
    """Deleting a token revokes it."""

    is_deletable = True
    list_display = ("name", "user", "token_key", "scope", "created", "last_used_at", "expiry")
    list_filter = ("scope",)
    list_select_related = ("user",)
    search_fields = ("name", "token_key", "user__username")
    fields = ("name", "user", "token_key", "scope", "created", "last_used_at", "expiry")

    def delete_model(self, request: HttpRequest, obj: ApiToken) -> None:
        revoke_token(obj, actor=signed_in(request), request=request)


@admin.register(Invitation)
class InvitationAdmin(ServiceOwnedAdmin[Invitation]):
    """Made and revoked at /account/invitations/."""

    list_display = ("note", "state", "invited_by", "created_at", "expires_at", "used_at", "used_by")
    list_select_related = ("invited_by", "used_by")
    search_fields = ("note", "used_by__username")
    fields = ("note", "groups", "invited_by", "created_at", "expires_at", "revoked_at", "used_at", "used_by")


@admin.register(Secret)
class SecretAdmin(ServiceOwnedAdmin[Secret]):
    """That there is a key, never the key: not even its ciphertext."""

    is_deletable = True
    list_display = ("owner", "name", "updated_at")
    list_filter = ("name",)
    list_select_related = ("owner",)
    fields = ("owner", "name", "updated_at")


@admin.register(Job)
class JobAdmin(ServiceOwnedAdmin[Job]):
    list_display = ("label", "owner", "status", "done", "total", "created_at", "heartbeat_at", "finished_at")
    list_filter = ("status", "kind")
    list_select_related = ("owner",)
    search_fields = ("label", "owner__username")
    date_hierarchy = "created_at"
    actions = ("cancel",)

    @admin.action(description="Cancel the selected jobs", permissions=["operate"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        unfinished = queryset.exclude(status__in=JOB_ENDED)
        for job in unfinished:
            jobs.cancel(job)
        self.message_user(request, "Asked the selected jobs to stop.", messages.SUCCESS)


@admin.register(AuditEntry)
class AuditEntryAdmin(ServiceOwnedAdmin[AuditEntry]):
    list_display = ("at", "actor", "action", "subject", "address")
    list_filter = ("action",)
    list_select_related = ("actor",)
    search_fields = ("subject", "actor__username", "address")
    date_hierarchy = "at"


@admin.register(SocketTicket)
class SocketTicketAdmin(ServiceOwnedAdmin[SocketTicket]):
    # They live for seconds, and must not stand in the way of deleting their user.
    is_deletable = True
    list_display = ("user", "expires_at")
    list_select_related = ("user",)
    fields = ("user", "expires_at")
