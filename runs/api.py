"""Runs over HTTP: submit, watch, stop, download. The same services as the pages."""

from __future__ import annotations

from django.db.models import QuerySet
from django.http import HttpResponse, HttpResponseBase
from django_filters import rest_framework as filters
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.services import record
from runs import logfile, selectors, services
from runs.enums import Profile, Status
from runs.files import send_checkpoint, send_sample
from runs.models import Run
from runs.serializers import (
    CheckpointSerializer,
    MetricsSerializer,
    RetrySerializer,
    RunEventSerializer,
    RunSerializer,
    SampleSerializer,
    SubmitSerializer,
)

LOG_BYTES = 1 << 20


class RunFilter(filters.FilterSet):
    status = filters.MultipleChoiceFilter(choices=Status.choices)
    profile = filters.ChoiceFilter(choices=Profile.choices)
    dataset = filters.NumberFilter(field_name="dataset_version__dataset")
    base_model = filters.NumberFilter(field_name="base_model")
    owner = filters.CharFilter(field_name="owner__username")
    name = filters.CharFilter(field_name="output_name", lookup_expr="icontains")


class RunViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Run]):
    serializer_class = RunSerializer
    filterset_class = RunFilter
    queryset = Run.objects.none()  # for the schema; requests go through the selector

    def get_queryset(self) -> QuerySet[Run]:
        return selectors.list_runs(self.request.user)

    def _visible(self) -> Run:
        return get_visible(Run, self.request.user, pk=self.kwargs["pk"])

    def _editable(self) -> Run:
        return get_editable(Run, self.request.user, pk=self.kwargs["pk"])

    def _answer(self, run: Run, status: int = 200) -> Response:
        return Response(RunSerializer(run).data, status=status)

    @extend_schema(request=SubmitSerializer, responses={201: RunSerializer})
    def create(self, request: Request) -> Response:
        """Queue a run; it starts as soon as a slot is free."""
        asked = SubmitSerializer(data=request.data, context={"request": request})
        asked.is_valid(raise_exception=True)
        given = dict(asked.validated_data)
        run = services.submit_run(signed_in(request), values=given.pop("settings"), **given)
        return self._answer(run, status=201)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str) -> Response:
        """Delete an ended run and its files."""
        run = self._editable()
        services.delete_run(run)
        record(signed_in(request), "run deleted", run, request)
        return Response(status=204)

    @extend_schema(request=None, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def stop(self, request: Request, pk: str) -> Response:
        """Ask the run to stop: it saves weights and state first."""
        return self._answer(services.stop_run(self._editable(), actor=signed_in(request)))

    @extend_schema(request=None, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def resume(self, request: Request, pk: str) -> Response:
        """Go on from the newest saved state, as a new attempt of the same run."""
        return self._answer(services.resume_run(self._editable(), actor=signed_in(request)))

    @extend_schema(request=RetrySerializer, responses={201: RunSerializer})
    @action(detail=True, methods=["post"])
    def retry(self, request: Request, pk: str) -> Response:
        """A new run with the same settings, base model and dataset version."""
        asked = RetrySerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        run = services.retry_run(self._visible(), actor=signed_in(request), **asked.validated_data)
        return self._answer(run, status=201)

    @extend_schema(request=None, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def hold(self, request: Request, pk: str) -> Response:
        """Keep a waiting run from starting."""
        return self._answer(services.hold_run(self._editable(), actor=signed_in(request)))

    @extend_schema(request=None, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def release(self, request: Request, pk: str) -> Response:
        """Let a held run start."""
        return self._answer(services.release_run(self._editable(), actor=signed_in(request)))

    @extend_schema(
        parameters=[OpenApiParameter("offset", OpenApiTypes.INT, description="Bytes to skip.")],
        responses={(200, "application/octet-stream"): OpenApiTypes.BINARY},
    )
    @action(detail=True)
    def log(self, request: Request, pk: str) -> HttpResponse:
        """Up to 1 MiB of raw log from `offset`; the header X-Log-Next-Offset says where to go on."""
        offset = _whole_number(request, "offset")
        data = logfile.read_at(self._visible().log_path, offset, LOG_BYTES)
        answer = HttpResponse(data, content_type="application/octet-stream")
        answer["X-Log-Next-Offset"] = str(offset + len(data))
        return answer

    @extend_schema(
        parameters=[OpenApiParameter("since", OpenApiTypes.INT, description="Only points after this step.")],
        responses=MetricsSerializer,
    )
    @action(detail=True)
    def metrics(self, request: Request, pk: str) -> Response:
        """Loss and learning rate by step."""
        return Response({"points": selectors.metric_points(self._visible(), since=_whole_number(request, "since"))})

    @extend_schema(responses=CheckpointSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def artifacts(self, request: Request, pk: str) -> Response:
        """The LoRA files that the run saved."""
        return Response(CheckpointSerializer(self._visible().checkpoints.all(), many=True).data)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    @action(detail=True, url_path=r"artifacts/(?P<checkpoint_id>\d+)/download")
    def download(self, request: Request, pk: str, checkpoint_id: str) -> HttpResponseBase:
        """One LoRA file; Range requests are answered."""
        return send_checkpoint(request, self._visible(), int(checkpoint_id))

    @extend_schema(responses=SampleSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def samples(self, request: Request, pk: str) -> Response:
        """The pictures that the run drew on its way."""
        return Response(SampleSerializer(self._visible().samples.all(), many=True).data)

    @extend_schema(responses={(200, "image/png"): OpenApiTypes.BINARY})
    @action(detail=True, url_path=r"samples/(?P<sample_id>\d+)/file")
    def sample_file(self, request: Request, pk: str, sample_id: str) -> HttpResponseBase:
        """One sample's picture."""
        return send_sample(request, self._visible(), int(sample_id))

    @extend_schema(responses=RunEventSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def events(self, request: Request, pk: str) -> Response:
        """Every change of status, and warnings."""
        return Response(RunEventSerializer(self._visible().events.select_related("actor"), many=True).data)


def _whole_number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{name} is a whole number, 0 or more.", field=name)
    return int(text)
