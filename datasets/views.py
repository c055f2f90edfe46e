"""Pages of datasets: list, grid of pictures with captions, upload, sharing, deletion, and the pictures themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.core import signing
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.cache import get_conditional_response
from django.utils.html import format_html
from django.utils.http import content_disposition_header, urlencode
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from datasets import adoption, exports, selectors, services
from datasets.caption_views import pictures_context
from datasets.forms import DatasetForm, UploadForm
from datasets.models import Dataset, DatasetVersion, Picture
from datasets.pictures import CONTENT_TYPES, ensure_thumbnail, picture_path
from datasets.trigger_words import replacement_of
from lorapilot.access import get_editable, get_owned, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.forms import ShareForm
from lorapilot.services import record

DATASETS_A_PAGE = 24
UNDO_SECONDS = 3600
MOST_NAMED = 20  # files in one message
READ_BYTES = 256 * 1024

get_or_post = require_http_methods(["GET", "HEAD", "POST"])


# --- Datasets ---------------------------------------------------------------------------------------------------------
@require_safe
def dataset_list(request: HttpRequest) -> HttpResponse:
    user = signed_in(request)
    wanted = request.GET.get("q", "").strip()
    found = selectors.visible_datasets(user)
    page = Paginator(found.filter(name__icontains=wanted) if wanted else found, DATASETS_A_PAGE).get_page(
        request.GET.get("page")
    )
    names = adoption.folder_names(user) if user.is_staff else []
    context = {"page": page, "wanted": wanted, "found_folders": [{"folder": name} for name in names]}
    return render(request, "datasets/list.html", context)


@require_safe
def found(request: HttpRequest) -> HttpResponse:
    """The list's folders on the server, with what is in them: fetched when the page is there."""
    context = {"found_folders": adoption.found_folders(signed_in(request)), "is_counted": True}
    return render(request, "datasets/_found_folders.html", context)


@require_POST
def adopt(request: HttpRequest) -> HttpResponse:
    """A folder of the workspace becomes a dataset of the staff member's."""
    user = signed_in(request)
    dataset, _ = adoption.adopt_folder(user, folder=request.POST.get("folder", ""))
    record(user, "folder adopted as a dataset", f"{dataset.adopted_from}: {dataset}", request)
    messages.success(request, f"“{dataset.name}” is being filled from {dataset.adopted_from}. Reload to see more.")
    return redirect("datasets:detail", dataset.pk)


