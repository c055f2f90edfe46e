"""Files that somebody built to do harm, made at test time, and an installation of its own for what is killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.datasets.conftest import add, dataset, draw, everything  # noqa: F401 fixtures of that folder, used here too
from tests.serving.conftest import started  # noqa: F401 as above

ROOT = Path(__file__).resolve().parents[2]
SETUP = "import django; django.setup()\n"
FILL = """
from datasets import services
from lorapilot.models import ApiToken, User
alice = User.objects.create_user("alice")
datasets = [services.create_dataset(alice, name=name).pk for name in ("Cats", "Dogs")]
import json; print(json.dumps([datasets, ApiToken.objects.create(user=alice, name="t", scope="write")[1]]))
"""


def zipped(*entries, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # exactly; ZipInfo itself cuts names at a NUL
            archive.writestr(info, content, compression)
    return file.getvalue()


class Installation:
    """A database and a workspace that other processes use. `program` is Python, run there with Django set up."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.environment = {
            "LORAPILOT_WORKSPACE": str(self.workspace),
            "STATIC_ROOT": os.environ["STATIC_ROOT"],
            "DJANGO_SETTINGS_MODULE": "lorapilot.settings",
            "MALLOC_ARENA_MAX": "1",  # so that address space says what is used
        }
        self.run("from django.core.management import call_command; call_command('migrate', verbosity=0)")
        self.datasets, self.token = self.facts(FILL)

    def run(self, program: str, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SETUP + program, *arguments],
            cwd=ROOT,
            env=os.environ | self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def facts(self, program: str, *arguments: str, **environment: str):
        return json.loads(self.run(program, *arguments, **environment).splitlines()[-1])


@pytest.fixture(scope="session")
def installation(tmp_path_factory):
    return Installation(tmp_path_factory.mktemp("hostile"))
