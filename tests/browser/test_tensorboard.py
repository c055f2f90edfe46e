"""The real TensorBoard in the real server: a loss curve in a browser, and what passes without one."""

import contextlib
import math
import re

import psutil
import pytest
import requests

from tests.browser.conftest import PASSWORDS
from tests.serving.conftest import wait_until
from tests.tfevents import write_events

TIME_SERIES = "experiment/defaultExperimentId/data/plugin/timeseries/timeSeries"
# What the browser says about the sandbox is no violation: neither frame can be navigated out of it.
KNOWN = re.compile(r"allow-scripts and allow-same-origin|Multiple instances of Three\.js")


@pytest.fixture(scope="module")
def board(live_platform):
    """The address of TensorBoard; two of Alice's runs have written events."""
    outputs = live_platform.log.parents[2]
    for name in ("sks-face", "sks-face-first-try"):
        write_events(outputs / name / "tensorboard", [math.exp(-step / 20) for step in range(60)])
    return f"{live_platform.address}/tensorboard/"


@pytest.fixture(scope="module")
def alice(live_platform):
    """A signed-in client that is no browser."""
    session = requests.Session()
    address = f"{live_platform.address}/accounts/login/"
    session.get(address)
    form = {"login": "alice", "password": PASSWORDS["alice"], "csrfmiddlewaretoken": session.cookies["csrftoken"]}
    assert session.post(address, form, headers={"Referer": address}).url.endswith("/runs/")
    yield session
    session.close()


def boards_of(live_platform):
    """The TensorBoard processes of the server."""
    children = psutil.Process(live_platform.process.pid).children()
    return [child for child in children if "serve.py" in " ".join(child.cmdline())]


def test_real_tensorboard_answers_through_the_server(board, alice, live_platform):
    page = alice.get(f"{board}app/")
    assert "<title>TensorBoard</title>" in page.text
    assert "/font-roboto" not in page.text
    assert re.search(r"url\(font-roboto/[\w-]+\.woff2", page.text)
    assert page.headers["Content-Security-Policy"].count("script-src") == 1
    assert alice.get(f"{board}app/data/runs").json() == ["sks-face", "sks-face-first-try"]
    script = alice.get(f"{board}app/index.js")
    assert len(script.content) > 5_000_000
    assert script.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert alice.get(f"{board}app/data/environment").json()["data_location"] == "logs"
    assert live_platform.address not in page.text
    [process] = boards_of(live_platform)
    assert process.net_connections("inet") == []


def test_real_tensorboard_loads_no_other_plugins(board, alice):
    listed = alice.get(f"{board}app/data/plugins_listing").json()
    assert sorted(listed) == [
        "custom_scalars", "distributions", "histograms", "hparams", "images", "scalars", "text", "timeseries",
    ]  # fmt: skip


def test_real_tensorboard_answers_the_questions_of_its_page(board, alice, live_platform):
    question = {"requests": (None, '[{"plugin": "scalars", "tag": "loss/train"}]')}
    own = {"Origin": live_platform.address}
    [answer] = alice.post(f"{board}app/{TIME_SERIES}", files=question, headers=own).json()
    points = answer["runToSeries"]["sks-face"]
    assert [points[0]["step"], points[-1]["step"], points[-1]["value"]] == [1, 60, pytest.approx(math.exp(-59 / 20))]
    assert alice.post(f"{board}app/{TIME_SERIES}", files=question).status_code == 403


def test_real_tensorboard_dies_with_the_server(board, alice, live_platform):
    alice.get(f"{board}app/")
    [process] = boards_of(live_platform)
    live_platform.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    live_platform.start()
    with contextlib.suppress(requests.ConnectionError):  # the connection that the old server kept
        alice.get(f"{board}app/")
    assert alice.get(f"{board}app/data/runs").json() == ["sks-face", "sks-face-first-try"]
    assert len(boards_of(live_platform)) == 1


def test_link_of_a_run_shows_its_loss_curve_without_a_complaint(board, browser_of, live_platform):
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/runs/{live_platform.rows['live']}/")
    page.click("text=Open in TensorBoard")
    frame = page.frame_locator("iframe")
    frame.get_by_text("loss/train").first.wait_for(timeout=30_000)
    frame.locator("line-chart canvas, line-chart svg path").first.wait_for()
    assert frame.get_by_text("sks-face", exact=True).count() >= 1
    assert frame.get_by_text("sks-face-first-try").count() == 0
    frame.get_by_role("tab", name="Scalars").click()
    frame.get_by_text("tag: loss/train").first.wait_for()
    assert [complaint for complaint in page.complaints if not KNOWN.search(complaint)] == []


def test_scripts_in_tensorboard_reach_nothing_else_and_people_can_sign_out(board, chromium, live_platform):
    context = chromium.new_context()  # a session of its own, which ends here
    page = context.new_page()
    page.goto(board)
    page.fill("[name=login]", "alice")
    page.fill("[name=password]", PASSWORDS["alice"])
    page.click("main button")
    page.frame_locator("iframe").get_by_text("loss/train").first.wait_for(timeout=30_000)
    [_, frame] = page.frames
    reached = frame.evaluate(
        """async () => {
          const ask = (from) => from.fetch('/api/v1/me/').then((answer) => answer.status, (error) => error.name);
          const inline = document.createElement('script');
          inline.textContent = 'window.ranInline = true';
          document.body.append(inline);
          return {own: await ask(window), parent: await ask(parent), popup: parent.open('/runs/'),
                  inline: window.ranInline === true, board: (await fetch('data/runs')).status};
        }"""
    )
    assert reached == {"own": "TypeError", "parent": "TypeError", "popup": None, "inline": False, "board": 200}
    page.click("#account-menu summary")
    page.click("text=Sign out")
    page.wait_for_url("**/accounts/login/**")
    context.close()


def test_person_without_runs_is_told_so(browser_of, board):
    page = browser_of("bob")
    page.goto(board)
    assert page.locator("h1").inner_text() == "TensorBoard has nothing to show yet"
    assert page.locator("iframe").count() == 0
    assert page.complaints == []
