"""Pages of the grid: its next part, one caption, edits of many, deletions of many, and what the captions consist of."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.html import format_html
from django.utils.http import urlencode
from django.views.decorators.http import require_POST, require_safe

from datasets import bulk_edits, caption_edits, picture_removal, selectors, tag_lists
from datasets.caption_edits import CaptionConflict
from datasets.caption_forms import OperationForm, TagListForm
from datasets.forms import CaptionForm
from datasets.models import BulkEdit, Dataset, Picture
from datasets.picture_filters import SHOWN, SORTED, PictureFilter
from datasets.quality_forms import BucketForm, query_of
from datasets.selections import Selection
from datasets.thumbnails import draw_lost_thumbnails
from datasets.trigger_words import trigger_report
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import Conflict, UserError
from lorapilot.services import record

PICTURES_A_PAGE = 60
PREFILLED = ("kind", "text", "replacement")  # of the form for many captions, by the page's address
SHOWN_TAGS = 60


# --- The grid ---------------------------------------------------------------------------------------------------------
def grid_context(request: HttpRequest, dataset: Dataset) -> dict[str, Any]:
    """One part of the grid, and how its filter stands. The same number of queries for any number of pictures."""
    wanted = PictureFilter.from_query(request.GET)
    shown, cursor = wanted.page(dataset, after=request.GET.get("after", ""), size=PICTURES_A_PAGE)
    draw_lost_thumbnails(shown)
    return {
        "dataset": dataset,
        "can_edit": dataset.is_editable_by(signed_in(request)),
        "filter": wanted,
        "filter_query": urlencode(wanted.as_query()),
        "pictures": shown,
        "next_query": urlencode(wanted.as_query() | {"after": cursor}) if cursor else "",
        "is_continued": "after" in request.GET,
    }


def pictures_context(request: HttpRequest, dataset: Dataset) -> dict[str, Any]:
    """For the page of a dataset: the grid with its filter, the edit of many captions, and what can be undone."""
    context = grid_context(request, dataset)
    wanted: PictureFilter = context["filter"]
    given = {name: request.GET[name] for name in PREFILLED if name in request.GET}
    return context | {
        "match_count": wanted.pictures(dataset).count() if wanted.is_narrow else None,
        "bucket_settings": query_of(wanted.rules),
        "shown_choices": SHOWN,
        "sort_choices": SORTED,
        "operation_form": OperationForm(initial=given),
        "is_prefilled": bool(given),
        "bulk_edits": dataset.bulk_edits.select_related("actor").defer("removed"),
    }


@require_safe
def grid(request: HttpRequest, pk: int) -> HttpResponse:
    """The next part of the grid, fetched when the one before is scrolled to its end."""
    dataset = get_visible(Dataset, signed_in(request), pk=pk)
    return render(request, "datasets/_grid_part.html", grid_context(request, dataset))


# --- One caption ------------------------------------------------------------------------------------------------------
@require_POST
def caption(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponse:
    """Saved while one types (htmx), or by its button. 409 with both texts when somebody else saved meanwhile."""
    user = signed_in(request)
    picture = selectors.editable_picture(user, dataset_id=pk, picture_id=picture_pk)
    form = CaptionForm(request.POST)
    error = "" if form.is_valid() else form.sentence()
    if not error:
        try:
            text, revision = form.cleaned_data["caption"], form.cleaned_data["revision"]
            caption_edits.set_caption(picture, caption=text, revision=revision, actor=user)
        except CaptionConflict as conflict:
            return _conflict(request, conflict)
        except UserError as refused:
            error = refused.message
    if request.htmx:  # type: ignore[attr-defined]  # django_htmx's middleware
        return _caption_state(request, picture, error)
    if error:
        raise UserError(error, field="caption")
    return _to_picture(picture)


@require_POST
def caption_undo(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponse:
    """The caption before the last change; again, the one before that."""
    picture = selectors.editable_picture(signed_in(request), dataset_id=pk, picture_id=picture_pk)
    form = CaptionForm(request.POST)
    revision = form.cleaned_data["revision"] if form.is_valid() else None
    try:
        caption_edits.undo_caption(picture, revision=revision)
    except CaptionConflict as conflict:
        return _conflict(request, conflict)
    except UserError as refused:
        if request.htmx:  # type: ignore[attr-defined]  # as above
            context = {"dataset": picture.dataset, "picture": picture, "can_edit": True, "error": refused.message}
            return render(request, "datasets/_picture.html", context)
        raise
    if request.htmx:  # type: ignore[attr-defined]  # as above
        context = {"dataset": picture.dataset, "picture": picture, "can_edit": True, "state": "Undone"}
        return render(request, "datasets/_picture.html", context)
    return _to_picture(picture)


def _to_picture(picture: Picture) -> HttpResponse:
    return redirect(reverse("datasets:detail", args=[picture.dataset_id]) + f"#picture-{picture.pk}")


def _conflict(request: HttpRequest, conflict: CaptionConflict) -> HttpResponse:
    partial = request.htmx  # type: ignore[attr-defined]  # django_htmx's middleware
    template = "datasets/_caption_conflict.html" if partial else "datasets/caption_conflict.html"
    context = {"picture": conflict.picture, "dataset": conflict.picture.dataset, "yours": conflict.yours}
    context["last"] = caption_edits.history_of(conflict.picture).first()
    return render(request, template, context, status=HTTPStatus.CONFLICT)


def _caption_state(request: HttpRequest, picture: Picture, error: str) -> HttpResponse:
    missing = selectors.pictures_of(picture.dataset, only_missing=True).count()
    context = {"dataset": picture.dataset, "picture": picture, "error": error, "missing_count": missing}
    return render(request, "datasets/_caption_state.html", context)


# --- Many captions ----------------------------------------------------------------------------------------------------
@require_POST
def bulk_preview(request: HttpRequest, pk: int) -> HttpResponse:
    """What an edit would change: how many captions, and the first 50. Changes nothing."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    return _show_plan(request, dataset)


