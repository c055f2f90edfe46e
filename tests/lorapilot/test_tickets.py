"""Socket tickets: one socket each, 30 seconds, for whoever may read."""

import threading
from datetime import datetime, timedelta

import pytest
from django.db import connections
from django.utils import timezone
from rest_framework.test import APIClient

from lorapilot.models import SocketTicket
from lorapilot.services import issue_ticket, redeem_ticket

URL = "/api/v1/tickets/"


@pytest.mark.parametrize("scope", ["read", "write"])
def test_ticket_is_issued(api_of, alice, scope):
    answer = api_of(alice, scope).post(URL)
    assert answer.status_code == 201
    assert sorted(answer.json()) == ["expires_at", "ticket"]
    lifetime = datetime.fromisoformat(answer.json()["expires_at"]) - timezone.now()
    assert timedelta(seconds=20) < lifetime <= timedelta(seconds=30)
    row = SocketTicket.objects.get()
    assert row.user == alice
    assert answer.json()["ticket"] not in row.digest
    assert redeem_ticket(answer.json()["ticket"]) == alice


def test_ticket_of_nobody_is_401(db):
    assert APIClient().post(URL).status_code == 401
    assert SocketTicket.objects.count() == 0


def test_ticket_wrong_method_is_405(api_of, alice):
    assert api_of(alice).get(URL).status_code == 405


def test_ticket_works_once(alice):
    ticket = issue_ticket(alice)
    assert [redeem_ticket(ticket), redeem_ticket(ticket)] == [alice, None]
    assert SocketTicket.objects.count() == 0


def test_ticket_expired_is_refused_and_gone(alice):
    ticket = issue_ticket(alice)
    SocketTicket.objects.update(expires_at=timezone.now())
    assert redeem_ticket(ticket) is None
    assert SocketTicket.objects.count() == 0


def test_ticket_of_a_deactivated_user_is_refused(alice):
    ticket = issue_ticket(alice)
    alice.is_active = False
    alice.save()
    assert redeem_ticket(ticket) is None


@pytest.mark.parametrize("ticket", ["", "x", "\ud800", "\0", "x" * 10_000])
def test_ticket_unknown_is_refused(db, ticket):
    assert redeem_ticket(ticket) is None


def test_issue_forgets_expired_tickets(alice, bob):
    issue_ticket(alice)
    SocketTicket.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    issue_ticket(bob)
    assert SocketTicket.objects.get().user == bob


@pytest.mark.django_db(transaction=True)
def test_ticket_brought_twice_at_once_opens_one_socket(alice):
    ticket = issue_ticket(alice)
    both, got = threading.Barrier(2), []

    def bring():
        both.wait(20)
        try:
            got.append(redeem_ticket(ticket))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=bring) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(got, key=bool) == [None, alice]
