"""What can be told about the database: which one it is, and whether its tables are those of this code."""

from __future__ import annotations

from pathlib import Path

from django.db import connection
from django.db.migrations.executor import MigrationExecutor

NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


def is_missing() -> bool:
    """An SQLite database before the first start. To connect to it would make an empty file."""
    name = str(connection.settings_dict["NAME"])
    return connection.vendor == "sqlite" and not name.startswith("file:") and not Path(name).exists()


def describe() -> str:
    """Kind and version, as in `PostgreSQL 16.2`. Raises django.db.Error when it does not answer."""
    connection.ensure_connection()
    version = ".".join(map(str, connection.get_database_version()))
    return f"{NAMES.get(connection.vendor, connection.vendor)} {version}"


def unapplied_migrations() -> int:
    """How many steps of `manage.py migrate` are to be made. Raises django.db.Error when it does not answer."""
    executor = MigrationExecutor(connection)
    return len(executor.migration_plan(executor.loader.graph.leaf_nodes()))
