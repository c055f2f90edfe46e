"""Pages of the LoRA library: what runs made and people brought."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from lorapilot import downloads, workspace
from lorapilot.access import get_editable, get_owned, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.forms import ShareForm
from lorapilot.services import share as share_with_groups
from models_registry import adapter_selectors, adapter_services
from models_registry.enums import Architecture
from models_registry.lora_recognition import STYLES, metadata_rows
from models_registry.models import Adapter
from runs import library, publishing
from runs.forms import PublishForm
from runs.library_forms import AdapterForm, LoraUploadForm
from runs.models import Sample

ON_A_PAGE = 24
FILTERS = ("architecture", "tag", "owner")
get_or_post = require_http_methods(["GET", "HEAD", "POST"])


@require_safe
def adapter_list(request: HttpRequest) -> HttpResponse:
    return _list_page(request, LoraUploadForm())


def _list_page(request: HttpRequest, form: LoraUploadForm) -> HttpResponse:
    user = signed_in(request)
    asked = {name: request.GET.get(name, "").replace("\0", "").strip() for name in ("q", *FILTERS)}
    text, given = asked["q"], {name: asked[name] for name in FILTERS}
    found = adapter_selectors.search_adapters(user, text=text, **given)
    page = Paginator(found, ON_A_PAGE).get_page(request.GET.get("page"))
    samples = library.samples_of(list(page.object_list))
    present = set(Adapter.objects.visible_to(user).order_by().values_list("architecture", flat=True).distinct())
    context = given | {
        "page": page,
        "rows": [(adapter, samples[adapter.pk]) for adapter in page],
        "q": text,
        "is_filtered": bool(text or any(given.values())),
        "architectures": [choice for choice in Architecture.choices if choice[0] in present],
        "tags": adapter_selectors.tags_in_use(user),
        "owners": adapter_selectors.owners_of(user),
        "form": form,
    }
    status = HTTPStatus.BAD_REQUEST if form.errors else HTTPStatus.OK
    return render(request, "runs/library.html", context, status=status)


@require_POST
def upload(request: HttpRequest) -> HttpResponse:
    """The plain form, for browsers without scripts: one file in one request."""
    form = LoraUploadForm(request.POST, request.FILES)
    if form.is_valid():
        file = form.cleaned_data["file"]
        try:
            adapter = adapter_services.add_file(signed_in(request), filename=file.name, content=file)
        except UserError as error:
            form.add_error("file", error.message)
        else:
            messages.success(request, f"{adapter.name} is in the library. Only you see it until you share it.")
            return redirect("loras:detail", adapter.pk)
    return _list_page(request, form)


@require_safe
def detail(request: HttpRequest, pk: int) -> HttpResponse:
    return _detail_page(request, pk)


@require_POST
def edit(request: HttpRequest, pk: int) -> HttpResponse:
    """Name, trigger word and tags."""
    adapter = get_editable(Adapter, request.user, pk=pk)
    form = AdapterForm(request.POST)
    if form.is_valid():
        try:
            adapter_services.edit_adapter(adapter, **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            messages.success(request, "Saved.")
            return redirect("loras:detail", pk)
    return _detail_page(request, pk, form=form)


@require_POST
def share(request: HttpRequest, pk: int) -> HttpResponse:
    user = signed_in(request)
    adapter = get_owned(Adapter, user, pk=pk)
    form = ShareForm(request.POST, user=user, thing=adapter)
    if not form.is_valid():
        return _detail_page(request, pk, share_form=form)
    share_with_groups(adapter, **form.chosen(), actor=user, request=request)
    messages.success(request, "Sharing saved.")
    return redirect("loras:detail", pk)


@get_or_post
def delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Asks first, and names what will be gone."""
    adapter = get_owned(Adapter, request.user, pk=pk)
    if request.method == "POST":
        adapter_services.delete_adapter(adapter, actor=signed_in(request), request=request)
        messages.success(request, f"{adapter.name} is deleted.")
        return redirect("loras:list")
    return render(request, "runs/library_delete.html", {"adapter": adapter})


