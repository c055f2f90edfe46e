"""Pages: base models."""

from __future__ import annotations

from django.urls import URLPattern

app_name = "models"
urlpatterns: list[URLPattern] = []
