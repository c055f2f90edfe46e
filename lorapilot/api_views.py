"""The core's endpoints: who am I, tokens, keys of other services, socket tickets, jobs; the schema with its page."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import Http404
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularSwaggerSplitView
from rest_framework import generics
from rest_framework.exceptions import AuthenticationFailed, NotAuthenticated, Throttled
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle, ScopedRateThrottle
from rest_framework.views import APIView

from lorapilot import jobs, services
from lorapilot.access import signed_in
from lorapilot.accounts import find_person
from lorapilot.errors import Conflict, NotAllowed
from lorapilot.models import ApiToken, Job, Secret, User
from lorapilot.selectors import get_token, secrets_of, tokens_of
from lorapilot.serializers import (
    IssuedTokenSerializer,
    JobSerializer,
    MeSerializer,
    NewSecretSerializer,
    NewTokenSerializer,
    SecretSerializer,
    TicketSerializer,
    TokenSerializer,
)


class MeView(APIView):
    @extend_schema(responses=MeSerializer, summary="Who I am, and what this token may do")
    def get(self, request: Request) -> Response:
        return Response(MeSerializer(signed_in(request), context={"request": request}).data)


class TokenListView(generics.ListAPIView[ApiToken]):
    """One's own tokens. A token is created with a password or in a browser's session, never with another token."""

    queryset = ApiToken.objects.none()  # for the schema, which is made without a user
    serializer_class = TokenSerializer
    throttle_scope = "login"

    def get_queryset(self) -> QuerySet[ApiToken]:
        return tokens_of(signed_in(self.request))

    def get_permissions(self) -> Sequence[Any]:
        # POST brings its own proof: see _person.
        return [] if self.request.method == "POST" else super().get_permissions()

    def get_throttles(self) -> list[BaseThrottle]:
        return [ScopedRateThrottle()] if self.request.method == "POST" else super().get_throttles()

    @extend_schema(summary="My tokens")
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @extend_schema(
        summary="Create a token", request=NewTokenSerializer, responses={201: IssuedTokenSerializer}, auth=[]
    )
    def post(self, request: Request) -> Response:
        new = NewTokenSerializer(data=request.data)
        new.is_valid(raise_exception=True)
        values = dict(new.validated_data)
        user = self._person(request, values.pop("username", ""), values.pop("password", ""))
        row, token = services.create_token(user, request=request, **values)
        body = {
            "token": token,
            "key": row.token_key,
            "name": row.name,
            "scope": row.scope,
            "expires_at": row.expiry,
        }
        return Response(IssuedTokenSerializer(body).data, status=HTTPStatus.CREATED)

    def _person(self, request: Request, username: str, password: str) -> User:
        if username:
            return _person_by_password(request, username, password)
        if isinstance(request.auth, ApiToken):
            raise NotAllowed("A token cannot create tokens. Send username and password, or use the account page.")
        if not request.user.is_authenticated:
            raise NotAuthenticated("Send username and password.")
        return signed_in(request)


def _person_by_password(request: Request, username: str, password: str) -> User:
    try:
        person = find_person(request._request, username=username, password=password)
    except ValidationError as error:
        raise Throttled(detail=error.messages[0]) from None
    if person is None:
        raise AuthenticationFailed("The username or the password is wrong.")
    return person


class TokenView(APIView):
    @extend_schema(summary="Revoke a token", responses={204: None})
    def delete(self, request: Request, token_key: str) -> Response:
        user = signed_in(request)
        services.revoke_token(get_token(user, token_key), actor=user, request=request)
        return Response(status=HTTPStatus.NO_CONTENT)


class SecretListView(generics.ListAPIView[Secret]):
    queryset = Secret.objects.none()  # as above
    serializer_class = SecretSerializer
    pagination_class = None

    def get_queryset(self) -> QuerySet[Secret]:
        return secrets_of(signed_in(self.request))

    @extend_schema(summary="Which keys of other services I have set")
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)


class SecretView(APIView):
    @extend_schema(summary="Set a key of another service", request=NewSecretSerializer, responses=SecretSerializer)
    def put(self, request: Request, name: str) -> Response:
        new = NewSecretSerializer(data=request.data)
        new.is_valid(raise_exception=True)
        secret = services.set_secret(signed_in(request), name=name, request=request, **new.validated_data)
        return Response(SecretSerializer(secret).data)

    @extend_schema(summary="Delete a key of another service", responses={204: None})
    def delete(self, request: Request, name: str) -> Response:
        services.delete_secret(signed_in(request), name=name, request=request)
        return Response(status=HTTPStatus.NO_CONTENT)


class TicketListView(APIView):
    # A token with scope `read` may watch, too: sockets only ever show.
    permission_classes = (IsAuthenticated,)

    @extend_schema(
        summary="A ticket for one websocket, valid for 30 seconds", request=None, responses={201: TicketSerializer}
    )
    def post(self, request: Request) -> Response:
        expires_at = timezone.now() + services.TICKET_LIFETIME
        body = {"ticket": services.issue_ticket(signed_in(request)), "expires_at": expires_at}
        return Response(TicketSerializer(body).data, status=HTTPStatus.CREATED)


class JobListView(generics.ListAPIView[Job]):
    """Background work: imports, hashing, thumbnails. One's own; staff see all."""

    queryset = Job.objects.none()  # for the schema, which is made without a user
    serializer_class = JobSerializer
    filterset_fields: ClassVar = ["status"]

    def get_queryset(self) -> QuerySet[Job]:
        return jobs.visible_jobs(signed_in(self.request)).select_related("owner")


class JobView(generics.RetrieveAPIView[Job]):
    queryset = Job.objects.none()  # as above
    serializer_class = JobSerializer

    def get_queryset(self) -> QuerySet[Job]:
        return jobs.visible_jobs(signed_in(self.request)).select_related("owner")


class JobCancelView(APIView):
    @extend_schema(summary="Cancel a job", request=None, responses=JobSerializer)
    def post(self, request: Request, pk: str) -> Response:
        job = jobs.visible_jobs(signed_in(request)).filter(pk=pk).first()
        if job is None:
            raise Http404
        if job.status in jobs.JOB_ENDED:
            raise Conflict("This job has already ended.")
        jobs.cancel(job)
        job.refresh_from_db()
        return Response(JobSerializer(job).data)


class DocsView(SpectacularSwaggerSplitView):
    """Swagger UI from our own server, its script apart from the page, as the Content-Security-Policy demands."""

    url_name = "schema"
    template_name = "lorapilot/api_docs.html"
