"""Every page of runs: works, wrong method, stranger, bad input, and the database afterwards."""

from __future__ import annotations

import html
import json
import re
from datetime import timedelta
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from django.contrib.auth.models import Group
from django.contrib.messages import get_messages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from datasets.models import DatasetVersion
from lorapilot.models import AuditEntry
from runs import disk, selectors, services, urls, waiting
from runs.dispatch import claim
from runs.enums import Ending, Priority, Status
from runs.models import Attempt, Checkpoint, Host, Run, RunEvent, Sample
from runs.templatetags import run_figures
from runs.transitions import change_status
from tests.factories import make_base_model, make_dataset, make_run, make_slot

HTMX = {"HX-Request": "true"}
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
READS = ["detail", "artifacts", "samples", "events", "attempts", "adapted", "status", "download", "sample_file", "log"]
WRITES = ["stop", "pause", "kill", "resume", "hold", "release", "move", "priority"]
ASKS = ["delete", "share"]  # GET shows a form
ELSEWHERE = [  # test_publishing.py, test_config_pages.py, test_picture_history.py
    *("publish", "unpublish"),
    *("options", "write_config", "read_config", "base_config", "config", "run_on"),
    *("of_picture", "of_versions", "destroy_picture"),
]
OF_NO_RUN = ["list", "new", "preview", "choose", "compare"]
NOW = timezone.now()


def to(name, *args):
    return reverse(f"runs:{name}", args=args)


def page(answer):
    """The text of a page, one space between words."""
    text = re.sub(r"<[^>]*>", " ", answer.content.decode())
    return re.sub(r"\s+([.,:])(?=\s)", r"\1", re.sub(r"\s+", " ", html.unescape(text)))


def markup(answer):
    return answer.content.decode()


def told(answer):
    """The messages that the next page will show."""
    return [str(message) for message in get_messages(answer.wsgi_request)]


def everything():
    """All rows of runs, to be compared before and after."""
    tables = (Run, Attempt, RunEvent, DatasetVersion, Checkpoint)
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables} | {"audit": audited()}


def audited():
    """What was done, by the audit trail."""
    entries = AuditEntry.objects.exclude(action="signed in").order_by("pk")
    return [(entry.actor.username, entry.action, entry.subject) for entry in entries]


def status(answer):
    """Of an answer that may be a file; one that is read to its end is closed."""
    if answer.streaming:
        assert b"".join(answer.streaming_content) in (b"content", b"step 1\n")
    return answer.status_code


def waits(owner, *names, **options):
    """Runs of `owner` that wait, since no host takes any."""
    made = [make_run(owner, output_name=name, **options) for name in names]
    return made[0] if len(made) == 1 else made


def train(run, slot=None, **values):
    """`run` trains on `slot`."""
    assert claim(run, slot or make_slot(name=f"cpu{run.pk}"))
    assert change_status(run, old=Status.STARTING, new=Status.RUNNING, started_at=timezone.now())
    Run.objects.filter(pk=run.pk).update(**values)
    run.refresh_from_db()
    return run


def save_state(run, step):
    folder = run.folder / "state" / f"step{step:08d}"
    folder.mkdir(parents=True)
    for name in ("lora.safetensors", "training.pt", "state.json", "COMPLETE"):
        (folder / name).touch()
    run.states.create(step=step, path=f"state/step{step:08d}")


def write_stop_plan(run, *seconds):
    run.attempt_folder().mkdir(parents=True)
    steps = [{"signal": "SIGINT", "grace_seconds": grace} for grace in seconds]
    (run.attempt_folder() / "launch.json").write_text(json.dumps({"stop": steps}))


@pytest.fixture
def run(workspace, alice, team, handed_out):
    """Alice's, shared with Bob's team; it waits, with a LoRA file, a sample and a log of an earlier attempt."""
    run = make_run(alice)
    run.groups.add(team)
    (run.folder / "_logs").mkdir(parents=True)
    run.log_path.write_text("step 1\n")
    for name in ("first.safetensors", "sample.png"):
        (run.folder / name).write_bytes(b"content")
    Checkpoint.objects.create(run=run, step=4, path="first.safetensors", bytes=7, sha256="a" * 64)
    Sample.objects.create(run=run, step=4, index=0, path="sample.png", prompt="sks red", seed=1)
    return run


@pytest.fixture
def addresses(run):
    """Every page below a run, by name."""
    of_files = {
        "download": to("download", run.pk, run.checkpoints.get().pk),
        "sample_file": to("sample_file", run.pk, run.samples.get().pk),
    }
    return {name: to(name, run.pk) for name in READS + WRITES + ASKS + ["retry"] if name not in of_files} | of_files


@pytest.fixture
def browser(alice, client_of):
    return client_of(alice)


# --- Who may, and how -------------------------------------------------------------------------------------------------
def test_every_page_is_tested_here(addresses):
    assert {pattern.name for pattern in urls.urlpatterns} == {*OF_NO_RUN, *addresses, *ELSEWHERE}


def test_pages_ask_visitors_to_sign_in(addresses, client):
    before = everything()
    for address in (*map(to, OF_NO_RUN), *addresses.values()):
        for answer in (client.get(address), client.post(address)):
            assert (answer.status_code, answer.url) == (302, f"{reverse('account_login')}?next={address}")
    assert everything() == before


