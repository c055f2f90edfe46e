"""The core's API, mounted at /api/v1/."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.urls import path
from drf_spectacular.views import SpectacularAPIView

from lorapilot import api_views as views
from lorapilot.invitation_api import InvitationListView, InvitationView

urlpatterns = [
    path("me/", views.MeView.as_view(), name="api-me"),
    path("tokens/", views.TokenListView.as_view(), name="api-tokens"),
    path("tokens/<slug:token_key>/", views.TokenView.as_view(), name="api-token"),
    path("secrets/", views.SecretListView.as_view(), name="api-secrets"),
    path("secrets/<slug:name>/", views.SecretView.as_view(), name="api-secret"),
    path("tickets/", views.TicketListView.as_view(), name="api-tickets"),
    path("invitations/", InvitationListView.as_view(), name="api-invitations"),
    path("invitations/<int:pk>/", InvitationView.as_view(), name="api-invitation"),
    path("jobs/", views.JobListView.as_view(), name="api-jobs"),
    path("jobs/<uuid:pk>/", views.JobView.as_view(), name="api-job"),
    path("jobs/<uuid:pk>/cancel/", views.JobCancelView.as_view(), name="api-job-cancel"),
    path("schema/", SpectacularAPIView.as_view(), name="schema"),
    path("docs/", login_required(views.DocsView.as_view()), name="api-docs"),
]