@require_POST
def bulk_apply(request: HttpRequest, pk: int) -> HttpResponse:
    """What the preview showed, or nothing: captions that changed since are shown again."""
    user = signed_in(request)
    dataset = get_editable(Dataset, user, pk=pk)
    form = OperationForm(request.POST)
    if not form.is_valid():
        return _show_plan(request, dataset)
    try:
        done = bulk_edits.apply_edit(
            dataset,
            operation=form.operation(),
            selection=_selection(request),
            actor=user,
            fingerprint=request.POST.get("fingerprint", ""),
        )
    except Conflict as conflict:
        return _show_plan(request, dataset, notice=conflict.message)
    if done.edit:
        record(user, "captions edited", f"{dataset}: {done.edit}", request)
    messages.success(request, _undoable(_sentence(done.changed, "caption", "changed", done.left_alone), done.edit))
    return redirect(_detail(dataset, request))


def _show_plan(request: HttpRequest, dataset: Dataset, *, notice: str = "") -> HttpResponse:
    form, plan, error = OperationForm(request.POST), None, ""
    if form.is_valid():
        try:
            plan = bulk_edits.plan_edit(dataset, operation=form.operation(), selection=_selection(request))
        except UserError as refused:
            error = refused.message
    else:
        error = " ".join(str(sentence) for sentences in form.errors.values() for sentence in sentences)
    context = {"dataset": dataset, "plan": plan, "notice": notice, "error": error, "sent": _sent(request)}
    if request.htmx:  # type: ignore[attr-defined]  # django_htmx's middleware
        return render(request, "datasets/_bulk_preview.html", context)
    status = HTTPStatus.CONFLICT if notice else HTTPStatus.BAD_REQUEST if error else HTTPStatus.OK
    return render(request, "datasets/bulk_preview.html", context, status=status)


@require_POST
def edit_undo(request: HttpRequest, pk: int, edit_pk: int) -> HttpResponse:
    """Undo an edit of many captions, or a deletion of many pictures, as a whole."""
    user = signed_in(request)
    dataset = get_editable(Dataset, user, pk=pk)
    edit = get_object_or_404(BulkEdit.objects.select_related("dataset"), dataset=dataset, pk=edit_pk)
    back, left = bulk_edits.undo_edit(edit)
    record(user, "captions edited", f"{dataset}: undone: {edit}", request)
    messages.success(request, _sentence(back, "picture" if edit.is_deletion else "caption", "back", left))
    return redirect(_detail(dataset, request))


