"""The OpenAPI schema is complete, and its page comes from our own server."""

from io import StringIO
from pathlib import Path

import pytest
from django.conf import settings
from django.core.management import call_command
from django.test import Client

DOCS = [Path(settings.BASE_DIR) / "docs" / name for name in ("api.md", "scripts-api.md")]


@pytest.fixture(scope="module")
def schema():
    import yaml

    text = StringIO()
    call_command("spectacular", "--validate", "--fail-on-warn", stdout=text)
    return yaml.safe_load(text.getvalue())


def test_schema_is_made_without_warnings(schema):
    assert schema["info"]["title"] == "LoRA Pilot"
    assert schema["components"]["securitySchemes"]["token"]["type"] == "apiKey"


def test_every_route_is_in_the_docs(schema):
    methods = {"get", "post", "put", "patch", "delete"}
    routes = {f"{method.upper()} {path}" for path, item in schema["paths"].items() for method in methods & set(item)}
    lines = [line for page in DOCS for line in page.read_text().splitlines()]
    documented = {row.split("`")[1].replace("&lt;", "<") for row in lines if row.startswith("| `")}
    assert {route for route in routes if _as_documented(route) not in documented} == set()


def _as_documented(route):
    """`GET /api/v1/jobs/{id}/` is written `GET /jobs/<id>/`."""
    return route.replace(" /api/v1/", " /").replace("{", "<").replace("}", ">")


def test_schema_for_a_token(api_of, alice):
    answer = api_of(alice, "read").get("/api/v1/schema/")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/vnd.oai.openapi; charset=utf-8")


def test_page_takes_everything_from_here(client_of, alice):
    page = client_of(alice).get("/api/v1/docs/")
    text = page.content.decode()
    assert page.status_code == 200
    assert ("<style" in text, "style=" in text, "http://" in text, "https://" in text) == (False, False, False, False)
    assert '<script src="/api/v1/docs/?script="></script>' in text
    script = client_of(alice).get("/api/v1/docs/?script=")
    assert script.headers["Content-Type"] == "application/javascript"
    assert 'url: "/api/v1/schema/"' in script.content.decode().replace("\\u002D", "-")


def test_page_for_nobody_is_the_sign_in_page(db):
    for path in ("/api/v1/docs/", "/api/v1/docs/?script="):
        assert Client().get(path).status_code == 302
