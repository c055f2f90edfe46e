"""The API of automatic captions, below /api/v1/datasets/<id>/captioning/. For those who may change the dataset."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import generics, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets.captioning import selectors, services
from datasets.captioning.enums import LOCAL, REMOTE, Captioner, Proposal, Which
from datasets.captioning.providers import needs_key
from datasets.captioning.services import Order
from datasets.models import Captioning, CaptionProposal, Dataset
from lorapilot.access import get_editable, signed_in
from lorapilot.errors import UserError
from lorapilot.selectors import secrets_of
from runs import captioning as captions


class OrderInput(serializers.Serializer[Any]):
    captioner = serializers.ChoiceField(choices=Captioner.choices)
    model = serializers.CharField(max_length=200, help_text="At the provider, or a folder below the models folder.")
    which = serializers.ChoiceField(choices=Which.choices, default=Which.MISSING)
    overwrite = serializers.BooleanField(default=False, help_text="Also pictures that have a caption.")
    pictures = serializers.ListField(child=serializers.IntegerField(), default=list, help_text="Ids, for `selected`.")
    options = serializers.DictField(default=dict, help_text="docs/datasets.md lists them.")


class TryInput(OrderInput):
    picture = serializers.IntegerField(help_text="Id of the picture to ask about.")


class AnswerSerializer(serializers.Serializer[Any]):
    caption = serializers.CharField()
    input_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()


class CountsSerializer(serializers.Serializer[Any]):
    total = serializers.IntegerField()
    waiting = serializers.IntegerField()
    proposed = serializers.IntegerField()
    failed = serializers.IntegerField()
    accepted = serializers.IntegerField()
    discarded = serializers.IntegerField()
    input_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()


class CaptioningSerializer(serializers.ModelSerializer[Captioning]):
    owner = serializers.CharField(source="owner.username")
    counts = serializers.SerializerMethodField(help_text="Of its pictures, by what became of them; tokens so far.")
    cost = serializers.SerializerMethodField(help_text="Tokens times your prices; null without a price.")
    activity = serializers.SerializerMethodField(help_text="`status`, `is_active`, `message`, `run` or `job`.")

    class Meta:
        model = Captioning
        fields = (
            "id", "dataset", "owner", "captioner", "model", "which", "overwrite", "options", "counts", "cost",
            "activity", "created_at",
        )  # fmt: skip

    def get_counts(self, captioning: Captioning) -> dict[str, int]:
        return dict(CountsSerializer(selectors.counts_of(captioning)).data)

    def get_cost(self, captioning: Captioning) -> float | None:
        return selectors.cost_so_far(captioning, selectors.counts_of(captioning))

    def get_activity(self, captioning: Captioning) -> dict[str, Any]:
        return captions.as_json(captioning)


class ProposalSerializer(serializers.ModelSerializer[CaptionProposal]):
    picture_name = serializers.CharField(source="picture.original_name")
    current = serializers.CharField(source="picture.caption", help_text="The picture's caption now.")
    differs_since = serializers.BooleanField(help_text="Somebody changed that since the proposal was made.")

    class Meta:
        model = CaptionProposal
        fields = (
            "id", "picture", "picture_name", "state", "caption", "current", "previous", "differs_since", "reason",
            "input_tokens", "output_tokens",
        )  # fmt: skip


class ProposalInput(serializers.Serializer[Any]):
    caption = serializers.CharField(allow_blank=True, help_text="One line; line breaks become spaces.")


class ChoiceInput(serializers.Serializer[Any]):
    """Either `proposals` or `all`."""

    proposals = serializers.ListField(child=serializers.IntegerField(), required=False, help_text="Ids.")
    all = serializers.BooleanField(default=False)
    even_if_changed = serializers.BooleanField(
        default=False, help_text="Also in place of captions that were changed after the proposal was made."
    )

    def ids(self) -> list[int] | None:
        """None: all."""
        self.is_valid(raise_exception=True)
        found = self.validated_data.get("proposals")
        if self.validated_data["all"] == bool(found):
            raise UserError("Name the proposals by their ids, or send all: true.", field="proposals")
        return None if self.validated_data["all"] else found


class AcceptedSerializer(serializers.Serializer[Any]):
    accepted = serializers.IntegerField()
    changed = serializers.IntegerField(help_text="Left alone: their pictures' captions were changed meanwhile.")


class CaptioningListView(generics.ListAPIView[Captioning]):
    queryset = Captioning.objects.none()
    serializer_class = CaptioningSerializer
    filter_backends = ()

    def get_queryset(self) -> QuerySet[Captioning]:
        dataset = get_editable(Dataset, signed_in(self.request), pk=self.kwargs["pk"])
        return selectors.captionings_of(dataset).prefetch_related("runs")

    @extend_schema(summary="Orders of automatic captions")
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @extend_schema(summary="Caption automatically", request=OrderInput, responses={201: CaptioningSerializer})
    def post(self, request: Request, pk: int) -> Response:
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=pk)
        made = captions.start(user, dataset, _order(OrderInput(data=request.data)))
        return Response(_shown(request, pk, made.pk), status=HTTPStatus.CREATED)


class CaptionersView(APIView):
    @extend_schema(summary="Who can make captions here", responses={200: dict})
    def get(self, request: Request, pk: int) -> Response:
        """Providers, whether they need a key and whether you have set it; captioners here, with their models."""
        user = signed_in(request)
        get_editable(Dataset, user, pk=pk)
        keys = {secret.name for secret in secrets_of(user)}
        remote = [
            {"captioner": one, "has_key": one in keys, "needs_key": needs_key(one)}
            for one in Captioner
            if one in REMOTE
        ]
        local = [{"captioner": one, "models": captions.local_models(one)} for one in Captioner if one in LOCAL]
        return Response({"remote": remote, "local": local})


class TryView(APIView):
    @extend_schema(summary="Ask a provider about one picture", request=TryInput, responses=AnswerSerializer)
    def post(self, request: Request, pk: int) -> Response:
        """Nothing is kept. 424, with the reason, when the provider refuses or cannot be reached."""
        user = signed_in(request)
        dataset = get_editable(Dataset, user, pk=pk)
        given = TryInput(data=request.data)
        order = _order(given)
        picture = get_object_or_404(dataset.pictures, pk=given.validated_data["picture"])
        return Response(AnswerSerializer(services.try_one(user, picture, order)).data)


class CaptioningView(APIView):
    @extend_schema(summary="One order", responses=CaptioningSerializer)
    def get(self, request: Request, pk: int, captioning_id: int) -> Response:
        return Response(_shown(request, pk, captioning_id))


class CancelView(APIView):
    @extend_schema(summary="Stop captioning; what is proposed stays", request=None, responses=CaptioningSerializer)
    def post(self, request: Request, pk: int, captioning_id: int) -> Response:
        captions.cancel(_captioning(request, pk, captioning_id), actor=signed_in(request))
        return Response(_shown(request, pk, captioning_id))


class GoOnView(APIView):
    @extend_schema(summary="Caption what waits or failed", request=None, responses=CaptioningSerializer)
    def post(self, request: Request, pk: int, captioning_id: int) -> Response:
        captions.go_on(_captioning(request, pk, captioning_id), actor=signed_in(request))
        return Response(_shown(request, pk, captioning_id))


class ProposalListView(generics.ListAPIView[CaptionProposal]):
    queryset = CaptionProposal.objects.none()
    serializer_class = ProposalSerializer
    filter_backends = ()

    def get_queryset(self) -> QuerySet[CaptionProposal]:
        captioning = _captioning(self.request, self.kwargs["pk"], self.kwargs["captioning_id"])
        state = self.request.query_params.get("state", "")
        if state and state not in Proposal.values:
            raise UserError(f"A state is one of: {', '.join(Proposal.values)}.", field="state")
        return selectors.proposals_of(captioning, state=state)

    @extend_schema(summary="What is proposed", parameters=[OpenApiParameter("state", str, enum=Proposal.values)])
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)


class ProposalView(APIView):
    @extend_schema(summary="Edit what is proposed", request=ProposalInput, responses=ProposalSerializer)
    def patch(self, request: Request, pk: int, captioning_id: int, proposal_id: int) -> Response:
        captioning = _captioning(request, pk, captioning_id)
        proposal = get_object_or_404(selectors.proposals_of(captioning), pk=proposal_id)
        given = ProposalInput(data=request.data)
        given.is_valid(raise_exception=True)
        return Response(ProposalSerializer(services.edit(proposal, **given.validated_data)).data)


class AcceptView(APIView):
    @extend_schema(summary="Accept proposals", request=ChoiceInput, responses=AcceptedSerializer)
    def post(self, request: Request, pk: int, captioning_id: int) -> Response:
        captioning = _captioning(request, pk, captioning_id)
        chosen = ChoiceInput(data=request.data)
        wanted = chosen.ids()
        force = chosen.validated_data["even_if_changed"]
        return Response(
            AcceptedSerializer(
                services.accept(captioning, actor=signed_in(request), proposals=wanted, even_if_changed=force)
            ).data
        )


class DiscardView(APIView):
    @extend_schema(summary="Discard proposals", request=ChoiceInput, responses={200: dict})
    def post(self, request: Request, pk: int, captioning_id: int) -> Response:
        captioning = _captioning(request, pk, captioning_id)
        return Response({"discarded": services.discard(captioning, proposals=ChoiceInput(data=request.data).ids())})


class UndoView(APIView):
    @extend_schema(summary="Give accepted pictures their earlier captions", request=None, responses=AcceptedSerializer)
    def post(self, request: Request, pk: int, captioning_id: int) -> Response:
        """`accepted`: how many were undone. What somebody changed since is left alone."""
        done = services.undo(_captioning(request, pk, captioning_id), actor=signed_in(request))
        return Response(AcceptedSerializer(done).data)


def _order(given: OrderInput) -> Order:
    given.is_valid(raise_exception=True)
    names = ("captioner", "model", "which", "overwrite", "pictures", "options")
    return Order(**{name: given.validated_data[name] for name in names})


def _captioning(request: Request, pk: int, captioning_id: int) -> Captioning:
    return selectors.editable_captioning(signed_in(request), dataset_id=pk, captioning_id=captioning_id)


def _shown(request: Request, pk: int, captioning_id: int) -> Any:
    return CaptioningSerializer(_captioning(request, pk, captioning_id)).data
