"""Pages of the LoRA library, below /loras/."""

from __future__ import annotations

from django.urls import path

from runs import library_views as views

app_name = "loras"
urlpatterns = [
    path("", views.adapter_list, name="list"),
    path("upload/", views.upload, name="upload"),
    path("<int:pk>/", views.detail, name="detail"),
    path("<int:pk>/edit/", views.edit, name="edit"),
    path("<int:pk>/share/", views.share, name="share"),
    path("<int:pk>/delete/", views.delete, name="delete"),
    path("<int:pk>/download/", views.download, name="download"),
    path("<int:pk>/samples/<int:sample_pk>/", views.sample, name="sample"),
    path("<int:pk>/publish/", views.publish, name="publish"),
    path("<int:pk>/unpublish/", views.unpublish, name="unpublish"),
]
