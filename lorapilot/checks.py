"""System checks: settings and packages that would fail later, and worse.

`manage.py check` shows them; `manage.py up` runs them before it starts anything.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import django.contrib.admin
from django.conf import settings
from django.contrib.staticfiles import finders
from django.core.checks import CheckMessage, Error, Warning, register  # noqa: A004 Django's name for it
from django.template.loader import get_template

from lorapilot.workspace import is_safe_name

# lorapilot/server.py and lorapilot/cluster.py build on their internals.
PINNED = {"daphne": "4.2.3", "Twisted": "26.10.0", "autobahn": "26.10.2", "django-q2": "1.11.1"}
# What docs/decisions and the tests of supervision rest on.
QUEUE = {
    "orm": "default",
    "max_attempts": 1,
    "ack_failures": True,
    "catch_up": False,
    "poll": 0.2,
    "queue_limit": 1,
    "save_limit": -1,
    "scheduler": False,
}
SLICE_SECONDS = 20
DAY_SECONDS = 86_400
SCRIPTS = ("django_htmx/htmx-2.min.js", "unfold/js/chart/chart.js")
ADMIN_FILES = ("admin/css/base.css", "admin/js/core.js")
ADMIN_HOME = Path(django.contrib.admin.__file__).parent
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
ROLE_NAMES = {"io", "web"}  # of the second cluster and of the web side's lock


@register
def check_pinned_packages(**_: Any) -> list[CheckMessage]:
    """Versions whose internals our server and cluster know."""
    return [
        Error(
            f"{name} is {installed or 'not installed'}; the server is built and tested with {wanted}.",
            hint="pip install -r requirements.txt",
            id="lorapilot.E001",
        )
        for name, wanted in PINNED.items()
        if (installed := _installed(name)) != wanted
    ]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@register
def check_queue(**_: Any) -> list[CheckMessage]:
    """Q_CLUSTER in the shape in which no run starts twice and none is lost."""
    host: dict[str, Any] = settings.Q_CLUSTER
    io: dict[str, Any] = host | host.get("ALT_CLUSTERS", {}).get("io", {})
    wrong = [f"{key} must be {value!r}" for key, value in QUEUE.items() if host.get(key) != value]
    wrong += [f"io's {key} must be {value!r}" for key, value in QUEUE.items() if io.get(key) != value]
    if not 2 * SLICE_SECONDS < host["timeout"] < host["retry"]:
        wrong.append(f"timeout must be above {2 * SLICE_SECONDS} (twice a slice), and retry above timeout")
    if host["workers"] < len(settings.SLOT_LAYOUT) + 2:
        wrong.append("workers must be two more than slots (LORAPILOT_WORKERS, LORAPILOT_SLOTS)")
    if "io" not in host.get("ALT_CLUSTERS", {}):
        wrong.append("ALT_CLUSTERS must have io")
    elif not io["timeout"] < io["retry"] or io["retry"] < DAY_SECONDS:
        wrong.append("io's retry must be a day, and above its timeout")
    hint = "`retry` is a lease that begins at delivery: docs/operations.md, “The task queue”."
    return [Error(f"Q_CLUSTER: {what}.", hint=hint, id="lorapilot.E002") for what in wrong]


@register
def check_database(**_: Any) -> list[CheckMessage]:
    """SQLite as measured: without these options every seventh write under load fails with `database is locked`."""
    database = settings.DATABASES["default"]
    if database["ENGINE"] != "django.db.backends.sqlite3":
        return []
    options = database.get("OPTIONS", {})
    is_tuned = (
        options.get("timeout", 0) >= 20
        and options.get("transaction_mode") == "IMMEDIATE"
        and "journal_mode=WAL" in options.get("init_command", "")
        and "synchronous=NORMAL" in options.get("init_command", "")
    )
    if is_tuned and not database.get("ATOMIC_REQUESTS"):
        return []
    hint = "timeout 20, transaction_mode IMMEDIATE, WAL, synchronous NORMAL; no ATOMIC_REQUESTS. Or use PostgreSQL."
    return [Error("SQLite is not set up for several processes that write.", hint=hint, id="lorapilot.E003")]


@register
def check_static_files(**_: Any) -> list[CheckMessage]:
    """The scripts that pages load from packages, and the stock admin."""
    found: list[CheckMessage] = [
        Error(f"The static file {name} is missing.", hint="pip install -r requirements.txt", id="lorapilot.E004")
        for name in SCRIPTS
        if finders.find(name) is None
    ]
    origins = {name: finders.find(name) for name in ADMIN_FILES}
    origins["admin/base.html"] = get_template("admin/base.html").origin.name  # type: ignore[attr-defined]  # Django's
    return found + [
        Error(
            f"{name} of the admin is not Django's own but {origin}.",
            hint="List django.contrib.admin before apps that bring an admin theme (unfold).",
            id="lorapilot.E005",
        )
        for name, origin in origins.items()
        if origin is None or not Path(origin).is_relative_to(ADMIN_HOME)
    ]


@register
def check_names(**_: Any) -> list[CheckMessage]:
    """A host's name is the name of its cluster, of a lock file and of a row."""
    found: list[CheckMessage] = []
    if settings.HOST_NAME in ROLE_NAMES or not is_safe_name(settings.HOST_NAME):
        hint = "Set LORAPILOT_HOST_NAME to letters, digits, dots and dashes; `io` and `web` are taken."
        found.append(
            Error(f"{settings.HOST_NAME!r} cannot be the name of a training host.", hint=hint, id="lorapilot.E006")
        )
    numbers = [number for slot in settings.SLOT_LAYOUT for number in slot.split("+")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        hint = "Each GPU once, by its number in nvidia-smi; `+` joins those that train together: 0,1,2+3"
        found.append(Error("LORAPILOT_SLOTS cannot be read.", hint=hint, id="lorapilot.E008"))
    if settings.X_ACCEL_PREFIX and not settings.X_ACCEL_PREFIX.startswith("/"):
        hint = "It is the path of nginx's internal location, such as /files."
        found.append(Error("X_ACCEL_PREFIX does not start with a slash.", hint=hint, id="lorapilot.E007"))
    return found


@register
def check_exposure(**_: Any) -> list[CheckMessage]:
    """What is fine on a laptop and not on a network."""
    is_public = settings.WEB_HOST not in LOCAL_NAMES | {"::1"}
    rules = [
        (
            len(settings.SECRET_KEY) < 50 or len(set(settings.SECRET_KEY)) < 5,
            "SECRET_KEY is short or simple: sessions could be forged.",
            "Leave it unset, and a long one is made and kept in the workspace.",
            "lorapilot.W001",
        ),
        (
            "*" in settings.ALLOWED_HOSTS,
            "ALLOWED_HOSTS lets every name in: another site can point its own at this one.",
            "Name the addresses under which people open LoRA Pilot.",
            "lorapilot.W002",
        ),
        (
            is_public and set(settings.ALLOWED_HOSTS) <= LOCAL_NAMES,
            f"LoRA Pilot listens on {settings.WEB_HOST}, but lets only this machine in: others get “Bad Request”.",
            "Add the name or address under which people open it to ALLOWED_HOSTS.",
            "lorapilot.W003",
        ),
        (
            is_public and settings.DEBUG,
            f"DEBUG shows settings and code to everybody who reaches {settings.WEB_HOST}.",
            "Unset DEBUG.",
            "lorapilot.W004",
        ),
        (
            settings.BEHIND_HTTPS and not settings.TRUSTED_PROXIES,
            "Behind a proxy every client seems to have the proxy's address: they share one limit of requests.",
            "Set TRUSTED_PROXIES to the number of proxies that add to X-Forwarded-For, usually 1.",
            "lorapilot.W005",
        ),
    ]
    return [Warning(message, hint=hint, id=id_) for is_wrong, message, hint, id_ in rules if is_wrong]
