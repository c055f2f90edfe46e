"""The account page: tokens are made, shown once, and revoked; groups are named."""

import re

import pytest
from django.test import Client

from lorapilot import services
from lorapilot.models import ApiToken, AuditEntry

ACCOUNT = "/account/"
CREATE = "/account/tokens/"
GOOD = {"name": "laptop", "scope": "read", "days": "30"}


def _revoke(token):
    return f"/account/tokens/{token.token_key}/revoke/"


def test_page_lists_ones_own_tokens_and_groups(client_of, alice, bob):
    hers, _ = services.create_token(alice, name="her laptop")
    services.create_token(bob, name="his laptop")
    answer = client_of(alice).get(ACCOUNT)
    page = answer.content.decode()
    assert answer.status_code == 200
    assert (page.count("her laptop</strong>"), page.count("his laptop"), page.count(hers.token_key)) == (1, 0, 2)
    assert list(answer.context["groups"].values_list("name", flat=True)) == ["team"]
    assert '<a class="button" href="/accounts/password/change/">' in page


def test_page_without_tokens_or_groups(client_of, charlie):
    page = client_of(charlie).get(ACCOUNT).content.decode()
    assert "You have no tokens." in page
    assert "You are in no group." in page


def test_page_escapes_names(client_of, alice):
    services.create_token(alice, name="<script>x</script>")
    page = client_of(alice).get(ACCOUNT).content.decode()
    assert "<script>x" not in page


@pytest.mark.parametrize("rows", [1, 3])
def test_page_has_the_same_queries_for_any_number_of_tokens(client_of, alice, rows, django_assert_num_queries):
    for n in range(rows):
        services.create_token(alice, name=f"token {n}")
    browser = client_of(alice)
    with django_assert_num_queries(5):
        browser.get(ACCOUNT)


def test_create_shows_the_token_once(client_of, alice):
    browser = client_of(alice)
    answer = browser.post(CREATE, GOOD)
    shown = re.findall(r"lp_[0-9a-f]{64}", answer.content.decode())
    row = ApiToken.objects.get()
    assert (answer.status_code, len(shown), row.name, row.scope, row.user) == (200, 1, "laptop", "read", alice)
    assert shown[0][:15] == row.token_key
    assert "no-store" in answer.headers["Cache-Control"]
    assert shown[0] not in browser.get(ACCOUNT).content.decode()
    entry = AuditEntry.objects.get(action="token created")
    assert (entry.actor, entry.subject, entry.address) == (alice, f"laptop ({row.token_key}…)", "127.0.0.1")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"name": ""}, "name", "This field is required."),
        ({"name": "x" * 101}, "name", "Ensure this value has at most 100 characters (it has 101)."),
        ({"scope": "all"}, "scope", "Select a valid choice. all is not one of the available choices."),
        ({"days": "0"}, "days", "Choose between 1 and 365 days."),
        ({"days": "366"}, "days", "Choose between 1 and 365 days."),
        ({"days": "many"}, "days", "Enter a whole number."),
    ],
)
def test_create_with_bad_input_says_so_at_the_field(client_of, alice, change, field, message):
    answer = client_of(alice).post(CREATE, GOOD | change)
    assert (answer.status_code, ApiToken.objects.count()) == (400, 0)
    assert answer.context["form"].errors == {field: [message]}
    assert f'id="id_{field}_error"' in answer.content.decode()


def test_revoke(client_of, alice):
    token, _ = services.create_token(alice, name="laptop")
    answer = client_of(alice).post(_revoke(token), follow=True)
    assert answer.redirect_chain == [(ACCOUNT, 302)]
    assert [str(message) for message in answer.context["messages"]] == ["The token “laptop” opens nothing any more."]
    assert ApiToken.objects.count() == 0
    assert AuditEntry.objects.filter(actor=alice, action="token revoked").count() == 1


@pytest.mark.parametrize("who", ["bob", "charlie", "staff"])
def test_revoke_of_somebody_elses_is_404(client_of, alice, request, who):
    token, _ = services.create_token(alice, name="laptop")
    assert client_of(request.getfixturevalue(who)).post(_revoke(token)).status_code == 404
    assert ApiToken.objects.count() == 1


def test_wrong_methods_are_405(client_of, alice):
    token, _ = services.create_token(alice, name="laptop")
    browser = client_of(alice)
    assert browser.post(ACCOUNT).status_code == 405
    assert browser.get(CREATE).status_code == 405
    assert browser.get(_revoke(token)).status_code == 405
    assert ApiToken.objects.count() == 1


def test_nobody_is_sent_to_the_sign_in_page(db):
    for path in (ACCOUNT, CREATE, "/account/tokens/lp_x/revoke/"):
        answer = Client().post(path) if path != ACCOUNT else Client().get(path)
        assert (answer.status_code, answer.headers["Location"]) == (302, f"/accounts/login/?next={path}")


def test_posts_need_a_csrf_token(alice):
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    assert browser.post(CREATE, GOOD).status_code == 403
    assert ApiToken.objects.count() == 0
