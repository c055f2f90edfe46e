"""Pages that show several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from lorapilot.access import signed_in
from lorapilot.errors import UserError
from runs import comparison
from runs.models import Run
from runs.views import HtmxRequest


@require_safe
def choose(request: HttpRequest) -> HttpResponse:
    """Which runs: those in the address are ticked."""
    return _ask(request, comparison.run_ids(request.GET.getlist("run")))


@require_safe
def compare(request: HtmxRequest) -> HttpResponse:
    """Two to six runs; asks again when there are fewer or more. htmx asks for the samples of another step."""
    ids = comparison.run_ids(request.GET.getlist("run"))
    try:
        comparison.check_count(ids)
    except UserError as error:
        return _ask(request, ids, refused=error.message)
    runs = comparison.find_runs(signed_in(request), ids)
    drawn = _samples(request, runs)
    if request.htmx:
        return render(request, "runs/_compare_samples.html", drawn)
    went = comparison.courses(runs)
    rows = comparison.rows(runs)
    context = {
        "columns": [{"run": run, "figures": one.figures} for run, one in zip(runs, went, strict=True)],
        "rows": rows,
        "different": sum(row.differs for row in rows),
        "curves": comparison.curves_json(runs, went),
        "has_points": any(one.curve for one in went),
    }
    return render(request, "runs/compare.html", drawn | context)


def _ask(request: HttpRequest, ids: Sequence[int], *, refused: str = "") -> HttpResponse:
    name = request.GET.get("name", "").replace("\0", "")
    context = {
        "runs": comparison.choices(signed_in(request), chosen=ids, name=name),
        "chosen": set(ids),
        "name": name,
        "refused": refused,
        "least": comparison.LEAST,
        "most": comparison.MOST,
    }
    return render(request, "runs/choose.html", context, status=HTTPStatus.BAD_REQUEST if refused else HTTPStatus.OK)


def _samples(request: HttpRequest, runs: Sequence[Run]) -> dict[str, Any]:
    """The samples at the step in the address, else at the last one."""
    found = comparison.samples(runs)
    wanted = request.GET.get("step", "")
    last = found.steps[-1] if found.steps else 0
    step = next((step for step in found.steps if str(step) == wanted), last)
    return {
        "runs": runs,
        "steps": found.steps,
        "step": step,
        "sample_rows": [{"row": row, "cells": list(zip(runs, row.at(step), strict=True))} for row in found.rows],
    }
