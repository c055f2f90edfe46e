"""Every page of hosts: works, wrong method, not staff, bad input, and the database afterwards."""

from __future__ import annotations

import html
import re
from datetime import timedelta

import pytest
from django.contrib.messages import get_messages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from lorapilot.models import AuditEntry
from runs import disk, host_urls, services
from runs.dispatch import claim
from runs.enums import Ending, Status
from runs.models import Attempt, Host, Run, RunEvent, Slot
from runs.transitions import change_status
from tests.factories import make_run, make_slot

HTMX = {"HX-Request": "true"}
STAFF_ONLY = "Only staff can change hosts and their slots. Ask whoever runs this installation."
OF_HOSTS = ["drain", "move_runs", "undrain", "declare_dead"]
OF_SLOTS = ["enable_slot", "disable_slot"]
ASKS = ["move_runs", "declare_dead"]  # GET shows a form
LONG_AGO = timezone.now() - timedelta(minutes=5)


def to(name, *args):
    return reverse(f"hosts:{name}", args=args)


def page(answer):
    """The text of a page, one space between words."""
    text = re.sub(r"<[^>]*>", " ", answer.content.decode())
    return re.sub(r"\s+([.,:])(?=\s)", r"\1", re.sub(r"\s+", " ", html.unescape(text)))


def markup(answer):
    return answer.content.decode()


def told(answer):
    return [str(message) for message in get_messages(answer.wsgi_request)]


def audited():
    entries = AuditEntry.objects.exclude(action="signed in").order_by("pk")
    return [(entry.actor.username, entry.action, entry.subject) for entry in entries]


def everything():
    """All rows of hosts and runs, to be compared before and after."""
    tables = (Host, Slot, Run, Attempt, RunEvent)
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables} | {"audit": audited()}


@pytest.fixture
def run(workspace, alice, team, handed_out):
    """Alice's, shared with Bob's team; it trains on the first of two hosts."""
    run = make_run(alice)
    run.groups.add(team)
    assert claim(run, make_slot("first"))
    assert change_status(run, old=Status.STARTING, new=Status.RUNNING)
    Run.objects.filter(pk=run.pk).update(step=2)
    make_slot("second")
    return run


@pytest.fixture
def host(run):
    return Host.objects.get(name="first")


@pytest.fixture
def slot(host):
    return host.slots.get()


@pytest.fixture
def addresses(host, slot):
    """Every page that changes something, by name."""
    return {name: to(name, host.pk) for name in OF_HOSTS} | {name: to(name, slot.pk) for name in OF_SLOTS}


@pytest.fixture
def browser(staff, client_of):
    return client_of(staff)


def lose(host):
    Host.objects.filter(pk=host.pk).update(heartbeat_at=LONG_AGO, lost_at=timezone.now())


# --- Who may, and how -------------------------------------------------------------------------------------------------
def test_every_page_is_tested_here(addresses):
    assert {pattern.name for pattern in host_urls.urlpatterns} == {"list", *addresses}


def test_pages_ask_visitors_to_sign_in(addresses, client):
    before = everything()
    for address in (to("list"), *addresses.values()):
        for answer in (client.get(address), client.post(address)):
            assert (answer.status_code, answer.url) == (302, f"{reverse('account_login')}?next={address}")
    assert everything() == before


def test_hosts_are_changed_by_staff_only(addresses, alice, client_of):
    before, owner = everything(), client_of(alice)
    for name, address in addresses.items():
        answer = owner.post(address)
        assert (answer.status_code, STAFF_ONLY in page(answer)) == (403, True), name
    assert [owner.get(addresses[name]).status_code for name in ASKS] == [403, 403]
    assert everything() == before


def test_pages_refuse_the_wrong_method(addresses, browser):
    before = everything()
    asked = {name: browser.get(address).status_code for name, address in addresses.items()}
    assert asked == dict.fromkeys(addresses, 405) | dict.fromkeys(ASKS, 200)
    assert browser.post(to("list")).status_code == 405
    assert {browser.put(address).status_code for address in (to("list"), *addresses.values())} == {405}
    assert everything() == before


