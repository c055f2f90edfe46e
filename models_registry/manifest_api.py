"""The API of models that can be pulled: everybody who is signed in reads, staff pull."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework import serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot.access import signed_in
from models_registry import manifest, pulls
from models_registry.manifest_selectors import manifest_rows, pull_status


class ManifestRowSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    kind = serializers.ChoiceField(choices=manifest.KINDS)
    source = serializers.CharField()  # type: ignore[assignment]  # REST framework's fields have one of their own
    subdir = serializers.CharField(help_text="Of the models folder.")
    include = serializers.CharField(help_text="Patterns of a repository's files, or the name that a file gets.")
    expected_size_bytes = serializers.IntegerField(allow_null=True, help_text="About; null: unknown.")
    category = serializers.CharField()
    installed = serializers.BooleanField()
    size_bytes = serializers.IntegerField(help_text="As it is here.")
    target_path = serializers.CharField(help_text="Absolute for staff, else in the models folder.")
    licence = serializers.CharField()
    gated = serializers.BooleanField()
    architecture = serializers.CharField()
    stacks = serializers.ListField(child=serializers.CharField())
    role = serializers.CharField()
    base_model = serializers.IntegerField(
        source="base_model.pk", default=None, allow_null=True, help_text="Its id, when it is registered."
    )


class ProblemSerializer(serializers.Serializer[Any]):
    line = serializers.IntegerField()
    message = serializers.CharField()


class ManifestSerializer(serializers.Serializer[Any]):
    models = ManifestRowSerializer(many=True)
    problems = ProblemSerializer(many=True)


class PullSerializer(serializers.Serializer[Any]):
    subdir = serializers.CharField(
        max_length=400, required=False, default="", allow_blank=True, help_text="Instead of the manifest's folder."
    )


class PullStatusSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    state = serializers.ChoiceField(choices=("idle", "running", "done", "error"))
    progress_pct = serializers.FloatField()
    last_line = serializers.CharField()
    error = serializers.CharField()


class ManifestView(APIView):
    @extend_schema(summary="Models that can be pulled, and wrong lines of the manifest", responses=ManifestSerializer)
    def get(self, request: Request) -> Response:
        rows = manifest_rows(signed_in(request))
        body = {"models": rows, "problems": [asdict(problem) for problem in manifest.load().problems]}
        return Response(ManifestSerializer(body).data)


class PullView(APIView):
    @extend_schema(summary="How far the pull of a model is", responses=PullStatusSerializer)
    def get(self, request: Request, name: str) -> Response:
        return self._status(request, name)

    @extend_schema(summary="Pull a model (staff)", request=PullSerializer, responses={202: PullStatusSerializer})
    def post(self, request: Request, name: str) -> Response:
        wanted = PullSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        pulls.start_pull(signed_in(request), name, wanted.validated_data["subdir"], request=request._request)
        return self._status(request, name, status.HTTP_202_ACCEPTED)

    @extend_schema(summary="Cancel a pull (staff); what has arrived is kept", responses=PullStatusSerializer)
    def delete(self, request: Request, name: str) -> Response:
        pulls.cancel_pull(signed_in(request), name, request=request._request)
        return self._status(request, name)

    def _status(self, request: Request, name: str, code: int = status.HTTP_200_OK) -> Response:
        return Response(PullStatusSerializer(pull_status(signed_in(request), name)).data, status=code)
