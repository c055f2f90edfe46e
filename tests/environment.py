"""The environment of a test process: a workspace of its own. Loaded as a plugin (pyproject.toml), since pytest-django
reads Django's settings before any conftest: nothing of the developer's own installation may be used."""

import os
import shutil
import tempfile
from pathlib import Path

SESSION_WORKSPACE = Path(tempfile.mkdtemp(prefix="lorapilot-tests-"))
(SESSION_WORKSPACE / "staticfiles").mkdir()
os.environ.update(
    LORAPILOT_WORKSPACE=str(SESSION_WORKSPACE),
    LORAPILOT_ENV_FILE=os.devnull,
    LORAPILOT_HOST_NAME="testhost",
    STATIC_ROOT=str(SESSION_WORKSPACE / "staticfiles"),
    SECRET_KEY="only-for-tests-" + "x" * 50,
    API_RATE="100000/min",
)
for name in ("DATABASE_URL", "REDIS_URL", "DEBUG", "ALLOWED_HOSTS", "SIGNUP_OPEN"):
    os.environ.pop(name, None)
for trainer in ("KOHYA", "AI_TOOLKIT", "DIFFUSION_PIPE"):
    os.environ.pop(f"{trainer}_HOME", None)
    os.environ.pop(f"{trainer}_PYTHON", None)


def pytest_unconfigure(config):
    shutil.rmtree(SESSION_WORKSPACE, ignore_errors=True)