def test_pages_do_not_exist_for_strangers(addresses, charlie, client_of):
    before, stranger = everything(), client_of(charlie)
    asked = {
        name: (status(stranger.get(address)), status(stranger.post(address))) for name, address in addresses.items()
    }
    reads, writes = dict.fromkeys(READS, (404, 405)), dict.fromkeys([*WRITES, "retry"], (405, 404))
    assert asked == reads | writes | dict.fromkeys(ASKS, (404, 404))
    assert everything() == before


def test_pages_are_looked_at_and_not_changed_by_the_team(addresses, bob, client_of):
    before, member = everything(), client_of(bob)
    assert {name: status(member.get(addresses[name])) for name in READS} == dict.fromkeys(READS, 200)
    for name in WRITES + ASKS:
        answer = member.post(addresses[name], {"to": "up", "priority": "-1"})
        assert (answer.status_code, NOT_YOURS in page(answer)) == (403, True), name
    assert [member.get(addresses[name]).status_code for name in ASKS] == [403, 403]
    assert everything() == before


def test_pages_refuse_the_wrong_method(addresses, browser):
    before = everything()
    asked = {name: status(browser.get(address)) for name, address in addresses.items()}
    assert asked == dict.fromkeys(READS + ASKS, 200) | dict.fromkeys([*WRITES, "retry"], 405)
    assert {browser.post(addresses[name]).status_code for name in READS} == {405}
    assert {browser.post(to(name)).status_code for name in ("list", "choose", "compare")} == {405}
    assert browser.get(to("preview")).status_code == 405
    every = {*map(to, OF_NO_RUN), *addresses.values()}
    assert {browser.put(address).status_code for address in every} == {405}
    assert everything() == before


def test_pages_of_nothing_are_not_found(run, browser):
    before = everything()
    assert {browser.get(to(name, 99)).status_code for name in ("detail", "status", "log", "delete")} == {404}
    assert {browser.post(to(name, 99)).status_code for name in WRITES} == {404}
    assert [browser.get(to(name, run.pk, 99)).status_code for name in ("download", "sample_file")] == [404, 404]
    assert everything() == before


def test_staff_change_what_is_others(run, staff, client_of):
    answer = client_of(staff).post(to("hold", run.pk))
    run.refresh_from_db()
    assert (answer.status_code, answer.url, run.held_at is None) == (302, to("detail", run.pk), False)


# --- The list ---------------------------------------------------------------------------------------------------------
def names(answer, start="Waiting"):
    """The runs of a section of the list, in order, with what stands before the name."""
    section = markup(answer).partition(f">{start} <")[2].partition("</table>")[0]
    return re.findall(r'id="run-\d+"[^>]*>([^<]+)<', section)


def rows(answer):
    """[name, text] of each waiting run."""
    section = markup(answer).partition(">Waiting <")[2].partition("</table>")[0]
    return {
        re.search(r'id="run-\d+"[^>]*>([^<]+)<', row)[1]: page(SimpleNamespace(content=row.encode())).strip()
        for row in re.findall(r'<tr id="queued-.*?</tr>', section, re.DOTALL)
    }


def test_list_without_runs_says_how_to_begin(db, charlie, client_of):
    answer = client_of(charlie).get(to("list"))
    assert (answer.status_code, "Three steps to a first LoRA" in page(answer)) == (200, True)


def test_list_shows_what_trains_what_waits_and_what_has_ended(run, alice, browser):
    ended, trains = waits(alice, "ended", "trains")
    services.stop_run(ended, actor=alice)
    train(trains, step=2)
    answer = browser.get(to("list"))
    assert [names(answer, section) for section in ("Training", "Waiting", "Ended")] == [
        ["trains"],
        ["first"],
        ["ended"],
    ]
    assert waiting.TURN_RULE in page(answer)
    part = browser.get(to("list"), headers=HTMX)
    assert ("<html" in markup(part), names(part)) == (False, ["first"])


def test_queue_is_in_its_real_order_and_places_count_everybody(run, alice, bob, charlie, staff, client_of):
    waits(alice, "second")
    waits(bob, "bobs")
    waits(charlie, "charlies")
    order = [run.output_name for run in waiting.queue_in_order()]
    assert order == ["first", "bobs", "charlies", "second"]
    seen = {user: client_of(user).get(to("list")) for user in (staff, alice, bob, charlie)}
    assert {user: names(answer) for user, answer in seen.items()} == {
        staff: order,
        alice: ["first", "second"],
        bob: ["first", "bobs"],
        charlie: ["charlies"],
    }
    assert [row.wait.place for row in selectors.queue_rows(alice)] == [1, 4]
    assert [row.wait.place for row in selectors.queue_rows(charlie)] == [3]


