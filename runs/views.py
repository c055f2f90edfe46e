"""The runs' pages. `request.htmx` picks a part of a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST, require_safe
from django_htmx.middleware import HtmxDetails

from datasets.models import DatasetVersion
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.selectors import shareable_groups
from lorapilot.services import record
from runs import files, library, memory_ladder, publishing, selectors, services, waiting
from runs.cloning import run_form
from runs.enums import TERMINAL, Priority, Status
from runs.forms import ESSENTIALS, PriorityForm, RunForm, priority_choices
from runs.models import Run
from runs.preview import preview_of
from runs.stacks import STACKS

RUNS_ON_A_PAGE = 25


class HtmxRequest(HttpRequest):
    """What HtmxMiddleware makes of a request."""

    htmx: HtmxDetails


# --- The list and its queue -------------------------------------------------------------------------------------------
@require_safe
def list_runs(request: HtmxRequest) -> HttpResponse:
    """What trains, what waits, what has ended. htmx asks for all of it every few seconds, without the frame."""
    return render(request, "runs/_rows.html" if request.htmx else "runs/list.html", _rows(request))


def _rows(request: HttpRequest) -> dict[str, Any]:
    ended = selectors.list_runs(request.user).filter(status__in=TERMINAL).order_by("-finished_at")
    page = Paginator(ended, RUNS_ON_A_PAGE).get_page(request.GET.get("page"))
    return {
        "active": selectors.active_runs(request.user),
        "queue": selectors.queue_rows(signed_in(request)),
        "turn_rule": waiting.TURN_RULE,
        "priorities": priority_choices(signed_in(request)),
        "page_obj": page,
        "here": f"?page={page.number}" if page.number > 1 else "",
    }


@require_POST
def move(request: HtmxRequest, run_id: int) -> HttpResponse:
    """Up, down, to the front or to the end of its owner's runs."""
    run = get_editable(Run, request.user, pk=run_id)
    to = request.POST.get("to", "")
    return _change_queue(request, run, lambda: services.reorder_run(run, actor=signed_in(request), to=to))


@require_POST
def set_priority(request: HtmxRequest, run_id: int) -> HttpResponse:
    run = get_editable(Run, request.user, pk=run_id)
    form = PriorityForm(request.POST)
    if not form.is_valid():
        raise UserError("Choose low, normal or high.", field="priority")
    priority = form.cleaned_data["priority"]
    return _change_queue(request, run, lambda: services.set_priority(run, actor=signed_in(request), priority=priority))


@require_POST
def hold(request: HtmxRequest, run_id: int) -> HttpResponse:
    run = get_editable(Run, request.user, pk=run_id)
    return _change_queue(request, run, lambda: services.hold_run(run, actor=signed_in(request)))


@require_POST
def release(request: HtmxRequest, run_id: int) -> HttpResponse:
    run = get_editable(Run, request.user, pk=run_id)
    return _change_queue(request, run, lambda: services.release_run(run, actor=signed_in(request)))


def _change_queue(request: HtmxRequest, run: Run, change: Callable[[], Run]) -> HttpResponse:
    """Change where a run stands. The answer is the list for htmx, which also tells what was refused; else back to the
    page that asked."""
    if not request.htmx:
        change()
        is_from_list = request.POST.get("back") == "list"
        return redirect(f"{reverse('runs:list')}{_page(request)}" if is_from_list else run_address(run))
    told = {"level": "", "message": ""}
    try:
        change()
    except UserError as error:
        told = {"level": "error", "message": error.message}
    rows = _rows(request)
    if not told["message"]:
        told["message"] = _where_it_stands(run, rows["queue"])
    return render(request, "runs/_queue_answer.html", rows | {"told": told})


def _where_it_stands(run: Run, queue: list[selectors.QueueRow]) -> str:
    """For those who do not see the list."""
    place = next((row.wait.place for row in queue if row.run.pk == run.pk), None)
    run.refresh_from_db()
    if run.status != Status.QUEUED:
        return f"{run.output_name} starts."
    where = f"number {place} of those that wait" if place else "held"
    return f"{run.output_name} is {where}, priority {Priority(run.priority).label.lower()}."


def _page(request: HttpRequest) -> str:
    page = request.GET.get("page", "")
    return f"?page={page}" if page.isdecimal() else ""


def run_address(run: Run) -> str:
    return reverse("runs:detail", args=[run.pk])


# --- The run form -----------------------------------------------------------------------------------------------------
@require_http_methods(["GET", "POST"])
def new_run(request: HttpRequest) -> HttpResponse:
    """The run form, for one run or many. What was typed is kept when it is refused."""
    if request.method == "GET":
        initial = {name: request.GET[name] for name in ("dataset", "base_model") if name in request.GET}
        return render(request, "runs/new.html", {"form": run_form(request, initial=initial)})
    form = run_form(request, request.POST)
    if form.is_valid():
        try:
            runs = _submit(request, form)
        except UserError as error:
            for one in error.all:
                form.add_error(form.field_of(one.field), one.message)
        else:
            return _show_submitted(request, runs, are_many=bool(form.varied()))
    return render(request, "runs/new.html", {"form": form}, status=422)


