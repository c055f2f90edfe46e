"""API tokens: made with a password or in a session, shown once, scoped, expiring, revoked."""

from datetime import timedelta

import pytest
from django.conf import settings as django_settings
from django.core.cache import cache
from django.utils import timezone
from knox.crypto import hash_token
from rest_framework.test import APIClient
from rest_framework.throttling import SimpleRateThrottle

from lorapilot import services
from lorapilot.errors import Conflict, UserError
from lorapilot.models import ApiToken, AuditEntry

URL = "/api/v1/tokens/"


@pytest.fixture(autouse=True)
def no_attempts_yet():
    cache.clear()


@pytest.fixture
def anybody(db):
    return APIClient()


@pytest.fixture
def session_of():
    """An API client that carries a browser's session, and checks CSRF as the server does."""

    def client(user):
        api = APIClient(enforce_csrf_checks=True)
        api.force_login(user)
        return api

    return client


def _with(token):
    api = APIClient()
    api.credentials(HTTP_AUTHORIZATION=f"Token {token}")
    return api


def _audit():
    return list(AuditEntry.objects.order_by("pk").values_list("actor__username", "action", "subject", "address"))


# --- Create -----------------------------------------------------------------------------------------------------------
def test_create_with_password(anybody, alice):
    body = {"username": "alice", "password": "alice", "name": " laptop ", "scope": "read", "days": 7}
    answer = anybody.post(URL, body)
    assert answer.status_code == 201
    assert sorted(answer.json()) == ["expires_at", "key", "name", "scope", "token"]
    token = answer.json()["token"]
    row = ApiToken.objects.get()
    assert (row.user, row.name, row.scope, row.last_used_at) == (alice, "laptop", "read", None)
    assert row.digest == hash_token(token)
    assert row.token_key == token[:15] == answer.json()["key"]
    assert token.startswith("lp_")
    assert abs(row.expiry - timezone.now() - timedelta(days=7)) < timedelta(minutes=1)
    assert _with(token).get("/api/v1/me/").json()["username"] == "alice"
    assert _audit() == [("alice", "token created", f"laptop ({token[:15]}…)", "127.0.0.1")]


def test_create_with_email_and_defaults(anybody, alice):
    answer = anybody.post(URL, {"username": "alice@example.org", "password": "alice", "name": "laptop"})
    assert answer.status_code == 201
    row = ApiToken.objects.get()
    assert row.scope == "write"
    assert abs(row.expiry - timezone.now() - timedelta(days=django_settings.API_TOKEN_DAYS)) < timedelta(minutes=1)


def test_create_as_form_data(anybody, alice):
    answer = anybody.post(URL, {"username": "alice", "password": "alice", "name": "curl"}, format="multipart")
    assert answer.status_code == 201


def test_create_in_a_session_wants_csrf(session_of, alice):
    assert session_of(alice).post(URL, {"name": "laptop"}).status_code == 403
    assert ApiToken.objects.count() == 0
    api = APIClient()
    api.force_login(alice)
    assert api.post(URL, {"name": "laptop"}).status_code == 201
    assert ApiToken.objects.get().user == alice


@pytest.mark.parametrize("scope", ["read", "write"])
def test_create_with_a_token_is_refused(api_of, alice, scope):
    answer = api_of(alice, scope).post(URL, {"name": "child"})
    assert (answer.status_code, ApiToken.objects.count()) == (403, 1)
    assert answer.json() == {
        "detail": "A token cannot create tokens. Send username and password, or use the account page."
    }


def test_create_by_nobody_is_refused(anybody):
    answer = anybody.post(URL, {"name": "laptop"})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Token")
    assert answer.json() == {"detail": "Send username and password."}


@pytest.mark.parametrize(("username", "password"), [("alice", "wrong"), ("nobody", "alice"), ("alice", "Alice")])
def test_create_with_a_wrong_password_is_refused(anybody, alice, username, password):
    answer = anybody.post(URL, {"username": username, "password": password, "name": "laptop"})
    assert (answer.status_code, answer.json()) == (401, {"detail": "The username or the password is wrong."})
    assert ApiToken.objects.count() == 0
    known = "alice" if username == "alice" else "(unknown name)"
    assert _audit() == [(None, "sign-in failed", known, "127.0.0.1")]


def test_create_by_an_inactive_user_is_refused(anybody, alice):
    alice.is_active = False
    alice.save()
    answer = anybody.post(URL, {"username": "alice", "password": "alice", "name": "laptop"})
    assert (answer.status_code, answer.json()) == (401, {"detail": "The username or the password is wrong."})


