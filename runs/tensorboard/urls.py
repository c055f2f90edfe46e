"""TensorBoard, below /tensorboard/."""

from __future__ import annotations

from django.urls import path

from runs.tensorboard import views

app_name = "tensorboard"
urlpatterns = [
    path("", views.show, name="show"),
    path("app/", views.app, name="app"),
    path("app/<path:path>", views.app, name="app_file"),
]
