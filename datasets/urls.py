"""Pages under /datasets/."""

from __future__ import annotations

from django.urls import path

from datasets import caption_urls, quality_urls, views

app_name = "datasets"
urlpatterns = [
    path("", views.dataset_list, name="list"),
    path("new/", views.new, name="new"),
    path("found/", views.found, name="found"),
    path("adopt/", views.adopt, name="adopt"),
    path("<int:pk>/", views.detail, name="detail"),
    path("<int:pk>/edit/", views.edit, name="edit"),
    path("<int:pk>/share/", views.share, name="share"),
    path("<int:pk>/upload/", views.upload, name="upload"),
    path("<int:pk>/export/", views.export, name="export"),
    path("<int:pk>/versions/<int:version_pk>/export/", views.version_export, name="version-export"),
    path("<int:pk>/delete/", views.delete, name="delete"),
    path("<int:pk>/restore/", views.restore, name="restore"),
    path("<int:pk>/pictures/<int:picture_pk>/delete/", views.picture_delete, name="picture-delete"),
    path("<int:pk>/pictures/<int:picture_pk>/thumbnail/", views.thumbnail, name="thumbnail"),
    path("<int:pk>/pictures/<int:picture_pk>/original/", views.original, name="original"),
    *caption_urls.urlpatterns,
    *quality_urls.urlpatterns,
]
