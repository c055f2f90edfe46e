"""Pages of automatic captions, below /datasets/<id>/captioning/."""

from __future__ import annotations

from django.urls import path

from runs import captioning_views as views

app_name = "captioning"
urlpatterns = [
    path("", views.new, name="new"),
    path("<int:captioning_id>/", views.show, name="show"),
    path("<int:captioning_id>/status/", views.status, name="status"),
    path("<int:captioning_id>/review/", views.review, name="review"),
    path("<int:captioning_id>/undo/", views.undo, name="undo"),
    path("<int:captioning_id>/cancel/", views.cancel, name="cancel"),
    path("<int:captioning_id>/go-on/", views.go_on, name="go_on"),
    path("<int:captioning_id>/proposals/<int:proposal_id>/", views.edit, name="edit"),
]