def test_pages_of_nothing_are_not_found(addresses, browser):
    before = everything()
    assert {browser.post(to(name, 99)).status_code for name in (*OF_HOSTS, *OF_SLOTS)} == {404}
    assert everything() == before


# --- The list ---------------------------------------------------------------------------------------------------------
def test_list_without_hosts_says_how_to_begin(db, charlie, client_of):
    answer = client_of(charlie).get(to("list"))
    assert (answer.status_code, "No host yet" in page(answer)) == (200, True)


def test_list_is_for_everybody_and_names_only_runs_that_one_may_see(run, alice, bob, charlie, staff, client_of):
    shown = {user: page(client_of(user).get(to("list"))) for user in (alice, bob, charlie, staff)}
    assert ["first alice · 50 %" in shown[user] for user in (alice, bob, charlie, staff)] == [True, True, False, True]
    assert ["a run of another user" in shown[user] for user in (alice, charlie)] == [False, True]
    assert ["Drain" in shown[user] for user in (alice, staff)] == [False, True]
    assert ["Disable" in shown[user] for user in (alice, staff)] == [False, True]
    assert f'href="/runs/{run.pk}/"' not in markup(client_of(charlie).get(to("list")))


def test_list_shows_condition_devices_and_the_disk(host, slot, staff, browser, monkeypatch, settings):
    host.slots.update(is_enabled=False)
    host.devices.update(memory_bytes=80 << 30, name="NVIDIA H100")
    Host.objects.filter(pk=host.pk).update(boot_id="boot-1")
    monkeypatch.setattr(disk, "free_bytes", lambda: 12 << 30)
    shown = page(browser.get(to("list")))
    assert "12.0 GB free, of which 2.0 GB are never given to a run." in shown
    assert re.search(r"first Online heard of \d s ago Drain first Drain and move runs… of first Slot", shown)
    assert "cpu Disabled NVIDIA H100 80.0 GB first alice" in shown
    assert "Boot id boot-1 Device 0 cpu" in shown
    monkeypatch.setattr(disk, "free_bytes", lambda: 1 << 30)
    assert "The disk has 1.0 GB left, less than the floor of 2.0 GB" in page(browser.get(to("list")))


@pytest.mark.parametrize(
    ("change", "label", "sentence", "buttons"),
    [
        ({}, "Online", "heard of", ["drain", "move"]),
        ({"draining_at": LONG_AGO}, "Draining", "what trains there ends first", ["move", "undrain"]),
        ({"lost_at": LONG_AGO}, "Lost", "Its runs may still be training", ["drain", "dead"]),
        ({"lost_at": LONG_AGO, "draining_at": LONG_AGO}, "Lost Draining", "last heard of", ["undrain", "dead"]),
        ({"lost_at": LONG_AGO, "dead_at": LONG_AGO}, "Dead", "When its worker starts again", []),
        ({"heartbeat_at": None}, "Lost", "never heard of", ["drain", "dead"]),
    ],
)
def test_list_offers_what_a_host_is_ready_for(host, browser, change, label, sentence, buttons):
    Host.objects.filter(pk=host.pk).update(**change)
    part = browser.get(to("list"), headers=HTMX)
    section = markup(part).partition(f'id="host-{host.pk}"')[2].partition("</section>")[0]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", section))
    assert [f"first {label} " in text, sentence in text, "<html" in markup(part)] == [True, True, False]
    paths = {"drain": "drain", "move": "move_runs", "undrain": "undrain", "dead": "declare_dead"}
    assert [name for name, path in paths.items() if f'"{to(path, host.pk)}"' in section] == buttons


