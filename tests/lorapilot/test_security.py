"""What stands around every page: sign-in, Content-Security-Policy, headers, error pages, health."""

import pytest
from django.conf import settings
from django.core.exceptions import PermissionDenied, RequestDataTooBig
from django.db import OperationalError
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from rest_framework.views import APIView

from lorapilot.errors import Conflict, Missing, NotAllowed, UserError, UserErrorMiddleware
from lorapilot.models import User

POLICY = [
    "base-uri 'self'",
    "connect-src 'self'",
    "default-src 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
    "img-src 'self' data: blob:",
    "object-src 'none'",
]
# Everything else asks for sign-in.
OPEN = {
    "accounts/login/",
    "accounts/logout/",
    "accounts/signup/",
    "accounts/inactive/",
    "accounts/invitation/<str:secret>/",
    "admin/login/",
    "healthz/",
}


def _policy(answer):
    """The directives in alphabetical order; django-csp sends them in any."""
    return sorted(answer.headers["Content-Security-Policy"].split("; "))


def _patterns(resolver, prefix=""):
    for part in resolver.url_patterns:
        if isinstance(part, URLResolver):
            yield from _patterns(part, prefix + str(part.pattern))
        elif isinstance(part, URLPattern):
            yield prefix + str(part.pattern), part.callback


def test_every_page_asks_for_sign_in():
    open_pages = {
        path
        for path, view in _patterns(get_resolver())
        if not getattr(view, "login_required", True) and not issubclass(getattr(view, "cls", object), APIView)
    }
    assert open_pages == OPEN


def test_every_endpoint_asks_for_sign_in():
    """REST framework's views let LoginRequiredMiddleware pass: their own permissions refuse."""
    endpoints = {
        path: view.cls for path, view in _patterns(get_resolver()) if issubclass(getattr(view, "cls", object), APIView)
    }
    assert len(endpoints) > 8
    without = {path for path, view in endpoints.items() if "IsAuthenticated" not in str(view.permission_classes)}
    assert without == set()


@pytest.mark.parametrize("path", ["/", "/runs/", "/datasets/", "/models/", "/account/", "/api/v1/docs/"])
def test_page_for_nobody_is_the_sign_in_page(db, path):
    answer = Client().get(path)
    assert (answer.status_code, answer.headers["Location"]) == (302, f"/accounts/login/?next={path}")


@pytest.mark.parametrize(
    "path", ["/api/v1/me/", "/api/v1/jobs/", "/api/v1/schema/", "/api/v1/runs/", "/api/v1/datasets/"]
)
def test_endpoint_for_nobody_is_401(db, path):
    answer = Client().get(path)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Token")


def test_start_page_is_the_list_of_runs(client_of, alice):
    answer = client_of(alice).get("/")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/runs/")


@pytest.mark.parametrize(
    "path", ["/account/", "/runs/", "/datasets/", "/models/", "/nothing/", "/api/v1/me/", "/api/v1/docs/"]
)
def test_headers(client_of, alice, path):
    answer = client_of(alice).get(path)
    headers = answer.headers
    assert _policy(answer) == POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/accounts/login/", "/admin/login/", "/healthz/", "/nothing/"])
def test_policy_for_nobody(db, path):
    assert _policy(Client().get(path)) == POLICY


def test_cookies_are_not_for_scripts(alice):
    browser = Client()
    browser.post("/accounts/login/", {"login": "alice", "password": "alice"})
    session = browser.cookies["sessionid"]
    assert (session["httponly"], session["samesite"]) == (True, "Lax")
    assert (session["secure"], browser.cookies["csrftoken"]["samesite"]) == ("", "Lax")


def test_host_that_is_not_ours_is_refused(db):
    assert Client().get("/healthz/", headers={"Host": "evil.example"}).status_code == 400


# --- Errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("error", "status"), [(UserError, 400), (NotAllowed, 403), (Missing, 404), (Conflict, 409)])
def test_user_error_is_a_page_with_its_sentence(rf, alice, error, status):
    request = rf.get("/runs/")
    request.user = alice
    answer = UserErrorMiddleware(lambda _: None).process_exception(request, error("Choose <another> name."))
    assert answer.status_code == status
    assert "<p>Choose &lt;another&gt; name.</p>" in answer.content.decode()


def test_other_errors_are_not_shown(rf):
    assert UserErrorMiddleware(lambda _: None).process_exception(rf.get("/"), RuntimeError("a bug")) is None


def test_user_error_reaches_the_browser(client_of, alice, monkeypatch):
    def refuse(*_args):
        raise Conflict("Somebody else was faster.")

    monkeypatch.setattr("lorapilot.views.tokens_of", refuse)
    answer = client_of(alice).get("/account/")
    assert (answer.status_code, "Somebody else was faster." in answer.content.decode()) == (409, True)


def test_unknown_page_is_404(client_of, alice):
    answer = client_of(alice).get("/nothing/")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (PermissionDenied("inner detail"), 403, ""),
        (RequestDataTooBig("inner detail"), 413, "That is more than one request may carry."),
        (RuntimeError("inner detail"), 500, "Something went wrong on our side"),
    ],
)
def test_error_pages_say_nothing_from_within(client_of, alice, monkeypatch, error, status, sentence):
    def fail(*_args):
        raise error

    monkeypatch.setattr("lorapilot.views.tokens_of", fail)
    browser = client_of(alice)
    browser.raise_request_exception = False
    answer = browser.get("/account/")
    page = answer.content.decode()
    assert (answer.status_code, sentence in page, "inner detail" in page) == (status, True, False)


# --- Health -----------------------------------------------------------------------------------------------------------
def test_healthz_needs_no_sign_in(db):
    answer = Client().get("/healthz/")
    assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, b"ok", "text/plain")
    assert Client().head("/healthz/").status_code == 200
    assert Client().post("/healthz/").status_code == 405


def test_healthz_without_a_database_is_503(db, monkeypatch):
    def fail():
        raise OperationalError("connection refused: secret-host")

    browser = Client()
    with monkeypatch.context() as broken:
        broken.setattr("lorapilot.views.connection.cursor", fail)
        answer = browser.get("/healthz/")
    assert (answer.status_code, answer.content) == (503, b"The database does not answer.")


# --- Settings that others rely on -------------------------------------------------------------------------------------
def test_superuser_and_staff_permissions_work_with_our_backend(staff, alice):
    from django.contrib.auth.models import Permission

    assert settings.AUTHENTICATION_BACKENDS == ["allauth.account.auth_backends.AuthenticationBackend"]
    assert staff.has_perm("lorapilot.change_job") is True
    assert alice.has_perm("lorapilot.change_job") is False
    alice.user_permissions.add(Permission.objects.get(codename="change_job"))
    assert User.objects.get(pk=alice.pk).has_perm("lorapilot.change_job") is True
