"""Invitations: staff make links; whoever opens one makes an account, once, though sign-up is closed."""

from datetime import timedelta

import pytest
from django.contrib.auth.models import Group
from django.core.cache import cache
from django.db import IntegrityError, connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from lorapilot import invitations, services
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.models import AuditEntry, Invitation, User

PAGE, API, SIGNUP = "/account/invitations/", "/api/v1/invitations/", "/accounts/signup/"
NEW = {"username": "dora", "email": "", "password1": "a-long-enough-one", "password2": "a-long-enough-one"}
USELESS = "This invitation was used or revoked, has expired, or is cut off. Ask for a new one."


@pytest.fixture(autouse=True)
def no_attempts_yet():
    cache.clear()


@pytest.fixture
def invited(staff, team):
    """(row, path of the link)"""
    row, secret = invitations.create_invitation(staff, note="Dora", groups=[team])
    return row, f"/accounts/invitation/{secret}/"


def names():
    return set(User.objects.values_list("username", flat=True))


def test_invited_person_makes_an_account_in_the_groups(invited, team):
    row, link = invited
    browser = Client()
    opened = browser.get(link)
    assert (opened.status_code, opened.headers["Location"]) == (302, SIGNUP)
    assert "You are invited." in browser.get(SIGNUP).content.decode()
    assert browser.post(SIGNUP, NEW).headers["Location"] == "/runs/"
    dora = User.objects.get(username="dora")
    row.refresh_from_db()
    assert (row.used_by, row.state, list(dora.groups.all())) == (dora, "used", [team])
    assert (dora.is_staff, dora.is_superuser, browser.session["_auth_user_id"]) == (False, False, str(dora.pk))
    told = AuditEntry.objects.filter(action__startswith="invitation").order_by("pk")
    assert list(told.values_list("actor__username", "action")) == [
        ("staff", "invitation created"),
        ("dora", "invitation used"),
    ]


def test_sign_up_stays_closed_without_an_invitation(invited, staff):
    assert "Sign-up is closed" in Client().get(SIGNUP).content.decode()
    Client().post(SIGNUP, NEW)
    assert names() == {"staff"}


def test_link_works_once(invited):
    first, second = Client(), Client()
    for browser in (first, second):
        browser.get(invited[1])
    first.post(SIGNUP, NEW)
    assert "Sign-up is closed" in second.post(SIGNUP, NEW | {"username": "eve"}).content.decode()
    assert (Client().get(invited[1]).status_code, names()) == (404, {"staff", "dora"})


def test_account_is_not_made_when_the_invitation_is_lost_at_the_last_moment(invited, monkeypatch):
    """Somebody else used it between the check of the page and the account."""
    browser = Client()
    browser.get(invited[1])
    monkeypatch.setattr(invitations, "redeem", lambda *_args, **_kwargs: False)
    answer = browser.post(SIGNUP, NEW)
    assert (answer.status_code, "can no longer be used" in answer.content.decode()) == (409, True)
    assert (names(), "_auth_user_id" in browser.session) == ({"staff"}, False)


def test_redeem_of_two_accounts_has_one_winner(invited, alice, bob):
    row, _ = invited
    assert [invitations.redeem(row.digest, user) for user in (alice, bob)] == [True, False]
    row.refresh_from_db()
    assert row.used_by == alice


@pytest.mark.parametrize("change", ["revoked_at", "expires_at", "used_at"])
def test_link_that_has_lost_its_force_opens_nothing(invited, change):
    row, link = invited
    browser = Client()
    browser.get(link)
    Invitation.objects.filter(pk=row.pk).update(**{change: timezone.now() - timedelta(seconds=1)})
    for one in (Client(), browser):
        answer = one.get(link)
        assert (answer.status_code, USELESS in answer.content.decode()) == (404, True)
    browser.post(SIGNUP, NEW)
    assert names() == {"staff"}


@pytest.mark.parametrize("secret", ["x", "%00", "é", "a" * 3000])
def test_link_that_was_never_given_opens_nothing(db, secret):
    assert Client().get(f"/accounts/invitation/{secret}/").status_code == 404


def test_looking_at_a_link_uses_nothing_up(invited):
    row, link = invited
    for method in ("get", "head"):
        assert getattr(Client(), method)(link).status_code == 302
    assert Client().post(link).status_code == 405
    row.refresh_from_db()
    assert row.state == "open"


def test_link_of_a_person_who_has_an_account_is_left_for_others(invited, alice, client_of):
    assert client_of(alice).get(invited[1]).status_code == 400
    assert Client().get(invited[1]).status_code == 302


def test_opening_links_is_limited(invited):
    answers = [Client().get("/accounts/invitation/guess/").status_code for _ in range(21)]
    assert answers == [404] * 20 + [429]
    assert Client().get(invited[1]).status_code == 429


def test_secret_is_stored_as_a_hash(invited):
    row, link = invited
    secret = link.split("/")[-2]
    assert (len(secret), row.digest) == (43, services.digest_of(secret))
    assert secret not in str(Invitation.objects.values().get())


def test_open_sign_up_goes_on_without_the_groups_of_a_revoked_invitation(invited, settings):
    settings.SIGNUP_OPEN = True
    browser = Client()
    browser.get(invited[1])
    Invitation.objects.update(revoked_at=timezone.now())
    browser.post(SIGNUP, NEW)
    assert list(User.objects.get(username="dora").groups.all()) == []


