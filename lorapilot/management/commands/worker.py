"""`manage.py worker`: another machine that trains, or the training side of a split installation."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management import BaseCommand
from django.db import connections

from lorapilot.children import Family, adopt_orphans
from lorapilot.management import platform


class Command(BaseCommand):
    help = "Train on this machine for a web side that runs elsewhere, with the same database and workspace folder."

    def handle(self, *_: Any, **__: Any) -> None:
        lock = platform.take_role(settings.HOST_NAME)
        adopt_orphans()
        platform.wait_for_migrations()
        housekeeper, clusters = platform.start_training_side()
        platform.say(f"This machine trains as {settings.HOST_NAME}. Logs: {settings.WORKSPACE / 'logs'}")
        connections.close_all()
        Family(clusters, say=platform.say, grace_seconds=platform.GRACE_SECONDS).run()
        housekeeper.end()
        lock.close()
        platform.say("Stopped.")
