"""`manage.py up`: the whole platform with one command."""

from __future__ import annotations

import os
import socket
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management import BaseCommand, CommandError, call_command
from django.db import connections

from lorapilot.children import Child, Family, adopt_orphans
from lorapilot.listening import address_of, listen
from lorapilot.management import platform
from lorapilot.models import User
from lorapilot.services import FIRST_ADMIN, create_first_admin
from models_registry.services import register_bundled_models

CANNOT_LISTEN = 69  # EX_UNAVAILABLE


class Command(BaseCommand):
    help = "Start LoRA Pilot: the web side and this machine's training. Ctrl-C stops it; training goes on."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default=settings.WEB_HOST, help="Address to listen on; 0.0.0.0: every network.")
        parser.add_argument("--port", type=int, default=settings.WEB_PORT, help="0: any free port.")
        parser.add_argument("--web-only", action="store_true", help="No training here; see `manage.py worker`.")

    def handle(self, *_: Any, **options: Any) -> None:
        is_web_only = options["web_only"]
        locks = [platform.take_role(role) for role in (["web"] if is_web_only else ["web", settings.HOST_NAME])]
        listening = _listen(options["host"], options["port"])
        adopt_orphans()
        password = _prepare()
        clusters: list[Child] = []
        if is_web_only:
            housekeeper = platform.keep_house(is_host=False)
        else:
            housekeeper, clusters = platform.start_training_side()
        self._greet(listening, password)
        connections.close_all()
        family = [platform.web(listening), *clusters]
        Family(family, say=platform.say, grace_seconds=platform.GRACE_SECONDS).run()
        housekeeper.end()
        for lock in locks:
            lock.close()
        platform.say("Stopped.")

    def _greet(self, listening: socket.socket, password: str) -> None:
        lines = [
            "",
            f"  LoRA Pilot runs at {address_of(listening)}",
            f"    files    {settings.WORKSPACE}",
            f"    logs     {settings.WORKSPACE / 'logs'}",
            "    to stop  press Ctrl-C; training goes on, and is found again at the next start",
        ]
        if password:
            lines.append(f"    sign in  as {FIRST_ADMIN}, password {password} (shown this once)")
        elif not User.objects.filter(is_superuser=True).exists():
            lines.append("    sign in  there is no administrator yet: run `manage.py createsuperuser`")
        self.stdout.write("\n".join([*lines, ""]))
        self.stdout.flush()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port, patience_seconds=4)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise CommandError(
            f"Cannot listen on {host}, port {port}: {why}. Choose another with --port or --host.",
            returncode=CANNOT_LISTEN,
        ) from None


def _prepare() -> str:
    """Bring database and files up to date. Returns the first administrator's password on the very first start."""
    call_command("migrate", interactive=False, verbosity=0)
    platform.collect_static_files()
    register_bundled_models()
    return create_first_admin()
