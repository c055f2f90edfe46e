"""A real browser against a real server: chromium, the platform's own server process, SQLite and files in a folder of
the test's own. Static files are collected as in an installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PASSWORDS = {"alice": "alice-password", "bob": "bob-password"}


@pytest.fixture(scope="module")  # its event loop would refuse the database to modules that come after
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        reason = "No Chromium here: install the package `chromium` to run the browser tests."
        if os.environ.get("LORAPILOT_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Platform:
    """The server under test: it can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"} | {
            "LORAPILOT_WORKSPACE": str(folder / "workspace"),
            "STATIC_ROOT": str(folder / "static"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self.output = (folder / "server.log").open("ab")
        self.port = 0
        self.sessions: dict[str, object] = {}  # cookies of those who have signed in, by name
        self.process: subprocess.Popen[bytes] | None = None
        self.run("manage.py", "migrate", "--verbosity=0")
        self.run("manage.py", "collectstatic", "--noinput", "--verbosity=0")
        self.rows = json.loads(self.run(str(HERE / "rows.py")))
        self.log = Path(self.rows["log"])

    def run(self, *arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        command = [sys.executable, "-m", "lorapilot.server", "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=self.output
        )
        line = self.process.stdout.readline().decode()
        self.port = int(re.fullmatch(r"Listening on http://127\.0\.0\.1:(\d+)\n", line)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def live_platform(tmp_path_factory):
    platform = Platform(tmp_path_factory.mktemp("platform"))
    platform.start()
    yield platform
    platform.kill()
    platform.output.close()


@pytest.fixture
def browser_of(chromium, live_platform):
    """browser_of("alice"): a page in which Alice is signed in. `page.complaints` collects what the browser complains
    of: script errors, failed resources, violations of the Content-Security-Policy. She signs in once for all tests."""
    contexts = []

    def signed_in(name, *, width=1280, height=900, theme="light"):
        known = live_platform.sessions.get(name)
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, storage_state=known
        )
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: _note(page, message))
        page.on("pageerror", lambda error: page.complaints.append(f"{page.url}: {error}"))
        if known:
            page.goto(f"{live_platform.address}/runs/")
        elif name:
            _sign_in(page, live_platform, name)
            live_platform.sessions[name] = context.storage_state()
        return page

    yield signed_in
    for context in contexts:
        context.close()


def _sign_in(page, live_platform, name):
    page.goto(f"{live_platform.address}/accounts/login/")
    page.fill("[name=login]", name)
    page.fill("[name=password]", PASSWORDS[name])
    page.click("main button")
    page.wait_for_url("**/runs/")


def _note(page, message):
    if message.type in ("error", "warning"):
        page.complaints.append(f"{page.url}: {message.text}")
