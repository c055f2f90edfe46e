"""`manage.py models`: what the manifest offers, what is here, and pulling it, without a platform that runs."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError
from django.template.defaultfilters import filesizeformat
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lorapilot import workspace
from lorapilot.errors import UserError
from lorapilot.models import User
from models_registry import manifest, pulls
from models_registry.manifest_selectors import installed_bytes, target_of
from models_registry.models import Pull

NOT_THERE = 1
REFUSED = 2
INTERRUPTED = 130


class Command(BaseCommand):
    help = "List the models of the manifest, pull them, and say where they are."

    def add_arguments(self, parser: ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("list", help="every model of the manifest: size, whether it is here, where it goes")
        pull = actions.add_parser("pull", help="pull one model; started again, it goes on where it was")
        pull.add_argument("name")
        pull.add_argument("--dir", default="", help="a folder in the models folder, instead of the manifest's")
        everything = actions.add_parser("pull-all", help="pull every model that is not here")
        for action in (pull, everything):
            action.add_argument("--user", default="", help="whose keys of Hugging Face and Civitai are used")
        where = actions.add_parser("where", help="the path of a model; exit code 1 when it is not there")
        where.add_argument("name")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            getattr(self, f"_{options['action'].replace('-', '_')}")(options)
        except UserError as error:
            raise CommandError(error.message, returncode=REFUSED) from None
        except KeyboardInterrupt:
            raise CommandError("Stopped. What has arrived is kept.", returncode=INTERRUPTED) from None

    def _list(self, _options: dict[str, Any]) -> None:
        found = manifest.load()
        for problem in found.problems:
            self.stderr.write(str(problem))
        rows = list(Pull.objects.all())
        for entry in found.entries:
            pull = next((row for row in rows if row.name == entry.name), None)
            here = installed_bytes(entry, pull)
            size = here if here is not None else entry.expected_size_bytes
            state = "installed" if here is not None else "gated" if entry.is_gated else "-"
            told = filesizeformat(size).replace("\xa0", " ") if size is not None else "?"
            self.stdout.write(f"{entry.name:<32} {told:>10}  {state:<10} {target_of(entry, pull)}")

    def _where(self, options: dict[str, Any]) -> None:
        entry = manifest.find(options["name"])
        pull = Pull.objects.filter(name=entry.name).first()
        self.stdout.write(str(workspace.models() / target_of(entry, pull)))
        if installed_bytes(entry, pull) is None:
            raise CommandError(
                f"{entry.name} is not there, or not as a whole: `manage.py models pull {entry.name}` brings it.",
                returncode=NOT_THERE,
            )

    def _pull(self, options: dict[str, Any]) -> None:
        self._pull_entry(manifest.find(options["name"]), options["dir"], _user(options["user"]))

    def _pull_all(self, options: dict[str, Any]) -> None:
        """Those that fail are told at the end, and do not stop the others."""
        user = _user(options["user"])
        failed = []
        for entry in manifest.load().entries:
            pull = Pull.objects.filter(name=entry.name).first()
            if installed_bytes(entry, pull) is not None:
                continue
            try:
                self._pull_entry(entry, pull.subdir if pull else "", user)
            except UserError as error:
                failed.append(f"{entry.name}: {error.message}")
        if failed:
            raise CommandError("\n".join(failed), returncode=REFUSED)

    def _pull_entry(self, entry: manifest.Entry, subdir: str, user: User | None) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} % {task.fields[how]}"),
        )
        with Progress(*columns, console=Console(file=self.stderr)) as progress:  # type: ignore[arg-type]  # it has write
            bar = progress.add_task(entry.name, total=None, how="")

            def tell(done: int, total: int, message: str) -> None:
                progress.update(bar, completed=done, total=total or None, how=message)

            pull = pulls.pull_now(entry, subdir, user=user, tell=tell)
            progress.update(bar, total=1, completed=1, how="")
        self.stdout.write(str(workspace.models() / target_of(entry, pull)))


def _user(name: str) -> User | None:
    if not name:
        return None
    found = User.objects.filter(username=name, is_active=True).first()
    if found is None:
        raise CommandError(f"There is nobody called {name}.", returncode=REFUSED)
    return found
