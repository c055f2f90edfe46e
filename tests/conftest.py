"""A workspace and a database of the test's own. Alice owns, Bob shares her team, Charlie is a stranger."""

from __future__ import annotations

import pytest

LONG = {"trainer", "serving", "browser", "chaos", "hostile"}  # folders whose files take the longest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The long files first, so that the workers end together and not one of them alone with a long file."""
    items.sort(key=lambda item: LONG.isdisjoint(item.path.parts))


@pytest.fixture
def workspace(settings, tmp_path):
    """An empty workspace of the test's own."""
    settings.WORKSPACE = tmp_path / "workspace"
    settings.WORKSPACE.mkdir()
    return settings.WORKSPACE


@pytest.fixture(autouse=True)
def quick_settings(settings):
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    settings.STORAGES = settings.STORAGES | {
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    }


@pytest.fixture
def team(db):
    from django.contrib.auth.models import Group

    return Group.objects.create(name="team")


@pytest.fixture
def alice(db, team):
    return _user("alice", team)


@pytest.fixture
def bob(db, team):
    return _user("bob", team)


@pytest.fixture
def charlie(db):
    return _user("charlie")


@pytest.fixture
def staff(db):
    from lorapilot.models import User

    return User.objects.create_superuser("staff", "staff@example.org", "staff")


def _user(name, *groups):
    from lorapilot.models import User

    user = User.objects.create_user(name, f"{name}@example.org", name)
    user.groups.set(groups)
    return user


@pytest.fixture
def client_of():
    """client_of(alice): a browser in which Alice is signed in."""
    from django.test import Client

    def signed_in(user):
        browser = Client()
        browser.force_login(user)
        return browser

    return signed_in


@pytest.fixture
def api_of():
    """api_of(alice): an API client with a token of hers; api_of(alice, "read") has a read-only one."""
    from rest_framework.test import APIClient

    from lorapilot.models import ApiToken

    def with_token(user, scope="write"):
        _, token = ApiToken.objects.create(user=user, name="test", scope=scope)
        api = APIClient()
        api.credentials(HTTP_AUTHORIZATION=f"Token {token}")
        return api

    return with_token
