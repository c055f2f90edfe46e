"""Addresses of the grid and of editing captions, below /datasets/."""

from __future__ import annotations

from django.urls import path

from datasets import caption_views as views

urlpatterns = [
    path("<int:pk>/grid/", views.grid, name="grid"),
    path("<int:pk>/captions/tools/", views.caption_tools, name="caption-tools"),
    path("<int:pk>/captions/preview/", views.bulk_preview, name="bulk-preview"),
    path("<int:pk>/captions/apply/", views.bulk_apply, name="bulk-apply"),
    path("<int:pk>/captions/edits/<int:edit_pk>/undo/", views.edit_undo, name="edit-undo"),
    path("<int:pk>/captions/tag-list/", views.tag_list, name="tag-list"),
    path("<int:pk>/pictures/delete/", views.pictures_delete, name="pictures-delete"),
    path("<int:pk>/pictures/<int:picture_pk>/caption/", views.caption, name="caption"),
    path("<int:pk>/pictures/<int:picture_pk>/caption/undo/", views.caption_undo, name="caption-undo"),
]
