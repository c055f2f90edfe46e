"""API: automatic captions, mounted at /api/v1/datasets/<id>/captioning/."""

from __future__ import annotations

from django.urls import path

from runs import captioning_api as api

urlpatterns = [
    path("", api.CaptioningListView.as_view(), name="api-captionings"),
    path("captioners/", api.CaptionersView.as_view(), name="api-captioners"),
    path("try/", api.TryView.as_view(), name="api-captioning-try"),
    path("<int:captioning_id>/", api.CaptioningView.as_view(), name="api-captioning"),
    path("<int:captioning_id>/cancel/", api.CancelView.as_view(), name="api-captioning-cancel"),
    path("<int:captioning_id>/go-on/", api.GoOnView.as_view(), name="api-captioning-go-on"),
    path("<int:captioning_id>/accept/", api.AcceptView.as_view(), name="api-captioning-accept"),
    path("<int:captioning_id>/discard/", api.DiscardView.as_view(), name="api-captioning-discard"),
    path("<int:captioning_id>/undo/", api.UndoView.as_view(), name="api-captioning-undo"),
    path("<int:captioning_id>/proposals/", api.ProposalListView.as_view(), name="api-proposals"),
    path("<int:captioning_id>/proposals/<int:proposal_id>/", api.ProposalView.as_view(), name="api-proposal"),
]