def test_held_runs_stand_where_they_would_start(run, alice, bob, browser):
    second, _ = waits(alice, "second", "third")
    waits(bob, "bobs")
    low = waits(alice, "low", priority=Priority.LOW)
    for held in (second, low):
        services.hold_run(held, actor=alice)
    found = [(row.run.output_name, row.wait.place) for row in selectors.queue_rows(alice)]
    assert found == [("first", 1), ("second", 0), ("third", 3), ("low", 0)]
    shown = rows(browser.get(to("list")))
    assert list(shown) == ["first", "second", "third", "low"]
    assert "second Held" in shown["second"]
    assert "after its release" in shown["second"]
    assert "Release second" in shown["second"]
    assert "Hold third" in shown["third"]
    services.release_run(second, actor=alice)
    assert [row.run.output_name for row in selectors.queue_rows(alice)] == list(shown)


def test_list_says_when_a_run_starts_or_why_it_does_not(run, alice, browser, monkeypatch):
    two = waits(alice, "two")
    assert "No host takes runs at the moment" in rows(browser.get(to("list")))["first"]
    slot = make_slot()
    assert [
        "in a moment" in rows(browser.get(to("list")))["first"],
        "not known yet" in rows(browser.get(to("list")))["two"],
    ] == [True, True]
    train(run, slot, eta_seconds=3 * 3600.0)
    assert "in about 3 h" in rows(browser.get(to("list")))["two"]
    Run.objects.filter(pk=two.pk).update(not_before=timezone.now() + timedelta(minutes=1))
    assert "It waits a moment after an interruption" in rows(browser.get(to("list")))["two"]
    Run.objects.filter(pk=two.pk).update(not_before=None)
    monkeypatch.setattr(disk, "free_bytes", lambda: 0)
    assert "It waits for space on the disk" in rows(browser.get(to("list")))["two"]


def test_list_shows_paused_runs_priorities_and_silent_hosts(run, alice, bob, client_of):
    trains, paused = waits(alice, "trains", "paused")
    train(trains)
    Host.objects.update(lost_at=timezone.now())
    Run.objects.filter(pk=paused.pk).update(attempt=2, held_at=timezone.now())
    Run.objects.filter(pk=run.pk).update(priority=Priority.HIGH)
    answer = client_of(alice).get(to("list"))
    assert "paused Paused" in rows(answer)["paused"]
    assert "Nothing is heard of testhost." in page(answer)
    assert ["High" in rows(client_of(user).get(to("list")))["first"] for user in (alice, bob)] == [True, True]
    assert f'id="priority-{run.pk}-1"' not in markup(answer)


def test_controls_are_for_those_who_may_change_the_run(run, alice, bob, staff, client_of):
    waits(alice, "second")
    found = {}
    for user in (alice, bob, staff):
        shown = markup(client_of(user).get(to("list")))
        asked = (f"up-{run.pk}", f"hold-{run.pk}", f"priority-{run.pk}-0", f"priority-{run.pk}-1")
        found[user] = [f'id="{name}"' in shown for name in asked]
    assert found == {alice: [True, True, True, False], bob: [False] * 4, staff: [True] * 4}


def test_list_costs_the_same_with_more_rows(run, alice, bob, browser):
    held, active = waits(alice, "held-1", "active-1")
    services.hold_run(held, actor=alice)
    train(active, eta_seconds=5.0)
    services.stop_run(waits(alice, "ended-1"), actor=alice)

    def queries():
        with CaptureQueriesContext(connection) as found:
            assert browser.get(to("list")).status_code == 200
        return len(found)

    browser.get(to("list"))
    before = queries()
    for number in (2, 3):
        held, active, ended, _ = waits(alice, *(f"{name}-{number}" for name in ("held", "active", "ended", "waits")))
        services.hold_run(held, actor=alice)
        train(active, eta_seconds=5.0)
        services.stop_run(ended, actor=alice)
        waits(bob, f"bobs-{number}").groups.set(alice.groups.all())
    assert len(selectors.queue_rows(alice)) == 8
    assert queries() == before


# --- What is done in the queue ----------------------------------------------------------------------------------------
def test_run_is_moved_in_the_queue(run, alice, browser):
    waits(alice, "second", "third")
    orders = []
    for to_ in ("last", "up", "first", "down"):
        answer = browser.post(to("move", run.pk), {"to": to_, "back": "list"})
        assert (answer.status_code, answer.url) == (302, to("list"))
        orders.append([waiting_.output_name for waiting_ in waiting.queue_in_order()])
    assert orders == [
        ["second", "third", "first"],
        ["second", "first", "third"],
        ["first", "second", "third"],
        ["second", "first", "third"],
    ]
    assert run.events.last().message == "Moved in the queue: down."


def test_move_by_htmx_answers_with_the_list_and_tells_where_the_run_stands(run, alice, browser):
    waits(alice, "second")
    answer = browser.post(to("move", run.pk), {"to": "down"}, headers=HTMX)
    assert (answer.status_code, names(answer)) == (200, ["second", "first"])
    assert "first is number 2 of those that wait, priority normal." in page(answer)
    assert "<html" not in markup(answer)


