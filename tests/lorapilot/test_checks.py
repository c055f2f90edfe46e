"""Each check is silent for the settings as they are, and says its sentence for the combination that it is about."""

import copy
import re

import pytest
from django.conf import settings as project
from django.core.checks import run_checks

from lorapilot import checks

SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": "x", "OPTIONS": {"timeout": 20}}
LOCAL = {"WEB_HOST": "127.0.0.1", "DEBUG": False, "BEHIND_HTTPS": False}


def ids(found):
    return [message.id for message in found]


def test_settings_as_they_are_pass_every_check():
    assert [message for message in run_checks() if message.id.startswith("lorapilot.")] == []


def test_pinned_packages_are_those_of_requirements_txt():
    lines = (project.BASE_DIR / "requirements.txt").read_text().splitlines()
    required = dict(re.split("==", line) for line in lines if re.split("==", line)[0] in checks.PINNED)
    assert required == checks.PINNED


def test_other_version_of_the_server_is_an_error(monkeypatch):
    monkeypatch.setitem(checks.PINNED, "daphne", "1.0")
    monkeypatch.setitem(checks.PINNED, "not-a-package", "2.0")
    assert [error.msg for error in checks.check_pinned_packages()] == [
        f"daphne is {checks._installed('daphne')}; the server is built and tested with 1.0.",
        "not-a-package is not installed; the server is built and tested with 2.0.",
    ]


@pytest.mark.parametrize(
    ("cluster", "changes"),
    [
        ("host", {"max_attempts": 2}),
        ("host", {"orm": None}),
        ("host", {"timeout": 30}),
        ("host", {"retry": 120}),
        ("host", {"workers": 1}),
        ("host", {"ALT_CLUSTERS": {}}),
        ("io", {"retry": 3600, "timeout": 3000}),
        ("io", {"timeout": 90_000}),
        ("io", {"queue_limit": 9}),
    ],
)
def test_other_shape_of_the_queue_is_an_error(settings, cluster, changes):
    shape = copy.deepcopy(project.Q_CLUSTER)
    (shape if cluster == "host" else shape["ALT_CLUSTERS"]["io"]).update(changes)
    settings.Q_CLUSTER = shape
    assert set(ids(checks.check_queue())) == {"lorapilot.E002"}


def test_sqlite_without_its_options_is_an_error(monkeypatch):
    monkeypatch.setitem(project.DATABASES, "default", SQLITE)
    assert ids(checks.check_database()) == ["lorapilot.E003"]


def test_postgresql_needs_no_options(monkeypatch):
    monkeypatch.setitem(project.DATABASES, "default", {"ENGINE": "django.db.backends.postgresql", "NAME": "x"})
    assert checks.check_database() == []


def test_missing_script_is_an_error(monkeypatch):
    monkeypatch.setattr(checks, "SCRIPTS", ("nowhere/htmx.js",))
    assert ids(checks.check_static_files()) == ["lorapilot.E004"]


def test_admin_of_another_package_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "ADMIN_HOME", tmp_path)
    assert ids(checks.check_static_files()) == ["lorapilot.E005"] * 3


@pytest.mark.parametrize("name", ["io", "web", "a/b", "", "two words"])
def test_host_name_that_means_something_else_is_an_error(settings, name):
    settings.HOST_NAME = name
    assert ids(checks.check_names()) == ["lorapilot.E006"]


def test_accel_prefix_that_is_no_path_is_an_error(settings):
    settings.X_ACCEL_PREFIX = "files"
    assert ids(checks.check_names()) == ["lorapilot.E007"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"SECRET_KEY": "short"}, ["lorapilot.W001"]),
        ({"SECRET_KEY": "a" * 60}, ["lorapilot.W001"]),
        ({"ALLOWED_HOSTS": ["*"]}, ["lorapilot.W002"]),
        ({"WEB_HOST": "0.0.0.0"}, ["lorapilot.W003"]),
        ({"WEB_HOST": "0.0.0.0", "ALLOWED_HOSTS": ["lora.example.org"]}, []),
        ({"WEB_HOST": "0.0.0.0", "ALLOWED_HOSTS": ["lora.example.org"], "DEBUG": True}, ["lorapilot.W004"]),
        ({"BEHIND_HTTPS": True}, ["lorapilot.W005"]),
        ({"BEHIND_HTTPS": True, "TRUSTED_PROXIES": 1}, []),
    ],
)
def test_exposure_to_a_network_is_warned_of(settings, changes, expected):
    values = LOCAL | {"ALLOWED_HOSTS": ["localhost", "127.0.0.1"], "TRUSTED_PROXIES": 0} | changes
    for name, value in values.items():
        setattr(settings, name, value)
    assert ids(checks.check_exposure()) == expected


def test_every_message_says_what_to_do(settings):
    settings.HOST_NAME, settings.X_ACCEL_PREFIX = "io", "files"
    found = checks.check_names() + checks.check_exposure()
    assert [message.hint for message in found if not message.hint] == []
