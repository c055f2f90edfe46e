"""Settings from the environment: typed, and loud when a value cannot be read.

`.env` beside `manage.py` is read first; a variable that is already set wins over it.
"""

from __future__ import annotations

import os
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured
from dotenv import load_dotenv

BASE_DIR = Path(__file__).resolve().parent.parent
load_dotenv(os.environ.get("LORAPILOT_ENV_FILE", BASE_DIR / ".env"))

TRUE = {"1", "true", "yes", "on"}
FALSE = {"0", "false", "no", "off", ""}


def text(name: str, default: str = "") -> str:
    return os.environ.get(name, default).strip()


def flag(name: str, *, default: bool) -> bool:
    value = text(name, str(default)).lower()
    if value in TRUE | FALSE:
        return value in TRUE
    raise ImproperlyConfigured(f"{name}={value!r} is neither true nor false. Use 1 or 0.")


def number(name: str, default: int, *, least: int = 0) -> int:
    value = text(name) or str(default)
    try:
        result = int(value)
    except ValueError:
        raise ImproperlyConfigured(f"{name}={value!r} is not a whole number.") from None
    if result < least:
        raise ImproperlyConfigured(f"{name}={result} is too small: the least is {least}.")
    return result


def words(name: str, default: str = "") -> list[str]:
    """A comma-separated list, empty items left out."""
    return [word.strip() for word in text(name, default).split(",") if word.strip()]


def path(name: str, default: Path) -> Path:
    value = text(name)
    return (Path(value).expanduser() if value else default).resolve()
