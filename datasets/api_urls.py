"""API: datasets and uploads, mounted at /api/v1/."""

from __future__ import annotations

from django.urls import path
from rest_framework.routers import SimpleRouter

from datasets import api, quality_api

router = SimpleRouter()
router.register("datasets", api.DatasetViewSet, basename="dataset")
router.register(r"datasets/(?P<dataset_pk>[0-9]+)/pictures", api.PictureViewSet, basename="picture")
router.register(r"datasets/(?P<dataset_pk>[0-9]+)/versions", api.VersionViewSet, basename="version")

urlpatterns = [
    path("uploads/", api.UploadsView.as_view(), name="upload-list"),
    path("uploads/<uuid:upload_id>/", api.UploadView.as_view(), name="upload-detail"),
    *quality_api.urlpatterns,
    *router.urls,
]