def test_list_costs_the_same_with_more_hosts(run, alice, browser):
    def queries():
        with CaptureQueriesContext(connection) as found:
            assert browser.get(to("list")).status_code == 200
        return len(found)

    queries()
    before = queries()
    for name in ("third", "fourth"):
        assert claim(make_run(alice, output_name=name), make_slot(name))
    assert queries() == before


# --- Maintenance ------------------------------------------------------------------------------------------------------
def test_host_is_drained_and_its_maintenance_ends(host, run, addresses, browser):
    answer = browser.post(addresses["drain"])
    host.refresh_from_db()
    assert (answer.status_code, answer.url, host.condition) == (302, to("list"), "draining")
    assert told(answer) == ["first takes no more runs."]
    run.refresh_from_db()
    assert run.status == "running"
    answer = browser.post(addresses["undrain"], headers=HTMX)
    host.refresh_from_db()
    assert (answer.status_code, host.condition) == (200, "online")
    assert '<p class="notice notice-success">The maintenance of first has ended.</p>' in markup(answer)
    assert audited() == [("staff", "host drained", "first"), ("staff", "host undrained", "first")]


def test_runs_are_moved_away_after_a_question_that_names_them(host, run, alice, staff, addresses, browser):
    before = everything()
    assert "first alice · step 2 of 4 · cpu" in page(browser.get(addresses["move_runs"]))
    assert everything() == before
    answer = browser.post(addresses["move_runs"])
    run.refresh_from_db()
    host.refresh_from_db()
    assert (answer.status_code, host.condition, run.status, run.stop_intent) == (302, "draining", "stopping", "move")
    assert audited() == [("staff", "host drained, runs moved", "first")]
    assert "Nothing trains there now." in page(browser.get(addresses["move_runs"]))  # it is about to go


# --- The end of a machine ---------------------------------------------------------------------------------------------
def test_host_is_declared_dead_after_a_question_that_says_what_it_means(host, run, addresses, browser):
    lose(host)
    before = everything()
    shown = page(browser.get(addresses["declare_dead"]))
    assert "first alice · step 2 of 4 · cpu" in shown
    assert "Whatever first still does for them is refused" in shown
    assert everything() == before
    answer = browser.post(addresses["declare_dead"])
    run.refresh_from_db()
    host.refresh_from_db()
    assert (answer.status_code, answer.url, host.condition) == (302, to("list"), "dead")
    assert told(answer) == ["first is declared dead. 1 run goes on elsewhere."]
    assert (run.attempt, str(run.slot), run.attempts.get(number=1).ending) == (2, "second/cpu", Ending.MOVED)
    assert audited() == [("staff", "host declared dead", "first")]
    assert "That is done already." in page(browser.get(addresses["declare_dead"]))


def test_question_tells_of_runs_that_were_asked_to_stop(host, run, alice, addresses, browser):
    services.stop_run(run, actor=alice)
    lose(host)
    assert "asked to stop before" in page(browser.get(addresses["declare_dead"]))


def test_host_that_is_heard_of_is_not_declared_dead(host, run, addresses, browser):
    before = everything()
    sentence = "first is heard of. Drain it instead, or stop its worker and wait half a minute."
    assert sentence in page(browser.get(addresses["declare_dead"]))
    answer = browser.post(addresses["declare_dead"])
    assert (answer.status_code, sentence in page(answer)) == (409, True)
    assert everything() == before


# --- Slots ------------------------------------------------------------------------------------------------------------
def test_slot_is_disabled_and_enabled(slot, addresses, browser):
    answer = browser.post(addresses["disable_slot"])
    slot.refresh_from_db()
    assert (answer.status_code, slot.is_enabled, told(answer)) == (302, False, ["first/cpu takes no more runs."])
    answer = browser.post(addresses["enable_slot"], headers=HTMX)
    slot.refresh_from_db()
    assert (answer.status_code, slot.is_enabled, "first/cpu takes runs again." in page(answer)) == (200, True, True)
    assert audited() == [("staff", "slot disabled", "first/cpu"), ("staff", "slot enabled", "first/cpu")]
