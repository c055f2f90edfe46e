"""The runs' pages. `request.htmx` picks a part of a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST, require_safe
from django_htmx.middleware import HtmxDetails

from datasets.models import DatasetVersion
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.services import record
from runs import files, planning, selectors, services
from runs.enums import TERMINAL, DeviceKind
from runs.forms import RunForm
from runs.models import Run
from runs.spec import RunSpec

RUNS_ON_A_PAGE = 25


class HtmxRequest(HttpRequest):
    """What HtmxMiddleware makes of a request."""

    htmx: HtmxDetails


@require_safe
def list_runs(request: HtmxRequest) -> HttpResponse:
    """The queue on top, what has ended below. htmx asks for both again every few seconds, without the frame."""
    ended = selectors.list_runs(request.user).filter(status__in=TERMINAL).order_by("-finished_at")
    page = Paginator(ended, RUNS_ON_A_PAGE).get_page(request.GET.get("page"))
    template = "runs/_rows.html" if request.htmx else "runs/list.html"
    return render(request, template, {"queue": selectors.queue(request.user), "page_obj": page})


@require_http_methods(["GET", "POST"])
def new_run(request: HttpRequest) -> HttpResponse:
    """The run form. What was typed is kept when it is refused."""
    if request.method == "GET":
        initial = {name: request.GET[name] for name in ("dataset", "base_model") if name in request.GET}
        return render(request, "runs/new.html", {"form": RunForm(signed_in(request), initial=initial)})
    form = RunForm(signed_in(request), request.POST)
    if form.is_valid():
        try:
            run = services.submit_run(signed_in(request), values=form.values(), **_essentials(form))
        except UserError as error:
            form.add_error(error.field if error.field in form.fields else None, error.message)
        else:
            messages.success(request, f"{run.output_name} is in the queue.")
            return redirect("runs:detail", run.pk)
    return render(request, "runs/new.html", {"form": form}, status=422)


def _essentials(form: RunForm) -> dict[str, Any]:
    return {name: form.cleaned_data[name] for name in ("dataset", "base_model", "output_name", "profile")}


@dataclass
class Preview:
    """What the form as it stands would train, or why it cannot yet."""

    plan: planning.Plan | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def spec(self) -> RunSpec | None:
        return self.plan.spec if self.plan else None

    @property
    def device(self) -> str:
        return DeviceKind(self.plan.device).label if self.plan else ""


@require_POST
def preview(request: HttpRequest) -> HttpResponse:
    """Steps, epochs and what is adapted, while the form is being filled in."""
    form = RunForm(signed_in(request), request.POST)
    form.full_clean()
    chosen = form.cleaned_data
    shown = Preview()
    if chosen.get("dataset") and chosen.get("base_model"):
        try:
            shown.plan = planning.plan_run(
                pictures=list(chosen["dataset"].pictures.values("caption", "repeats")),
                base_model=chosen["base_model"],
                profile=chosen.get("profile", ""),
                values=form.values(),
            )
        except UserError as error:
            shown.errors.append(error.message)
    return render(request, "runs/_preview.html", {"preview": shown})


@require_safe
def show_run(request: HttpRequest, run_id: int) -> HttpResponse:
    """One run: everything about it, live."""
    run = get_visible(Run, request.user, pk=run_id)
    version: DatasetVersion = run.dataset_version
    return render(
        request,
        "runs/detail.html",
        {
            "run": run,
            "can_change": run.is_editable_by(request.user),
            "version": version,
            "settings_rows": selectors.settings_rows(run),
            "queue_place": selectors.queue_place(run),
        }
        | _parts(run),
    )


def _parts(run: Run) -> dict[str, Any]:
    return {
        "checkpoints": run.checkpoints.order_by("-is_final", "-step"),
        "samples_by_step": selectors.samples_by_step(run),
        "events": run.events.select_related("actor"),
    }


@require_GET
def show_part(request: HttpRequest, run_id: int, part: str) -> HttpResponse:
    """One part of the run's page, asked for again when the socket says that it changed."""
    run = get_visible(Run, request.user, pk=run_id)
    context = _parts(run) | {"run": run, "can_change": run.is_editable_by(request.user)}
    return render(request, f"runs/_{part}.html", context)


@require_safe
def download(request: HttpRequest, run_id: int, checkpoint_id: int) -> HttpResponseBase:
    return files.send_checkpoint(request, get_visible(Run, request.user, pk=run_id), checkpoint_id)


@require_safe
def sample_file(request: HttpRequest, run_id: int, sample_id: int) -> HttpResponseBase:
    return files.send_sample(request, get_visible(Run, request.user, pk=run_id), sample_id)


@require_safe
def log(request: HttpRequest, run_id: int) -> HttpResponseBase:
    return files.send_log(request, get_visible(Run, request.user, pk=run_id))


@require_POST
def stop(request: HttpRequest, run_id: int) -> HttpResponse:
    run = services.stop_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect("runs:detail", run.pk)


@require_POST
def resume(request: HttpRequest, run_id: int) -> HttpResponse:
    run = services.resume_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect("runs:detail", run.pk)


@require_POST
def retry(request: HttpRequest, run_id: int) -> HttpResponse:
    """Whoever sees a run may run its settings again, under a name of its own."""
    run = services.retry_run(get_visible(Run, request.user, pk=run_id), actor=signed_in(request))
    messages.success(request, f"{run.output_name} is in the queue.")
    return redirect("runs:detail", run.pk)


@require_POST
def hold(request: HttpRequest, run_id: int) -> HttpResponse:
    run = services.hold_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect("runs:detail", run.pk)


@require_POST
def release(request: HttpRequest, run_id: int) -> HttpResponse:
    run = services.release_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect("runs:detail", run.pk)


@require_http_methods(["GET", "POST"])
def delete(request: HttpRequest, run_id: int) -> HttpResponse:
    """Asks first, and names what will be gone."""
    run = get_editable(Run, request.user, pk=run_id)
    if request.method == "GET":
        return render(request, "runs/confirm_delete.html", {"run": run, "checkpoints": run.checkpoints.all()})
    services.delete_run(run)
    record(signed_in(request), "run deleted", run, request)
    messages.success(request, f"{run.output_name} and its files are deleted.")
    return redirect("runs:list")


@require_http_methods(["GET", "POST"])
def share(request: HttpRequest, run_id: int) -> HttpResponse:
    """Which of the owner's groups may look at the run."""
    run = get_editable(Run, request.user, pk=run_id)
    groups = signed_in(request).groups.all()
    if request.method == "POST":
        services.share_run(run, groups=groups.filter(pk__in=request.POST.getlist("groups")))
        record(signed_in(request), "run shared", run, request)
        return redirect("runs:detail", run.pk)
    return render(request, "runs/share.html", {"run": run, "groups": groups, "shared": set(run.groups.all())})
