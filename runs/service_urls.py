"""Pages of the installation's parts, below /services/."""

from __future__ import annotations

from django.urls import path

from runs import service_views as views

app_name = "services"
urlpatterns = [
    path("", views.show_services, name="list"),
    path("logs/<str:name>/", views.show_log, name="log"),
    path("logs/<str:name>/download/", views.download_log, name="download_log"),
]
