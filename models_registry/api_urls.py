"""The model registry's addresses under /api/v1/."""

from __future__ import annotations

from django.urls import path
from rest_framework.routers import SimpleRouter

from models_registry.api import BaseModelViewSet
from models_registry.manifest_api import ManifestView, PullView

router = SimpleRouter()
router.register("models", BaseModelViewSet, basename="api-model")
urlpatterns = [
    path("models/manifest/", ManifestView.as_view(), name="api-manifest"),
    path("models/manifest/<str:name>/pull/", PullView.as_view(), name="api-pull"),
    *router.urls,
]
