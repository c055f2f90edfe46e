"""The services page, its API and the platform's logs: who sees what, and what is told of parts that are not well."""

import html
import re
import time
from datetime import timedelta

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone
from django_q.models import OrmQ

from lorapilot import database, service_logs
from runs import disk, parts, service_urls
from runs.dispatch import claim
from runs.enums import PartState, Status
from runs.models import Device, DeviceSample, Host, Run, Slot
from runs.stacks.installation import TRAINERS, Installation, Problem
from runs.transitions import change_status
from tests.factories import make_run, make_slot

HTMX = {"HX-Request": "true"}
PAGE, API = "/services/", "/api/v1/services/"
LONG_AGO = timezone.now() - timedelta(minutes=5)


def page(answer):
    """The text of a page, one space between words."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", answer.content.decode())))


def found(user, **given):
    return {part.name: part for part in parts.list_parts(user, **given)}


def told(part):
    return [problem.what for problem in part.problems]


def install(host, **installations):
    trainers = {key: Installation(looked_at=time.time()) for key in TRAINERS} | installations
    Host.objects.filter(pk=host.pk).update(trainers={key: one.as_json() for key, one in trainers.items()})


@pytest.fixture
def slot(workspace, db):
    """A host whose processes run, and which has measured."""
    slot = make_slot("gpu-1")
    running = {"gpu-1": time.time() - 90, "io": time.time() - 90}
    Host.objects.update(processes={"at": time.time(), "running": running})
    return slot


@pytest.fixture
def host(slot):
    return slot.host


@pytest.fixture
def run(slot, alice, team, handed_out):
    """Alice's, shared with Bob's team; it trains on the slot."""
    run = make_run(alice)
    run.groups.add(team)
    assert claim(run, slot)
    assert change_status(run, old=Status.STARTING, new=Status.RUNNING)
    return run


@pytest.fixture
def logs(workspace):
    folder = workspace / "logs"
    folder.mkdir()
    (folder / "web.log").write_text("first line\n<b>last</b> line\n")
    (folder / "io.log.1").write_text("old\n")
    (folder / "secret.txt").write_text("no log")
    (folder / "link.log").symlink_to(workspace / "secret_key")
    return folder


# --- Who may, and how -------------------------------------------------------------------------------------------------
def test_every_page_is_tested_here():
    assert {pattern.name for pattern in service_urls.urlpatterns} == {"list", "log", "download_log"}


def test_pages_ask_visitors_to_sign_in(db, client, logs):
    for address in (PAGE, f"{PAGE}logs/web.log/", f"{PAGE}logs/web.log/download/"):
        answer = client.get(address)
        assert (answer.status_code, answer.url) == (302, f"{reverse('account_login')}?next={address}")
    assert client.get(API).status_code == 401


def test_pages_refuse_the_wrong_method(staff, client_of, api_of, logs):
    browser = client_of(staff)
    addresses = (PAGE, f"{PAGE}logs/web.log/", f"{PAGE}logs/web.log/download/")
    assert {browser.post(address).status_code for address in addresses} == {405}
    assert {browser.delete(address).status_code for address in addresses} == {405}
    assert [api_of(staff).post(API).status_code, api_of(staff).delete(API).status_code] == [405, 405]


def test_page_refreshes_itself_with_the_list_alone(slot, charlie, client_of):
    browser = client_of(charlie)
    whole, part = browser.get(PAGE), browser.get(PAGE, headers=HTMX)
    assert ['hx-trigger="every 5s"' in whole.content.decode(), "<html" in part.content.decode()] == [True, False]
    assert all("Task queue" in page(answer) for answer in (whole, part))
    assert f'data-history="/api/v1/hosts/{slot.host.name}/history/"' in whole.content.decode()


def test_folders_commands_and_logs_are_for_staff(host, workspace, logs, charlie, staff, client_of, api_of):
    broken = Installation(
        home="/opt/sd", python="/opt/sd/p", error="/opt/x", problems=[Problem("Broken.", "mend /opt/sd")]
    )
    install(host, kohya=broken)
    for user, is_told in ((charlie, False), (staff, True)):
        shown, api = page(client_of(user).get(PAGE)), api_of(user).get(API)
        text = api.content.decode()
        assert ["Broken." in shown, "Broken." in text] == [True, True]
        for internal in ("/opt/sd", "/opt/x", str(workspace)):
            assert (internal in shown, internal in text) == (is_told, is_told), internal
        assert ("web.log" in shown, "web.log" in text) == (is_told, False)


def test_slot_names_its_run_only_to_those_who_may_see_it(run, slot, alice, bob, charlie, staff, client_of, api_of):
    shown = {user: page(client_of(user).get(PAGE)) for user in (alice, bob, charlie, staff)}
    assert ["It trains first." in text for text in shown.values()] == [True, True, False, True]
    assert "It trains a run of another user." in shown[charlie]
    ids = [
        next(part["run"] for part in api_of(user).get(API).json() if part["name"] == f"slot:{slot}")
        for user in (alice, charlie)
    ]
    assert ids == [run.pk, None]


def test_api_tells_what_the_page_shows(slot, alice, api_of):
    answer = {part["name"]: part for part in api_of(alice, "read").get(API).json()}
    assert list(answer) == [
        "web", "database", "broker", "io", "redis", "tensorboard", "disk", "worker:gpu-1", "slot:gpu-1/cpu",
        "builtin", "kohya", "ai_toolkit", "diffusion_pipe",
    ]  # fmt: skip
    assert answer["slot:gpu-1/cpu"] == {
        "name": "slot:gpu-1/cpu",
        "display": "gpu-1/cpu",
        "group": "Hosts and slots",
        "state": "ok",
        "summary": "Free.",
        "details": [],
        "problems": [],
        "run": None,
    }
    assert answer["kohya"]["state"] == "off"


def test_page_costs_the_same_with_more_hosts(run, alice, staff, client_of):
    browser = client_of(staff)

    def queries():
        with CaptureQueriesContext(connection) as captured:
            assert browser.get(PAGE).status_code == 200
        return len(captured)

    queries()
    before = queries()
    for name in ("second", "third"):
        assert claim(make_run(alice, output_name=name), make_slot(name))
        OrmQ.objects.create(key=name, payload="", lock=LONG_AGO)
    assert queries() == before


# --- What is told -----------------------------------------------------------------------------------------------------
def test_all_is_well(slot, staff):
    states = {name: part.state.value for name, part in found(staff).items() if part.group != parts.TRAINING}
    assert states == {
        "web": "ok", "database": "ok", "broker": "ok", "io": "ok", "redis": "off", "tensorboard": "ok", "disk": "ok",
        "worker:gpu-1": "ok", "slot:gpu-1/cpu": "ok",
    }  # fmt: skip


def test_installation_without_a_host_says_how_to_begin(workspace, staff, client_of):
    shown = found(staff)
    assert [shown[name].state for name in ("worker", "io")] == [PartState.DOWN, PartState.DOWN]
    assert shown["worker"].problems == [Problem("Nothing trains until a host runs.", "python manage.py up")]
    assert shown["kohya"].summary == "No host has told yet."
    assert "2 parts are down" in page(client_of(staff).get(PAGE))


def test_database_that_does_not_answer_is_down_and_the_rest_is_told(workspace, monkeypatch):
    def away():
        raise OperationalError("connection refused\nby db.example.org")

    monkeypatch.setattr(database, "describe", away)
    shown = found(Staff())
    assert (shown["database"].state, shown["database"].details[0].value) == (PartState.DOWN, "connection refused")
    assert list(shown) == [
        "web", "database", "redis", "tensorboard", "disk", "builtin", "kohya", "ai_toolkit", "diffusion_pipe"
    ]  # fmt: skip


class Staff:
    """Somebody at a terminal: in no database."""

    is_staff = True


def test_database_before_the_first_start_and_before_an_upgrade(workspace, staff, monkeypatch):
    monkeypatch.setattr(parts._Migrated, "is_known", False)
    monkeypatch.setattr(database, "unapplied_migrations", lambda: 2)
    part = found(staff)["database"]
    assert (part.state, part.problems) == (
        PartState.DOWN,
        [Problem("Its tables are not those of this version: 2 steps to go.", "python manage.py migrate")],
    )
    monkeypatch.setattr(database, "is_missing", lambda: True)
    part = found(staff)["database"]
    assert (part.state, told(part)) == (
        PartState.DOWN,
        ["LoRA Pilot has not been started yet: there is no database."],
    )


def test_sqlite_file_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setitem(connection.settings_dict, "NAME", tmp_path / "none.sqlite3")
    assert (database.is_missing(), list(tmp_path.iterdir())) == (connection.vendor == "sqlite", [])


def test_tasks_that_nobody_takes_are_told(slot, staff):
    now = timezone.now()
    OrmQ.objects.create(key="io", payload="", lock=now - timedelta(minutes=3))
    OrmQ.objects.create(key="gpu-1", payload="", lock=now - timedelta(seconds=1))
    OrmQ.objects.create(key="gpu-1", payload="", lock=now + timedelta(minutes=2))  # somebody works on it
    part = found(staff)["broker"]
    assert (part.state, part.summary) == (PartState.WARNING, "2 tasks wait, the oldest for 3 min.")
    assert told(part) == ["1 task waits for io, 3 min by now: nobody takes them."]


@pytest.mark.parametrize(
    ("change", "worker", "io", "slot_state"),
    [
        ({}, "ok", "ok", "ok"),
        ({"draining_at": LONG_AGO}, "warning", "ok", "off"),
        ({"lost_at": LONG_AGO, "heartbeat_at": LONG_AGO}, "down", "down", "off"),
        ({"lost_at": LONG_AGO, "dead_at": LONG_AGO}, "off", "down", "off"),
        ({"processes": {"at": time.time() + 3600, "running": {}}}, "ok", "ok", "ok"),  # not of now: nothing is known
        ({"processes": {}}, "ok", "ok", "ok"),
        ({"processes": "no io"}, "ok", "down", "ok"),
        ({"processes": "no worker"}, "down", "ok", "ok"),
    ],
)
def test_host_is_what_is_heard_of_it(slot, staff, change, worker, io, slot_state):
    running = {"no io": {"gpu-1": 1.0}, "no worker": {"io": 1.0}}
    if change.get("processes") in list(running):
        change = {"processes": {"at": time.time(), "running": running[change["processes"]]}}
    Host.objects.update(**change)
    shown = found(staff)
    assert [shown[name].state for name in ("worker:gpu-1", "io", "slot:gpu-1/cpu")] == [worker, io, slot_state]


def test_slot_tells_why_it_takes_no_run(slot, staff):
    Device.objects.all().delete()
    assert found(staff)["slot:gpu-1/cpu"].state == "warning"
    Slot.objects.update(is_enabled=False)
    part = found(staff)["slot:gpu-1/cpu"]
    assert (part.state, part.summary) == ("off", "Disabled: it takes no runs.")


def test_slot_of_a_lost_host_still_names_its_run(run, slot, staff):
    Host.objects.update(lost_at=LONG_AGO)
    part = found(staff)[f"slot:{slot}"]
    assert (part.state, part.summary, part.run) == ("warning", "It trains first.", run)


def test_host_tells_how_busy_its_devices_are(slot, staff):
    device = slot.devices.get()
    assert found(staff)["worker:gpu-1"].details[0].value == "no measurement of the last two minutes"
    DeviceSample.objects.create(device=device, at=LONG_AGO, utilisation=1)
    facts = {"utilisation": 87.4, "memory_used_bytes": 3 << 30, "temperature": 64, "power_watts": 412.5}
    DeviceSample.objects.create(device=device, at=timezone.now(), **facts)
    assert found(staff)["worker:gpu-1"].details[0].value == "87 % busy, 3.0\xa0GB in use, 64 °C, 412 W"


def test_full_disk_is_down(slot, staff, monkeypatch, settings):
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES - 1)
    assert found(staff)["disk"].state == PartState.DOWN


def test_redis_that_does_not_answer_is_a_warning(slot, staff, settings, unused_port):
    settings.REDIS_URL = f"redis://127.0.0.1:{unused_port}/0"
    assert found(staff)["redis"].state == PartState.WARNING


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# --- Trainers ---------------------------------------------------------------------------------------------------------
GOOD = Installation(
    home="/opt/sd", version="v0.10.1", commit="48d368fa" + "0" * 32, python_version="3.11.7", torch="2.6"
)
WARNED = Installation(home="/opt/sd", version="v0.9.9", problems=[Problem("Old.", "new", is_warning=True)])
BROKEN = Installation(home="/opt/sd", problems=[Problem("No PyTorch.", "pip")])


@pytest.mark.parametrize(
    ("installations", "state", "summary", "problems"),
    [
        ([Installation()], "off", "Not installed.", []),
        ([GOOD], "ok", "v0.10.1 (48d368fa), on h0.", []),
        ([WARNED], "warning", "v0.9.9, on h0.", ["Old."]),
        ([BROKEN], "down", "Installed: it cannot be used.", ["No PyTorch."]),
        ([GOOD, Installation()], "ok", "v0.10.1 (48d368fa), on h0.", []),
        ([GOOD, BROKEN], "warning", "v0.10.1 (48d368fa): it works on 1 of 2 hosts.", ["On h1: No PyTorch."]),
    ],
)  # fmt: skip
def test_trainer_is_told_over_all_hosts(workspace, staff, installations, state, summary, problems):
    for number, one in enumerate(installations):
        install(Host.objects.create(name=f"h{number}", heartbeat_at=timezone.now()), kohya=one)
    part = found(staff)["kohya"]
    assert (part.state, part.summary, told(part)) == (state, summary, problems)


def test_trainers_of_a_dead_host_do_not_count(host, staff):
    install(host, kohya=GOOD)
    Host.objects.update(dead_at=LONG_AGO)
    assert found(staff)["kohya"].summary == "No host has told yet."


# --- Logs -------------------------------------------------------------------------------------------------------------
def test_staff_read_and_download_logs(db, logs, staff, client_of):
    browser = client_of(staff)
    assert [log.name for log in service_logs.list_logs()] == ["io.log.1", "web.log"]
    assert "first line <b>last</b> line" in page(browser.get(f"{PAGE}logs/web.log/"))
    answer = browser.get(f"{PAGE}logs/web.log/download/")
    assert b"".join(answer) == (logs / "web.log").read_bytes()
    assert answer["Content-Disposition"] == 'attachment; filename="web.log"'
    (logs / "web.log").write_text("")
    assert "Nothing is in it yet." in page(browser.get(f"{PAGE}logs/web.log/"))


def test_logs_do_not_exist_for_others(logs, alice, client_of):
    browser = client_of(alice)
    addresses = (f"{PAGE}logs/web.log/", f"{PAGE}logs/web.log/download/")
    assert [browser.get(address).status_code for address in addresses] == [404, 404]


@pytest.mark.parametrize("name", ["secret.txt", "link.log", "none.log", "..", "%2e%2e%2fsecret_key", "..%2fweb.log"])
def test_name_that_is_not_listed_is_no_path(workspace, logs, staff, client_of, name):
    (workspace / "secret_key").write_text("key")
    browser = client_of(staff)
    addresses = (f"{PAGE}logs/{name}/", f"{PAGE}logs/{name}/download/")
    assert [browser.get(address).status_code for address in addresses] == [404, 404]


def test_long_log_is_read_from_its_end_by_pages_of_whole_lines(db, logs, staff, client_of, monkeypatch):
    monkeypatch.setattr(service_logs, "PAGE_BYTES", 25)
    lines = [f"line {number:03}\n" for number in range(7)]  # of 9 bytes
    (logs / "web.log").write_text("".join(lines))
    log = service_logs.get_log("web.log")
    pages, before = [], None
    while before != 0:
        excerpt = service_logs.read_before(log, before)
        pages.append(excerpt.text)
        before = excerpt.start
    assert pages == ["line 005\nline 006\n", "line 003\nline 004\n", "line 001\nline 002\n", "line 000\n"]
    shown = client_of(staff).get(f"{PAGE}logs/web.log/?before=45")
    assert ["line 004" in page(shown), "line 005" in page(shown)] == [True, False]
    assert 'href="?before=27"' in shown.content.decode()
    assert service_logs.read_before(log, 10**9).end == 63


def test_line_longer_than_a_page_is_cut(logs, monkeypatch):
    monkeypatch.setattr(service_logs, "PAGE_BYTES", 10)
    (logs / "web.log").write_text("x" * 25)
    assert service_logs.read_before(service_logs.get_log("web.log")) == service_logs.Excerpt(15, 25, "x" * 10)


@pytest.mark.parametrize("before", ["-1", "1.5", "x", "9" * 19])
def test_page_of_a_log_is_a_number_of_bytes(db, logs, staff, client_of, before):
    answer = client_of(staff).get(f"{PAGE}logs/web.log/", {"before": before})
    assert (answer.status_code, "whole number of bytes" in page(answer)) == (400, True)


def test_reading_changes_nothing(run, logs, staff, client_of, api_of):
    before = [list(table.objects.values()) for table in (Host, Slot, Run, DeviceSample)]
    for address in (PAGE, f"{PAGE}logs/web.log/"):
        client_of(staff).get(address)
    api_of(staff).get(API)
    assert [list(table.objects.values()) for table in (Host, Slot, Run, DeviceSample)] == before
