"""Sends a run's files. The caller has found the run by access.get_visible; paths come from our own rows only."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import get_object_or_404

from lorapilot import downloads, workspace
from runs.models import Run


def send_checkpoint(request: HttpRequest, run: Run, checkpoint_id: int) -> HttpResponseBase:
    """A LoRA file, as a download."""
    checkpoint = get_object_or_404(run.checkpoints, pk=checkpoint_id)
    path = workspace.inside(run.folder, checkpoint.path)
    return downloads.send_file(request, path, filename=path.name, content_type="application/octet-stream")


def send_sample(request: HttpRequest, run: Run, sample_id: int) -> HttpResponseBase:
    """A sample picture, to be shown in a page."""
    sample = get_object_or_404(run.samples, pk=sample_id)
    path = workspace.inside(run.folder, sample.path)
    return downloads.send_file(request, path, filename=path.name, content_type="image/png", as_attachment=False)


def send_log(request: HttpRequest, run: Run) -> HttpResponseBase:
    """The whole train.log, as a download."""
    filename = f"{run.output_name}.log"
    return downloads.send_file(request, run.log_path, filename=filename, content_type="text/plain; charset=utf-8")