def test_controls_at_the_ends_keep_the_focus_and_do_nothing(run, alice, browser):
    second = waits(alice, "second")
    shown = markup(browser.get(to("list")))

    def is_off(name):
        return 'type="button" aria-disabled="true"' in re.search(rf'<button [^>]*id="{name}"[^>]*>', shown)[0]

    ends = {
        f"{name}-{pk}": is_off(f"{name}-{pk}") for pk in (run.pk, second.pk) for name in ("first", "up", "down", "last")
    }
    assert list(ends.values()) == [True, True, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("move", {"to": "sideways"}, "Move it up, down, first or last."),
        ("move", {}, "Move it up, down, first or last."),
        ("priority", {"priority": "7"}, "Priority is -1 (low), 0 (normal) or 1 (high)."),
        ("priority", {"priority": "high"}, "Choose low, normal or high."),
        ("priority", {}, "Choose low, normal or high."),
    ],
)
def test_queue_refuses_bad_input(run, browser, name, given, sentence):
    before = everything()
    answer = browser.post(to(name, run.pk), given | {"back": "list"})
    assert (answer.status_code, sentence in page(answer)) == (400, True)
    assert everything() == before


def test_high_priority_is_refused_to_others_than_staff(run, browser):
    before = everything()
    answer = browser.post(to("priority", run.pk), {"priority": "1"})
    assert (answer.status_code, "High priority passes by the runs of others" in page(answer)) == (403, True)
    assert everything() == before


@pytest.mark.parametrize("name", ["move", "priority", "hold", "release"])
def test_queue_says_what_it_refused(run, browser, name):
    train(run)
    before, given = everything(), {"to": "up", "priority": "-1"}
    answer = browser.post(to(name, run.pk), given)
    assert (answer.status_code, "first is not waiting in the queue." in page(answer)) == (409, True)
    answer = browser.post(to(name, run.pk), given, headers=HTMX)
    assert (answer.status_code, names(answer, "Training")) == (200, ["first"])
    assert '<p class="notice notice-error">first is not waiting in the queue.</p>' in markup(answer)
    assert everything() == before


def test_priority_is_set_and_high_is_for_staff(run, staff, browser, client_of):
    answer = browser.post(to("priority", run.pk), {"priority": "-1", "back": "list"})
    run.refresh_from_db()
    assert (answer.status_code, answer.url, run.priority) == (302, to("list"), Priority.LOW)
    answer = client_of(staff).post(to("priority", run.pk), {"priority": "1"}, headers=HTMX)
    run.refresh_from_db()
    assert (run.priority, "priority high." in page(answer)) == (Priority.HIGH, True)
    assert run.events.last().message == "Priority: high."


def test_run_is_held_and_released_from_the_list_and_from_its_page(run, browser):
    answer = browser.post(to("hold", run.pk), headers=HTMX)
    run.refresh_from_db()
    assert ("first is held" in page(answer), run.held_at is None) == (True, False)
    answer = browser.post(to("release", run.pk))
    run.refresh_from_db()
    assert (answer.status_code, answer.url, run.held_at) == (302, to("detail", run.pk), None)
    answer = browser.post(f"{to('hold', run.pk)}?page=2", {"back": "list"})
    assert answer.url == f"{to('list')}?page=2"


# --- One run ----------------------------------------------------------------------------------------------------------
def test_page_of_a_waiting_run_tells_its_place_and_when_it_starts(run, alice, bob, browser):
    waits(bob, "bobs")
    second = waits(alice, "second")
    assert "It is next in the queue. It starts by itself" in page(browser.get(to("detail", run.pk)))
    assert "No host takes runs at the moment" in page(browser.get(to("status", run.pk)))
    make_slot()
    assert "It is next in the queue, and starts in a moment." in page(browser.get(to("status", run.pk)))
    assert "Number 3 in the queue; when it starts is not known yet." in page(browser.get(to("status", second.pk)))


def test_page_of_a_held_run_says_whether_it_is_paused(run, alice, browser):
    services.hold_run(run, actor=alice)
    shown = page(browser.get(to("status", run.pk)))
    assert ["first Held" in shown, "starts after it is released" in shown, "Release" in shown] == [True] * 3
    Run.objects.filter(pk=run.pk).update(attempt=2, reason="Paused. It goes on from step 3.")
    shown = page(browser.get(to("status", run.pk)))
    assert "first Paused" in shown
    assert "Paused. It goes on from step 3. It keeps its place in the queue, and goes on after it is released." in shown


def test_run_is_asked_to_stop_to_pause_or_to_end_now(run, alice, browser):
    train(run)
    answer = browser.post(to("pause", run.pk))
    run.refresh_from_db()
    assert (answer.status_code, answer.url) == (302, to("detail", run.pk))
    assert (run.status, run.stop_intent, run.stop_requested_by) == ("stopping", "pause", alice)
    shown = browser.get(to("status", run.pk))
    assert ["first Pausing" in page(shown), "held in the queue until it is released" in page(shown)] == [True, True]
    assert 'id="stop-button">Stop<' in markup(shown)  # it may still be stopped instead
    browser.post(to("stop", run.pk))
    run.refresh_from_db()
    assert (run.stop_intent, run.kill_requested_at) == ("stop", None)
    browser.post(to("kill", run.pk))
    run.refresh_from_db()
    assert run.kill_requested_at is not None
    shown = browser.get(to("status", run.pk))
    assert "It is being ended without saving" in page(shown)
    assert re.search(r'id="kill-button" disabled', markup(shown))


