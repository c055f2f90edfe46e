"""The API of the LoRA library and of uploads to it. Every change goes through the same services as the pages."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.http import HttpResponseBase
from django.urls import reverse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework import serializers, viewsets
from rest_framework.decorators import action
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot.access import get_editable, get_owned, get_visible, signed_in
from lorapilot.serializers import JobSerializer, SharingInput, valid
from lorapilot.services import share
from lorapilot.upload_api import ChunksView, chunks_schema, offset_headers
from models_registry import adapter_selectors, adapter_services
from models_registry.enums import Architecture
from models_registry.lora_recognition import metadata_rows
from models_registry.models import Adapter, AdapterUpload
from runs import library, publishing
from runs.library_views import send_adapter, send_adapter_sample
from runs.serializers import PublishedSerializer, PublishSerializer


# --- What is shown and taken ------------------------------------------------------------------------------------------
class AdapterSerializer(serializers.ModelSerializer[Adapter]):
    """A LoRA. The context has `runs` and `samples`, see `_context`."""

    owner = serializers.CharField(source="owner.username", read_only=True)
    groups: Any = serializers.SlugRelatedField(slug_field="name", many=True, read_only=True)
    editor_groups: Any = serializers.SlugRelatedField(slug_field="name", many=True, read_only=True)
    is_produced = serializers.BooleanField(read_only=True, help_text="A run made it; otherwise it was uploaded.")
    run = serializers.SerializerMethodField(help_text="The id of that run, when you see it.")
    tags: Any = serializers.SlugRelatedField(slug_field="word", many=True, read_only=True)
    download = serializers.SerializerMethodField()
    samples = serializers.SerializerMethodField(help_text="Addresses of pictures that it draws.")

    class Meta:
        model = Adapter
        fields: tuple[str, ...] = (
            "id",
            "name",
            "owner",
            "groups",
            "editor_groups",
            "is_produced",
            "run",
            "architecture",
            "style",
            "algorithm",
            "rank",
            "alpha",
            "dtype",
            "parameters",
            "bytes",
            "sha256",
            "trigger_word",
            "base_model",
            "base_model_name",
            "tags",
            "download",
            "samples",
            "created_at",
            "updated_at",
        )

    def get_run(self, adapter: Adapter) -> int | None:
        found: int | None = self.context["runs"].get(adapter.pk)
        return found

    def get_download(self, adapter: Adapter) -> str:
        return reverse("lora-download", args=[adapter.pk])

    def get_samples(self, adapter: Adapter) -> list[str]:
        samples = self.context["samples"][adapter.pk]
        return [reverse("lora-sample-file", args=[adapter.pk, sample.pk]) for sample in samples]


class LoraPartSerializer(serializers.Serializer[Any]):
    """Ranks and alphas: value → how many modules have it."""

    title = serializers.CharField()
    modules = serializers.IntegerField()
    ranks = serializers.DictField(child=serializers.IntegerField())
    alphas = serializers.DictField(child=serializers.IntegerField())


class MadeFromSerializer(serializers.Serializer[library.Origin]):
    """As far as you may see it."""

    run = serializers.CharField(source="run.output_name", default=None)
    dataset = serializers.CharField(source="version.name", default=None)
    dataset_version = serializers.IntegerField(source="version.number", default=None)
    dataset_digest = serializers.CharField(source="version.digest", default=None)
    base_model = serializers.CharField(source="base_model.name", default=None)
    base_model_sha256 = serializers.CharField(source="base_model.sha256", default=None)


class AdapterDetailSerializer(AdapterSerializer):
    """The context also has `look`, `origin` and `published`."""

    parts = serializers.SerializerMethodField(help_text="What of the base model it changes.")
    notes = serializers.SerializerMethodField()
    problem = serializers.SerializerMethodField(help_text='Why its file cannot be read now; "" when it can.')
    made_from = serializers.SerializerMethodField()
    published = serializers.SerializerMethodField(help_text="Path in the models folder. null: it is not published.")

    class Meta(AdapterSerializer.Meta):
        fields = (*AdapterSerializer.Meta.fields, "parts", "notes", "problem", "made_from", "published")

    def get_parts(self, _adapter: Adapter) -> list[dict[str, Any]]:
        contents = self.context["look"].contents
        return [dict(LoraPartSerializer(part).data) for part in contents.parts] if contents else []

    def get_notes(self, _adapter: Adapter) -> list[str]:
        contents = self.context["look"].contents
        return list(contents.notes) if contents else []

    def get_problem(self, _adapter: Adapter) -> str:
        return str(self.context["look"].problem)

    def get_made_from(self, _adapter: Adapter) -> dict[str, Any]:
        return dict(MadeFromSerializer(self.context["origin"]).data)

    def get_published(self, _adapter: Adapter) -> str | None:
        found: publishing.Published | None = self.context["published"]
        return found.path if found else None


class MetadataRowSerializer(serializers.Serializer[Any]):
    group = serializers.CharField()
    key = serializers.CharField()
    value = serializers.CharField(help_text="At most 2,000 characters of it.")
    is_cut = serializers.BooleanField()


class SearchInput(serializers.Serializer[Any]):
    q = serializers.CharField(
        required=False, help_text="Part of the name, trigger word, base model, a tag or the owner."
    )
    architecture = serializers.ChoiceField(choices=Architecture.choices, required=False)
    tag = serializers.CharField(required=False)
    owner = serializers.CharField(required=False, help_text="A username.")


class AdapterChanges(SharingInput):
    """What to change; what is left out stays."""

    name = serializers.CharField(max_length=100, required=False)
    trigger_word = serializers.CharField(max_length=100, required=False, allow_blank=True)
    tags = serializers.ListField(child=serializers.CharField(max_length=100), required=False)


class LoraFileInput(serializers.Serializer[Any]):
    file = serializers.FileField(help_text="A .safetensors file; 32 MiB in one request.")


class LoraUploadInput(serializers.Serializer[AdapterUpload]):
    filename = serializers.CharField(max_length=255)
    size = serializers.IntegerField(min_value=1, help_text="Bytes of the whole file.")
    sha256 = serializers.CharField(required=False, allow_blank=True, help_text="Of the whole file, hexadecimal.")


class LoraUploadSerializer(serializers.ModelSerializer[AdapterUpload]):
    """When its job has succeeded, `job.result.adapter` is the id of the LoRA."""

    chunk_bytes = serializers.SerializerMethodField(help_text="Send pieces of at most this size.")
    job = JobSerializer(read_only=True, allow_null=True)

    class Meta:
        model = AdapterUpload
        fields = ("id", "filename", "size", "offset", "sha256", "chunk_bytes", "job", "created_at", "finished_at")

    def get_chunk_bytes(self, _upload: AdapterUpload) -> int:
        return int(settings.UPLOAD_CHUNK_BYTES)


# --- The library ------------------------------------------------------------------------------------------------------
class AdapterViewSet(viewsets.GenericViewSet[Adapter]):
    """LoRAs that you own or that are shared with you: the final ones of runs, and uploaded ones."""

    serializer_class = AdapterSerializer
    queryset = Adapter.objects.none()  # for the schema; requests go through the selector
    filter_backends = ()
    lookup_value_regex = "[0-9]+"

    def get_queryset(self) -> QuerySet[Adapter]:
        return adapter_selectors.list_adapters(self.request.user)

    @extend_schema(parameters=[SearchInput], responses=AdapterSerializer(many=True))
    def list(self, request: Request) -> Response:
        user = signed_in(request)
        asked = valid(SearchInput(data=request.query_params))
        found = adapter_selectors.search_adapters(user, text=asked.pop("q", ""), **asked)
        page: Sequence[Adapter] = self.paginate_queryset(found) or []
        context = {"runs": library.visible_runs(page, user), "samples": library.samples_of(page)}
        return self.get_paginated_response(AdapterSerializer(page, many=True, context=context).data)

    @extend_schema(responses=AdapterDetailSerializer)
    def retrieve(self, request: Request, pk: str) -> Response:
        return self._answer(get_visible(Adapter, request.user, pk=pk))

    @extend_schema(request={"multipart/form-data": LoraFileInput}, responses={201: AdapterDetailSerializer})
    def create(self, request: Request) -> Response:
        """Add a LoRA file in one request. Larger ones go through /lora-uploads/."""
        file = valid(LoraFileInput(data=request.data))["file"]
        adapter = adapter_services.add_file(signed_in(request), filename=file.name, content=file)
        return self._answer(adapter, status=HTTPStatus.CREATED)

    @extend_schema(request=AdapterChanges, responses=AdapterDetailSerializer)
    def partial_update(self, request: Request, pk: str) -> Response:
        user = signed_in(request)
        adapter = get_editable(Adapter, user, pk=pk)
        given = valid(AdapterChanges(data=request.data, context={"user": user, "thing": adapter}))
        sharing = {name: given.pop(name) for name in ("groups", "editor_groups") if name in given}
        if sharing:
            get_owned(Adapter, user, pk=pk)
        adapter_services.edit_adapter(adapter, **given)
        if sharing:
            share(adapter, **sharing, actor=user, request=request)
        return self._answer(adapter)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str) -> Response:
        """Delete an uploaded LoRA with its file. 409 for one that a run has made: it goes with the run."""
        adapter = get_owned(Adapter, request.user, pk=pk)
        adapter_services.delete_adapter(adapter, actor=signed_in(request), request=request)
        return Response(status=HTTPStatus.NO_CONTENT)

    @extend_schema(responses=MetadataRowSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def metadata(self, request: Request, pk: str) -> Response:
        """What the file says of itself: at most 300 rows, 2,000 characters of each value."""
        look = adapter_selectors.look_into(get_visible(Adapter, request.user, pk=pk))
        rows = metadata_rows(look.contents.metadata) if look.contents else []
        return Response(MetadataRowSerializer(rows, many=True).data)

    @extend_schema(responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    @action(detail=True)
    def download(self, request: Request, pk: str) -> HttpResponseBase:
        """The file; Range requests are answered."""
        return send_adapter(request, get_visible(Adapter, request.user, pk=pk))

    @extend_schema(responses={(200, "image/png"): OpenApiTypes.BINARY})
    @action(detail=True, url_path=r"samples/(?P<sample_id>[0-9]{1,18})/file")
    def sample_file(self, request: Request, pk: str, sample_id: str) -> HttpResponseBase:
        """One picture that it draws."""
        return send_adapter_sample(request, get_visible(Adapter, request.user, pk=pk), int(sample_id))

    @extend_schema(request=PublishSerializer, responses={200: PublishedSerializer, 201: PublishedSerializer})
    @action(detail=True, methods=["post"])
    def publish(self, request: Request, pk: str) -> Response:
        """Put it into models/loras, where ComfyUI and InvokeAI find it. 200 when it is there already."""
        lora = library.lora_of(get_editable(Adapter, request.user, pk=pk))
        given = valid(PublishSerializer(data=request.data))
        found = publishing.publish_lora(lora, actor=signed_in(request), request=request, **given)
        status = HTTPStatus.CREATED if found.is_new else HTTPStatus.OK
        return Response(PublishedSerializer(found).data, status=status)

    @extend_schema(responses={204: None})
    @publish.mapping.delete
    def unpublish(self, request: Request, pk: str) -> Response:
        """Remove it from there. The library keeps its file."""
        lora = library.lora_of(get_editable(Adapter, request.user, pk=pk))
        publishing.unpublish_lora(lora, actor=signed_in(request), request=request)
        return Response(status=HTTPStatus.NO_CONTENT)

    def _answer(self, adapter: Adapter, status: int = HTTPStatus.OK) -> Response:
        user = signed_in(self.request)
        shown = self.get_queryset().get(pk=adapter.pk)
        context = {
            "runs": library.visible_runs([shown], user),
            "samples": library.samples_of([shown]),
            "look": adapter_selectors.look_into(shown),
            "origin": library.origin_of(shown, user),
            "published": publishing.find_published(library.lora_of(shown)),
        }
        return Response(AdapterDetailSerializer(shown, context=context).data, status=status)

    def get_parsers(self) -> Any:
        is_upload = self.request and self.request.method == "POST" and "pk" not in self.kwargs
        return [MultiPartParser()] if is_upload else super().get_parsers()


class LoraUploadsView(APIView):
    @extend_schema(request=LoraUploadInput, responses={201: LoraUploadSerializer}, operation_id="lora_uploads_create")
    def post(self, request: Request) -> Response:
        """Begin an upload of one LoRA file, then PATCH its bytes in pieces of `chunk_bytes`."""
        given = valid(LoraUploadInput(data=request.data))
        upload = adapter_services.start_upload(signed_in(request), **given)
        headers = offset_headers(upload.offset)
        return Response(LoraUploadSerializer(upload).data, status=HTTPStatus.CREATED, headers=headers)


@chunks_schema(LoraUploadSerializer)
class LoraUploadView(ChunksView):
    serializer_class = LoraUploadSerializer

    def find(self, request: Request, upload_id: Any) -> AdapterUpload:
        return adapter_selectors.open_upload(signed_in(request), upload_id=upload_id)

    def finish(self, upload: Any) -> None:
        adapter_services.finish_upload(upload)
