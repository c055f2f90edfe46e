"""Pages about trainers and their configurations: a stack's own options, files in and out, run again elsewhere."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from datasets.models import Dataset, DatasetVersion
from datasets.selectors import current_files, version_files
from lorapilot.access import get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.models import User
from runs import services, trainpilot
from runs.cloning import as_typed, run_form
from runs.configs import Brought, configuration, configuration_of, read_configuration
from runs.forms import OWN, RunForm
from runs.model_check import check_configuration, pulls_for
from runs.models import Run
from runs.planning import plan_run
from runs.spec import OPTIONS
from runs.stacks import STACKS, get_stack
from runs.stacks.base import TrainingPicture


@require_POST
def show_options(request: HttpRequest) -> HttpResponse:
    """The chosen trainer's own options, with what was typed into them."""
    form = run_form(request, request.POST)
    return render(request, "runs/_options.html", {"form": form})


@require_POST
def write_config(request: HttpRequest) -> HttpResponse:
    """The form as the configuration of its trainer."""
    form = run_form(request, request.POST)
    form.full_clean()
    context: dict[str, Any] = {}
    try:
        context["config"] = _text_of(form)
    except UserError as error:
        context |= {"config": request.POST.get("config", ""), "error": error.message}
    return render(request, "runs/_config_text.html", context)


def _text_of(form: RunForm) -> str:
    chosen = form.cleaned_data
    if not chosen.get("dataset") or not chosen.get("base_model"):
        raise UserError("Choose a dataset and a base model first.")
    stack = get_stack(chosen.get("stack") or "builtin")
    source: Dataset | DatasetVersion = chosen["dataset"]
    pictures = _pictures_of(source)
    plan = plan_run(
        pictures=pictures,
        base_model=chosen["base_model"],
        profile=chosen.get("profile", ""),
        values=form.values(),
        stack=stack.key,
        options=form.options(),
        base=trainpilot.base_of(form.user) if chosen.get("profile") else None,
        trigger_word=source.trigger_word,
    )
    found = configuration(
        stack,
        chosen["base_model"],
        plan.spec,
        options=plan.options,
        name=chosen.get("output_name") or "lora",
        pictures=[TrainingPicture(**picture) for picture in pictures],
    )
    return found.text


def _pictures_of(source: Dataset | DatasetVersion) -> list[dict[str, Any]]:
    return version_files(source) if isinstance(source, DatasetVersion) else current_files(source)


@require_POST
def read_config(request: HttpRequest) -> HttpResponse:
    """The run form again, filled in from a configuration; with what was left out."""
    stack = request.POST.get("stack") or "builtin"
    text = request.POST.get("config", "")
    form = run_form(request, request.POST)
    form.full_clean()
    source = form.cleaned_data.get("dataset")
    try:
        brought = read_configuration(stack, text, _pictures_of(source) if source else ())
    except UserError as error:
        form = run_form(request, request.POST)
        context = {"form": form, "config": text, "config_error": error.message}
        return render(request, "runs/new.html", context, status=422)
    form = run_form(request, _filled(request, brought))
    context = {"form": form, "config": text, "config_notes": brought.notes, "is_imported": True}
    return render(request, "runs/new.html", context)


def _filled(request: HttpRequest, brought: Brought) -> dict[str, Any]:
    """What the form would hold: the settings of the configuration instead of those that were typed."""
    kept = {"from", "dataset", "base_model", "output_name", "stack", "priority"} & request.POST.keys()
    data: dict[str, Any] = {name: request.POST[name] for name in kept} | {"profile": ""}
    if brought.base_model is not None:
        data["base_model"] = str(brought.base_model.pk)
    data |= {name: as_typed(value) for name, value in brought.values.items() if name in OPTIONS}
    return data | {f"{OWN}{key}": as_typed(value) for key, value in brought.options.items()}


@require_safe
def show_config(request: HttpRequest, run_id: int) -> HttpResponse:
    """One run as each trainer would be told to train it, and what it would lose there."""
    run = get_visible(Run, request.user, pk=run_id)
    stack = request.GET.get("stack") or run.stack
    if stack not in STACKS:
        stack = run.stack
    found = configuration_of(run, stack)
    if request.GET.get("download") and found.text:
        answer = HttpResponse(found.text, content_type="text/plain; charset=utf-8")
        answer["Content-Disposition"] = f'attachment; filename="{found.filename}"'
        return answer
    context = {"run": run, "found": found, "stacks": STACKS.values(), "is_own": stack == run.stack}
    return render(request, "runs/config.html", context)


@require_POST
def run_on(request: HttpRequest, run_id: int) -> HttpResponse:
    """The same run with another trainer, at once. What it loses is told, and stays with the run."""
    origin = get_visible(Run, request.user, pk=run_id)
    run = services.retry_run(origin, actor=signed_in(request), stack=request.POST.get("stack", ""))
    lost = f" {len(run.notes)} notes say what differs." if run.notes else ""
    messages.success(request, f"{run.output_name} is in the queue, with {get_stack(run.stack).name}.{lost}")
    return redirect("runs:detail", run.pk)


@require_http_methods(["GET", "POST"])
def base_config(request: HttpRequest) -> HttpResponse:
    """TrainPilot's base configuration of the signed-in user."""
    user = signed_in(request)
    if request.method == "GET":
        content = trainpilot.base_text(user)
        return render(request, "runs/base_config.html", {"content": content, **_checked(content, user)})
    if request.POST.get("reset"):
        trainpilot.reset_base(user)
        messages.success(request, "The base configuration is the documented one again.")
        return redirect("runs:base_config")
    content = request.POST.get("content", "")
    try:
        read = trainpilot.save_base(user, content)
    except UserError as error:
        context = {"content": content, "error": error.message}
        return render(request, "runs/base_config.html", context, status=422)
    messages.success(request, "The base configuration is saved. Profiles build on it from the next run on.")
    for note in read.notes:
        messages.warning(request, note)
    return redirect("runs:base_config")


def _checked(content: str, user: User) -> dict[str, Any]:
    """What it names of model files that runs would not find, and what could be pulled."""
    try:
        items = check_configuration(content)
    except UserError:  # the form tells that when it is saved
        return {}
    return {"wanting": [item for item in items if item.reason], "remedies": pulls_for(items, user)}
