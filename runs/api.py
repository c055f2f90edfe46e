"""Runs and hosts over HTTP: submit, watch, stop, download; maintenance. The same services as the pages."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404
from django_filters import rest_framework as filters
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot.access import get_editable, get_visible, require_staff, signed_in
from lorapilot.errors import UserError
from lorapilot.serializers import valid
from lorapilot.services import record
from runs import comparison, fleet, logfile, parts, publishing, selectors, services, waiting
from runs.device_history import MOST_HOURS, history_of
from runs.enums import Priority, Profile, Status
from runs.files import send_checkpoint, send_sample
from runs.model_check import remedies
from runs.models import Checkpoint, Host, Run
from runs.preview import Preview, Submission, preview_submission
from runs.serializers import (
    AttemptSerializer,
    BatchSerializer,
    CheckpointSerializer,
    ComparisonSerializer,
    DeviceHistorySerializer,
    DrainSerializer,
    HostSerializer,
    MetricsSerializer,
    MoveSerializer,
    PartSerializer,
    PrioritySerializer,
    PublishedSerializer,
    PublishSerializer,
    QueueSerializer,
    ResumeSerializer,
    RetrySerializer,
    RunCheckedSerializer,
    RunCheckSerializer,
    RunEventSerializer,
    RunSerializer,
    SampleSerializer,
    SubmitSerializer,
)
from runs.stacks import CAPTIONER, STACKS

LOG_BYTES = 1 << 20
MOST_ID = 2**63 - 1


class RunFilter(filters.FilterSet):
    status = filters.MultipleChoiceFilter(choices=Status.choices)
    profile = filters.ChoiceFilter(choices=Profile.choices)
    priority = filters.ChoiceFilter(choices=Priority.choices)
    stack = filters.ChoiceFilter(choices=[(name, name) for name in sorted([*STACKS, CAPTIONER.key])])
    dataset = filters.NumberFilter(field_name="dataset_version__dataset", max_value=MOST_ID)
    base_model = filters.NumberFilter(field_name="base_model", max_value=MOST_ID)
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

    def _answer(self, run: Run, status: int = HTTPStatus.OK) -> Response:
        """The run as it is now: a service may have let it start."""
        return Response(self.get_serializer(get_object_or_404(self.get_queryset(), pk=run.pk)).data, status=status)

    @extend_schema(request=SubmitSerializer, responses={201: RunSerializer})
    def create(self, request: Request) -> Response:
        """Queue a run; it starts as soon as a slot is free."""
        given = valid(SubmitSerializer(data=request.data, context={"request": request}))
        run = services.submit_run(signed_in(request), values=given.pop("settings"), **given)
        return self._answer(run, status=HTTPStatus.CREATED)

    @extend_schema(request=RunCheckSerializer, responses=RunCheckedSerializer, filters=False)
    @action(detail=False, methods=["post"], pagination_class=None)
    def check(self, request: Request) -> Response:
        """What would be trained, or what the trainer lacks for this base model. Nothing is queued."""
        given = valid(RunCheckSerializer(data=request.data, context={"request": request}))
        del given["priority"]
        source, values = given.pop("dataset"), given.pop("settings")
        asked = Submission(user=signed_in(request), source=source, values=values, **given)
        found = preview_submission(asked)
        if found.refusal and found.refusal.field not in ("base_model", "stack"):
            raise found.refusal
        refusal = found.refusal.message if found.refusal else ""
        missing = found.remedies
        if found.refusal and found.refusal.field == "stack":  # it is not installed: what it would lack after that
            missing = remedies(STACKS[asked.stack], asked.base_model, asked.user)
        return Response(RunCheckedSerializer({"refusal": refusal, "missing": missing, "plan": _planned(found)}).data)

    @extend_schema(request=BatchSerializer, responses={201: RunSerializer(many=True)}, filters=False)
    @action(detail=False, methods=["post"], pagination_class=None)
    def batch(self, request: Request) -> Response:
        """Queue a run for every combination of the values in `varied`, on one dataset version: all of them or none."""
        given = valid(BatchSerializer(data=request.data, context={"request": request}))
        made = services.submit_many(signed_in(request), values=given.pop("settings"), **given)
        runs = self.get_queryset().filter(pk__in=[run.pk for run in made]).order_by("pk")
        return Response(self.get_serializer(runs, many=True).data, status=HTTPStatus.CREATED)

    @extend_schema(responses=QueueSerializer, filters=False)
    @action(detail=False, pagination_class=None)
    def queue(self, request: Request) -> Response:
        """The waiting runs that you see, in the order in which they start; held ones are left out."""
        queue = waiting.Queue()
        yours = self.get_queryset().filter(status=Status.QUEUED, held_at=None).in_bulk()
        runs = [yours[run.pk] for run in queue.order if run.pk in yours]
        shown = {"rule": waiting.TURN_RULE, "length": len(queue.order), "runs": runs}
        return Response(QueueSerializer(shown, context={"queue": queue}).data)

    @extend_schema(
        parameters=[OpenApiParameter("run", OpenApiTypes.INT, many=True, required=True, description="Two to six ids.")],
        responses=ComparisonSerializer,
        filters=False,
    )
    @action(detail=False, pagination_class=None)
    def compare(self, request: Request) -> Response:
        """Two to six runs: how they went, the settings that differ, and their samples by prompt and seed."""
        ids = comparison.run_ids(request.query_params.getlist("run"))
        comparison.check_count(ids)
        runs = comparison.find_runs(signed_in(request), ids)
        figures = [course.figures for course in comparison.courses(runs)]
        shown = {
            "runs": [{"run": run, "figures": one} for run, one in zip(runs, figures, strict=True)],
            "differences": comparison.differences(runs),
            "samples": comparison.samples(runs).rows,
        }
        return Response(ComparisonSerializer(shown, context=self.get_serializer_context()).data)

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
    def pause(self, request: Request, pk: str) -> Response:
        """Let the run save and go back to the queue, where it is held until it is released."""
        return self._answer(services.pause_run(self._editable(), actor=signed_in(request)))

    @extend_schema(request=None, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def kill(self, request: Request, pk: str) -> Response:
        """End the run at once, without saving. It can be resumed from its last saved state."""
        return self._answer(services.kill_run(self._editable(), actor=signed_in(request)))

    @extend_schema(request=ResumeSerializer, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def resume(self, request: Request, pk: str) -> Response:
        """Go on from the newest saved state, as a new attempt of the same run."""
        run = self._editable()
        given = valid(ResumeSerializer(data=request.data))
        return self._answer(services.resume_run(run, actor=signed_in(request), **given))

    @extend_schema(request=RetrySerializer, responses={201: RunSerializer})
    @action(detail=True, methods=["post"])
    def retry(self, request: Request, pk: str) -> Response:
        """A new run with the same settings (but for those in `settings`), base model and dataset version."""
        run = self._visible()
        given = valid(RetrySerializer(data=request.data))
        return self._answer(services.retry_run(run, actor=signed_in(request), **given), status=HTTPStatus.CREATED)

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

    @extend_schema(request=PrioritySerializer, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def priority(self, request: Request, pk: str) -> Response:
        """Put a waiting run before or after the runs of others."""
        run = self._editable()
        given = valid(PrioritySerializer(data=request.data))
        return self._answer(services.set_priority(run, actor=signed_in(request), **given))

    @extend_schema(request=MoveSerializer, responses=RunSerializer)
    @action(detail=True, methods=["post"])
    def move(self, request: Request, pk: str) -> Response:
        """Move a waiting run among its owner's own of the same priority."""
        run = self._editable()
        given = valid(MoveSerializer(data=request.data))
        return self._answer(services.reorder_run(run, actor=signed_in(request), **given))

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
        run = self._visible()
        published = publishing.published_of(run)
        shown = CheckpointSerializer(run.checkpoints.all(), many=True, context={"published": published})
        return Response(shown.data)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    @action(detail=True, url_path=r"artifacts/(?P<checkpoint_id>[0-9]{1,18})/download")
    def download(self, request: Request, pk: str, checkpoint_id: str) -> HttpResponseBase:
        """One LoRA file; Range requests are answered."""
        return send_checkpoint(request, self._visible(), int(checkpoint_id))

    @extend_schema(request=PublishSerializer, responses={200: PublishedSerializer, 201: PublishedSerializer})
    @action(detail=True, methods=["post"], url_path=r"artifacts/(?P<checkpoint_id>[0-9]{1,18})/publish")
    def publish(self, request: Request, pk: str, checkpoint_id: str) -> Response:
        """Put one LoRA file into models/loras, where ComfyUI and InvokeAI find it. 200 when it is there already."""
        checkpoint = self._own_checkpoint(checkpoint_id)
        given = valid(PublishSerializer(data=request.data))
        found = publishing.publish_checkpoint(checkpoint, actor=signed_in(request), request=request, **given)
        status = HTTPStatus.CREATED if found.is_new else HTTPStatus.OK
        return Response(PublishedSerializer(found).data, status=status)

    @extend_schema(responses={204: None})
    @publish.mapping.delete
    def unpublish(self, request: Request, pk: str, checkpoint_id: str) -> Response:
        """Remove it from there. The run keeps its file."""
        publishing.unpublish_checkpoint(self._own_checkpoint(checkpoint_id), actor=signed_in(request), request=request)
        return Response(status=HTTPStatus.NO_CONTENT)

    def _own_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return get_object_or_404(self._editable().checkpoints.select_related("run"), pk=int(checkpoint_id))

    @extend_schema(responses=SampleSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def samples(self, request: Request, pk: str) -> Response:
        """The pictures that the run drew on its way."""
        return Response(SampleSerializer(self._visible().samples.all(), many=True).data)

    @extend_schema(responses={(200, "image/png"): OpenApiTypes.BINARY})
    @action(detail=True, url_path=r"samples/(?P<sample_id>[0-9]{1,18})/file")
    def sample_file(self, request: Request, pk: str, sample_id: str) -> HttpResponseBase:
        """One sample's picture."""
        return send_sample(request, self._visible(), int(sample_id))

    @extend_schema(responses=RunEventSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def events(self, request: Request, pk: str) -> Response:
        """Every change of status, and warnings."""
        return Response(RunEventSerializer(self._visible().events.select_related("actor"), many=True).data)

    @extend_schema(responses=AttemptSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def attempts(self, request: Request, pk: str) -> Response:
        """Every launch of the trainer: where, from which step, and how it ended."""
        return Response(AttemptSerializer(self._visible().attempts.select_related("slot__host"), many=True).data)


class HostViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Host]):
    """Machines that train, with their slots and devices. Everybody who is signed in reads, staff act."""

    serializer_class = HostSerializer
    queryset = Host.objects.none()  # for the schema
    filter_backends = ()
    lookup_field = "name"
    lookup_value_regex = r"[^/\x00]+"  # names of machines have dots

    def get_queryset(self) -> QuerySet[Host]:
        return selectors.list_hosts(signed_in(self.request))

    def _for_staff(self) -> Host:
        host = get_object_or_404(Host, name=self.kwargs["name"])
        require_staff(signed_in(self.request), fleet.STAFF_ONLY)
        return host

    def _answer(self, host: Host, done: str, subject: object) -> Response:
        record(signed_in(self.request), done, subject, self.request)
        return Response(self.get_serializer(get_object_or_404(self.get_queryset(), pk=host.pk)).data)

    @extend_schema(
        responses=DeviceHistorySerializer(many=True),
        parameters=[OpenApiParameter("hours", OpenApiTypes.INT, description="1 to 24 (the default).")],
    )
    @action(detail=True, pagination_class=None)
    def history(self, request: Request, name: str) -> Response:
        """How busy its devices were: at most 500 points each."""
        hours = _whole_number(request, "hours", default=MOST_HOURS)
        if not 1 <= hours <= MOST_HOURS:
            raise UserError(f"hours is 1 to {MOST_HOURS}: samples are kept for a day.", field="hours")
        found = history_of(get_object_or_404(Host, name=name), hours=hours)
        return Response(DeviceHistorySerializer(found, many=True).data)

    @extend_schema(request=DrainSerializer, responses=HostSerializer)
    @action(detail=True, methods=["post"])
    def drain(self, request: Request, name: str) -> Response:
        """Begin a maintenance: the host takes no more runs. Staff only."""
        host = self._for_staff()
        given = valid(DrainSerializer(data=request.data))
        fleet.drain_host(host, actor=signed_in(request), **given)
        return self._answer(host, "host drained, runs moved" if given["move_runs"] else "host drained", host)

    @extend_schema(request=None, responses=HostSerializer)
    @action(detail=True, methods=["post"])
    def undrain(self, request: Request, name: str) -> Response:
        """End the maintenance: the host takes runs again. Staff only."""
        host = fleet.undrain_host(self._for_staff())
        return self._answer(host, "host undrained", host)

    @extend_schema(request=None, responses=HostSerializer)
    @action(detail=True, methods=["post"], url_path="declare-dead")
    def declare_dead(self, request: Request, name: str) -> Response:
        """The host does not come back: its runs go on elsewhere. Refused (409) while it is heard of. Staff only."""
        host = self._for_staff()
        fleet.declare_dead(host, actor=signed_in(request))
        return self._answer(host, "host declared dead", host)

    @extend_schema(request=None, responses=HostSerializer)
    @action(detail=True, methods=["post"], url_path=r"slots/(?P<slot_name>[^/\x00]+)/enable")
    def enable(self, request: Request, name: str, slot_name: str) -> Response:
        """Let a slot take runs. Staff only."""
        return self._set_enabled(slot_name, is_enabled=True)

    @extend_schema(request=None, responses=HostSerializer)
    @action(detail=True, methods=["post"], url_path=r"slots/(?P<slot_name>[^/\x00]+)/disable")
    def disable(self, request: Request, name: str, slot_name: str) -> Response:
        """Let a slot finish its run and take no other. Staff only."""
        return self._set_enabled(slot_name, is_enabled=False)

    def _set_enabled(self, slot_name: str, *, is_enabled: bool) -> Response:
        host = self._for_staff()
        slot = fleet.set_slot_enabled(get_object_or_404(host.slots, name=slot_name), is_enabled=is_enabled)
        return self._answer(host, "slot enabled" if is_enabled else "slot disabled", slot)


class ServiceListView(APIView):
    @extend_schema(responses=PartSerializer(many=True))
    def get(self, request: Request) -> Response:
        """The parts of the installation and how each of them is. Folders, processes and commands are for staff."""
        return Response(PartSerializer(parts.list_parts(signed_in(request)), many=True).data)


def _planned(found: Preview) -> dict[str, Any] | None:
    """The figures that stand beside the run form."""
    plan = found.plan
    if plan is None:
        return None
    return {
        "spec": plan.spec.as_values(),
        "steps": plan.spec.steps,
        "epochs": plan.epochs,
        "updates_per_epoch": plan.updates_per_epoch,
        "images": plan.images,
        "repeats": plan.spec.repeats,
        "device": plan.device,
        "expected_seconds": found.seconds,
        "memory_bytes": found.memory_bytes,
        "needed_bytes": found.needed_bytes,
        "free_bytes": found.free_bytes,
        "notes": plan.notes,
        "not_expressed": plan.not_expressed,
    }


def _whole_number(request: Request, name: str, *, default: int = 0) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{name} is a whole number, 0 or more.", field=name)
    return int(text)
