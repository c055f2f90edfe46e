"""The API of datasets and uploads. Every change goes through the same services as the pages."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import django_filters
from django.db.models import QuerySet
from django.http.response import HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets import adoption, exports, selectors, services
from datasets.batches import checked_choices
from datasets.caption_api import conflict_response
from datasets.caption_edits import CaptionConflict
from datasets.caption_serializers import CaptionConflictSerializer, FilterInput
from datasets.models import Dataset, DatasetVersion, Picture, Upload
from datasets.picture_filters import PictureFilter
from datasets.serializers import (
    AdoptedSerializer,
    AdoptInput,
    CaptionInput,
    DatasetChanges,
    DatasetInput,
    DatasetSerializer,
    FilesInput,
    FoundFolderSerializer,
    ImportReportSerializer,
    PictureSerializer,
    UploadInput,
    UploadSerializer,
    VersionDetailSerializer,
    VersionSerializer,
)
from lorapilot.access import get_editable, get_owned, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.serializers import JobSerializer, valid
from lorapilot.services import record
from lorapilot.upload_api import ChunksView, chunks_schema, offset_headers

LAYOUT = OpenApiParameter("layout", str, enum=["flat", "kohya"], description="kohya: in folders <repeats>_<name>.")


def is_kohya_wanted(request: Request) -> bool:
    layout = request.query_params.get("layout", "flat")
    if layout not in ("flat", "kohya"):
        raise UserError("The layout is flat or kohya.", field="layout")
    return bool(layout == "kohya")


class DatasetFilter(django_filters.FilterSet):
    name = django_filters.CharFilter(lookup_expr="icontains", help_text="Part of the name.")

    class Meta:
        model = Dataset
        fields = ("name",)


class DatasetViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Any]):
    """Datasets that you own or that are shared with you. The owner, groups that may edit it, and staff
    change one; the owner and staff share and delete it."""

    serializer_class = DatasetSerializer
    filterset_class = DatasetFilter
    queryset = Dataset.objects.none()
    lookup_value_regex = "[0-9]+"

    def get_queryset(self) -> QuerySet[Any]:
        return selectors.visible_datasets(signed_in(self.request))

    @extend_schema(request=DatasetInput, responses={201: DatasetSerializer})
    def create(self, request: Request) -> Response:
        given = valid(DatasetInput(data=request.data))
        dataset = services.create_dataset(signed_in(request), **given)
        return Response(self._shown(dataset.pk), status=HTTPStatus.CREATED)

    @extend_schema(request=DatasetChanges, responses=DatasetSerializer)
    def partial_update(self, request: Request, pk: str) -> Response:
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=pk)
        given = valid(DatasetChanges(data=request.data, context={"user": user, "thing": dataset}))
        sharing = {name: given[name] for name in ("groups", "editor_groups") if name in given}
        if sharing:
            get_owned(Dataset, user, pk=pk)
        services.edit_dataset(dataset, name=given.get("name"), trigger_word=given.get("trigger_word"))
        if sharing:
            services.share_dataset(dataset, **sharing, actor=user, request=request)
        return Response(self._shown(dataset.pk))

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str) -> Response:
        user = signed_in(request)
        dataset = get_owned(Dataset, user, pk=pk)
        record(user, "dataset deleted", dataset, request)
        services.delete_dataset(dataset)
        return Response(status=HTTPStatus.NO_CONTENT)

    @extend_schema(parameters=[LAYOUT], responses={(200, "application/zip"): OpenApiTypes.BINARY}, methods=["GET"])
    @extend_schema(request=None, responses={202: JobSerializer}, methods=["POST"])
    @action(detail=True, methods=["get", "post"])
    def export(self, request: Request, pk: str) -> HttpResponseBase:
        """GET: pictures and captions as a ZIP archive. POST: as a folder on the server, in Kohya's form, by a job."""
        user = signed_in(request)
        if request.method == "POST":
            dataset = get_editable(Dataset, user, pk=pk)
            job = exports.start_folder_export(user, dataset=dataset)
            record(user, "dataset exported to a folder", dataset, request)
            return Response(JobSerializer(job).data, status=HTTPStatus.ACCEPTED)
        dataset = get_visible(Dataset, user, pk=pk)
        files = exports.dataset_files(dataset, is_kohya=is_kohya_wanted(request))
        return exports.zip_response(request._request, files, name=dataset.name)

    def _shown(self, pk: int) -> Any:
        return self.get_serializer(self.get_queryset().get(pk=pk)).data


