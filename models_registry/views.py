"""Pages: the list, one model, and for staff: registering, attaching files, removing."""

from __future__ import annotations

from django.contrib import messages
from django.db.models import prefetch_related_objects
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from lorapilot import workspace
from lorapilot.access import get_visible, require_staff, signed_in
from lorapilot.errors import UserError
from lorapilot.models import User
from models_registry import selectors, services
from models_registry.enums import Architecture
from models_registry.forms import AttachForm, RegisterForm
from models_registry.models import BaseModel

ARCHITECTURES = [choice for choice in Architecture.choices if choice[0] != Architecture.UNKNOWN]


@require_GET
def list_page(request: HttpRequest) -> HttpResponse:
    base_models = selectors.list_base_models(request.user).prefetch_related("components")
    architecture = request.GET.get("architecture", "").replace("\0", "")
    if architecture:
        base_models = base_models.filter(architecture=architecture)
    present = set(selectors.list_base_models(request.user).values_list("architecture", flat=True)) | {architecture}
    context = {
        "base_models": base_models,
        "architectures": [choice for choice in ARCHITECTURES if choice[0] in present],
        "architecture": architecture,
        "models_folder": workspace.models(),
        "candidates": selectors.unregistered_candidates() if request.user.is_staff else [],
    }
    return render(request, "models_registry/list.html", context)


@require_GET
def detail(request: HttpRequest, pk: int) -> HttpResponse:
    """The page; for htmx only the part that changes while the model is hashed."""
    base_model = _visible(request, pk)
    if request.headers.get("HX-Request"):
        return render(request, "models_registry/_progress.html", _files(base_model))
    return render(request, "models_registry/detail.html", _detail(request, base_model))


def _files(base_model: BaseModel) -> dict[str, object]:
    prefetch_related_objects([base_model], "components")  # asked for several times below
    components = base_model.components.all()
    return {
        "base_model": base_model,
        "components": [component for component in components if not component.is_attached],
        "attached": [component for component in components if component.is_attached],
    }


def _detail(request: HttpRequest, base_model: BaseModel, form: AttachForm | None = None) -> dict[str, object]:
    if form is None and request.user.is_staff:
        form = AttachForm(candidates=selectors.part_candidates())
    return _files(base_model) | {
        "inspection": selectors.inspect(base_model),
        "problems": selectors.missing_files(base_model),
        "absolute_path": workspace.models() / base_model.path,
        "attach_form": form,
    }


@require_POST
def attach(request: HttpRequest, pk: int) -> HttpResponse:
    user = _staff(request)
    base_model = _visible(request, pk)
    form = AttachForm(request.POST, candidates=selectors.part_candidates())
    if form.is_valid():
        try:
            component = services.attach_component(base_model, **form.cleaned_data, by=user, request=request)
        except UserError as error:
            form.add_error(form.field_of(error.field), error.message)
        else:
            messages.success(request, f"{base_model.name} is now trained with {component.path}.")
            return redirect("models:detail", base_model.pk)
    return render(request, "models_registry/detail.html", _detail(request, base_model, form), status=400)


@require_POST
def detach(request: HttpRequest, pk: int, component_pk: int) -> HttpResponse:
    user = _staff(request)
    component = get_object_or_404(_visible(request, pk).components.filter(is_attached=True), pk=component_pk)
    services.detach_component(component, by=user, request=request)
    messages.success(request, f"{component.path} is taken off. The file is where it was.")
    return redirect("models:detail", pk)


@require_GET
def hashing(request: HttpRequest, pk: int) -> HttpResponse:
    """How far the checksums are: the part of a card that htmx asks for every two seconds until they are there."""
    return render(request, "models_registry/_hashing.html", {"base_model": _visible(request, pk)})


@require_http_methods(["GET", "POST"])
def register(request: HttpRequest) -> HttpResponse:
    user = _staff(request)
    form = RegisterForm(request.POST if request.method == "POST" else None)
    if request.method == "POST" and form.is_valid():
        try:
            base_model = services.register_base_model(**form.cleaned_data, registered_by=user)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            messages.success(request, f"{base_model.name} is registered. Its checksums are being computed.")
            return redirect("models:detail", base_model.pk)
    context = {"form": form, "models_folder": workspace.models(), "candidates": selectors.unregistered_candidates()}
    return render(request, "models_registry/register.html", context, status=400 if form.errors else 200)


@require_POST
def rehash(request: HttpRequest, pk: int) -> HttpResponse:
    base_model = services.rehash_base_model(_visible(request, pk), requested_by=signed_in(request))
    messages.success(request, f"The checksums of {base_model.name} are being computed again.")
    return redirect("models:detail", base_model.pk)


@require_http_methods(["GET", "POST"])
def forget(request: HttpRequest, pk: int) -> HttpResponse:
    user = _staff(request)
    base_model = _visible(request, pk)
    context: dict[str, object] = {"base_model": base_model}
    if request.method == "POST":
        try:
            services.forget_base_model(base_model, forgotten_by=user, request=request)
        except UserError as error:
            return render(
                request, "models_registry/forget.html", context | {"refusal": error.message}, status=error.status
            )
        messages.success(request, f"{base_model.name} is removed from the list. Its files are where they were.")
        return redirect("models:list")
    return render(request, "models_registry/forget.html", context)


def _visible(request: HttpRequest, pk: int) -> BaseModel:
    return get_visible(BaseModel, request.user, pk=pk)


def _staff(request: HttpRequest) -> User:
    user = signed_in(request)
    require_staff(user, services.STAFF_ONLY)
    return user
