"""The model registry's addresses under /api/v1/."""

from __future__ import annotations

from rest_framework.routers import SimpleRouter

from models_registry.api import BaseModelViewSet

router = SimpleRouter()
router.register("models", BaseModelViewSet, basename="api-model")
urlpatterns = router.urls
