"""What the documentation has to tell: every setting, command, page and route of the API."""

import ast
import re
from pathlib import Path

import pytest
from django.urls import URLPattern, get_resolver

ROOT = Path(__file__).resolve().parent.parent
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
EVERYTHING = "\n".join(DOCS.values())
READERS = {"text", "flag", "number", "words", "path"}  # of lorapilot/env.py


def variables_that_settings_read():
    tree = ast.parse((ROOT / "lorapilot" / "settings.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    of_env = [call for call in calls if ast.unparse(call.func.value) == "env" and call.func.attr in READERS]
    return {call.args[0].value for call in of_env} | {"LORAPILOT_ENV_FILE"}


def variables_with_a_row():
    return set(re.findall(r"^\| `([A-Z_]+)` \|", DOCS["settings.md"], re.MULTILINE))


def test_every_setting_is_documented_and_no_other():
    assert variables_with_a_row() == variables_that_settings_read()


def test_example_file_names_only_settings_that_exist():
    named = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert named - variables_that_settings_read() == set()


@pytest.mark.parametrize("name", ["compose.yaml", "Dockerfile"])
def test_container_files_set_only_settings_that_exist(name):
    named = set(re.findall(r"\b(LORAPILOT_[A-Z_]+)\b", (ROOT / name).read_text()))
    assert named - variables_that_settings_read() == set()


@pytest.mark.parametrize(
    "command",
    sorted(
        path.stem
        for app in ("lorapilot", "datasets", "models_registry", "runs")
        for path in (ROOT / app / "management" / "commands").glob("[!_]*.py")
    ),
)
def test_every_command_is_documented(command):
    assert f"`manage.py {command}" in EVERYTHING


@pytest.mark.parametrize(
    "target", re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
)
def test_every_make_target_is_explained_at_the_top_of_the_makefile(target):
    head = (ROOT / "Makefile").read_text().split("SHELL")[0]
    assert f"make {target} " in head


def routes(resolver=None, prefix=""):
    """Every address as in `/api/v1/runs/{}/log/`."""
    for entry in (resolver or get_resolver()).url_patterns:
        address = prefix + str(entry.pattern).removeprefix("^").removesuffix("$")
        if isinstance(entry, URLPattern):
            yield "/" + re.sub(r"<[^>]+>|\(\?P<\w+>(\[[^\]]*\]|\\.)([+*]|\{[\d,]+\})?\)", "{}", address)
        else:
            yield from routes(entry, address)


def documented_routes():
    """Addresses in the documentation, whatever their variables are called there."""
    return {re.sub(r"\{[^}]*\}|<[^>]*>", "{}", address) for address in re.findall(r"/[\w/{}<>:.-]*", EVERYTHING)}


def test_every_route_of_the_api_is_documented():
    documented = documented_routes()
    ours = {route for route in routes() if route.startswith("/api/v1/")}
    short = {route: route.removeprefix("/api/v1") for route in ours}
    assert sorted(route for route in ours if route not in documented and short[route] not in documented) == []


def test_every_part_of_the_site_is_documented():
    parts = {f"/{route.split('/')[1]}/" for route in routes() if route != "/"}
    assert sorted(part for part in parts if f"`{part}" not in EVERYTHING) == []


@pytest.mark.parametrize("name", DOCS)
def test_links_between_documents_lead_somewhere(name):
    path = next((ROOT / "docs").rglob(name))
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", DOCS[name]) if "://" not in target]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []
