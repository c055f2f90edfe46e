"""The page on which a picture is turned and cropped."""

from __future__ import annotations

import io
from http import HTTPStatus
from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.utils.cache import get_conditional_response
from django.views.decorators.http import require_http_methods, require_safe
from PIL import ImageOps

from datasets import edits, selectors
from datasets.edit_services import edit_picture, original_of
from datasets.models import Picture
from datasets.pictures import opened, picture_path
from datasets.quality_forms import EditForm
from lorapilot.access import signed_in
from lorapilot.errors import UserError

SHOWN_PIXELS = 1024


@require_http_methods(["GET", "HEAD", "POST"])
def picture_edit(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponse:
    """`turn` (90: to the right, 270: to the left) and `undo` apply at once; else the fields do."""
    picture = selectors.editable_picture(signed_in(request), dataset_id=pk, picture_id=picture_pk)
    if request.method != "POST":
        return _page(request, picture, EditForm(initial=_now(picture)))
    form = EditForm(request.POST)
    try:
        wanted = _wanted(request, picture, form)
        if wanted:
            edit_picture(picture, **wanted)
    except UserError as error:
        form.add_error(error.field if error.field in form.fields else None, error.message)
    if form.is_bound and form.errors:
        return _page(request, picture, form, status=HTTPStatus.BAD_REQUEST)
    messages.success(request, "Saved. The file that you uploaded is kept." if picture.edit else "As you uploaded it.")
    return redirect("datasets:picture-edit", pk, picture_pk)


def _wanted(request: HttpRequest, picture: Picture, form: EditForm) -> dict[str, Any]:
    """The edit that was asked for; empty when the form is wrong."""
    if request.POST.get("undo"):
        form.is_bound = False
        return {"rotation": 0, "crop": None}
    if turn := request.POST.get("turn"):
        form.is_bound = False
        return _turned(picture, 90 if turn == "90" else 270)
    return {"rotation": form.cleaned_data["rotation"], "crop": form.crop()} if form.is_valid() else {}


def _turned(picture: Picture, degrees: int) -> dict[str, Any]:
    """Turned further; the crop goes along."""
    now, original = picture.edit or {"rotation": 0, "crop": None}, original_of(picture)
    size = edits.turned_size((original["width"], original["height"]), now["rotation"])
    left, top, width, height = now["crop"] or (0, 0, *size)
    crop = edits.turned_box((left, top, width, height), size, degrees) if now["crop"] else None
    return {"rotation": (now["rotation"] + degrees) % 360, "crop": crop}


def _now(picture: Picture) -> dict[str, Any]:
    """The form's values for the picture as it is."""
    edit, original = picture.edit or {"rotation": 0, "crop": None}, original_of(picture)
    size = edits.turned_size((original["width"], original["height"]), edit["rotation"])
    left, top, width, height = edit["crop"] or (0, 0, *size)
    return {"rotation": edit["rotation"], "left": left, "top": top, "width": width, "height": height}


def _page(request: HttpRequest, picture: Picture, form: EditForm, status: int = HTTPStatus.OK) -> HttpResponse:
    original, rotation = original_of(picture), (picture.edit or {}).get("rotation", 0)
    whole = edits.turned_size((original["width"], original["height"]), rotation)
    pictures = picture.dataset.pictures.values_list("pk", flat=True)
    context = {
        "dataset": picture.dataset,
        "picture": picture,
        "form": form,
        "rotation": rotation,
        "whole": whole,
        "box": _now(picture),
        "original": original,
        "previous": pictures.filter(pk__lt=picture.pk).order_by("-pk").first(),
        "following": pictures.filter(pk__gt=picture.pk).order_by("pk").first(),
    }
    return render(request, "datasets/picture_edit.html", context, status=status)


@require_safe
def unedited(request: HttpRequest, pk: int, picture_pk: int) -> HttpResponseBase:
    """The picture as it was uploaded, small enough for a page and turned by `rotation` degrees, not cropped."""
    picture = selectors.visible_picture(signed_in(request), dataset_id=pk, picture_id=picture_pk)
    original = original_of(picture)
    rotation = int(given) if (given := request.GET.get("rotation", "0")) in map(str, edits.ROTATIONS) else 0
    etag = f'"{original["sha256"]}-{rotation}"'
    response = get_conditional_response(request, etag=etag)
    if response is None:
        response = HttpResponse(_drawn(original, rotation), content_type="image/webp")
    response["ETag"] = etag
    response["Cache-Control"] = "private, no-cache"
    return response


def _drawn(original: dict[str, Any], rotation: int) -> bytes:
    drawn = io.BytesIO()
    try:
        with opened(picture_path(original["sha256"], original["extension"])) as image:
            image.draft("RGB", (SHOWN_PIXELS, SHOWN_PIXELS))
            shown = edits.turned(ImageOps.exif_transpose(image), rotation)
            shown = shown.convert("RGBA" if shown.has_transparency_data else "RGB")
            shown.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
            shown.save(drawn, "WEBP", quality=85)
    except OSError:
        raise Http404 from None
    return drawn.getvalue()
