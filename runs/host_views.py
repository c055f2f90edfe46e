"""The hosts' pages: everybody who is signed in looks, staff act. What they do goes into the audit trail."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from lorapilot.access import require_staff, signed_in
from lorapilot.services import record
from runs import disk, fleet, selectors
from runs.enums import Status
from runs.models import Host, Slot
from runs.views import HtmxRequest


@require_safe
def list_hosts(request: HtmxRequest) -> HttpResponse:
    """All hosts with their slots, and the disk that they share. htmx asks for them again every few seconds."""
    return render(request, "runs/_hosts.html" if request.htmx else "runs/hosts.html", _hosts(request))


def _hosts(request: HttpRequest) -> dict[str, Any]:
    return {
        "hosts": selectors.list_hosts(signed_in(request)),
        "free_bytes": disk.free_bytes(),
        "floor_bytes": settings.DISK_FLOOR_BYTES,
        "is_below_floor": disk.is_below_floor(),
    }


def _for_staff(request: HttpRequest) -> None:
    require_staff(signed_in(request), fleet.STAFF_ONLY)


def _done(request: HtmxRequest, action: str, subject: Host | Slot, message: str) -> HttpResponse:
    record(signed_in(request), action, subject, request)
    if request.htmx:
        return render(request, "runs/_hosts_answer.html", _hosts(request) | {"message": message})
    messages.success(request, message)
    return redirect("hosts:list")


@require_POST
def drain(request: HtmxRequest, host_id: int) -> HttpResponse:
    """Begin a maintenance; what trains there ends first."""
    _for_staff(request)
    host = fleet.drain_host(get_object_or_404(Host, pk=host_id), actor=signed_in(request))
    return _done(request, "host drained", host, f"{host} takes no more runs.")


@require_http_methods(["GET", "POST"])
def move_runs(request: HtmxRequest, host_id: int) -> HttpResponse:
    """Begin a maintenance, and let what trains there go on elsewhere. Asks first, and names the runs."""
    _for_staff(request)
    host = get_object_or_404(Host, pk=host_id)
    if request.method == "GET":
        runs = selectors.runs_on(host).exclude(status=Status.STOPPING)
        return render(request, "runs/confirm_move.html", {"host": host, "runs": runs})
    fleet.drain_host(host, actor=signed_in(request), move_runs=True)
    return _done(
        request, "host drained, runs moved", host, f"{host} takes no more runs; its runs save and go on elsewhere."
    )


@require_POST
def undrain(request: HtmxRequest, host_id: int) -> HttpResponse:
    _for_staff(request)
    host = fleet.undrain_host(get_object_or_404(Host, pk=host_id))
    return _done(request, "host undrained", host, f"The maintenance of {host} has ended.")


@require_http_methods(["GET", "POST"])
def declare_dead(request: HtmxRequest, host_id: int) -> HttpResponse:
    """Asks first, and says what it means."""
    _for_staff(request)
    host = get_object_or_404(Host, pk=host_id)
    if request.method == "GET":
        return render(request, "runs/confirm_dead.html", {"host": host, "runs": selectors.runs_on(host)})
    moved = fleet.declare_dead(host, actor=signed_in(request))
    went_on = f" {len(moved)} run{'s go' if len(moved) != 1 else ' goes'} on elsewhere." if moved else ""
    return _done(request, "host declared dead", host, f"{host} is declared dead.{went_on}")


@require_POST
def set_slot_enabled(request: HtmxRequest, slot_id: int, *, is_enabled: bool) -> HttpResponse:
    """A disabled slot finishes its run and takes no other."""
    _for_staff(request)
    slot = get_object_or_404(Slot.objects.select_related("host"), pk=slot_id)
    fleet.set_slot_enabled(slot, is_enabled=is_enabled)
    action = "slot enabled" if is_enabled else "slot disabled"
    return _done(request, action, slot, f"{slot} takes {'runs again' if is_enabled else 'no more runs'}.")
