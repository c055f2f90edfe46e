"""API: datasets and uploads, mounted at /api/v1/."""

from __future__ import annotations

from django.urls import path
from rest_framework.routers import SimpleRouter

from datasets import api, caption_api, quality_api

router = SimpleRouter()
router.register("datasets", api.DatasetViewSet, basename="dataset")
router.register(r"datasets/(?P<dataset_pk>[0-9]+)/pictures", api.PictureViewSet, basename="picture")
router.register(r"datasets/(?P<dataset_pk>[0-9]+)/versions", api.VersionViewSet, basename="version")

caption_urls = [
    path("datasets/<int:dataset_pk>/caption-edits/", caption_api.CaptionEditsView.as_view()),
    path("datasets/<int:dataset_pk>/caption-edits/preview/", caption_api.CaptionPreviewView.as_view()),
    path("datasets/<int:dataset_pk>/caption-edits/<int:edit_pk>/undo/", caption_api.CaptionEditUndoView.as_view()),
    path("datasets/<int:dataset_pk>/pictures/delete/", caption_api.PicturesDeleteView.as_view()),
    path("datasets/<int:dataset_pk>/pictures/<int:pk>/history/", caption_api.HistoryView.as_view()),
    path("datasets/<int:dataset_pk>/pictures/<int:pk>/undo/", caption_api.CaptionUndoView.as_view()),
    path("datasets/<int:dataset_pk>/tags/", caption_api.TagsView.as_view()),
    path("datasets/<int:dataset_pk>/trigger/", caption_api.TriggerView.as_view()),
    path("tag-list/", caption_api.TagListView.as_view()),
]

urlpatterns = [
    *caption_urls,
    path("datasets/found/", api.FoundFoldersView.as_view(), name="dataset-found"),
    path("uploads/", api.UploadsView.as_view(), name="upload-list"),
    path("uploads/<uuid:upload_id>/", api.UploadView.as_view(), name="upload-detail"),
    *quality_api.urlpatterns,
    *router.urls,
]
