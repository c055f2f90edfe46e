"""The API of quality, turning and cropping, and versions."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.shortcuts import get_object_or_404
from django.urls import path
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets import checking, edits, selectors, versions
from datasets.edit_services import edit_picture
from datasets.models import Dataset, DatasetVersion, Picture
from datasets.quality import as_dict, report_on
from datasets.quality_forms import rules_of
from datasets.serializers import PictureSerializer, VersionSerializer
from datasets.version_views import state_named
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.serializers import JobSerializer, valid
from lorapilot.services import record


class EditSerializer(serializers.Serializer[Any]):
    rotation = serializers.ChoiceField(choices=edits.ROTATIONS, default=0, help_text="Clockwise, in degrees.")
    crop = serializers.ListField(
        child=serializers.IntegerField(),
        min_length=4,
        max_length=4,
        allow_null=True,
        default=None,
        help_text="[left, top, width, height] in pixels of the turned picture; null: all of it.",
    )


class KeepSerializer(serializers.Serializer[Any]):
    pictures = serializers.ListField(child=serializers.IntegerField(), help_text="Those that look alike.")
    keep = serializers.IntegerField(help_text="The one that stays.")
    caption_of = serializers.IntegerField(help_text="The one whose caption it gets.")


class CheckSerializer(serializers.Serializer[Any]):
    again = serializers.BooleanField(default=False, help_text="Also those that were checked before.")


def _parameter(name: str, kind: Any, description: str) -> OpenApiParameter:
    return OpenApiParameter(name, kind, description=description)


BUCKETS = [
    _parameter("resolution", int, "Side in pixels of a square with the training area; 1024 when left out."),
    _parameter("buckets", str, "off: everything is cropped to a square."),
    _parameter("upscale", str, "off: small pictures are not enlarged."),
    _parameter("minimum", int, "Shortest side of a bucket; else as the run form sets it for the resolution."),
    _parameter("maximum", int, "Longest side of a bucket."),
    _parameter("step", int, "Sides are multiples of it."),
]


class QualityView(APIView):
    @extend_schema(parameters=BUCKETS, responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, dataset_pk: int) -> Response:
        """What is wrong with the dataset, and where the trainer puts each picture."""
        user = signed_in(request)
        dataset = get_visible(Dataset, user, pk=dataset_pk)
        return Response(as_dict(report_on(user, dataset, rules_of(request.query_params))))


class QualityCheckView(APIView):
    @extend_schema(request=CheckSerializer, responses={202: JobSerializer})
    def post(self, request: Request, dataset_pk: int) -> Response:
        """Check the files and find out which pictures look alike, in the background."""
        user = signed_in(request)
        dataset = get_visible(Dataset, user, pk=dataset_pk)
        job = checking.check_dataset(dataset, actor=user, **valid(CheckSerializer(data=request.data)))
        return Response(JobSerializer(job).data, status=HTTPStatus.ACCEPTED)


class QualityKeepView(APIView):
    @extend_schema(request=KeepSerializer, responses=VersionSerializer)
    def post(self, request: Request, dataset_pk: int) -> Response:
        """Of pictures that look alike, keep one. Answers with the version that the dataset was before."""
        dataset = get_editable(Dataset, signed_in(request), pk=dataset_pk)
        before = checking.keep_one(dataset, **valid(KeepSerializer(data=request.data)))
        return Response(VersionSerializer(before).data)


class PictureEditView(APIView):
    @extend_schema(responses=EditSerializer)
    def get(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """How the picture is turned and cropped."""
        picture = selectors.visible_picture(signed_in(request), dataset_id=dataset_pk, picture_id=pk)
        return Response(EditSerializer(picture.edit or {"rotation": 0, "crop": None}).data)

    @extend_schema(request=EditSerializer, responses=PictureSerializer)
    def put(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """Turn and crop the picture as it was uploaded. The uploaded file stays."""
        picture = self._editable(request, dataset_pk, pk)
        given = valid(EditSerializer(data=request.data))
        edited = edit_picture(picture, rotation=given["rotation"], crop=given["crop"] and tuple(given["crop"]))
        return Response(PictureSerializer(edited).data)

    @extend_schema(responses=PictureSerializer)
    def delete(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """The picture is again as it was uploaded."""
        picture = self._editable(request, dataset_pk, pk)
        return Response(PictureSerializer(edit_picture(picture, rotation=0, crop=None)).data)

    def _editable(self, request: Request, dataset_pk: int, pk: int) -> Picture:
        return selectors.editable_picture(signed_in(request), dataset_id=dataset_pk, picture_id=pk)


class VersionDiffView(APIView):
    @extend_schema(
        parameters=[
            OpenApiParameter("from", str, required=True, description="Number of a version, or `now`."),
            OpenApiParameter("to", str, description="The same; `now` when left out."),
        ],
        responses=OpenApiTypes.OBJECT,
    )
    def get(self, request: Request, dataset_pk: int) -> Response:
        """Pictures that were added, removed or changed between two versions; captions word by word. `missing`: added,
        but deleted for good since, so restoring does not bring them back."""
        dataset = get_visible(Dataset, signed_in(request), pk=dataset_pk)
        before = state_named(dataset, request.query_params.get("from", ""))
        after = state_named(dataset, request.query_params.get("to", "now"))
        return Response(_diff_as_dict(versions.diff(before, after)))


class VersionRestoreView(APIView):
    @extend_schema(request=None, responses=OpenApiTypes.OBJECT)
    def post(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """Make the dataset as the version was. `before` is the version that undoes it; `missing` names pictures that
        were deleted for good."""
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=dataset_pk)
        version = get_object_or_404(DatasetVersion, dataset=dataset, pk=pk)
        restored = versions.restore_version(dataset, version)
        record(user, "dataset restored", f"{dataset} to v{version.number}", request)
        before = restored.before and VersionSerializer(restored.before).data
        return Response({"before": before, "missing": restored.missing})


def _diff_as_dict(found: versions.Diff) -> dict[str, Any]:
    return {
        "trigger_word": found.trigger_word,
        "added": [_named(listed) for listed in found.added],
        "removed": [_named(listed) for listed in found.removed],
        "missing": [_named(listed) for listed in found.missing],
        "changed": [
            _named(change.after)
            | {
                "is_edited": change.is_edited,
                "repeats": [change.before["repeats"], change.after["repeats"]],
                "caption": change.caption,
            }
            for change in found.changed
        ],
    }


def _named(listed: versions.Listed) -> dict[str, Any]:
    return {name: listed[name] for name in ("name", "sha256")}


BELOW = "datasets/<int:dataset_pk>"
urlpatterns = [
    path(f"{BELOW}/quality/", QualityView.as_view(), name="dataset-quality"),
    path(f"{BELOW}/quality/check/", QualityCheckView.as_view(), name="dataset-quality-check"),
    path(f"{BELOW}/quality/keep/", QualityKeepView.as_view(), name="dataset-quality-keep"),
    path(f"{BELOW}/pictures/<int:pk>/edit/", PictureEditView.as_view(), name="picture-edit"),
    path(f"{BELOW}/versions/diff/", VersionDiffView.as_view(), name="version-diff"),
    path(f"{BELOW}/versions/<int:pk>/restore/", VersionRestoreView.as_view(), name="version-restore"),
]
