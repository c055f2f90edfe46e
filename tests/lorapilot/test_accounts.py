"""Sign-in, sign-out, sign-up, password; and what of it the audit trail keeps."""

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import NoReverseMatch, reverse

from lorapilot.models import AuditEntry, User

LOGIN, LOGOUT, SIGNUP, PASSWORD = (
    "/accounts/login/",
    "/accounts/logout/",
    "/accounts/signup/",
    "/accounts/password/change/",
)
NEW = {"username": "dora", "email": "", "password1": "a-long-enough-one", "password2": "a-long-enough-one"}


@pytest.fixture(autouse=True)
def no_attempts_yet():
    cache.clear()


def _audit():
    return list(AuditEntry.objects.order_by("pk").values_list("actor__username", "action", "subject", "address"))


@pytest.mark.parametrize("login", ["alice", "alice@example.org"])
def test_sign_in_by_name_or_address(alice, login):
    browser = Client()
    answer = browser.post(LOGIN, {"login": login, "password": "alice"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/runs/")
    assert browser.session["_auth_user_id"] == str(alice.pk)
    assert _audit() == [("alice", "signed in", "alice", "127.0.0.1")]


def test_sign_in_goes_where_one_wanted_but_not_elsewhere(alice):
    for target, goes in (("/account/", "/account/"), ("https://evil.example/", "/runs/"), ("//evil.example", "/runs/")):
        answer = Client().post(LOGIN, {"login": "alice", "password": "alice", "next": target})
        assert (answer.status_code, answer.headers["Location"]) == (302, goes)


@pytest.mark.parametrize(("login", "subject"), [("alice", "alice"), ("my-secret-password", "(unknown name)")])
def test_sign_in_failed_is_recorded_without_what_may_be_a_password(alice, login, subject):
    answer = Client().post(LOGIN, {"login": login, "password": "wrong"})
    assert (answer.status_code, "_auth_user_id" in answer.client.session) == (200, False)
    assert _audit() == [(None, "sign-in failed", subject, "127.0.0.1")]


def test_sign_in_of_a_deactivated_user_leads_nowhere(alice):
    alice.is_active = False
    alice.save()
    browser = Client()
    answer = browser.post(LOGIN, {"login": "alice", "password": "alice"}, follow=True)
    assert (answer.status_code, answer.redirect_chain) == (200, [("/accounts/inactive/", 302)])
    assert "_auth_user_id" not in browser.session


def test_sign_in_stops_after_too_many_attempts(alice):
    browser = Client()
    for _ in range(5):
        browser.post(LOGIN, {"login": "alice", "password": "wrong"})
    answer = browser.post(LOGIN, {"login": "alice", "password": "alice"})
    assert (answer.status_code, "_auth_user_id" in browser.session) == (200, False)
    assert answer.context["form"].non_field_errors() == ["Too many failed login attempts. Try again later."]


def test_deactivation_ends_the_session(client_of, alice):
    browser = client_of(alice)
    User.objects.update(is_active=False)
    assert browser.get("/account/").headers["Location"] == "/accounts/login/?next=/account/"


def test_sign_out_by_post_only(client_of, alice):
    browser = client_of(alice)
    AuditEntry.objects.all().delete()
    assert browser.get(LOGOUT).status_code == 200
    assert "_auth_user_id" in browser.session
    assert browser.post(LOGOUT).status_code == 302
    assert "_auth_user_id" not in browser.session
    assert _audit() == [("alice", "signed out", "alice", "127.0.0.1")]


def test_sign_up_is_closed(db, settings):
    browser = Client()
    assert "Sign up" not in browser.get(LOGIN).content.decode()
    assert b"closed" in browser.get(SIGNUP).content
    browser.post(SIGNUP, NEW)
    assert User.objects.count() == 0


def test_sign_up_open_makes_an_ordinary_user(db, settings):
    settings.SIGNUP_OPEN = True
    browser = Client()
    assert f'href="{SIGNUP}"' in browser.get(LOGIN).content.decode()
    answer = browser.post(SIGNUP, NEW | {"is_staff": "1", "is_superuser": "1"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/runs/")
    dora = User.objects.get()
    assert (dora.username, dora.is_staff, dora.is_superuser) == ("dora", False, False)


@pytest.mark.parametrize(
    "change", [{"username": "ALICE"}, {"email": "alice@example.org"}, {"password1": "x", "password2": "x"}]
)
def test_sign_up_with_bad_input_is_refused(alice, settings, change):
    settings.SIGNUP_OPEN = True
    answer = Client().post(SIGNUP, NEW | change)
    assert (answer.status_code, User.objects.count()) == (200, 1)
    assert answer.context["form"].errors != {}


def test_password_is_changed(client_of, alice):
    browser = client_of(alice)
    new = {"oldpassword": "alice", "password1": "another-good-one", "password2": "another-good-one"}
    answer = browser.post(PASSWORD, new)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/account/")
    alice.refresh_from_db()
    assert alice.check_password("another-good-one")
    assert browser.get("/account/").status_code == 200


def test_password_is_not_changed_without_the_old_one(client_of, alice):
    new = {"oldpassword": "wrong", "password1": "another-good-one", "password2": "another-good-one"}
    assert client_of(alice).post(PASSWORD, new).status_code == 200
    alice.refresh_from_db()
    assert alice.check_password("alice")


@pytest.mark.parametrize("path", [LOGIN, LOGOUT, SIGNUP, "/accounts/inactive/"])
def test_addresses_of_the_door_need_no_session(db, path):
    answer = Client().get(path)
    assert answer.status_code == (302 if path == LOGOUT else 200)
    assert answer.headers.get("Location", "") in {"", "/runs/", "/"}


@pytest.mark.parametrize(
    "name", ["account_reset_password", "account_email", "socialaccount_login", "account_reauthenticate"]
)
def test_unused_addresses_of_allauth_are_absent(name):
    with pytest.raises(NoReverseMatch):
        reverse(name)


@pytest.mark.parametrize("path", ["password/reset/", "email/", "3rdparty/", "social/login/error/", ""])
def test_unused_paths_of_allauth_are_404(client_of, alice, path):
    assert client_of(alice).get("/accounts/" + path).status_code == 404
