"""Pages of the core: the account with its API tokens and keys of other services, error pages, and whether this
process is healthy."""

from __future__ import annotations

from http import HTTPStatus

from django.contrib import messages
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import RequestDataTooBig
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views import defaults
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from lorapilot import services
from lorapilot.access import signed_in
from lorapilot.errors import UserError
from lorapilot.forms import SecretForm, TokenForm
from lorapilot.models import ApiToken, SecretName
from lorapilot.selectors import get_token, secrets_of, tokens_of


@require_safe
def account(request: HttpRequest) -> HttpResponse:
    return _account_page(request, TokenForm())


@require_POST
@never_cache
def create_token(request: HttpRequest) -> HttpResponse:
    """Answers with the page that shows the new token: the one time that anybody sees it."""
    form = TokenForm(request.POST)
    if form.is_valid():
        try:
            row, token = services.create_token(signed_in(request), request=request, **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            return _account_page(request, TokenForm(), created=row, token=token)
    return _account_page(request, form, status=HTTPStatus.BAD_REQUEST)


@require_POST
def revoke_token(request: HttpRequest, token_key: str) -> HttpResponse:
    user = signed_in(request)
    token = get_token(user, token_key)
    services.revoke_token(token, actor=user, request=request)
    messages.success(request, f"The token “{token.name}” opens nothing any more.")
    return redirect("account")


@require_POST
def set_secret(request: HttpRequest) -> HttpResponse:
    form = SecretForm(request.POST, auto_id="id_secret_%s")
    if form.is_valid():
        try:
            secret = services.set_secret(signed_in(request), request=request, **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            messages.success(request, f"Your key of {secret.get_name_display()} is set.")
            return redirect("account")
    return _account_page(request, TokenForm(), secret_form=form, status=HTTPStatus.BAD_REQUEST)


@require_POST
def delete_secret(request: HttpRequest, name: str) -> HttpResponse:
    services.delete_secret(signed_in(request), name=name, request=request)
    messages.success(request, f"Your key of {SecretName(name).label} is deleted.")
    return redirect("account")


def _account_page(
    request: HttpRequest,
    form: TokenForm,
    *,
    secret_form: SecretForm | None = None,
    created: ApiToken | None = None,
    token: str = "",
    status: int = HTTPStatus.OK,
) -> HttpResponse:
    user = signed_in(request)
    context = {
        "form": form,
        "created": created,
        "token": token,
        "tokens": tokens_of(user),
        "secret_form": secret_form or SecretForm(auto_id="id_secret_%s"),
        "secrets": secrets_of(user),
        "now": timezone.now(),
        "groups": user.groups.order_by("name"),
    }
    return render(request, "lorapilot/account.html", context, status=status)


@login_not_required
@require_safe
def healthz(_request: HttpRequest) -> HttpResponse:
    """200 when this process reaches its database, for load balancers and container health checks; 503 otherwise."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError:
        return HttpResponse("The database does not answer.", status=503, content_type="text/plain")
    return HttpResponse("ok", content_type="text/plain")


# --- Errors outside any view: JSON for the API, a page for people -----------------------------------------------------
def _is_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Django sends everything suspicious here, bodies that are too large too."""
    if isinstance(exception, RequestDataTooBig):
        status, message = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "That is more than one request may carry."
    else:
        status, message = HTTPStatus.BAD_REQUEST, "The request could not be read."
    if _is_api(request):
        return JsonResponse({"detail": message}, status=status)
    return render(request, "refused.html", {"message": message}, status=status)


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _is_api(request):
        return JsonResponse({"detail": "You may not do this."}, status=HTTPStatus.FORBIDDEN)
    return defaults.permission_denied(request, exception)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    if _is_api(request):
        return JsonResponse({"detail": "There is nothing at this address."}, status=HTTPStatus.NOT_FOUND)
    return defaults.page_not_found(request, exception)


def server_error(request: HttpRequest) -> HttpResponse:
    if _is_api(request):
        message = "Something went wrong on our side. The server's log has the details."
        return JsonResponse({"detail": message}, status=HTTPStatus.INTERNAL_SERVER_ERROR)
    return defaults.server_error(request)