@pytest.mark.parametrize("name", ["pause", "kill", "resume"])
def test_what_a_run_cannot_do_is_refused(run, alice, browser, name):
    train(run)
    services.end(run, Status.SUCCEEDED)
    before = everything()
    answer = browser.post(to(name, run.pk))
    assert (answer.status_code, "succeeded" in page(answer)) == (409, True)
    assert everything() == before


def test_waiting_run_is_paused_by_holding_it(run, browser):
    browser.post(to("pause", run.pk))
    run.refresh_from_db()
    assert (run.status, run.held_at is None) == ("queued", False)


def test_stopping_run_shows_its_clock_and_what_would_be_lost(run, alice, browser):
    train(run, step=1240, total_steps=2000)
    save_state(run, 1200)
    write_stop_plan(run, 60, 10, 5)
    services.stop_run(run, actor=alice)
    run.refresh_from_db()
    asked = timezone.localtime(run.stop_requested_at)
    Run.objects.filter(pk=run.pk).update(stop_requested_at=asked.replace(hour=14, minute=4, second=0))
    shown = browser.get(to("status", run.pk))
    assert "It has until 14:05:10 to save; then it is ended." in page(shown)
    assert "If it is ended before it has saved, steps 1,201 to 1,240 will be trained again." in page(shown)
    assert 'data-confirm-detail="Nothing more is saved: steps 1,201 to 1,240 will be trained again."' in markup(shown)


def test_stopping_run_that_was_not_launched_has_no_clock(run, alice, browser):
    train(run)
    services.stop_run(run, actor=alice)
    shown = page(browser.get(to("status", run.pk)))
    assert ["It finishes its step, saves, and ends." in shown, "It has until" in shown] == [True, False]


def test_run_that_moves_says_why(run, staff, browser):
    train(run)
    services.ask_to_stop(run, intent="move", actor=staff, message="testhost is taken out: it goes on elsewhere.")
    assert "testhost is taken out: it goes on elsewhere." in page(browser.get(to("status", run.pk)))


def test_stop_tells_what_is_lost_when_the_trainer_cannot_save(run, alice, browser, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "saves_on_stop", False, raising=False)
    train(run, step=30, total_steps=100)
    detail = "This trainer does not save when it stops. It has no saved state yet: it starts again from the first step"
    assert markup(browser.get(to("status", run.pk))).count(f'data-confirm-detail="{detail}') == 2  # stop and pause
    save_state(run, 20)
    detail = (
        "This trainer does not save when it stops. What it trained after step 20, its newest saved state, is trained"
    )
    assert markup(browser.get(to("status", run.pk))).count(f'data-confirm-detail="{detail}') == 2
    services.stop_run(run, actor=alice)
    shown = page(browser.get(to("status", run.pk)))
    assert "This trainer does not save when it stops: steps 21 to 30 will be trained again." in shown


def test_run_on_a_silent_host_says_so_and_the_status_message_changes(run, browser):
    train(run)
    before = selectors.status_of(run)
    assert "Nothing is heard of" not in page(browser.get(to("status", run.pk)))
    Host.objects.update(lost_at=NOW, heartbeat_at=NOW.replace(hour=9, minute=5))
    shown = page(browser.get(to("status", run.pk)))
    assert re.search(r"Nothing is heard of testhost since \d+ \w+, 09:05", shown)
    assert "The run may still be training. It is followed again when the host is back" in shown
    now = selectors.status_of(run)
    assert [before.pop("host_condition"), now.pop("host_condition")] == ["online", "lost"]
    assert before == now


def test_status_message_is_json_and_its_page_begins_with_it(run, alice, browser):
    train(run)
    save_state(run, 2)
    services.pause_run(run, actor=alice)
    shown = markup(browser.get(to("detail", run.pk)))
    message = json.loads(html.unescape(re.search(r'data-run="([^"]*)"', shown)[1]))
    assert message == selectors.status_of(run)
    asked = ("status_label", "stop_intent", "kill_requested", "host_condition", "state_step")
    assert [message[name] for name in asked] == ["Pausing", "pause", False, "online", 2]


def fail_by_memory(run, **values):
    train(run)
    facts = {"ended_at": timezone.now(), "ending": Ending.OUT_OF_MEMORY, "exit_code": 3, "start_step": 0}
    run.attempts.update(**facts)
    services.end(run, Status.FAILED, reason="The GPU ran out of memory.", code=3)
    Run.objects.filter(pk=run.pk).update(**values)
    run.refresh_from_db()


def test_run_that_ran_out_of_memory_is_resumed_with_less(run, browser):
    fail_by_memory(run)
    shown = browser.get(to("status", run.pk))
    rung = "Gradient checkpointing is on: slower, the result is the same."
    assert [text in page(shown) for text in ("Memory ran out", "Resume with less memory", rung)] == [True] * 3
    answer = browser.post(to("resume", run.pk), {"less_memory": "yes"})
    run.refresh_from_db()
    assert (answer.status_code, run.status, run.attempt) == (302, "queued", 2)
    assert run.adaptations == {"gradient_checkpointing": True}
    assert run.reason == f"{rung} It starts again from step 0."