def _submit(request: HttpRequest, form: RunForm) -> list[Run]:
    essentials = {name: form.cleaned_data[name] for name in ESSENTIALS} | {"retry_of": form.origin}
    if varied := form.varied():
        return services.submit_many(
            signed_in(request), varied=varied, values=form.values(), options=form.options(), **essentials
        )
    return [services.submit_run(signed_in(request), values=form.values(), options=form.options(), **essentials)]


def _show_submitted(request: HttpRequest, runs: list[Run], *, are_many: bool) -> HttpResponse:
    if are_many:
        messages.success(request, f"{len(runs)} run{'s are' if len(runs) > 1 else ' is'} in the queue.")
        return redirect("runs:list")
    messages.success(request, f"{runs[0].output_name} is in the queue.")
    return redirect(run_address(runs[0]))


@require_POST
def preview(request: HttpRequest) -> HttpResponse:
    """What would be trained, while the form is being filled in."""
    form = run_form(request, request.POST)
    form.full_clean()
    return render(request, "runs/_preview.html", {"preview": preview_of(form)})


# --- One run ----------------------------------------------------------------------------------------------------------
@require_safe
def show_run(request: HttpRequest, run_id: int) -> HttpResponse:
    """One run: everything about it, live."""
    run = get_visible(Run, request.user, pk=run_id)
    version: DatasetVersion = run.dataset_version
    context = {
        "run": run,
        "version": version,
        "settings_rows": selectors.settings_rows(run),
        "status_json": json.dumps(selectors.status_of(run)),
    }
    for part in PARTS.values():
        context |= part(request, run)
    return render(request, "runs/detail.html", context)


@require_GET
def show_part(request: HttpRequest, run_id: int, part: str) -> HttpResponse:
    """One part of the run's page, asked for again when the socket says that it changed."""
    run = get_visible(Run, request.user, pk=run_id)
    return render(request, f"runs/_{part}.html", {"run": run} | PARTS[part](request, run))


def _status(request: HttpRequest, run: Run) -> dict[str, Any]:
    """The head of the page: how it stands, what its reader may do, and what that would cost."""
    can_change = run.is_editable_by(request.user)
    return {
        "can_change": can_change,
        "wait": waiting.Queue().wait_of(run),
        "host": run.slot.host if run.slot else None,
        "saves_on_stop": not run.trains or (run.stack in STACKS and STACKS[run.stack].saves_on_stop),
        "state_step": services.newest_state_step(run) if run.is_active else 0,
        "stop_asked": selectors.why_it_stops(run) if run.status == Status.STOPPING else None,
        "stop_deadline": selectors.stop_deadline(run),
        "is_out_of_memory": selectors.ran_out_of_memory(run),
        "rung": _rung(run) if can_change and run.trains and selectors.ran_out_of_memory(run) else None,
    }


def _rung(run: Run) -> memory_ladder.Rung | None:
    """What a resume with less memory would change; None at the end of the ladder."""
    spec = memory_ladder.effective(run.spec, run.adaptations)
    return memory_ladder.next_rung(spec, services.device_of(run), stack=run.stack)


# What each part of the page shows, by the name of its template.
PARTS: dict[str, Callable[[HttpRequest, Run], dict[str, Any]]] = {
    "status": _status,
    "artifacts": lambda request, run: {
        "artifacts": publishing.artifact_rows(run),
        "can_change": run.is_editable_by(request.user),
        "adapter": library.adapter_of(run, signed_in(request)),
    },
    "samples": lambda _, run: {"samples_by_step": selectors.samples_by_step(run)},
    "events": lambda _, run: {"events": run.events.select_related("actor")},
    "attempts": lambda _, run: {"attempts": selectors.attempt_rows(run)},
    "adapted": lambda _, run: {"adapted": selectors.adapted(run)},
}


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
    return redirect(run_address(run))


@require_POST
def pause(request: HttpRequest, run_id: int) -> HttpResponse:
    run = services.pause_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect(run_address(run))


@require_POST
def kill(request: HttpRequest, run_id: int) -> HttpResponse:
    """The page has asked, and has said what is lost."""
    run = services.kill_run(get_editable(Run, request.user, pk=run_id), actor=signed_in(request))
    return redirect(run_address(run))


@require_POST
def resume(request: HttpRequest, run_id: int) -> HttpResponse:
    run = get_editable(Run, request.user, pk=run_id)
    less_memory = request.POST.get("less_memory") == "yes"
    services.resume_run(run, actor=signed_in(request), less_memory=less_memory)
    return redirect(run_address(run))


@require_POST
def retry(request: HttpRequest, run_id: int) -> HttpResponse:
    """Whoever sees a run may run its settings again, under a name of its own."""
    run = services.retry_run(get_visible(Run, request.user, pk=run_id), actor=signed_in(request))
    messages.success(request, f"{run.output_name} is in the queue.")
    return redirect(run_address(run))


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
    """Which groups may look at the run: those of whoever asks, and those that look already."""
    run = get_editable(Run, request.user, pk=run_id)
    groups = shareable_groups(signed_in(request), thing=run)
    if request.method == "POST":
        ticked = set(request.POST.getlist("groups"))
        services.share_run(run, groups=[group for group in groups if str(group.pk) in ticked])
        record(signed_in(request), "run shared", run, request)
        return redirect(run_address(run))
    return render(request, "runs/share.html", {"run": run, "groups": groups, "shared": set(run.groups.all())})
