"""Pages of the model registry."""

from __future__ import annotations

from django.urls import path

from models_registry import views

app_name = "models"
urlpatterns = [
    path("", views.list_page, name="list"),
    path("register/", views.register, name="register"),
    path("<int:pk>/", views.detail, name="detail"),
    path("<int:pk>/components/", views.attach, name="attach"),
    path("<int:pk>/components/<int:component_pk>/detach/", views.detach, name="detach"),
    path("<int:pk>/hashing/", views.hashing, name="hashing"),
    path("<int:pk>/rehash/", views.rehash, name="rehash"),
    path("<int:pk>/forget/", views.forget, name="forget"),
]
