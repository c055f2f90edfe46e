"""Which runs saw a picture, and deleting it for good. By page and by API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets import selectors
from datasets.models import Dataset
from lorapilot.access import get_visible, signed_in
from lorapilot.services import record
from runs import picture_history

MOST_NAMED = 6  # runs on one version


@require_safe
def of_picture(request: HttpRequest, dataset_pk: int, picture_pk: int) -> HttpResponse:
    user = signed_in(request)
    picture = selectors.visible_picture(user, dataset_id=dataset_pk, picture_id=picture_pk)
    context = {
        "picture": picture,
        "dataset": picture.dataset,
        "seen": picture_history.runs_that_saw(user, picture_history.root_of(picture)),
        "can_destroy": picture.dataset.is_owned_by(user),
    }
    return render(request, "runs/of_picture.html", context)


@require_safe
def of_versions(request: HttpRequest, dataset_pk: int) -> HttpResponse:
    """The part of a dataset's list of versions that names the runs on each."""
    user = signed_in(request)
    dataset = get_visible(Dataset, user, pk=dataset_pk)
    context = {
        "versions": picture_history.runs_on_versions(user, dataset),
        "most": MOST_NAMED,
        "most_slice": f":{MOST_NAMED}",
        "beyond": -MOST_NAMED,
    }
    return render(request, "runs/_of_versions.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
def destroy(request: HttpRequest, dataset_pk: int, picture_pk: int) -> HttpResponse:
    """Says what is touched, asks, and deletes the picture for good."""
    user = signed_in(request)
    picture = selectors.owned_picture(user, dataset_id=dataset_pk, picture_id=picture_pk)
    if request.method != "POST":
        affected = picture_history.affected_by_destroying(user, picture)
        context = {"picture": picture, "dataset": picture.dataset, "affected": affected}
        return render(request, "runs/destroy_picture.html", context)
    subject = f"{picture.original_name} of {picture.dataset}"
    picture_history.destroy_picture(user, picture)
    record(user, "picture deleted for good", subject, request)
    messages.success(request, f"“{picture.original_name}” is deleted for good.")
    return redirect("datasets:detail", dataset_pk)


class SeenSerializer(serializers.Serializer[Any]):
    run = serializers.IntegerField(source="run.pk")
    output_name = serializers.CharField(source="run.output_name")
    status = serializers.CharField(source="run.status")
    version = serializers.CharField(source="run.dataset_version")
    caption = serializers.CharField()
    is_edited = serializers.BooleanField(help_text="Turned or cropped when the run saw it.")
    loras = serializers.ListField(child=serializers.CharField(), help_text="Its LoRA files.")


class PictureRunsView(APIView):
    @extend_schema(responses=SeenSerializer(many=True))
    def get(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """The runs that you see which were trained on this picture, with the caption that it had then."""
        user = signed_in(request)
        picture = selectors.visible_picture(user, dataset_id=dataset_pk, picture_id=pk)
        seen = picture_history.runs_that_saw(user, picture_history.root_of(picture))
        return Response(SeenSerializer(seen, many=True).data)


class DestroyPictureView(APIView):
    @extend_schema(responses={204: None})
    def delete(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """Delete the picture for good: its file, in all your datasets and versions (of staff: everywhere)."""
        user = signed_in(request)
        picture = selectors.owned_picture(user, dataset_id=dataset_pk, picture_id=pk)
        subject = f"{picture.original_name} of {picture.dataset}"
        picture_history.destroy_picture(user, picture)
        record(user, "picture deleted for good", subject, request)
        return Response(status=HTTPStatus.NO_CONTENT)
