"""TensorBoard behind our sign-in: what each person's one shows, when it lives, and what passes the proxy.

The process here is a small stand-in that tells what it was asked; tests/browser/test_tensorboard.py has the real one.
"""

import json
import os
import signal
import textwrap

import psutil
import pytest
from django.test import AsyncClient
from django.urls import reverse

from lorapilot import workspace
from lorapilot.models import User
from runs.models import Run
from runs.tensorboard import sources, viewers
from runs.tensorboard.viewers import Viewers
from tests.factories import make_run
from tests.tfevents import write_events

STAND_IN = textwrap.dedent(
    """
    import json, os, socket, socketserver, sys
    from http.server import BaseHTTPRequestHandler
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith("/ends"):
                os._exit(1)
            sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
            told = {"method": self.command, "target": self.path, "headers": dict(self.headers), "sent": sent}
            told |= {"pid": os.getpid(), "environment": dict(os.environ), "logs": sorted(os.listdir(sys.argv[1]))}
            content = b"" if self.command == "HEAD" else json.dumps(told).encode()
            self.send_response(203)
            for name, value in {"Content-Type": "application/json", "Set-Cookie": "sessionid=stolen", "X-Own": "1",
                                "Connection": "close", "Content-Security-Policy": "default-src *"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        do_HEAD = do_POST = do_GET
        def log_message(self, *_):
            pass
    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True
        def get_request(self):
            return self.socket.accept()[0], ("unix", 0)
    server = Server(("", 0), Answer, bind_and_activate=False)
    server.socket = socket.socket(fileno=int(sys.argv[2]))
    server.serve_forever()
    """
)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def boards(workspace, tmp_path, monkeypatch, clock):
    """The viewers of this test's own, with the stand-in."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    found = Viewers(program=program, clock=clock)
    monkeypatch.setattr(viewers, "VIEWERS", found)
    yield found
    found.stop_all()


def run_with_events(owner, name, *, below="tensorboard", **values):
    run = make_run(owner, output_name=name)
    Run.objects.filter(pk=run.pk).update(**values)
    write_events(run.folder / below, [0.5, 0.25])
    return run


def names(user):
    return [source.run.output_name for source in sources.runs_with_events(user)]


# --- What is shown ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "found"),
    [
        ([], []),
        (["tensorboard"], ["tensorboard"]),
        ([""], [""]),
        (["logs/20260102120000", "logs/20260101120000"], ["logs/20260101120000", "logs/20260102120000"]),
        (["logs/network_train/1"], ["logs/network_train/1"]),
        (["logs", "logs/of_one_setting"], ["logs"]),
        (["much/too/far/below"], []),
    ],
)
def test_event_folders_are_found_wherever_the_trainer_writes_them(workspace, alice, written, found):
    run = make_run(alice)
    for folder in written:
        write_events(run.folder / folder, [1.0])
    (run.folder / "samples").mkdir(parents=True)
    (run.folder / "samples" / "000001-0.png").touch()
    assert sources.event_folders(run) == [run.folder / folder for folder in found]


def test_runs_with_events_are_those_that_a_user_may_see(workspace, alice, bob, charlie, staff, team):
    make_run(alice, output_name="silent")
    run_with_events(alice, "own")
    run_with_events(alice, "shared").groups.add(team)
    assert names(alice) == ["shared", "own"]
    assert names(bob) == ["shared"]
    assert names(charlie) == []
    assert names(staff) == ["shared", "own"]


def test_sources_tell_for_each_trainer_what_there_is(workspace, alice, charlie):
    run_with_events(alice, "guided", profile="regular")
    run_with_events(alice, "old", stack="kohya", below="logs/1")
    run_with_events(alice, "new", stack="kohya", below="logs/1")
    kohya = {"ready": True, "path": "outputs/new/logs/1", "reason": ""}
    guided = {"ready": True, "path": "outputs/guided/tensorboard", "reason": ""}
    empty = {"ready": False, "path": ""}
    assert sources.tensorboard_sources(alice) == {
        "trainpilot": guided,
        "kohya": kohya,
        "ai-toolkit": empty | {"reason": "No AI Toolkit run of yours has written TensorBoard events yet."},
        "diffpipe": empty | {"reason": "No Diffusion Pipe run of yours has written TensorBoard events yet."},
    }
    assert [source["ready"] for source in sources.tensorboard_sources(charlie).values()] == [False] * 4


def test_links_follow_what_the_user_may_see(workspace, alice, bob, team, tmp_path):
    run = run_with_events(alice, "one", below="logs/1")
    write_events(run.folder / "logs" / "2", [1.0])
    shared = run_with_events(alice, "two.b")
    shared.groups.add(team)
    logs = tmp_path / "logs"
    logs.mkdir()
    assert sources.link_runs(alice, logs) is False
    assert {link.name: link.readlink() for link in logs.iterdir()} == {
        "one": run.folder / "logs" / "1",
        "one~2": run.folder / "logs" / "2",
        "two.b": shared.folder / "tensorboard",
    }
    assert sources.link_runs(bob, logs) is True
    assert [link.name for link in logs.iterdir()] == ["two.b"]
    shared.groups.clear()
    assert sources.link_runs(bob, logs) is True
    assert list(logs.iterdir()) == []
    assert (shared.folder / "tensorboard" / "events.out.tfevents.1.host.1.0").exists()


# --- The page and the API ---------------------------------------------------------------------------------------------
def test_page_says_that_there_is_nothing_yet(workspace, alice, charlie, client_of):
    run_with_events(alice, "own")
    page = client_of(charlie).get("/tensorboard/")
    assert page.status_code == 200
    assert "None of your runs has written TensorBoard events yet. They appear with the first logged step." in (
        page.content.decode()
    )
    assert "<iframe" not in page.content.decode()


def test_page_has_the_readers_tensorboard_in_a_frame(workspace, alice, client_of):
    run_with_events(alice, "own")
    page = client_of(alice).get("/tensorboard/")
    assert 'src="/tensorboard/app/#timeseries" title="TensorBoard, 1 run"' in page.content.decode()
    policy = directives(page)
    assert policy["connect-src"] == "'none'"
    assert policy["frame-src"] == "testserver/tensorboard/app/"
    assert policy["form-action"] == "testserver/accounts/logout/"
    assert policy["sandbox"] == "allow-scripts allow-same-origin allow-forms allow-downloads"


def test_page_of_one_run_filters_by_its_name(workspace, alice, client_of):
    run_with_events(alice, "own-1.5")
    page = client_of(alice).get("/tensorboard/?run=own-1.5").content.decode()
    assert 'src="/tensorboard/app/?runFilter=%5Eown-1%5B.%5D5%28~%7C%24%29#timeseries"' in page


@pytest.mark.parametrize("name", ["silent", "strangers", '"><script>'])
def test_page_of_a_run_without_events_shows_the_others(workspace, alice, charlie, client_of, name):
    make_run(alice, output_name="silent")
    run_with_events(alice, "own")
    run_with_events(charlie, "strangers")
    page = client_of(alice).get("/tensorboard/", {"run": name}).content.decode()
    assert 'src="/tensorboard/app/#timeseries"' in page
    assert "has written no TensorBoard events yet: these are your other runs." in page
    assert "<script>" not in page


def test_page_costs_the_same_queries_for_many_runs(workspace, alice, client_of, django_assert_num_queries):
    browser = client_of(alice)
    run_with_events(alice, "one")
    browser.get("/tensorboard/")
    with django_assert_num_queries(3):  # session, user, runs
        browser.get("/tensorboard/")
    run_with_events(alice, "two")
    run_with_events(alice, "three")
    with django_assert_num_queries(3):
        browser.get("/tensorboard/")


def test_page_and_frame_send_strangers_to_sign_in(db, client, boards):
    for address in ("/tensorboard/", "/tensorboard/app/", "/tensorboard/app/index.js"):
        response = client.get(address)
        assert (response.status_code, response.url) == (302, f"/accounts/login/?next={address}")
    assert boards._viewers == {}


def test_page_refuses_other_methods(workspace, alice, client_of):
    assert client_of(alice).post("/tensorboard/").status_code == 405


def test_pages_of_runs_lead_to_tensorboard(workspace, alice, client_of):
    run = make_run(alice, output_name="own")
    assert 'href="/tensorboard/?run=own"' in client_of(alice).get(f"/runs/{run.pk}/").content.decode()
    assert 'href="/tensorboard/"' in client_of(alice).get("/runs/").content.decode()


def test_api_tells_what_there_is_to_see(boards, alice, charlie, api_of):
    run_with_events(alice, "own")
    address = "/api/v1/tensorboard/status/"
    assert api_of(alice, "read").get(address).json() == {"running": False, "runs": 1, "reason": ""}
    assert api_of(charlie).get(address).json() == {"running": False, "runs": 0, "reason": sources.NOTHING}
    assert api_of(alice).post(address).status_code == 405


def test_api_wants_a_token(db, client):
    assert client.get("/api/v1/tensorboard/status/").status_code == 401


# --- What passes the proxy --------------------------------------------------------------------------------------------
def directives(response):
    return dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))


async def asked(user, path="", *, method="GET", **options):
    """The response, and what the stand-in told in it."""
    client = AsyncClient()
    await client.aforce_login(user)
    response = await client.generic(method, f"/tensorboard/app/{path}", **options)
    content = b"".join([part async for part in response]) if response.streaming else response.content
    response.close()
    return response, json.loads(content) if response.streaming else content


transactional = pytest.mark.django_db(transaction=True)


@transactional
async def test_question_and_answer_pass_with_named_headers_only(boards, alice):
    headers = {"Authorization": "Token lp_secret", "Accept-Encoding": "gzip", "X-Forwarded-For": "1.2.3.4"}
    response, told = await asked(alice, "data/a run/%3F?tag=a%26b&n=1", headers=headers)
    assert (told["method"], told["target"]) == ("GET", "/tensorboard/app/data/a%20run/%3F?tag=a%26b&n=1")
    assert told["headers"] == {"Accept-Encoding": "gzip", "Host": "tensorboard", "Content-Length": "0"}
    assert response.status_code == 203
    assert response.headers["Content-Type"] == "application/json"
    assert {"Set-Cookie", "X-Own", "Connection"} & set(response.headers) == set()
    assert list(response.cookies) == []
    assert told["environment"].keys() - {"LC_CTYPE"} == {"LANG", "PYTHONDONTWRITEBYTECODE"}


@transactional
async def test_line_break_in_an_address_is_not_passed(boards, alice):
    assert (await asked(alice, "data/runs%0d%0aX-Own:%20yes"))[0].status_code == 404


@transactional
async def test_frame_has_a_policy_of_its_own(boards, alice):
    response, _ = await asked(alice)
    assert response.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert directives(response) == {
        "default-src": "'none'",
        "script-src": "testserver/tensorboard/app/index.js",
        "worker-src": "testserver/tensorboard/app/chart_worker.js",
        "style-src": "'unsafe-inline'",
        "connect-src": "testserver/tensorboard/app/",
        "font-src": "testserver/tensorboard/app/ data:",
        "img-src": "testserver/tensorboard/app/ data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'self'",
        "sandbox": "allow-scripts allow-same-origin allow-downloads",
    }


@transactional
async def test_head_has_no_body(boards, alice):
    response, told = await asked(alice, method="HEAD")
    assert (response.status_code, told) == (203, b"")


@transactional
@pytest.mark.parametrize(
    "path",
    [
        "experiment/defaultExperimentId/data/plugin/timeseries/timeSeries",
        "data/plugin/scalars/scalars_multirun",
        "experiment/defaultExperimentId/data/plugin/hparams/session_groups",
    ],
)
async def test_question_by_post_passes_from_our_own_page(boards, alice, path):
    _, told = await asked(alice, path, method="POST", data=b"tag=loss", headers={"Origin": "http://testserver"})
    assert (told["method"], told["sent"]) == ("POST", "tag=loss")


@transactional
async def test_trusted_origins_are_our_own_address_too(boards, alice, settings):
    settings.CSRF_TRUSTED_ORIGINS = ["https://lora.example.org:8443"]
    headers = {"Origin": "https://lora.example.org:8443"}
    response, told = await asked(alice, "data/plugin/scalars/scalars_multirun", method="POST", headers=headers)
    assert told["method"] == "POST"
    connect = "testserver/tensorboard/app/ lora.example.org:8443/tensorboard/app/"
    assert directives(response)["connect-src"] == connect


@transactional
@pytest.mark.parametrize(
    ("path", "origin", "status"),
    [
        ("", "http://testserver", 405),
        ("data/runs", "http://testserver", 405),
        ("data/plugin/scalars/scalars_multirun/more", "http://testserver", 405),
        ("data/plugin/scalars/scalars_multirun", "http://evil.example", 403),
        ("data/plugin/scalars/scalars_multirun", "null", 403),
    ],
)
async def test_other_posts_are_refused(boards, alice, path, origin, status):
    response, _ = await asked(alice, path, method="POST", headers={"Origin": origin})
    assert response.status_code == status
    assert boards._viewers == {}


@transactional
async def test_put_is_refused(boards, alice):
    response, _ = await asked(alice, method="PUT")
    assert response.status_code == 405


@transactional
async def test_tensorboard_that_ends_is_one_sentence(boards, alice):
    response, content = await asked(alice, "ends")
    assert response.status_code == 502
    assert content.startswith(b"TensorBoard does not answer. Load the page again")


# --- When a process lives ---------------------------------------------------------------------------------------------
def test_prefix_of_the_program_is_the_address_of_the_frame():
    assert reverse("tensorboard:app") == f"{viewers.PREFIX}/"


@transactional
async def test_each_person_has_a_process_with_their_own_runs(boards, alice, bob, charlie, team, sync):
    await sync(lambda: run_with_events(alice, "own"))
    await sync(lambda: run_with_events(alice, "shared").groups.add(team))
    told = {user.username: (await asked(user))[1] for user in (alice, bob, charlie)}
    assert {name: one["logs"] for name, one in told.items()} == {
        "alice": ["own", "shared"],
        "bob": ["shared"],
        "charlie": [],
    }
    assert len({one["pid"] for one in told.values()}) == 3
    assert boards.is_running(alice)
    folder = workspace.cache() / "tensorboard" / str(alice.pk)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert psutil.Process(told["alice"]["pid"]).net_connections("inet") == []


@pytest.fixture
def sync():
    """The database from an async test."""
    from asgiref.sync import sync_to_async

    return lambda function: sync_to_async(function)()


@transactional
async def test_run_that_appears_is_linked_after_ten_seconds_or_with_a_page(boards, alice, clock, sync):
    first = (await asked(alice))[1]
    await sync(lambda: run_with_events(alice, "new"))
    clock.now += 9
    assert (await asked(alice, "data/runs"))[1]["logs"] == []
    clock.now += 1
    assert (await asked(alice, "data/runs"))[1]["logs"] == ["new"]
    await sync(lambda: run_with_events(alice, "newer"))
    last = (await asked(alice))[1]
    assert last["logs"] == ["new", "newer"]
    assert last["pid"] == first["pid"]


@transactional
async def test_run_that_is_taken_away_ends_the_process_that_has_read_it(boards, alice, bob, team, clock, sync):
    run = await sync(lambda: run_with_events(alice, "shared"))
    await sync(lambda: run.groups.add(team))
    first = (await asked(bob))[1]
    assert first["logs"] == ["shared"]
    await sync(run.groups.clear)
    clock.now += 10
    second = (await asked(bob, "data/runs"))[1]
    assert second["logs"] == []
    assert second["pid"] != first["pid"]
    assert not psutil.pid_exists(first["pid"])


@transactional
async def test_process_that_was_killed_starts_again_with_the_next_request(boards, alice):
    first = (await asked(alice))[1]["pid"]
    os.kill(first, signal.SIGKILL)
    boards._viewers[alice.pk].process.wait()
    second = (await asked(alice, "data/runs"))[1]["pid"]
    assert second != first
    assert boards.is_running(alice)


@transactional
async def test_process_without_requests_ends(boards, alice, bob, clock, monkeypatch):
    monkeypatch.setattr(viewers, "WATCH_SECONDS", 0.01)
    await asked(alice)
    clock.now += 1
    await asked(bob)
    clock.now += 599
    boards.stop_idle()
    assert (boards.is_running(alice), boards.is_running(bob)) == (False, True)
    clock.now += 1
    await boards._watch  # it looks by itself, and ends with the last one
    assert boards.is_running(bob) is False


@transactional
async def test_ninth_viewer_ends_the_one_used_least_recently(boards, alice, clock, sync):
    users = [await sync(lambda n=n: User.objects.create_user(f"viewer-{n}")) for n in range(9)]
    for user in users[:8]:
        await asked(user)
        clock.now += 1
    await asked(users[0], "data/runs")
    clock.now += 1
    await asked(users[8])
    assert [boards.is_running(user) for user in users] == [True, False, *[True] * 7]


@transactional
async def test_socket_works_in_a_workspace_that_lies_deep(boards, alice, settings, tmp_path):
    settings.WORKSPACE = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 6)
    settings.WORKSPACE.mkdir(parents=True)
    assert (await asked(alice))[0].status_code == 203