def test_used_and_revoked_at_once_is_refused_by_the_database(invited):
    now = timezone.now()
    with pytest.raises(IntegrityError), transaction.atomic():
        Invitation.objects.update(used_at=now, revoked_at=now)


def test_create_checks_who_and_for_how_long(staff, alice):
    with pytest.raises(NotAllowed):
        invitations.create_invitation(alice)
    for days in (0, 91, -1):
        with pytest.raises(UserError):
            invitations.create_invitation(staff, days=days)
    assert Invitation.objects.count() == 0


def test_create_stops_at_many_open_ones(staff, monkeypatch):
    monkeypatch.setattr(invitations, "OPEN_AT_MOST", 1)
    row, _ = invitations.create_invitation(staff)
    with pytest.raises(Conflict):
        invitations.create_invitation(staff)
    invitations.revoke_invitation(row, actor=staff)
    invitations.create_invitation(staff)


# --- Pages ------------------------------------------------------------------------------------------------------------
def test_page_makes_a_link_and_shows_it_once(staff, team, client_of):
    browser = client_of(staff)
    answer = browser.post(PAGE, {"note": "Dora", "days": 3, "groups": [team.pk]})
    link = answer.context["link"]
    assert link.startswith("http://testserver/accounts/invitation/")
    assert link in answer.content.decode()
    assert link not in browser.get(PAGE).content.decode()
    row = Invitation.objects.get()
    assert (row.note, row.invited_by, list(row.groups.all())) == ("Dora", staff, [team])
    assert timedelta(days=2.9) < row.expires_at - timezone.now() < timedelta(days=3)
    assert Client().get(link).status_code == 302


def test_page_refuses_bad_input(staff, client_of):
    browser = client_of(staff)
    for given in ({"days": 0}, {"days": "x"}, {"days": 1, "groups": [99]}, {"days": 1, "note": "n" * 101}):
        assert browser.post(PAGE, given).status_code == 400
    assert Invitation.objects.count() == 0


def test_page_revokes(invited, staff, client_of):
    row, link = invited
    browser = client_of(staff)
    address = f"{PAGE}{row.pk}/revoke/"
    assert [browser.get(address).status_code, browser.post(f"{PAGE}99/revoke/").status_code] == [405, 404]
    assert browser.post(address).headers["Location"] == PAGE
    assert (browser.post(address).status_code, Client().get(link).status_code) == (409, 404)
    assert AuditEntry.objects.filter(action="invitation revoked", actor=staff).count() == 1


def test_pages_are_for_staff(invited, alice, client_of):
    browser = client_of(alice)
    answers = [browser.get(PAGE), browser.post(PAGE, {"days": 1}), browser.post(f"{PAGE}{invited[0].pk}/revoke/")]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert Client().get(PAGE).headers["Location"] == f"/accounts/login/?next={PAGE}"
    assert [row.state for row in Invitation.objects.all()] == ["open"]
    assert PAGE not in browser.get("/account/").content.decode()


def test_list_asks_the_database_as_often_for_three_as_for_one(staff, team, client_of):
    browser, counts = client_of(staff), []
    for number in (1, 2):
        for _ in range(number):
            invitations.create_invitation(staff, groups=[team])
        with CaptureQueriesContext(connection) as queries:
            browser.get(PAGE)
        counts.append(len(queries))
    assert counts[0] == counts[1]


# --- API --------------------------------------------------------------------------------------------------------------
def test_api_makes_lists_and_revokes(staff, team, api_of):
    api = api_of(staff)
    made = api.post(API, {"note": "Dora", "groups": ["team"], "days": 2})
    row = Invitation.objects.get()
    assert made.status_code == 201
    assert services.digest_of(made.json()["link"].split("/")[-2]) == row.digest
    listed = api.get(API).json()["results"]
    assert listed == [{key: value for key, value in made.json().items() if key != "link"}]
    assert (listed[0]["state"], listed[0]["groups"], listed[0]["invited_by"]) == ("open", ["team"], "staff")
    assert api.delete(f"{API}{row.pk}/").status_code == 204
    assert (api.delete(f"{API}{row.pk}/").status_code, api.delete(f"{API}99/").status_code) == (409, 404)
    assert api.get(API).json()["results"][0]["state"] == "revoked"


def test_api_refuses_bad_input_and_other_people(invited, staff, alice, api_of):
    api = api_of(staff)
    for given in ({"days": 91}, {"days": "x"}, {"groups": ["nobody"]}, {"note": "n" * 101}):
        assert api.post(API, given).status_code == 400
    other, before = api_of(alice), Invitation.objects.count()
    refused = [other.get(API), other.post(API, {}), other.delete(f"{API}{invited[0].pk}/")]
    assert [answer.status_code for answer in refused] == [403] * 3
    assert api.put(API, {}).status_code == 405
    assert (Invitation.objects.count(), Invitation.objects.get().state) == (before, "open")


def test_groups_can_be_deleted_while_invitations_name_them(invited):
    Group.objects.all().delete()
    browser = Client()
    browser.get(invited[1])
    browser.post(SIGNUP, NEW)
    assert list(User.objects.get(username="dora").groups.all()) == []
