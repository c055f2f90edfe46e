"""The services page: everybody sees how the parts are; staff see folders, commands and the platform's own logs."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_safe

from lorapilot import downloads, service_logs
from lorapilot.access import signed_in
from lorapilot.errors import UserError
from runs import parts
from runs.enums import PartState
from runs.models import Host
from runs.views import HtmxRequest


@require_safe
def show_services(request: HtmxRequest) -> HttpResponse:
    """All parts by group. htmx asks for them again every few seconds."""
    if request.htmx:
        return render(request, "runs/_services.html", _parts(request))
    hosts = Host.objects.filter(dead_at=None)
    return render(request, "runs/services.html", _parts(request) | {"hosts": hosts})


def _parts(request: HttpRequest) -> dict[str, Any]:
    user = signed_in(request)
    found = parts.list_parts(user)
    groups: dict[str, list[parts.Part]] = {}
    for part in found:
        groups.setdefault(part.group, []).append(part)
    return {
        "groups": groups,
        "down": [part for part in found if part.state == PartState.DOWN],
        "logs": service_logs.list_logs() if user.is_staff else None,
    }


def _log_for_staff(request: HttpRequest, name: str) -> service_logs.ServiceLog:
    if not signed_in(request).is_staff:
        raise Http404
    return service_logs.get_log(name)


@require_safe
def show_log(request: HttpRequest, name: str) -> HttpResponse:
    """The end of a log, or what stands before byte `?before=`. Staff only."""
    log = _log_for_staff(request, name)
    given = request.GET.get("before", "")
    if given and (not given.isdecimal() or len(given) > 18):
        raise UserError("`before` is a whole number of bytes.", field="before")
    excerpt = service_logs.read_before(log, int(given) if given else None)
    shown = {"log": log, "excerpt": excerpt, "is_end": excerpt.end >= log.bytes}
    return render(request, "runs/service_log.html", shown)


@require_safe
def download_log(request: HttpRequest, name: str) -> HttpResponseBase:
    """The whole log. Staff only."""
    log = _log_for_staff(request, name)
    return downloads.send_file(request, log.path, filename=log.name, content_type="text/plain; charset=utf-8")
