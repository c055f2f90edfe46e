"""Pages of versions: list, what differs between two, and back to one."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db.models import F, Func, IntegerField
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from datasets.models import Dataset, DatasetVersion
from datasets.services import pin_version
from datasets.versions import diff, restore_version
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.services import record

NOW = "now"
MOST_SHOWN = 200  # pictures in a comparison


class JSONLength(Func):
    """How many entries a JSON list has, counted by the database."""

    function = "json_array_length"
    output_field = IntegerField()

    def as_postgresql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, function="jsonb_array_length", **context)


@require_safe
def versions(request: HttpRequest, pk: int) -> HttpResponse:
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=pk)
    listed = dataset.versions.defer("pictures").annotate(picture_count=JSONLength(F("pictures")))
    context = {"dataset": dataset, "versions": listed, "can_edit": dataset.is_editable_by(user)}
    return render(request, "datasets/versions.html", context)


@require_POST
def pin(request: HttpRequest, pk: int) -> HttpResponse:
    """Keeps the dataset as it is now. The same content is the version that there is."""
    dataset = get_editable(Dataset, signed_in(request), pk=pk)
    known = set(dataset.versions.values_list("pk", flat=True))
    version = pin_version(dataset)
    if version.pk in known:
        messages.info(request, f"The dataset is the same as version {version.number}, so there is nothing new to keep.")
    else:
        messages.success(request, f"The dataset as it is now is kept as version {version.number}.")
    return redirect("datasets:versions", pk)


@require_safe
def compare(request: HttpRequest, pk: int) -> HttpResponse:
    """`from` and `to`: numbers of versions, or `now`."""
    dataset = get_visible(Dataset, signed_in(request), pk=pk)
    before = state_named(dataset, request.GET.get("from", ""))
    after = state_named(dataset, request.GET.get("to", NOW))
    context = {
        "dataset": dataset,
        "before": before,
        "after": after,
        "diff": diff(before, after),
        "most": MOST_SHOWN,
        "most_slice": f":{MOST_SHOWN}",
        "shown": _shown(dataset),
    }
    return render(request, "datasets/versions_compare.html", context)


def state_named(dataset: Dataset, name: str) -> Dataset | DatasetVersion:
    """The dataset as it is `now`, or its version of that number."""
    if name == NOW:
        return dataset
    if not name.isdecimal() or len(name) > 9:
        raise Http404
    return get_object_or_404(DatasetVersion, dataset=dataset, number=int(name))


@require_http_methods(["GET", "HEAD", "POST"])
def restore(request: HttpRequest, pk: int, number: int) -> HttpResponse:
    """Shows what would change, then does it."""
    user = signed_in(request)
    dataset = get_editable(Dataset, user, pk=pk)
    version = get_object_or_404(DatasetVersion, dataset=dataset, number=number)
    if request.method != "POST":
        context = {
            "dataset": dataset,
            "version": version,
            "diff": diff(dataset, version),
            "most": MOST_SHOWN,
            "most_slice": f":{MOST_SHOWN}",
            "shown": _shown(dataset),
        }
        return render(request, "datasets/version_restore.html", context)
    restored = restore_version(dataset, version)
    record(user, "dataset restored", f"{dataset} to v{number}", request)
    undo = f" Restore version {restored.before.number} to undo this." if restored.before else ""
    messages.success(request, f"The dataset is as in version {number}.{undo}")
    if restored.missing:
        names = ", ".join(restored.missing[:5]) + (" and others" if len(restored.missing) > 5 else "")
        messages.warning(request, f"Deleted for good, so not brought back: {names}.")
    return redirect("datasets:versions", pk)


def _shown(dataset: Dataset) -> dict[str, int]:
    """The pictures that have a thumbnail on the page, by their file: those that are in the dataset now."""
    return dict(dataset.pictures.values_list("sha256", "pk"))
