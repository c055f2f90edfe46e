"""The admin looks at base models; the registry's services alone write them."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from lorapilot.access import signed_in
from lorapilot.admin import ServiceOwnedAdmin
from lorapilot.errors import UserError
from models_registry import services
from models_registry.models import Adapter, AdapterTag, AdapterUpload, BaseModel, ModelComponent, Pull


class ModelComponentInline(admin.TabularInline[ModelComponent, BaseModel]):
    model = ModelComponent
    extra = 0
    can_delete = False
    readonly_fields = ("role", "path", "is_attached", "bytes", "dtype", "parameters", "sha256")

    def has_add_permission(self, request: HttpRequest, obj: BaseModel | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: BaseModel | None = None) -> bool:
        return False


@admin.register(BaseModel)
class BaseModelAdmin(ServiceOwnedAdmin[BaseModel]):
    list_display = ("name", "architecture", "resolution", "bytes", "sha256", "registered_by", "created_at")
    list_filter = ("architecture", "layout")
    list_select_related = ("registered_by",)
    search_fields = ("name", "path", "sha256")
    inlines = (ModelComponentInline,)
    actions = ("hash_again",)

    @admin.action(description="Compute the checksums again", permissions=["operate"])
    def hash_again(self, request: HttpRequest, queryset: QuerySet[BaseModel]) -> None:
        for base_model in queryset:
            try:
                services.rehash_base_model(base_model, requested_by=signed_in(request))
            except UserError as error:
                self.message_user(request, error.message, messages.WARNING)
            else:
                self.message_user(request, f"The checksums of {base_model.name} are being computed again.")


@admin.register(ModelComponent)
class ModelComponentAdmin(ServiceOwnedAdmin[ModelComponent]):
    list_display = ("path", "base_model", "role", "is_attached", "bytes", "dtype", "parameters", "sha256")
    list_filter = ("role", "is_attached")
    list_select_related = ("base_model",)
    search_fields = ("path", "sha256")


@admin.register(Pull)
class PullAdmin(ServiceOwnedAdmin[Pull]):
    list_display = ("name", "subdir", "requested_by", "job", "updated_at")
    list_select_related = ("requested_by", "job")
    search_fields = ("name",)


@admin.register(Adapter)
class AdapterAdmin(ServiceOwnedAdmin[Adapter]):
    list_display = ("name", "owner", "architecture", "algorithm", "rank", "alpha", "bytes", "sha256", "created_at")
    list_filter = ("architecture", "algorithm")
    list_select_related = ("owner",)
    search_fields = ("name", "owner__username", "sha256", "trigger_word")


@admin.register(AdapterTag)
class AdapterTagAdmin(ServiceOwnedAdmin[AdapterTag]):
    list_display = ("word", "adapter")
    list_select_related = ("adapter",)
    search_fields = ("word",)


@admin.register(AdapterUpload)
class AdapterUploadAdmin(ServiceOwnedAdmin[AdapterUpload]):
    list_display = ("filename", "owner", "offset", "size", "created_at", "finished_at")
    list_select_related = ("owner",)