def _detail_page(
    request: HttpRequest, pk: int, *, form: AdapterForm | None = None, share_form: ShareForm | None = None
) -> HttpResponse:
    """The page of one LoRA; a form that was refused is shown with its errors."""
    user = signed_in(request)
    adapter = adapter_selectors.list_adapters(user).filter(pk=pk).first()
    if adapter is None:
        raise Http404
    look = adapter_selectors.look_into(adapter)
    given = {"name": adapter.name, "trigger_word": adapter.trigger_word}
    given["tags"] = ", ".join(tag.word for tag in adapter.tags.all())
    context = {
        "adapter": adapter,
        "look": look,
        "style": STYLES.get(adapter.style, adapter.style),
        "metadata": metadata_rows(look.contents.metadata) if look.contents else [],
        "origin": library.origin_of(adapter, user),
        "samples": library.samples_of([adapter])[adapter.pk],
        "published": publishing.find_published(library.lora_of(adapter)),
        "can_edit": adapter.is_editable_by(user),
        "can_share": adapter.is_owned_by(user),
        "tags": adapter_selectors.tags_in_use(user),
        "form": form or AdapterForm(initial=given),
        "share_form": share_form or ShareForm(user=user, thing=adapter),
    }
    status = HTTPStatus.BAD_REQUEST if form or share_form else HTTPStatus.OK
    return render(request, "runs/library_detail.html", context, status=status)


# --- Files ------------------------------------------------------------------------------------------------------------
def send_adapter(request: HttpRequest, adapter: Adapter) -> HttpResponseBase:
    """The LoRA file, as a download. The caller has checked who asks."""
    try:
        path = adapter_selectors.file_of(adapter)
    except ValueError:  # somebody has put a link there
        raise Http404 from None
    filename = f"{adapter.name}.safetensors"
    return downloads.send_file(request, path, filename=filename, content_type="application/octet-stream")


def send_adapter_sample(request: HttpRequest, adapter: Adapter, sample_pk: int) -> HttpResponseBase:
    """A picture that the LoRA draws: who sees it sees them, whether or not the run is shared."""
    found: list[Sample] = library.samples_of([adapter])[adapter.pk]
    sample = next((sample for sample in found if sample.pk == sample_pk), None)
    if sample is None:
        raise Http404
    path = workspace.inside(sample.run.folder, sample.path)
    return downloads.send_file(request, path, filename=path.name, content_type="image/png", as_attachment=False)


@require_safe
def download(request: HttpRequest, pk: int) -> HttpResponseBase:
    return send_adapter(request, get_visible(Adapter, request.user, pk=pk))


@require_safe
def sample(request: HttpRequest, pk: int, sample_pk: int) -> HttpResponseBase:
    return send_adapter_sample(request, get_visible(Adapter, request.user, pk=pk), sample_pk)


# --- models/loras -----------------------------------------------------------------------------------------------------
@get_or_post
def publish(request: HttpRequest, pk: int) -> HttpResponse:
    """Asks for the name; what was typed is kept when it is refused."""
    adapter = get_editable(Adapter, request.user, pk=pk)
    lora = library.lora_of(adapter)
    form = PublishForm(request.POST or None, initial={"name": publishing.proposed_name(lora)})
    if request.method == "POST" and form.is_valid():
        try:
            found = publishing.publish_lora(
                lora, actor=signed_in(request), name=form.cleaned_data["name"], request=request
            )
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            messages.success(request, f"Published as {found.path}.")
            return redirect("loras:detail", pk)
    status = HTTPStatus.UNPROCESSABLE_ENTITY if form.errors else HTTPStatus.OK
    return render(request, "runs/library_publish.html", {"adapter": adapter, "form": form}, status=status)


@get_or_post
def unpublish(request: HttpRequest, pk: int) -> HttpResponse:
    """Asks first, and names what will be gone."""
    adapter = get_editable(Adapter, request.user, pk=pk)
    lora = library.lora_of(adapter)
    if request.method != "POST":
        context: dict[str, Any] = {"adapter": adapter, "found": publishing.get_published(lora)}
        return render(request, "runs/library_unpublish.html", context)
    found = publishing.unpublish_lora(lora, actor=signed_in(request), request=request)
    messages.success(request, f"{found.path} is removed.")
    return redirect("loras:detail", pk)
