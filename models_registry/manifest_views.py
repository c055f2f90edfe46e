"""Pages: models that can be pulled; pulling, watching and cancelling (staff)."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST

from lorapilot.access import signed_in
from lorapilot.errors import UserError
from lorapilot.models import SecretName
from lorapilot.selectors import secrets_of
from models_registry import manifest, pulls
from models_registry.manifest_selectors import ManifestRow, manifest_row, manifest_rows, status_of


@require_GET
def manifest_page(request: HttpRequest) -> HttpResponse:
    """All models of the manifest, or those of one family."""
    rows = manifest_rows(signed_in(request))
    family = request.GET.get("family", "")
    context = {
        "items": [_item(row) for row in rows if not family or row.architecture == family],
        "families": {row.architecture: row.entry.family for row in rows if row.architecture},
        "family": family,
        "problems": manifest.load().problems if request.user.is_staff else [],
        "has_token": _has_token(request),
    }
    return render(request, "models_registry/manifest.html", context)


@require_GET
def pull_state(request: HttpRequest, name: str) -> HttpResponse:
    """One model's state: the part of the page that htmx asks for every two seconds while it is being pulled."""
    item = _item(manifest_row(signed_in(request), name))
    return render(request, "models_registry/_manifest_state.html", {"item": item, "has_token": _has_token(request)})


@require_POST
def start(request: HttpRequest, name: str) -> HttpResponse:
    """htmx asks beside the run form, and gets a line."""
    try:
        pulls.start_pull(signed_in(request), name, request=request)
    except UserError as error:
        if not request.headers.get("HX-Request"):
            raise
        return render(request, "models_registry/_pull_started.html", {"error": error.message})
    if request.headers.get("HX-Request"):
        return render(request, "models_registry/_pull_started.html")
    messages.success(request, f"{name} is being pulled. It goes on when you leave this page.")
    return _to_family(name)


@require_POST
def cancel(request: HttpRequest, name: str) -> HttpResponse:
    pulls.cancel_pull(signed_in(request), name, request=request)
    messages.success(request, f"{name} stops. What has arrived is kept for the next time.")
    return _to_family(name)


def _item(row: ManifestRow) -> dict[str, object]:
    return {"row": row, "status": status_of(row.name, row.pull)}


def _has_token(request: HttpRequest) -> bool:
    return secrets_of(signed_in(request)).filter(name=SecretName.HUGGINGFACE).exists()


def _to_family(name: str) -> HttpResponse:
    """The list of the model's family: what else it needs stands there."""
    return redirect(f"{reverse('models:manifest')}?family={manifest.find(name).architecture}")