def test_resume_without_a_wish_changes_no_setting(run, browser):
    fail_by_memory(run)
    browser.post(to("resume", run.pk), {"less_memory": "no"})
    run.refresh_from_db()
    assert (run.status, run.adaptations) == ("queued", {})


def test_end_of_the_memory_ladder_is_told(run, browser):
    fail_by_memory(run, adaptations={"gradient_checkpointing": True})
    shown = page(browser.get(to("status", run.pk)))
    assert ["Resume with less memory" in shown, "There is nothing left to save memory with" in shown] == [False, True]
    answer = browser.post(to("resume", run.pk), {"less_memory": "yes"})
    run.refresh_from_db()
    assert (answer.status_code, run.status) == (409, "failed")


def test_other_failures_offer_no_less_memory(run, browser):
    fail_by_memory(run)
    run.attempts.update(ending=Ending.FAILED)
    shown = page(browser.get(to("status", run.pk)))
    assert ["This run failed" in shown, "less memory" in shown, "Exit code 3." in shown] == [True, False, True]


def test_attempts_tell_how_they_ended_and_what_was_adapted(run, browser):
    assert "It has not been started yet." in page(browser.get(to("attempts", run.pk)))
    slot, ended = make_slot(), timezone.now()
    batch = {"batch_size": 1, "gradient_accumulation_steps": 2}
    spec = run.spec | {"batch_size": 2}
    Run.objects.filter(pk=run.pk).update(spec=spec, attempt=3, adaptations=batch | {"gradient_checkpointing": True})
    facts = [
        {"ending": Ending.OUT_OF_MEMORY, "exit_code": -9, "ended_at": ended},
        {"ending": Ending.MOVED, "ended_at": ended, "start_step": 2, "adaptations": {"gradient_checkpointing": True}},
        {"start_step": 2},  # its row is filled in at the launch
    ]
    for number, fact in enumerate(facts, start=1):
        Attempt.objects.create(run=run, number=number, slot=slot, **fact)
    shown = page(browser.get(to("attempts", run.pk)))
    third, second, first = (shown.index(f"Attempt {number} ") for number in (3, 2, 1))
    assert third < second < first
    assert "not yet 2 – Batch size 2 → 1 Gradient accumulation 1 → 2" in shown[third:second]
    assert "Moved 2 – Gradient checkpointing no → yes" in shown[second:first]
    assert "testhost/cpu" in shown[first:]
    assert "Out of memory 0 -9 (SIGKILL)" in shown[first:]
    adapted = page(browser.get(to("adapted", run.pk)))
    assert "Since memory ran out, it trains with Batch size 2 → 1" in adapted
    settings = page(browser.get(to("detail", run.pk))).partition("As submitted")[2]
    assert ["Batch size 2 " in settings, "Gradient checkpointing no " in settings] == [True, True]


def test_page_costs_the_same_with_more_attempts_and_neighbours(run, alice, browser):
    slot = make_slot()

    def queries():
        with CaptureQueriesContext(connection) as found:
            assert browser.get(to("detail", run.pk)).status_code == 200
        return len(found)

    Attempt.objects.create(run=run, number=1, slot=slot)
    browser.get(to("detail", run.pk))
    before = queries()
    Attempt.objects.create(run=run, number=2, slot=slot)
    Attempt.objects.create(run=run, number=3, slot=slot)
    waits(alice, "second", "third")
    assert queries() == before


def test_retry_is_a_new_run_of_whoever_asks(run, bob, client_of):
    answer = client_of(bob).post(to("retry", run.pk))
    again = Run.objects.get(owner=bob)
    assert (answer.status_code, answer.url, again.output_name) == (302, to("detail", again.pk), "first-2")
    assert told(answer) == ["first-2 is in the queue."]


def test_delete_asks_first_and_names_what_will_be_gone(run, alice, browser):
    services.stop_run(run, actor=alice)
    assert "first.safetensors" in page(browser.get(to("delete", run.pk)))
    assert run.folder.exists()
    answer = browser.post(to("delete", run.pk))
    assert (answer.status_code, answer.url, told(answer)) == (302, to("list"), ["first and its files are deleted."])
    assert (Run.objects.count(), run.folder.exists()) == (0, False)
    assert audited() == [("alice", "run deleted", "first")]


def test_delete_of_a_run_that_trains_is_refused(run, browser):
    train(run)
    answer = browser.post(to("delete", run.pk))
    assert (answer.status_code, "first is running: stop it first." in page(answer)) == (409, True)
    assert (Run.objects.count(), run.folder.exists()) == (1, True)


def test_share_by_staff_keeps_the_owners_groups(run, team, staff, client_of):
    run.groups.add(team)
    assert f'value="{team.pk}" checked' in client_of(staff).get(to("share", run.pk)).content.decode()
    client_of(staff).post(to("share", run.pk), {"groups": [team.pk]})
    assert list(run.groups.all()) == [team]


@pytest.mark.parametrize("wrong", ["", "x", "\0", "9" * 30, "9" * 5000])
def test_share_with_what_is_no_group_changes_nothing(run, team, browser, wrong):
    run.groups.add(team)
    answer = browser.post(to("share", run.pk), {"groups": [team.pk, wrong]})
    assert (answer.status_code, list(run.groups.all())) == (302, [team])


