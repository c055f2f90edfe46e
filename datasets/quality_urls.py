"""Pages under /datasets/: quality, turning and cropping, versions."""

from __future__ import annotations

from django.urls import path

from datasets import edit_views, quality_views, version_views

urlpatterns = [
    path("<int:pk>/quality/", quality_views.quality, name="quality"),
    path("<int:pk>/quality/summary/", quality_views.summary, name="quality-summary"),
    path("<int:pk>/buckets/", quality_views.buckets, name="buckets"),
    path("<int:pk>/quality/check/", quality_views.check, name="quality-check"),
    path("<int:pk>/quality/keep/", quality_views.keep, name="quality-keep"),
    path("<int:pk>/pictures/<int:picture_pk>/edit/", edit_views.picture_edit, name="picture-edit"),
    path("<int:pk>/pictures/<int:picture_pk>/unedited/", edit_views.unedited, name="unedited"),
    path("<int:pk>/versions/", version_views.versions, name="versions"),
    path("<int:pk>/versions/pin/", version_views.pin, name="version-pin"),
    path("<int:pk>/versions/compare/", version_views.compare, name="versions-compare"),
    path("<int:pk>/versions/<int:number>/restore/", version_views.restore, name="version-restore"),
]
