"""Whether there is anything for TensorBoard to show."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot.access import signed_in
from runs.tensorboard import sources, viewers


class TensorBoardStatusSerializer(serializers.Serializer[dict[str, object]]):
    running = serializers.BooleanField(help_text="Your TensorBoard runs now; its page starts it.")
    runs = serializers.IntegerField(help_text="Runs of yours that have written events.")
    reason = serializers.CharField(help_text="Why there is nothing to show; empty when there is.")


class TensorBoardStatusView(APIView):
    @extend_schema(summary="What TensorBoard can show you", responses=TensorBoardStatusSerializer)
    def get(self, request: Request) -> Response:
        user = signed_in(request)
        runs = len(sources.runs_with_events(user))
        is_running = viewers.VIEWERS.is_running(user)
        body = {"running": is_running, "runs": runs, "reason": "" if runs else sources.NOTHING}
        return Response(TensorBoardStatusSerializer(body).data)