def test_share_is_with_ones_own_groups_only(run, team, browser):
    others = Group.objects.create(name="others")
    answer = browser.post(to("share", run.pk), {"groups": [others.pk]})
    assert (answer.status_code, list(run.groups.all())) == (302, [])
    browser.post(to("share", run.pk), {"groups": [team.pk, others.pk]})
    assert (list(run.groups.all()), audited()) == ([team], [("alice", "run shared", "first")] * 2)


# --- The run form -----------------------------------------------------------------------------------------------------
@pytest.fixture
def given(workspace, alice, handed_out):
    """What a filled-in form sends."""
    dataset, model = make_dataset(alice), make_base_model()
    return {"dataset": dataset.pk, "base_model": model.pk, "output_name": "cat", "profile": "", "steps": "4"}


def many(given, **varied):
    return given | {f"vary_{name}": values for name, values in varied.items()}


def test_form_offers_what_one_may_use(given, alice, charlie, staff, client_of):
    shown = {user: markup(client_of(user).get(to("new"))) for user in (alice, charlie, staff)}
    assert [">shapes<" in shown[user] for user in (alice, charlie, staff)] == [True, False, True]
    assert [
        re.findall(r'<option value="(-?\d)"[^>]*>(?:Low|Normal|High)<', shown[user]) for user in (alice, staff)
    ] == [
        ["-1", "0"],
        ["-1", "0", "1"],
    ]
    chosen = markup(client_of(alice).get(to("new"), {"dataset": given["dataset"]}))
    assert f'<option value="{given["dataset"]}" selected>' in chosen


def test_form_submits_one_run(given, alice, browser):
    answer = browser.post(to("new"), given | {"priority": "-1", "keep_last": "2", "less_memory_when_out": "true"})
    run = Run.objects.get()
    assert (answer.status_code, answer.url) == (302, to("detail", run.pk))
    assert told(answer) == ["cat is in the queue."]
    assert (run.owner, run.output_name, run.priority, run.total_steps) == (alice, "cat", Priority.LOW, 4)
    assert (run.spec["keep_last"], run.spec["less_memory_when_out"], run.spec["gpus"]) == (2, True, 1)


@pytest.mark.parametrize("model", ["none", "9" * 30, "9" * 5000])
def test_form_refuses_a_base_model_that_is_none(given, browser, model):
    answer = browser.post(to("new"), given | {"base_model": model})
    assert (answer.status_code, Run.objects.count()) == (422, 0)


def test_form_submits_many_runs(given, browser):
    varied = many(given, rank="2, 4,2", learning_rate="1e-4 5e-5", seed="", profile=["quick_test", "regular"])
    answer = browser.post(to("new"), varied | {"warmup_steps": "0"})
    assert (answer.status_code, answer.url, told(answer)) == (302, to("list"), ["8 runs are in the queue."])
    assert sorted(Run.objects.values_list("output_name", "profile", "spec__rank", "spec__learning_rate"))[:3] == [
        ("cat-quick-test-r2-lr0.0001", "quick_test", 2, 0.0001),
        ("cat-quick-test-r2-lr5e-05", "quick_test", 2, 0.00005),
        ("cat-quick-test-r4-lr0.0001", "quick_test", 4, 0.0001),
    ]
    assert DatasetVersion.objects.count() == 1


def test_form_with_one_variation_submits_one_run(given, browser):
    answer = browser.post(to("new"), many(given, seed="5"))
    assert (answer.url, told(answer)) == (to("list"), ["1 run is in the queue."])
    assert [(run.output_name, run.spec["seed"]) for run in Run.objects.all()] == [("cat-s5", 5)]


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"output_name": "../x"}, "output_name", "Use letters, digits"),
        ({"output_name": ""}, "output_name", "This field is required."),
        ({"dataset": "99"}, "dataset", "Select a valid choice."),
        ({"profile": "best"}, "profile", "Select a valid choice."),
        ({"steps": "0"}, "steps", "Steps must be at least 1."),
        ({"steps": "many"}, "steps", "Enter a whole number."),
        ({"gpus": "3"}, "gpus", "No slot has 3 GPUs."),
        ({"priority": "1"}, "priority", "Select a valid choice."),
        ({"vary_rank": "8, x"}, "vary_rank", "Write whole numbers with commas between them."),
        ({"vary_rank": "8, 0"}, "vary_rank", "Rank must be at least 1."),
        ({"vary_seed": "1.5"}, "vary_seed", "Write whole numbers with commas between them."),
        ({"vary_learning_rate": "1e-4, fast"}, "vary_learning_rate", "Write numbers with commas between them."),
        ({"vary_learning_rate": "1e-4, 2"}, "vary_learning_rate", "Learning rate must be at most 1."),
        ({"vary_learning_rate": "nan"}, "vary_learning_rate", "Learning rate is a finite number."),
        ({"vary_profile": ["best"]}, "vary_profile", "Select a valid choice."),
        ({"vary_seed": ",".join(map(str, range(51)))}, "", "That makes more than 50 runs."),
        ({"output_name": "x" * 99, "vary_seed": "1, 2"}, "output_name", "Use letters, digits"),
    ],
)
def test_form_refuses_bad_input_at_its_field_and_keeps_what_was_typed(given, browser, change, field, sentence):
    before = everything()
    answer = browser.post(to("new"), given | change)
    assert answer.status_code == 422
    errors = answer.context["form"].errors
    assert list(errors) == [field or "__all__"]
    assert errors[field or "__all__"][0].startswith(sentence)
    assert sentence in page(answer)
    name, typed = next(iter(change.items()))
    assert answer.context["form"][name].value() == typed
    assert {**everything(), "DatasetVersion": []} == before  # pinning the pictures changes nothing


