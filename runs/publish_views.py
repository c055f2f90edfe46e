"""Pages that put a run's LoRA file where other programs find it, and take it away again."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods

from lorapilot.access import get_editable, signed_in
from lorapilot.errors import UserError
from runs import publishing
from runs.forms import PublishForm
from runs.models import Checkpoint, Run


@require_http_methods(["GET", "POST"])
def publish(request: HttpRequest, run_id: int, checkpoint_id: int) -> HttpResponse:
    """Asks for the name; what was typed is kept when it is refused."""
    checkpoint = _checkpoint(request, run_id, checkpoint_id)
    form = PublishForm(
        request.POST or None, initial={"name": publishing.proposed_name(publishing.of_checkpoint(checkpoint))}
    )
    status = 200
    if request.method == "POST":
        if form.is_valid() and _publish(request, checkpoint, form):
            return redirect("runs:detail", run_id)
        status = 422
    context = {"run": checkpoint.run, "checkpoint": checkpoint, "form": form}
    return render(request, "runs/publish.html", context, status=status)


def _publish(request: HttpRequest, checkpoint: Checkpoint, form: PublishForm) -> bool:
    try:
        found = publishing.publish_checkpoint(
            checkpoint, actor=signed_in(request), name=form.cleaned_data["name"], request=request
        )
    except UserError as error:
        form.add_error(error.field or None, error.message)
        return False
    messages.success(request, f"Published as {found.path}.")
    return True


@require_http_methods(["GET", "POST"])
def unpublish(request: HttpRequest, run_id: int, checkpoint_id: int) -> HttpResponse:
    """Asks first, and names what will be gone."""
    checkpoint = _checkpoint(request, run_id, checkpoint_id)
    if request.method == "GET":
        found = publishing.get_published(publishing.of_checkpoint(checkpoint))
        context = {"run": checkpoint.run, "checkpoint": checkpoint, "found": found}
        return render(request, "runs/confirm_unpublish.html", context)
    found = publishing.unpublish_checkpoint(checkpoint, actor=signed_in(request), request=request)
    messages.success(request, f"{found.path} is removed.")
    return redirect("runs:detail", run_id)


def _checkpoint(request: HttpRequest, run_id: int, checkpoint_id: int) -> Checkpoint:
    run = get_editable(Run, request.user, pk=run_id)
    return get_object_or_404(run.checkpoints.select_related("run"), pk=checkpoint_id)
