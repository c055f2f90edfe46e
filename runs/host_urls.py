"""Pages of hosts, below /hosts/."""

from __future__ import annotations

from django.urls import path

from runs import host_views as views

app_name = "hosts"
urlpatterns = [
    path("", views.list_hosts, name="list"),
    path("<int:host_id>/drain/", views.drain, name="drain"),
    path("<int:host_id>/move-runs/", views.move_runs, name="move_runs"),
    path("<int:host_id>/undrain/", views.undrain, name="undrain"),
    path("<int:host_id>/declare-dead/", views.declare_dead, name="declare_dead"),
    path("slots/<int:slot_id>/enable/", views.set_slot_enabled, {"is_enabled": True}, name="enable_slot"),
    path("slots/<int:slot_id>/disable/", views.set_slot_enabled, {"is_enabled": False}, name="disable_slot"),
]
