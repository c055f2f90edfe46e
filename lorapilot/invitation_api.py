"""The API of invitations, for staff."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema
from rest_framework import generics, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from lorapilot import invitations
from lorapilot.access import require_staff, signed_in
from lorapilot.invitation_views import address_of
from lorapilot.models import Invitation
from lorapilot.serializers import named_groups


class InvitationSerializer(serializers.ModelSerializer[Invitation]):
    groups: Any = serializers.SlugRelatedField(slug_field="name", many=True, read_only=True)
    invited_by = serializers.CharField(source="invited_by.username", default=None, read_only=True)
    used_by = serializers.CharField(source="used_by.username", default=None, read_only=True)
    state = serializers.CharField(read_only=True, help_text="open, used, revoked or expired.")

    class Meta:
        model = Invitation
        fields: tuple[str, ...] = (
            "id",
            "note",
            "groups",
            "state",
            "invited_by",
            "created_at",
            "expires_at",
            "revoked_at",
            "used_at",
            "used_by",
        )


class NewInvitationSerializer(serializers.Serializer[Any]):
    note = serializers.CharField(max_length=100, required=False, allow_blank=True, help_text="For whom it is.")
    days = serializers.IntegerField(
        default=invitations.DAYS, help_text=f"How long it is valid: 1 to {invitations.DAYS_AT_MOST}."
    )
    groups = named_groups("Of the new account.")


class IssuedInvitationSerializer(InvitationSerializer):
    link = serializers.SerializerMethodField(help_text="Shown this once.")

    class Meta(InvitationSerializer.Meta):
        fields = (*InvitationSerializer.Meta.fields, "link")

    def get_link(self, _invitation: Invitation) -> str:
        return str(self.context["link"])


class InvitationListView(generics.ListAPIView[Invitation]):
    queryset = Invitation.objects.none()  # for the schema, which is made without a user
    serializer_class = InvitationSerializer

    def get_queryset(self) -> QuerySet[Invitation]:
        return invitations.list_invitations(signed_in(self.request))

    @extend_schema(summary="All invitations. Staff only")
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @extend_schema(
        summary="Invite somebody. Staff only",
        request=NewInvitationSerializer,
        responses={201: IssuedInvitationSerializer},
    )
    def post(self, request: Request) -> Response:
        staff = signed_in(request)
        require_staff(staff, invitations.STAFF_ONLY)
        new = NewInvitationSerializer(data=request.data)
        new.is_valid(raise_exception=True)
        made, secret = invitations.create_invitation(staff, request=request, **new.validated_data)
        shown = IssuedInvitationSerializer(made, context={"link": address_of(request, secret)})
        return Response(shown.data, status=HTTPStatus.CREATED)


class InvitationView(APIView):
    @extend_schema(summary="Revoke an invitation. Staff only", responses={204: None})
    def delete(self, request: Request, pk: int) -> Response:
        staff = signed_in(request)
        found = get_object_or_404(invitations.list_invitations(staff), pk=pk)
        invitations.revoke_invitation(found, actor=staff, request=request)
        return Response(status=HTTPStatus.NO_CONTENT)
