"""Pages of the model registry."""

from __future__ import annotations

from django.urls import path

from models_registry import manifest_views, views

app_name = "models"
urlpatterns = [
    path("", views.list_page, name="list"),
    path("register/", views.register, name="register"),
    path("get/", manifest_views.manifest_page, name="manifest"),
    path("get/<str:name>/", manifest_views.pull_state, name="pull_state"),
    path("get/<str:name>/pull/", manifest_views.start, name="pull"),
    path("get/<str:name>/cancel/", manifest_views.cancel, name="cancel_pull"),
    path("<int:pk>/", views.detail, name="detail"),
    path("<int:pk>/components/", views.attach, name="attach"),
    path("<int:pk>/components/<int:component_pk>/detach/", views.detach, name="detach"),
    path("<int:pk>/hashing/", views.hashing, name="hashing"),
    path("<int:pk>/rehash/", views.rehash, name="rehash"),
    path("<int:pk>/forget/", views.forget, name="forget"),
]
