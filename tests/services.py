"""Servers that some tests need: skipped with the reason, or failed with LORAPILOT_REQUIRE_SERVICES=1, without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432")


def lack(reason: str) -> None:
    """Skip this test, or fail it where the server has to be there."""
    if os.environ.get("LORAPILOT_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def postgres_url(name: str) -> Iterator[str]:
    """The address of an empty database, dropped afterwards."""
    try:
        server = psycopg.connect(f"{POSTGRES}/postgres", autocommit=True, connect_timeout=5)
    except psycopg.OperationalError:
        lack("No PostgreSQL at TEST_POSTGRES_URL (default postgres@127.0.0.1:5432).")
    with server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield f"{POSTGRES}/{name}"
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
