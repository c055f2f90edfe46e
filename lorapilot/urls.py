"""Every address of the platform: pages at the root, the API under /api/v1/, the admin under /admin/."""

from __future__ import annotations

from allauth.account import views as allauth
from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from lorapilot import invitation_views, views

# Of allauth's addresses only those that we use: an installation has no mail, so staff reset passwords in the admin.
accounts = [
    path("login/", allauth.login, name="account_login"),
    path("logout/", allauth.logout, name="account_logout"),
    path("signup/", allauth.signup, name="account_signup"),
    path("inactive/", allauth.account_inactive, name="account_inactive"),
    path("password/change/", allauth.password_change, name="account_change_password"),
]
urlpatterns = [
    path("", RedirectView.as_view(pattern_name="runs:list"), name="home"),
    path("datasets/<int:pk>/captioning/", include("runs.captioning_urls")),
    path("datasets/", include("datasets.urls")),
    path("models/", include("models_registry.urls")),
    path("runs/", include("runs.urls")),
    path("loras/", include("runs.library_urls")),
    path("hosts/", include("runs.host_urls")),
    path("services/", include("runs.service_urls")),
    path("tensorboard/", include("runs.tensorboard.urls")),
    path("account/", views.account, name="account"),
    path("account/tokens/", views.create_token, name="create_token"),
    path("account/tokens/<slug:token_key>/revoke/", views.revoke_token, name="revoke_token"),
    path("account/secrets/", views.set_secret, name="set_secret"),
    path("account/secrets/<slug:name>/delete/", views.delete_secret, name="delete_secret"),
    path("account/invitations/", invitation_views.invitation_list, name="invitations"),
    path("account/invitations/<int:pk>/revoke/", invitation_views.revoke, name="revoke_invitation"),
    path("accounts/invitation/<str:secret>/", invitation_views.open_invitation, name="open_invitation"),
    path("accounts/", include(accounts)),
    path("api/v1/", include("lorapilot.api_urls")),
    path("api/v1/", include("datasets.api_urls")),
    path("api/v1/", include("models_registry.api_urls")),
    path("api/v1/", include("runs.api_urls")),
    path("", include("runs.scripts_urls")),
    path("admin/", admin.site.urls),
    path("healthz/", views.healthz, name="healthz"),
]
handler400 = views.bad_request
handler403 = views.permission_denied
handler404 = views.not_found
handler500 = views.server_error
