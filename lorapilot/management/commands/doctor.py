"""`manage.py doctor`: what the services page shows, at a terminal, and the commands that mend what is wrong."""

from __future__ import annotations

import fcntl
import json
from argparse import ArgumentParser
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import BaseCommand

from lorapilot.models import User
from runs import parts
from runs.enums import PartState
from runs.hosts import find_gpus
from runs.parts import Part
from runs.stacks.installation import Problem, look_at_all

INDENT = " " * 11


class Command(BaseCommand):
    help = "Look at every part of the installation and at this machine's trainers. Exit code 1: something is down."
    requires_system_checks: tuple[str, ...] = ()  # it also has to work when something is wrong

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="For programs: a list of parts.")

    def handle(self, *_: Any, **options: Any) -> None:
        # Whoever has this terminal has the files: nothing is kept from them.
        operator = User(username="doctor", is_staff=True)
        here = look_at_all(has_gpu=bool(find_gpus()), is_fresh=True)
        found = parts.list_parts(operator, web=_web_part(), here=here)
        if options["json"]:
            self.stdout.write(json.dumps([_as_json(part) for part in found], indent=2))
        else:
            self._show(found)
        if any(part.state == PartState.DOWN for part in found):
            raise SystemExit(1)

    def _show(self, found: list[Part]) -> None:
        width = max(len(part.display) for part in found)
        group = ""
        for part in found:
            if part.group != group:
                self.stdout.write(f"\n{part.group}")
            group = part.group
            self.stdout.write(f"  {self._coloured(part.state)} {part.display:<{width}}  {part.summary}")
            for detail in part.details:
                self.stdout.write(f"{INDENT}{detail.label}: {detail.value}")
            for problem in part.problems:
                self._show_problem(problem)
        down = [part.display for part in found if part.state == PartState.DOWN]
        self.stdout.write(f"\nDown: {', '.join(down)}." if down else "\nNothing is down.")

    def _show_problem(self, problem: Problem) -> None:
        self.stdout.write(f"{INDENT}{problem.what}")
        for line in problem.mend.splitlines():
            self.stdout.write(f"{INDENT}  $ {line}")

    def _coloured(self, state: PartState) -> str:
        style = {"ok": self.style.SUCCESS, "warning": self.style.WARNING, "down": self.style.ERROR}.get(state, str)
        return str(style(f"{state.value:<8}"))


def _as_json(part: Part) -> dict[str, Any]:
    shown = {name: getattr(part, name) for name in ("name", "display", "group", "state", "summary")}
    shown["details"] = [{"label": detail.label, "value": detail.value} for detail in part.details]
    shown["problems"] = [asdict(problem) for problem in part.problems]
    return shown | {"run": part.run.pk if part.run else None}


def _web_part() -> Part:
    """By the lock that `manage.py up` holds, on whichever machine that shares the workspace."""
    lock = settings.WORKSPACE / "locks" / "web.lock"
    part = Part(name="web", display="Web", group=parts.PLATFORM, state=PartState.DOWN, summary="It does not run.")
    if not _is_held(lock):
        return replace(part, problems=[Problem("No page is served from this workspace.", parts.START)])
    return replace(part, state=PartState.OK, summary=f"Served by process {lock.read_text().strip()}.")


def _is_held(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of again at once
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
