"""The API of runs and hosts, mounted at /api/v1/."""

from __future__ import annotations

from django.urls import path
from rest_framework.routers import SimpleRouter

from runs.api import HostViewSet, RunViewSet, ServiceListView

router = SimpleRouter()
router.register("runs", RunViewSet, basename="run")
router.register("hosts", HostViewSet, basename="host")
urlpatterns = [*router.urls, path("services/", ServiceListView.as_view(), name="api-services")]