@extend_schema_view(list=extend_schema(parameters=[FilterInput]))
class PictureViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[Picture]):
    """The pictures of a dataset, with their captions."""

    serializer_class = PictureSerializer
    queryset = Picture.objects.none()
    filter_backends = ()
    lookup_value_regex = "[0-9]+"

    def get_queryset(self) -> QuerySet[Picture]:
        dataset = get_visible(Dataset, signed_in(self.request), pk=self.kwargs["dataset_pk"])
        if self.action != "list":
            return selectors.pictures_of(dataset)
        return PictureFilter.from_query(self.request.query_params).pictures(dataset)

    @extend_schema(
        request={"multipart/form-data": FilesInput},
        responses={201: ImportReportSerializer, 400: ImportReportSerializer},
    )
    def create(self, request: Request, dataset_pk: int) -> Response:
        """Add files in one request. What is refused is named with the reason; the rest goes in (400: nothing did)."""
        dataset = get_editable(Dataset, signed_in(request), pk=dataset_pk)
        form: Any = request.data  # multipart only
        sent = form.dict() | {"files": request.FILES.getlist("files")}
        sent = {key: value for key, value in sent.items() if key != "paths"}
        if form.getlist("paths"):
            sent["paths"] = form.getlist("paths")
        given = valid(FilesInput(data=sent))
        files, paths = given["files"], given.get("paths") or [file.name for file in given["files"]]
        if len(paths) != len(files):
            raise UserError("Send as many paths as files, in the same order, or none.", field="paths")
        choices = checked_choices(flatten=given["flatten"], replaces_captions=given["replace_captions"])
        report = services.import_files(dataset, files=list(zip(paths, files, strict=True)), choices=choices)
        done = report.sentence()
        body = {"detail": done or report.reasons()} | report.as_dict()
        return Response(body, status=HTTPStatus.CREATED if done else HTTPStatus.BAD_REQUEST)

    @extend_schema(request=CaptionInput, responses={200: PictureSerializer, 409: CaptionConflictSerializer})
    def partial_update(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """Change the caption. With the `revision` that you saw, never over somebody else's: 409 has both texts."""
        picture = selectors.editable_picture(signed_in(request), dataset_id=dataset_pk, picture_id=pk)
        try:
            services.set_caption(picture, **valid(CaptionInput(data=request.data)), actor=signed_in(request))
        except CaptionConflict as conflict:
            return conflict_response(conflict)
        return Response(self.get_serializer(picture).data)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, dataset_pk: int, pk: int) -> Response:
        picture = selectors.editable_picture(signed_in(request), dataset_id=dataset_pk, picture_id=pk)
        services.delete_picture(picture)
        return Response(status=HTTPStatus.NO_CONTENT)

    def get_parsers(self) -> list[Any]:
        return [MultiPartParser()] if self.request and self.request.method == "POST" else super().get_parsers()


class VersionViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[DatasetVersion]):
    """The immutable versions of a dataset: what runs were, and can be, trained on."""

    serializer_class = VersionSerializer
    queryset = DatasetVersion.objects.none()
    filter_backends = ()
    lookup_value_regex = "[0-9]+"

    def get_queryset(self) -> QuerySet[DatasetVersion]:
        dataset = get_visible(Dataset, signed_in(self.request), pk=self.kwargs["dataset_pk"])
        return dataset.versions.order_by("-number")

    def get_serializer_class(self) -> Any:
        return VersionDetailSerializer if self.action == "retrieve" else VersionSerializer

    @extend_schema(request=None, responses={201: VersionSerializer})
    def create(self, request: Request, dataset_pk: int) -> Response:
        """Pin what the dataset holds now. The same content gives the same version."""
        dataset = get_editable(Dataset, signed_in(request), pk=dataset_pk)
        return Response(VersionSerializer(services.pin_version(dataset)).data, status=HTTPStatus.CREATED)

    @extend_schema(parameters=[LAYOUT], responses={(200, "application/zip"): OpenApiTypes.BINARY})
    @action(detail=True, methods=["get"])
    def export(self, request: Request, dataset_pk: int, pk: int) -> HttpResponseBase:
        """What the version holds, as a ZIP archive."""
        version = self.get_object()
        files = exports.version_files(version, is_kohya=is_kohya_wanted(request))
        return exports.zip_response(request._request, files, name=str(version))


# --- Folders of the workspace -----------------------------------------------------------------------------------------
class FoundFoldersView(APIView):
    """Kohya's folders in `<workspace>/datasets/` that are no dataset yet. Staff only."""

    @extend_schema(responses=FoundFolderSerializer(many=True), operation_id="datasets_found_list")
    def get(self, request: Request) -> Response:
        return Response(FoundFolderSerializer(adoption.found_folders(signed_in(request)), many=True).data)

    @extend_schema(request=AdoptInput, responses={201: AdoptedSerializer}, operation_id="datasets_found_adopt")
    def post(self, request: Request) -> Response:
        """Make a dataset of such a folder: a job copies its files, and the folder stays as it is."""
        given = valid(AdoptInput(data=request.data))
        dataset, job = adoption.adopt_folder(signed_in(request), **given)
        record(signed_in(request), "folder adopted as a dataset", f"{dataset.adopted_from}: {dataset}", request)
        body = AdoptedSerializer({"dataset": dataset.pk, "name": dataset.name, "job": job}).data
        return Response(body, status=HTTPStatus.CREATED)


# --- Uploads in chunks ------------------------------------------------------------------------------------------------
class UploadsView(APIView):
    @extend_schema(request=UploadInput, responses={201: UploadSerializer}, operation_id="uploads_create")
    def post(self, request: Request) -> Response:
        """Begin an upload of one file, then PATCH its bytes in pieces of `chunk_bytes`."""
        user = signed_in(request)
        given = valid(UploadInput(data=request.data))
        dataset = get_editable(Dataset, user, pk=given.pop("dataset"))
        choices = checked_choices(flatten=given.pop("flatten"), replaces_captions=given.pop("replace_captions"))
        upload = services.start_upload(user, dataset=dataset, choices=choices, **given)
        return Response(UploadSerializer(upload).data, status=HTTPStatus.CREATED, headers=offset_headers(upload.offset))


@chunks_schema(UploadSerializer)
class UploadView(ChunksView):
    serializer_class = UploadSerializer

    def find(self, request: Request, upload_id: Any) -> Upload:
        return selectors.open_upload(signed_in(request), upload_id=upload_id)

    def finish(self, upload: Any) -> None:
        services.finish_upload(upload)
