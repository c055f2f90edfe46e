"""Every address of the platform: pages at the root, the API under /api/v1/, the admin under /admin/."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from lorapilot import views

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="runs:list"), name="home"),
    path("datasets/", include("datasets.urls")),
    path("models/", include("models_registry.urls")),
    path("runs/", include("runs.urls")),
    path("api/v1/", include("datasets.api_urls")),
    path("api/v1/", include("models_registry.api_urls")),
    path("api/v1/", include("runs.api_urls")),
    path("accounts/", include("allauth.urls")),
    path("admin/", admin.site.urls),
    path("healthz/", views.healthz, name="healthz"),
]
