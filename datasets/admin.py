"""Datasets in the admin: to look at. The pages and the API change them, through services."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest

from datasets import services
from datasets.models import (
    BulkEdit,
    CaptionChange,
    Captioning,
    CaptionProposal,
    Dataset,
    DatasetVersion,
    Picture,
    TagList,
    Upload,
)
from lorapilot.admin import ServiceOwnedAdmin


@admin.register(Dataset)
class DatasetAdmin(ServiceOwnedAdmin[Dataset]):
    list_display = ("name", "owner", "picture_count", "trigger_word", "updated_at")
    list_select_related = ("owner",)
    search_fields = ("name", "owner__username")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).annotate(picture_count=Count("pictures"))

    @admin.display(description="pictures", ordering="picture_count")
    def picture_count(self, dataset: Any) -> int:
        return int(dataset.picture_count)


@admin.register(Picture)
class PictureAdmin(ServiceOwnedAdmin[Picture]):
    list_display = ("original_name", "dataset", "width", "height", "caption", "created_at")
    list_select_related = ("dataset",)
    search_fields = ("original_name", "caption", "dataset__name", "sha256")


@admin.register(DatasetVersion)
class DatasetVersionAdmin(ServiceOwnedAdmin[DatasetVersion]):
    list_display = ("name", "number", "owner", "picture_count", "digest", "created_at")
    list_select_related = ("owner",)
    search_fields = ("name", "digest", "owner__username")

    @admin.display(description="pictures")
    def picture_count(self, version: DatasetVersion) -> int:
        return len(version.pictures)


@admin.register(BulkEdit)
class BulkEditAdmin(ServiceOwnedAdmin[BulkEdit]):
    list_display = ("label", "dataset", "actor", "picture_count", "created_at", "undone_at")
    list_select_related = ("dataset", "actor")
    search_fields = ("label", "dataset__name", "actor__username")


@admin.register(CaptionChange)
class CaptionChangeAdmin(ServiceOwnedAdmin[CaptionChange]):
    list_display = ("picture", "before", "after", "revision", "actor", "created_at", "is_undone")
    list_select_related = ("picture", "actor")
    search_fields = ("before", "after", "picture__original_name")


@admin.register(TagList)
class TagListAdmin(ServiceOwnedAdmin[TagList]):
    list_display = ("name", "owner", "tag_count", "updated_at")
    list_select_related = ("owner",)
    search_fields = ("name", "owner__username")


@admin.register(Captioning)
class CaptioningAdmin(ServiceOwnedAdmin[Captioning]):
    list_display = ("model", "captioner", "dataset", "owner", "created_at")
    list_select_related = ("dataset", "owner")
    search_fields = ("model", "dataset__name", "owner__username")


@admin.register(CaptionProposal)
class CaptionProposalAdmin(ServiceOwnedAdmin[CaptionProposal]):
    list_display = ("picture", "state", "caption", "reason", "captioning")
    list_select_related = ("picture", "captioning__dataset")
    list_filter = ("state",)
    search_fields = ("caption", "reason", "picture__original_name")


@admin.register(Upload)
class UploadAdmin(ServiceOwnedAdmin[Upload]):
    list_display = ("filename", "owner", "dataset", "offset", "size", "created_at", "finished_at")
    list_select_related = ("owner", "dataset")
    search_fields = ("filename", "owner__username")
    actions = ("cancel",)

    @admin.action(description="Cancel the selected uploads", permissions=["view"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Upload]) -> None:
        for upload in queryset.select_related("job"):
            services.cancel_upload(upload)