@pytest.mark.parametrize("wrong", ["\0", "9" * 30, "9" * 5000])
def test_form_takes_a_base_model_that_is_none_for_none(given, browser, wrong):
    assert browser.get(f"{to('new')}?base_model={quote(wrong)}").status_code == 200
    assert browser.post(to("new"), given | {"base_model": wrong}).status_code == 422
    assert browser.post(to("preview"), given | {"base_model": wrong}).status_code == 200


def test_form_refuses_a_strangers_dataset(given, charlie, client_of):
    answer = client_of(charlie).post(to("new"), given)
    assert (answer.status_code, Run.objects.count()) == (422, 0)


def test_form_submits_all_runs_or_none(given, alice, browser):
    make_run(alice, output_name="cat-s2")
    answer = browser.post(to("new"), many(given, seed="1, 2, 3"))
    assert (answer.status_code, "There is a result called 'cat-s2' already." in page(answer)) == (422, True)
    assert Run.objects.count() == 1


def test_preview_shows_what_one_run_would_train(given, browser):
    answer = browser.post(to("preview"), given | {"output_name": ""})
    shown = page(answer)
    assert ["Steps 4 Epochs" in shown, "Disk, at most" in shown, "Start the run" in shown] == [True, True, True]
    assert ("Their names" in shown, "It writes up to" in shown, Run.objects.count()) == (False, False, 0)


def test_preview_of_many_runs_names_them(given, browser):
    shown = page(browser.post(to("preview"), many(given, rank="2, 4", seed="1, 2, 3")))
    assert "Runs 6 Steps in all 24 Pictures 3" in shown
    assert "cat-r2-s1 4 steps cat-r2-s2 4 steps cat-r2-s3 4 steps cat-r4-s1 4 steps" in shown
    assert "Start 6 runs" in shown


def test_preview_warns_of_a_full_disk(given, browser, monkeypatch, settings):
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES + 200 * 1024**2)
    assert "It writes up to" not in page(browser.post(to("preview"), given))
    shown = page(browser.post(to("preview"), many(given, seed="1, 2, 3")))
    assert re.search(r"Together they write up to [\d.]+ MB, and 200.0 MB are free on the disk above its floor.", shown)
    assert "Those that do not fit wait in the queue until there is space." in shown
    monkeypatch.setattr(disk, "free_bytes", lambda: 0)
    shown = page(browser.post(to("preview"), given))
    assert re.search(r"It writes up to [\d.]+ MB, and 0 bytes are free on the disk above its floor. It waits", shown)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": "0"}, "Steps must be at least 1."),
        ({"steps": "x"}, "Steps: Enter a whole number."),
        ({"vary_rank": "x"}, "Ranks: Write whole numbers with commas between them."),
        ({"vary_rank": "2, 1000"}, "Rank must be at most 512."),
        ({"vary_seed": ",".join(map(str, range(51)))}, "That makes more than 50 runs."),
        ({"dataset": ""}, "Choose a dataset and a base model."),
        ({"dataset": "99"}, "Choose a dataset and a base model."),
    ],
)
def test_preview_tells_what_is_wrong(given, browser, change, sentence):
    answer = browser.post(to("preview"), given | change)
    assert (answer.status_code, sentence in page(answer)) == (200, True)


# --- Figures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (-5, "in a moment"),
        (0.5, "in a moment"),
        (3.2, "in about 3 min"),
        (22, "in about 20 min"),
        (58, "in about 1 h"),
        (130, "in about 2 h"),
        (35 * 60, "in about 35 h"),
        (50 * 60, "in about 2 days"),
    ],
)
def test_forecast_is_only_as_exact_as_it_can_be(minutes, expected):
    assert run_figures.from_now(timezone.now() + timedelta(minutes=minutes, seconds=1)) == expected


@pytest.mark.parametrize(("code", "expected"), [(None, "–"), (0, "0"), (3, "3"), (-9, "-9 (SIGKILL)"), (-99, "-99")])
def test_exit_code_names_the_signal(code, expected):
    assert run_figures.exit_code(code) == expected


@pytest.mark.parametrize(
    ("state", "step", "expected"),
    [
        (1200, 1240, "steps 1,201 to 1,240 will be trained again"),
        (0, 1, "step 1 will be trained again"),
        (5, 5, "it has trained nothing since its newest saved state"),
    ],
)
def test_what_is_lost_is_told_in_steps(state, step, expected):
    assert run_figures.trained_again(SimpleNamespace(step=step), state) == expected
