"""Trainers over HTTP: which there are, their options, and their configurations as text."""

from __future__ import annotations

from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets.models import Dataset
from datasets.selectors import current_files
from lorapilot.access import get_visible, signed_in
from lorapilot.errors import Missing
from runs.configs import configuration_of, read_configuration
from runs.models import Run
from runs.planning import GUIDED, why_unavailable
from runs.serializers import (
    BroughtSerializer,
    ConfigTextSerializer,
    ConfigurationSerializer,
    OptionSerializer,
    StackSerializer,
)
from runs.stacks import STACKS
from runs.stacks.base import Stack
from runs.stacks.option_table import StackOption, refusal_of

STACK = OpenApiParameter("stack", OpenApiTypes.STR, description="A trainer's key; the run's own if left out.")


class StackListView(APIView):
    @extend_schema(responses=StackSerializer(many=True))
    def get(self, request: Request) -> Response:
        """The trainers, and whether a host has them."""
        return Response([_described(stack) for stack in STACKS.values()])


class StackView(APIView):
    @extend_schema(operation_id="stacks_options_list", responses=OptionSerializer(many=True))
    def get(self, request: Request, key: str) -> Response:
        """Every key that the trainer knows, and which of them are options of yours."""
        table = _stack(key).table()
        return Response([_option(option) for option in table.options.values()] if table else [])


class ReadConfigView(APIView):
    @extend_schema(request=ConfigTextSerializer, responses=BroughtSerializer)
    def post(self, request: Request, key: str) -> Response:
        """A configuration of this trainer as settings and options. Nothing is stored."""
        stack = _stack(key)
        given = ConfigTextSerializer(data=request.data)
        given.is_valid(raise_exception=True)
        chosen = given.validated_data.get("dataset")
        dataset = get_visible(Dataset, signed_in(request), pk=chosen) if chosen is not None else None
        pictures = current_files(dataset) if dataset else ()
        brought = read_configuration(stack.key, given.validated_data["config"], pictures)
        return Response(
            {
                "settings": brought.values,
                "options": brought.options,
                "base_model": brought.base_model.pk if brought.base_model else None,
                "notes": brought.notes,
            }
        )


class RunConfigView(APIView):
    @extend_schema(parameters=[STACK], responses=ConfigurationSerializer)
    def get(self, request: Request, pk: int) -> Response:
        """A run as a trainer would be told to train it, and what it would lose there."""
        run = get_visible(Run, request.user, pk=pk)
        found = configuration_of(run, _stack(request.query_params.get("stack") or run.stack).key)
        return Response({"filename": found.filename, "text": found.text, "lost": found.lost, "refusal": found.refusal})


def _stack(key: str) -> Stack:
    if key not in STACKS:
        raise Missing(f"There is no trainer {key!r}. There are {', '.join(sorted(STACKS))}.")
    return STACKS[key]


def _described(stack: Stack) -> dict[str, Any]:
    return {
        "key": stack.key,
        "name": stack.name,
        "unavailable": why_unavailable(stack),
        "architectures": sorted(stack.architectures),
        "saves_on_stop": stack.saves_on_stop,
        "has_profiles": stack.key in GUIDED,
    }


def _option(option: StackOption) -> dict[str, Any]:
    return {
        "key": option.key,
        "group": option.group,
        "type": option.type,
        "label": option.label,
        "help": option.help,
        "choices": list(option.choices),
        "least": option.least,
        "most": option.most,
        "above": option.above,
        "default": option.default,
        "architectures": sorted(option.architectures),
        "closed": refusal_of(option),
    }