@require_POST
def pictures_delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Asks first; can be undone among the last edits."""
    user = signed_in(request)
    dataset = get_editable(Dataset, user, pk=pk)
    selection = _selection(request)
    if request.POST.get("sure"):
        edit = picture_removal.remove_pictures(dataset, selection=selection, actor=user)
        record(user, "pictures deleted", f"{dataset}: {edit.picture_count}", request)
        messages.success(request, _undoable(_sentence(edit.picture_count, "picture", "deleted", 0), edit))
        return redirect(_detail(dataset, request))
    context = {"dataset": dataset, "sent": _sent(request), "error": ""}
    try:
        context["count"] = len(selection.rows(dataset))
    except UserError as refused:
        context["error"] = refused.message
    partial = request.htmx  # type: ignore[attr-defined]  # django_htmx's middleware
    return render(request, "datasets/_bulk_delete.html" if partial else "datasets/bulk_delete.html", context)


def _selection(request: HttpRequest) -> Selection:
    return Selection.from_form(request.POST, request.POST.getlist("picture"))


OF_EDIT = ("kind", "text", "replacement", "at_start", "scope")
SENT = (*OF_EDIT, "q", "tag", "show", "below", "sort", "bucket", *BucketForm.base_fields)


def _sent(request: HttpRequest) -> dict[str, str]:
    """What the next form has to send again."""
    ids = ",".join(filter(None, [request.POST.get("ids", ""), *request.POST.getlist("picture")]))
    return {name: request.POST[name] for name in SENT if request.POST.get(name)} | ({"ids": ids} if ids else {})


def _detail(dataset: Dataset, request: HttpRequest) -> str:
    query = urlencode(PictureFilter.from_query(request.POST).as_query())
    return reverse("datasets:detail", args=[dataset.pk]) + (f"?{query}" if query else "")


def _sentence(count: int, noun: str, done: str, left: int) -> str:
    """As in “3 captions changed. 1 was changed by somebody else meanwhile and stays as it is.”"""
    text = f"{count:,} {noun}{'' if count == 1 else 's'} {done}."
    if left:
        text += (
            f" {left:,} {'stays as it is: it was' if left == 1 else 'stay as they are: they were'} changed meanwhile."
        )
    return text


def _undoable(sentence: str, edit: BulkEdit | None) -> str:
    """With a button beside it. Its form (`undo-form`) is on the page of the dataset, which the message is for."""
    if edit is None:
        return sentence
    address = reverse("datasets:edit-undo", args=[edit.dataset_id, edit.pk])
    button = '{} <button class="button button-small" form="undo-form" formaction="{}">Undo</button>'
    return format_html(button, sentence, address)


# --- Tags and the trigger word ----------------------------------------------------------------------------------------
@require_safe
def caption_tools(request: HttpRequest, pk: int) -> HttpResponse:
    """What the captions consist of: tags by frequency, and where the trigger word is missing or leaks."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    tags = tag_lists.tag_counts(dataset)
    context = {
        "dataset": dataset,
        "can_edit": dataset.is_editable_by(user),
        "tags": tags[:SHOWN_TAGS],
        "tag_total": len(tags),
        "trigger": trigger_report(dataset, tags=tags),
        "tag_list": tag_lists.tag_list_of(user),
        "tag_list_form": TagListForm(),
    }
    return render(request, "datasets/_caption_tools.html", context)


@require_POST
def tag_list(request: HttpRequest, pk: int) -> HttpResponse:
    """The signed-in person's own list, uploaded or deleted on the page of any dataset that they see."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    if request.POST.get("delete"):
        tag_lists.delete_tag_list(user)
        messages.success(request, "The tag list is deleted.")
    else:
        form = TagListForm(request.POST, request.FILES)
        if not form.is_valid():
            raise UserError("Choose a text file with tags.", field="file")
        file = form.cleaned_data["file"]
        kept = tag_lists.set_tag_list(user, name=file.name, content=file.read(tag_lists.MAX_FILE_BYTES + 1))
        messages.success(request, f"{kept.tag_count:,} tags are proposed from now on.")
    return redirect("datasets:detail", dataset.pk)