@get_or_post
def new(request: HttpRequest) -> HttpResponse:
    form = DatasetForm(request.POST or None)
    if form.is_valid():
        try:
            dataset = services.create_dataset(signed_in(request), **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            return redirect("datasets:detail", dataset.pk)
    return render(request, "datasets/new.html", {"form": form}, status=_status_of(form))


@require_safe
def detail(request: HttpRequest, pk: int) -> HttpResponse:
    return _detail_page(request, pk)


@require_POST
def edit(request: HttpRequest, pk: int) -> HttpResponse:
    """Name and trigger word."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    old = dataset.trigger_word
    form = DatasetForm(request.POST)
    if form.is_valid():
        try:
            services.edit_dataset(dataset, **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            messages.success(request, _saved(dataset, old=old))
            return redirect("datasets:detail", pk)
    return _detail_page(request, pk, edit_form=form)


def _saved(dataset: Dataset, *, old: str) -> str:
    """With a link to the edit that replaces the trigger word from before, where captions have it."""
    if not (old and dataset.trigger_word and old.casefold() != dataset.trigger_word.casefold()):
        return "Saved."
    operation, count = replacement_of(dataset, old=old)
    if not count:
        return "Saved."
    query = urlencode({"kind": operation.kind, "text": operation.text, "replacement": operation.replacement})
    return format_html(
        'Saved. {} caption{} “{}”: <a href="{}?{}#bulk">replace it by “{}”…</a>',
        f"{count:,}",
        " still has" if count == 1 else "s still have",
        old,
        reverse("datasets:detail", args=[dataset.pk]),
        query,
        operation.replacement,
    )


@require_POST
def share(request: HttpRequest, pk: int) -> HttpResponse:
    user = signed_in(request)
    dataset = get_owned(Dataset, user, pk=pk)
    form = ShareForm(request.POST, user=user, thing=dataset)
    if not form.is_valid():
        return _detail_page(request, pk, share_form=form)
    services.share_dataset(dataset, **form.chosen(), actor=user, request=request)
    messages.success(request, "Sharing saved.")
    return redirect("datasets:detail", pk)


@require_POST
def upload(request: HttpRequest, pk: int) -> HttpResponse:
    """The plain form, for browsers without scripts: a few files in one request."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return _detail_page(request, pk, upload_form=form)
    files = form.cleaned_data["files"]
    report = services.import_files(dataset, files=[(file.name, file) for file in files], choices=form.choices())
    _show_report(request, report)
    return redirect("datasets:detail", pk)


@get_or_post
def delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Asks first, and says what goes and what stays."""
    user = signed_in(request)
    dataset = get_owned(Dataset, user, pk=pk)
    if request.method == "POST":
        record(user, "dataset deleted", dataset, request)
        services.delete_dataset(dataset)
        messages.success(request, f"The dataset “{dataset.name}” is deleted.")
        return redirect("datasets:list")
    context = {"dataset": dataset, "picture_count": dataset.pictures.count(), "version_count": dataset.versions.count()}
    return render(request, "datasets/delete.html", context)


def _detail_page(
    request: HttpRequest,
    pk: int,
    *,
    edit_form: DatasetForm | None = None,
    share_form: ShareForm | None = None,
    upload_form: UploadForm | None = None,
) -> HttpResponse:
    """The page of one dataset; a form that was refused is shown with its errors."""
    user = signed_in(request)
    dataset = selectors.visible_datasets(user).filter(pk=pk).first()
    if dataset is None:
        raise Http404
    context = pictures_context(request, dataset) | {
        "can_share": dataset.is_owned_by(user),
        "edit_form": edit_form or DatasetForm({"name": dataset.name, "trigger_word": dataset.trigger_word}),
        "share_form": share_form or ShareForm(user=user, thing=dataset),
        "upload_form": upload_form or UploadForm(),
    }
    refused = edit_form or share_form or upload_form
    return render(request, "datasets/detail.html", context, status=HTTPStatus.BAD_REQUEST if refused else HTTPStatus.OK)


def _status_of(form: DatasetForm) -> int:
    return HTTPStatus.BAD_REQUEST if form.is_bound and form.errors else HTTPStatus.OK


def _show_report(request: HttpRequest, report: services.ImportReport) -> None:
    done = report.sentence()
    if done:
        messages.success(request, done)
    for name, note in report.notes:
        messages.info(request, f"{name}: {note}")
    if here := report.names_here():
        more = f" and {len(here) - MOST_NAMED:,} more" if len(here) > MOST_NAMED else ""
        messages.info(request, f"Already here: {', '.join(here[:MOST_NAMED])}{more}.")
    for name, reason in report.refused:
        messages.error(request, f"{name}: {reason}")


@require_safe
def export(request: HttpRequest, pk: int) -> HttpResponseBase:
    """The dataset as a ZIP archive; `?layout=kohya` in folders <repeats>_<name>."""
    dataset = get_visible(Dataset, signed_in(request), pk=pk)
    files = exports.dataset_files(dataset, is_kohya=request.GET.get("layout") == "kohya")
    return exports.zip_response(request, files, name=dataset.name)


@require_safe
def version_export(request: HttpRequest, pk: int, version_pk: int) -> HttpResponseBase:
    """The same of a version."""
    dataset = get_visible(Dataset, signed_in(request), pk=pk)
    version = get_object_or_404(DatasetVersion, dataset=dataset, pk=version_pk)
    files = exports.version_files(version, is_kohya=request.GET.get("layout") == "kohya")
    return exports.zip_response(request, files, name=str(version))


# --- One picture ------------------------------------------------------------------------------------------------------
@get_or_post
def picture_delete(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponse:
    """Asks first (a dialog with scripts, a page without), and offers to undo it."""
    picture = selectors.editable_picture(signed_in(request), dataset_id=pk, picture_id=picture_pk)
    dataset = picture.dataset
    if request.method != "POST":
        return render(request, "datasets/picture_delete.html", {"dataset": dataset, "picture": picture})
    deleted = services.delete_picture(picture)
    context = {"dataset": dataset, "name": deleted["original_name"], "token": _undo_signer(pk).sign_object(deleted)}
    if request.htmx:  # type: ignore[attr-defined]  # django_htmx's middleware
        return render(request, "datasets/_deleted.html", context)
    return render(request, "datasets/picture_deleted.html", context)


@require_POST
def restore(request: HttpRequest, pk: int) -> HttpResponse:
    """Undo a deletion: the token carries what was deleted, signed, so that nobody restores what was never theirs."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    try:
        deleted = _undo_signer(pk).unsign_object(request.POST.get("token", ""), max_age=UNDO_SECONDS)
    except signing.BadSignature:
        raise UserError("This can no longer be undone. Upload the picture again.") from None
    picture = services.restore_picture(dataset, deleted=deleted)
    if request.htmx:  # type: ignore[attr-defined]  # django_htmx's middleware
        return render(request, "datasets/_picture.html", {"dataset": dataset, "picture": picture, "can_edit": True})
    return redirect(reverse("datasets:detail", args=[pk]) + f"#picture-{picture.pk}")


def _undo_signer(pk: int) -> signing.TimestampSigner:
    return signing.TimestampSigner(salt=f"datasets.restore.{pk}")


# --- Media: a picture is reached through its dataset, never by its hash alone -----------------------------------------
@require_safe
def thumbnail(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponseBase:
    picture = selectors.visible_picture(signed_in(request), dataset_id=pk, picture_id=picture_pk)
    unchanged = _unchanged(request, picture)
    if unchanged:
        return unchanged
    try:
        content = ensure_thumbnail(picture.sha256, picture.extension).read_bytes()
    except FileNotFoundError:
        raise Http404 from None
    return _for_long(request, HttpResponse(content, content_type="image/webp"), picture)


@require_safe
async def original(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponseBase:
    user = await sync_to_async(signed_in)(request)
    picture = await sync_to_async(selectors.visible_picture)(user, dataset_id=pk, picture_id=picture_pk)
    unchanged = _unchanged(request, picture)
    if unchanged:
        return unchanged
    path = picture_path(picture.sha256, picture.extension)
    if not path.exists():
        raise Http404
    response = StreamingHttpResponse(_blocks(path), content_type=CONTENT_TYPES[picture.extension])
    response["Content-Length"] = str(picture.bytes)
    disposition = content_disposition_header(as_attachment=False, filename=picture.original_name)
    response["Content-Disposition"] = disposition or "inline"
    return _for_long(request, response, picture)


async def _blocks(path: Path) -> AsyncIterator[bytes]:
    """Asynchronous, because a file that Django iterates itself is read into memory whole."""
    with path.open("rb") as file:
        while block := await sync_to_async(file.read, thread_sensitive=False)(READ_BYTES):
            yield block


def _unchanged(request: HttpRequest, picture: Picture) -> HttpResponseBase | None:
    """304 for a client that has the picture as it is now."""
    found = get_conditional_response(request, etag=f'"{picture.sha256}"')
    return _for_long(request, found, picture) if found else None


def _for_long(request: HttpRequest, response: Any, picture: Picture) -> HttpResponseBase:
    """An address with `?v=` of the content can be kept; without, an edit may put another picture there."""
    response["ETag"] = f'"{picture.sha256}"'
    is_named = request.GET.get("v", "") and picture.sha256.startswith(request.GET["v"])
    response["Cache-Control"] = "private, max-age=31536000, immutable" if is_named else "private, no-cache"
    return response  # type: ignore[no-any-return]  # streaming and plain responses share no typed base with headers
