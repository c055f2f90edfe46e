"""What the core's API reads and writes."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.models import Group
from django.utils import timezone
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from lorapilot.models import ApiToken, Job, Secret, TokenScope, User
from lorapilot.selectors import shareable_groups
from lorapilot.services import SECRET_CHARACTERS_AT_MOST, TOKEN_DAYS_AT_MOST


class TokenSerializer(serializers.ModelSerializer[ApiToken]):
    key = serializers.CharField(source="token_key", help_text="The token's first characters: its name in addresses.")
    created_at = serializers.DateTimeField(source="created")
    expires_at = serializers.DateTimeField(source="expiry")
    is_expired = serializers.SerializerMethodField()

    class Meta:
        model = ApiToken
        fields: ClassVar = ["key", "name", "scope", "created_at", "last_used_at", "expires_at", "is_expired"]
        read_only_fields = fields

    def get_is_expired(self, token: ApiToken) -> bool:
        return token.expiry is not None and token.expiry <= timezone.now()


def valid(serializer: serializers.BaseSerializer[Any]) -> dict[str, Any]:
    """What was sent, checked. Raises ValidationError, which names the fields."""
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


class NewTokenSerializer(serializers.Serializer[Any]):
    """`username` and `password` are for scripts; a signed-in browser leaves them out."""

    username = serializers.CharField(required=False, help_text="Or the e-mail address.")
    password = serializers.CharField(required=False, trim_whitespace=False, write_only=True)
    name = serializers.CharField(max_length=100, help_text="The computer or script that will use it.")
    scope = serializers.ChoiceField(choices=TokenScope.choices, default=TokenScope.WRITE)
    days = serializers.IntegerField(
        required=False, help_text=f"How long it is valid: 1 to {TOKEN_DAYS_AT_MOST}; 90 when left out."
    )

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("username" in attrs) != ("password" in attrs):
            raise serializers.ValidationError("Send both username and password, or neither.")
        return attrs


class IssuedTokenSerializer(serializers.Serializer[Any]):
    token = serializers.CharField(help_text="Shown this once.")
    key = serializers.CharField()
    name = serializers.CharField()
    scope = serializers.ChoiceField(choices=TokenScope.choices)
    expires_at = serializers.DateTimeField()


class TicketSerializer(serializers.Serializer[Any]):
    ticket = serializers.CharField(help_text="Send it as the websocket's first message. It works once.")
    expires_at = serializers.DateTimeField()


class UsedTokenSerializer(serializers.ModelSerializer[ApiToken]):
    expires_at = serializers.DateTimeField(source="expiry")

    class Meta:
        model = ApiToken
        fields: ClassVar = ["name", "scope", "expires_at"]
        read_only_fields = fields


class MeSerializer(serializers.ModelSerializer[User]):
    groups: Any = serializers.SlugRelatedField(slug_field="name", many=True, read_only=True)
    token = serializers.SerializerMethodField()

    class Meta:
        model = User
        fields: ClassVar = ["username", "email", "is_staff", "groups", "token"]
        read_only_fields = fields

    @extend_schema_field(UsedTokenSerializer(allow_null=True))
    def get_token(self, _user: User) -> dict[str, Any] | None:
        """The token of this request; null in a browser's session."""
        token = self.context["request"].auth
        return dict(UsedTokenSerializer(token).data) if isinstance(token, ApiToken) else None


class SecretSerializer(serializers.ModelSerializer[Secret]):
    """That a key is set, and since when; never the key."""

    class Meta:
        model = Secret
        fields: ClassVar = ["name", "updated_at"]
        read_only_fields = fields


class NewSecretSerializer(serializers.Serializer[Any]):
    value = serializers.CharField(max_length=SECRET_CHARACTERS_AT_MOST, write_only=True)


class JobSerializer(serializers.ModelSerializer[Job]):
    owner: Any = serializers.SlugRelatedField(slug_field="username", read_only=True)

    class Meta:
        model = Job
        fields: ClassVar = [
            "id",
            "label",
            "owner",
            "status",
            "done",
            "total",
            "message",
            "result",
            "cancel_requested_at",
            "created_at",
            "finished_at",
        ]
        read_only_fields = fields


def named_groups(help_text: str) -> Any:
    return serializers.SlugRelatedField(
        slug_field="name", many=True, required=False, queryset=Group.objects.all(), help_text=help_text
    )


class SharingInput(serializers.Serializer[Any]):
    """Groups to share something with: for `lorapilot.services.share`. The context has `user` and `thing`."""

    groups = named_groups("Names of the groups whose members may look: those that you are in.")
    editor_groups = named_groups("Names of the groups whose members may also change it.")

    def validate_groups(self, groups: list[Group]) -> list[Group]:
        return self._allowed(groups)

    def validate_editor_groups(self, groups: list[Group]) -> list[Group]:
        return self._allowed(groups)

    def _allowed(self, groups: list[Group]) -> list[Group]:
        allowed = set(shareable_groups(self.context["user"], thing=self.context["thing"]))
        for group in groups:
            if group not in allowed:
                raise serializers.ValidationError(f"You are not in the group {group.name}.")
        return groups
