"""The API of captions: their history, edits of many, tags, and the trigger word."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.http import Http404
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from rest_framework import generics
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets import bulk_edits, caption_edits, picture_removal, selectors, tag_lists
from datasets.caption_edits import CaptionConflict
from datasets.caption_serializers import (
    AppliedSerializer,
    ApplyInput,
    BulkEditSerializer,
    CaptionChangeSerializer,
    CaptionConflictSerializer,
    EditInput,
    PlanSerializer,
    RevisionInput,
    SelectionInput,
    TagListInput,
    TagListSerializer,
    TagsSerializer,
    TriggerSerializer,
    UndoneSerializer,
)
from datasets.models import BulkEdit, CaptionChange, Dataset
from datasets.serializers import PictureSerializer
from datasets.trigger_words import trigger_report
from lorapilot.access import get_editable, get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.serializers import valid
from lorapilot.services import record

MOST_TAGS = 500


def conflict_response(conflict: CaptionConflict) -> Response:
    """Both texts: nothing is lost."""
    now = conflict.picture
    body = {"detail": conflict.message, "caption": now.caption, "revision": now.revision, "yours": conflict.yours}
    return Response(body, status=HTTPStatus.CONFLICT)


# --- One caption ------------------------------------------------------------------------------------------------------
class HistoryView(generics.ListAPIView[CaptionChange]):
    """The last changes of a caption, the newest first; undone ones too."""

    serializer_class = CaptionChangeSerializer
    queryset = CaptionChange.objects.none()
    filter_backends = ()

    def get_queryset(self) -> Any:
        ids = {"dataset_id": self.kwargs["dataset_pk"], "picture_id": self.kwargs["pk"]}
        return caption_edits.history_of(selectors.visible_picture(signed_in(self.request), **ids))


class CaptionUndoView(APIView):
    @extend_schema(request=RevisionInput, responses={200: PictureSerializer, 409: CaptionConflictSerializer})
    def post(self, request: Request, dataset_pk: int, pk: int) -> Response:
        """Bring back the caption before the last change; again, the one before that."""
        picture = selectors.editable_picture(signed_in(request), dataset_id=dataset_pk, picture_id=pk)
        given = valid(RevisionInput(data=request.data))
        try:
            caption_edits.undo_caption(picture, revision=given.get("revision"))
        except CaptionConflict as conflict:
            return conflict_response(conflict)
        return Response(PictureSerializer(picture).data)


# --- Many captions ----------------------------------------------------------------------------------------------------
@extend_schema_view(get=extend_schema(description="The last edits of many captions, and deletions of many pictures."))
class CaptionEditsView(generics.ListAPIView[BulkEdit]):
    serializer_class = BulkEditSerializer
    queryset = BulkEdit.objects.none()
    filter_backends = ()

    def get_queryset(self) -> Any:
        dataset = get_visible(Dataset, signed_in(self.request), pk=self.kwargs["dataset_pk"])
        return dataset.bulk_edits.select_related("actor").defer("removed").order_by("-pk")

    @extend_schema(request=ApplyInput, responses={200: AppliedSerializer})
    def post(self, request: Request, dataset_pk: int) -> Response:
        """Edit many captions, all or none. 409 when `fingerprint` is of a preview that no longer holds."""
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=dataset_pk)
        given = ApplyInput(data=request.data)
        fingerprint = valid(given)["fingerprint"]
        done = bulk_edits.apply_edit(
            dataset, operation=given.operation(), selection=given.selection(), actor=user, fingerprint=fingerprint
        )
        if done.edit:
            record(user, "captions edited", f"{dataset}: {done.edit}", request)
        return Response(AppliedSerializer(done).data)


class CaptionPreviewView(APIView):
    @extend_schema(request=EditInput, responses=PlanSerializer)
    def post(self, request: Request, dataset_pk: int) -> Response:
        """What an edit would change. Changes nothing."""
        dataset = get_editable(Dataset, signed_in(request), pk=dataset_pk)
        given = EditInput(data=request.data)
        given.is_valid(raise_exception=True)
        plan = bulk_edits.plan_edit(dataset, operation=given.operation(), selection=given.selection())
        return Response(PlanSerializer(plan).data)


class CaptionEditUndoView(APIView):
    @extend_schema(request=None, responses=UndoneSerializer)
    def post(self, request: Request, dataset_pk: int, edit_pk: int) -> Response:
        """Undo it as a whole. 409 when it was undone already."""
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=dataset_pk)
        edit = get_object_or_404(BulkEdit.objects.select_related("dataset"), dataset=dataset, pk=edit_pk)
        back, left = bulk_edits.undo_edit(edit)
        record(user, "captions edited", f"{dataset}: undone: {edit}", request)
        return Response({"back": back, "left_alone": left})


class PicturesDeleteView(APIView):
    @extend_schema(request=SelectionInput, responses=BulkEditSerializer)
    def post(self, request: Request, dataset_pk: int) -> Response:
        """Take many pictures out of the dataset. For a day, undoing the edit brings them back."""
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=dataset_pk)
        given = SelectionInput(data=request.data)
        given.is_valid(raise_exception=True)
        edit = picture_removal.remove_pictures(dataset, selection=given.selection(), actor=user)
        record(user, "pictures deleted", f"{dataset}: {edit.picture_count}", request)
        return Response(BulkEditSerializer(edit).data)


# --- Tags and the trigger word ----------------------------------------------------------------------------------------
class TagsView(APIView):
    @extend_schema(
        parameters=[
            OpenApiParameter("q", str, description="Part of the tag."),
            OpenApiParameter("limit", int, description=f"At most so many: 1 to {MOST_TAGS}, 100 when left out."),
        ],
        responses=TagsSerializer,
    )
    def get(self, request: Request, dataset_pk: int) -> Response:
        """The dataset's tags by frequency; with `q`, those of your own list, too."""
        user = signed_in(request)
        dataset = get_visible(Dataset, user, pk=dataset_pk)
        limit = request.query_params.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MOST_TAGS):
            raise UserError(f"The limit is a number from 1 to {MOST_TAGS}.", field="limit")
        found = tag_lists.find_tags(user, dataset=dataset, text=request.query_params.get("q", ""), limit=int(limit[:9]))
        return Response(TagsSerializer({"results": found}).data)


class TriggerView(APIView):
    @extend_schema(responses=TriggerSerializer)
    def get(self, request: Request, dataset_pk: int) -> Response:
        """Where the trigger word is missing or leaks, and what to write into sample prompts."""
        dataset = get_visible(Dataset, signed_in(request), pk=dataset_pk)
        return Response(TriggerSerializer(trigger_report(dataset, tags=tag_lists.tag_counts(dataset))).data)


class TagListView(APIView):
    parser_classes = (MultiPartParser,)

    @extend_schema(responses=TagListSerializer)
    def get(self, request: Request) -> Response:
        """Your own list of tags. 404 when you have none."""
        found = tag_lists.tag_list_of(signed_in(request))
        if found is None:
            raise Http404
        return Response(TagListSerializer(found).data)

    @extend_schema(request={"multipart/form-data": TagListInput}, responses=TagListSerializer)
    def put(self, request: Request) -> Response:
        """Keep this list, in place of the one before."""
        file = valid(TagListInput(data=request.data))["file"]
        content = file.read(tag_lists.MAX_FILE_BYTES + 1)
        kept = tag_lists.set_tag_list(signed_in(request), name=file.name, content=content)
        return Response(TagListSerializer(kept).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request) -> Response:
        tag_lists.delete_tag_list(signed_in(request))
        return Response(status=HTTPStatus.NO_CONTENT)