def test_create_after_too_many_wrong_passwords_is_refused_even_with_the_right_one(anybody, alice):
    for _ in range(5):
        anybody.post(URL, {"username": "alice", "password": "wrong", "name": "laptop"})
    answer = anybody.post(URL, {"username": "alice", "password": "alice", "name": "laptop"})
    assert answer.status_code == 429
    assert list(answer.json()) == ["detail"]
    assert ApiToken.objects.count() == 0


def test_create_is_throttled(anybody, alice, monkeypatch):
    monkeypatch.setattr(SimpleRateThrottle, "THROTTLE_RATES", SimpleRateThrottle.THROTTLE_RATES | {"login": "2/min"})
    body = {"username": "alice", "password": "alice", "name": "laptop"}
    # A header that anybody can send does not make another client.
    answers = [anybody.post(URL, body, headers={"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert int(answers[2].headers["Retry-After"]) <= 60
    assert answers[2].json()["detail"].startswith("Request was throttled.")


@pytest.mark.parametrize(
    ("change", "errors"),
    [
        ({"name": ""}, {"name": ["This field may not be blank."]}),
        ({"name": "x" * 101}, {"name": ["Ensure this field has no more than 100 characters."]}),
        ({"scope": "admin"}, {"scope": ['"admin" is not a valid choice.']}),
        ({"days": 0}, {"days": ["Choose between 1 and 365 days."]}),
        ({"days": 366}, {"days": ["Choose between 1 and 365 days."]}),
        ({"days": "soon"}, {"days": ["A valid integer is required."]}),
        ({"password": None}, {"password": ["This field may not be null."]}),
    ],
)
def test_create_with_bad_input_is_refused(anybody, alice, change, errors):
    answer = anybody.post(URL, {"username": "alice", "password": "alice", "name": "laptop"} | change)
    assert (answer.status_code, ApiToken.objects.count()) == (400, 0)
    assert answer.json()["errors"] == errors
    ((field, (sentence,)),) = errors.items()
    assert answer.json()["detail"] in {sentence, f"{field}: {sentence}"}


def test_create_with_half_the_credentials_is_refused(anybody, alice):
    answer = anybody.post(URL, {"username": "alice", "name": "laptop"})
    sentence = "Send both username and password, or neither."
    assert (answer.status_code, answer.json()) == (
        400,
        {"detail": sentence, "errors": {"non_field_errors": [sentence]}},
    )


def test_create_forgets_expired_ones_and_stops_at_fifty(alice):
    for n in range(services.TOKENS_AT_MOST):
        services.create_token(alice, name=f"token {n}")
    with pytest.raises(Conflict):
        services.create_token(alice, name="one too many")
    ApiToken.objects.filter(name="token 0").update(expiry=timezone.now() - timedelta(seconds=1))
    services.create_token(alice, name="fits again")
    assert ApiToken.objects.count() == services.TOKENS_AT_MOST
    assert not ApiToken.objects.filter(name="token 0").exists()


@pytest.mark.parametrize(
    ("values", "field"),
    [({"name": " "}, "name"), ({"name": "a", "scope": "all"}, "scope"), ({"name": "a", "days": 0}, "days")],
)
def test_create_service_names_the_field(alice, values, field):
    with pytest.raises(UserError) as refused:
        services.create_token(alice, **values)
    assert refused.value.field == field


# --- List, revoke -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 3])
def test_list_shows_ones_own(api_of, alice, bob, rows, django_assert_num_queries):
    api = api_of(alice, "read")
    for n in range(rows - 1):
        services.create_token(alice, name=f"token {n}")
    services.create_token(bob, name="his")
    api.get(URL)
    with django_assert_num_queries(3):
        answer = api.get(URL)
    assert answer.json()["count"] == rows
    assert sorted(answer.json()["results"][0]) == [
        "created_at", "expires_at", "is_expired", "key", "last_used_at", "name", "scope",
    ]  # fmt: skip


def test_list_says_what_has_expired(api_of, alice):
    api = api_of(alice)
    old, _ = services.create_token(alice, name="old")
    ApiToken.objects.filter(pk=old.pk).update(expiry=timezone.now())
    assert {row["name"]: row["is_expired"] for row in api.get(URL).json()["results"]} == {"old": True, "test": False}


def test_list_of_nobody_is_401(anybody):
    assert anybody.get(URL).status_code == 401


def test_revoke(api_of, alice):
    api = api_of(alice)
    row, token = services.create_token(alice, name="old laptop")
    assert api.delete(f"{URL}{row.token_key}/").status_code == 204
    assert not ApiToken.objects.filter(pk=row.pk).exists()
    assert _with(token).get("/api/v1/me/").status_code == 401
    assert _audit()[-1] == ("alice", "token revoked", f"old laptop ({row.token_key}…) of alice", "127.0.0.1")


def test_revoke_itself(alice):
    row, token = services.create_token(alice, name="laptop")
    assert _with(token).delete(f"{URL}{row.token_key}/").status_code == 204
    assert ApiToken.objects.count() == 0


@pytest.mark.parametrize("who", ["bob", "charlie", "staff"])
def test_revoke_of_somebody_elses_is_404(api_of, alice, request, who):
    row, _ = services.create_token(alice, name="hers")
    answer = api_of(request.getfixturevalue(who)).delete(f"{URL}{row.token_key}/")
    assert (answer.status_code, ApiToken.objects.filter(pk=row.pk).count()) == (404, 1)


def test_revoke_with_a_read_token_is_refused(api_of, alice):
    row, _ = services.create_token(alice, name="hers")
    answer = api_of(alice, "read").delete(f"{URL}{row.token_key}/")
    assert (answer.status_code, ApiToken.objects.count()) == (403, 2)
    assert answer.json() == {"detail": "This token can only read. Create one with scope `write` on the account page."}


@pytest.mark.parametrize(
    ("method", "path"), [("put", ""), ("patch", ""), ("delete", ""), ("get", "abc/"), ("post", "abc/")]
)
def test_wrong_method_is_405(api_of, alice, method, path):
    assert getattr(api_of(alice), method)(URL + path).status_code == 405


# --- Use --------------------------------------------------------------------------------------------------------------
def test_use_is_noted_at_most_once_a_minute(alice):
    row, token = services.create_token(alice, name="laptop")
    _with(token).get("/api/v1/me/")
    row.refresh_from_db()
    assert abs(timezone.now() - row.last_used_at) < timedelta(minutes=1)
    recently = timezone.now() - timedelta(seconds=30)
    ApiToken.objects.update(last_used_at=recently)
    _with(token).get("/api/v1/me/")
    row.refresh_from_db()
    assert row.last_used_at == recently


def test_expired_token_is_401_and_says_so(alice):
    row, token = services.create_token(alice, name="laptop")
    ApiToken.objects.filter(pk=row.pk).update(expiry=timezone.now())
    answer = _with(token).get("/api/v1/me/")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Token")
    assert answer.json() == {"detail": "This token has expired. Create a new one on the account page."}


def test_token_of_a_deactivated_user_is_401(alice):
    _, token = services.create_token(alice, name="laptop")
    alice.is_active = False
    alice.save()
    answer = _with(token).get("/api/v1/me/")
    assert (answer.status_code, answer.json()) == (401, {"detail": "This account is deactivated. Ask the operator."})


@pytest.mark.parametrize("token", ["lp_" + "0" * 64, "x", "lp_", "ÿ" * 20, "lp_" + "z" * 64, "lp_" + "0" * 64 + "\n"])
def test_unknown_token_is_401(db, token):
    answer = APIClient().get("/api/v1/me/", HTTP_AUTHORIZATION=f"Token {token}")
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Token")
    assert answer.json() == {"detail": "This token is unknown or was revoked. Create one on the account page."}


@pytest.mark.parametrize("header", ["Token", "Token a b", "Bearer lp_x", "Basic YWxpY2U6YWxpY2U=", ""])
def test_other_authorization_is_401(alice, header):
    answer = APIClient().get("/api/v1/me/", HTTP_AUTHORIZATION=header)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Token")
    assert list(answer.json()) == ["detail"]


def test_me_with_token_and_in_session(alice):
    row, token = services.create_token(alice, name="laptop", scope="read")
    expected = {
        "username": "alice",
        "email": "alice@example.org",
        "is_staff": False,
        "groups": ["team"],
        "token": {"name": "laptop", "scope": "read", "expires_at": row.expiry.isoformat().replace("+00:00", "Z")},
    }
    assert _with(token).get("/api/v1/me/").json() == expected
    api = APIClient()
    api.force_login(alice)
    assert api.get("/api/v1/me/").json() == expected | {"token": None}
    assert api.post("/api/v1/me/").status_code == 405
