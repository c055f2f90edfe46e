"""Pages about what is wrong with a dataset, and what the trainer will make of it."""

from __future__ import annotations

from http import HTTPStatus

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.http import urlencode
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from datasets import checking
from datasets.models import Dataset
from datasets.picture_filters import PictureFilter
from datasets.quality import DROPPED, Bucket, Report, bucket_counts, report_on
from datasets.quality_forms import USUAL_RESOLUTION, BucketForm, KeepForm, rules_of
from lora_trainer.buckets import rules_in_proportion
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import UserError

PICTURES_A_PAGE = 60
MOST_SHOWN = 24  # pictures of one finding, groups of those that look alike


@require_safe
def quality(request: HttpRequest, pk: int) -> HttpResponse:
    """The whole report, for the bucket settings in the address; `bucket=832x1216` (or `dropped`) shows its pictures."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    given = request.GET.copy()
    given["resolution"] = given.get("resolution") or str(USUAL_RESOLUTION)  # the page shows what it counts with
    form = BucketForm(given)
    is_valid = form.is_valid()
    report = report_on(user, dataset, form.rules() if is_valid else rules_in_proportion(USUAL_RESOLUTION))
    bucket = _bucket(report, request.GET.get("bucket", ""))
    context = {
        "dataset": dataset,
        "form": form,
        "report": report,
        "bucket": bucket,
        "grid_query": urlencode(PictureFilter(bucket=bucket.name, rules=report.rules).as_query()) if bucket else "",
        "page": Paginator(bucket.placed, PICTURES_A_PAGE).get_page(request.GET.get("page")) if bucket else None,
        "can_edit": dataset.is_editable_by(user),
        "most": MOST_SHOWN,
        "most_slice": f":{MOST_SHOWN}",
        "beyond": -MOST_SHOWN,
        "check": checking.running_check(dataset),
    }
    return render(request, "datasets/quality.html", context, status=HTTPStatus.OK if is_valid else 400)


def _bucket(report: Report, wanted: str) -> Bucket | None:
    """The one that is looked into: the fullest, if none is named."""
    if wanted == DROPPED:
        return Bucket((0, 0), report.dropped)
    found = report.buckets
    named = [bucket for bucket in found if bucket.name == wanted]
    return next(iter([*named, *found]), None)


@require_safe
def buckets(request: HttpRequest, pk: int) -> HttpResponse:
    """The choices of the grid's filter: buckets that have pictures, at the resolution that is entered."""
    dataset = get_visible(Dataset, signed_in(request), pk=pk)
    counts = bucket_counts(dataset, rules_of(request.GET))
    context = {"chosen": request.GET.get("bucket", ""), "bucket_counts": counts}
    return render(request, "datasets/_bucket_choices.html", context)


@require_safe
def summary(request: HttpRequest, pk: int) -> HttpResponse:
    """A few lines with counts, for beside the run form."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    form = BucketForm(request.GET)
    report = report_on(user, dataset, form.rules()) if form.is_valid() else None
    return render(request, "datasets/_quality_summary.html", {"dataset": dataset, "report": report})


@require_http_methods(["GET", "HEAD", "POST"])
def check(request: HttpRequest, pk: int) -> HttpResponse:
    """POST begins the check of the files, GET tells how far it is. Whoever may look at the dataset may ask for it."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    if request.method == "POST":
        checking.check_dataset(dataset, actor=user, again=bool(request.POST.get("again")))
        if not request.htmx:  # type: ignore[attr-defined]  # django_htmx's middleware
            messages.success(request, "The files are being checked. Load the page again in a moment.")
            return redirect("datasets:quality", pk)
    context = {
        "dataset": dataset,
        "check": checking.running_check(dataset),
        "unchecked": dataset.pictures.filter(checked_at=None).count(),
    }
    return render(request, "datasets/_quality_check.html", context)


@require_POST
def keep(request: HttpRequest, pk: int) -> HttpResponse:
    """Of pictures that look alike, one stays."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    form = KeepForm(request.POST)
    if not form.is_valid():
        raise UserError("Choose the picture to keep, and whose caption it gets, among those that look alike.")
    before = checking.keep_one(dataset, **form.cleaned_data)
    messages.success(request, f"Kept one. Restore version {before.number} to undo this.")
    return redirect("datasets:quality", pk)
