"""The API of base models: everybody who is signed in reads, staff register, attach files and remove."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet, prefetch_related_objects
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema
from rest_framework import mixins, serializers, status, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from lorapilot.access import get_visible, signed_in
from lorapilot.models import Job
from models_registry import selectors, services
from models_registry.enums import ATTACHABLE
from models_registry.models import BaseModel, ModelComponent


class ModelComponentSerializer(serializers.ModelSerializer[ModelComponent]):
    class Meta:
        model = ModelComponent
        fields = ("id", "role", "path", "bytes", "dtype", "parameters", "sha256", "is_attached")


class HashingSerializer(serializers.ModelSerializer[Job]):
    """The job that computes the checksums: bytes done, of how many."""

    class Meta:
        model = Job
        fields = ("id", "status", "done", "total", "message")


class BaseModelSerializer(serializers.ModelSerializer[BaseModel]):
    registered_by = serializers.CharField(source="registered_by.username", default=None, read_only=True)
    hashing = HashingSerializer(read_only=True, allow_null=True)

    class Meta:
        model = BaseModel
        fields: tuple[str, ...] = (
            "id",
            "name",
            "path",
            "layout",
            "architecture",
            "resolution",
            "prediction_type",
            "bytes",
            "sha256",
            "hashing",
            "registered_by",
            "created_at",
        )


class BaseModelDetailSerializer(BaseModelSerializer):
    components = ModelComponentSerializer(many=True, read_only=True)
    problems = serializers.SerializerMethodField(help_text="Files that vanished or changed since the registration.")

    class Meta(BaseModelSerializer.Meta):
        fields = (*BaseModelSerializer.Meta.fields, "components", "problems")

    def get_problems(self, base_model: BaseModel) -> list[str]:
        return selectors.missing_files(base_model)


class RegisterSerializer(serializers.Serializer[BaseModel]):
    path = serializers.CharField(max_length=500, help_text="Relative to the models folder.")
    name = serializers.CharField(max_length=100, required=False, default="", allow_blank=True)


class AttachSerializer(serializers.Serializer[ModelComponent]):
    role = serializers.ChoiceField(choices=[(role.value, role.label) for role in ATTACHABLE])
    path = serializers.CharField(max_length=500, help_text="Relative to the models folder: a file, or a folder.")


class BaseModelViewSet(mixins.ListModelMixin, viewsets.GenericViewSet[BaseModel]):
    serializer_class = BaseModelSerializer
    filterset_fields = ("architecture",)
    lookup_value_regex = "[0-9]+"
    queryset = BaseModel.objects.none()

    def get_queryset(self) -> QuerySet[BaseModel]:
        return selectors.list_base_models(self.request.user)

    @extend_schema(responses=BaseModelDetailSerializer)
    def retrieve(self, request: Request, pk: int) -> Response:
        base_model = get_visible(BaseModel, request.user, pk=pk)
        prefetch_related_objects([base_model], "components")  # for `components` and `problems`
        return Response(BaseModelDetailSerializer(base_model).data)

    @extend_schema(request=RegisterSerializer, responses={201: BaseModelDetailSerializer})
    def create(self, request: Request) -> Response:
        """Register a folder or file that lies in the models folder. Staff only."""
        wanted = RegisterSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        values: dict[str, Any] = wanted.validated_data
        base_model = services.register_base_model(**values, registered_by=signed_in(request))
        return Response(BaseModelDetailSerializer(base_model).data, status=status.HTTP_201_CREATED)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: int) -> Response:
        """Remove a model from the list; its files stay. Staff only; refused while runs use it."""
        base_model = get_visible(BaseModel, request.user, pk=pk)
        services.forget_base_model(base_model, forgotten_by=signed_in(request), request=request)
        return Response(status=status.HTTP_204_NO_CONTENT)

    @extend_schema(responses=ModelComponentSerializer(many=True), filters=False)
    @action(detail=True, pagination_class=None)
    def components(self, request: Request, pk: int) -> Response:
        """The model's own files, and those that are attached to it."""
        base_model = get_visible(BaseModel, request.user, pk=pk)
        return Response(ModelComponentSerializer(base_model.components.all(), many=True).data)

    @extend_schema(request=AttachSerializer, responses={201: ModelComponentSerializer})
    @components.mapping.post
    def attach(self, request: Request, pk: int) -> Response:
        """Train the model with a file or folder of the models folder; it replaces that of the same role. Staff only."""
        base_model = get_visible(BaseModel, request.user, pk=pk)
        wanted = AttachSerializer(data=request.data)
        wanted.is_valid(raise_exception=True)
        values: dict[str, Any] = wanted.validated_data
        user = signed_in(request)
        component = services.attach_component(base_model, **values, by=user, request=request)
        return Response(ModelComponentSerializer(component).data, status=status.HTTP_201_CREATED)

    @extend_schema(responses={204: None})
    @action(detail=True, methods=["delete"], url_path=r"components/(?P<component_id>[0-9]{1,18})")
    def detach(self, request: Request, pk: int, component_id: int) -> Response:
        """Train the model without an attached file, which stays where it is. Staff only; 409 for the model's own."""
        base_model = get_visible(BaseModel, request.user, pk=pk)
        component = get_object_or_404(base_model.components, pk=component_id)
        services.detach_component(component, by=signed_in(request), request=request)
        return Response(status=status.HTTP_204_NO_CONTENT)
