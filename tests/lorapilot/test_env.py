"""Settings from the environment: typed, and loud when a value cannot be read."""

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from lorapilot import env


@pytest.fixture
def variable(monkeypatch):
    return lambda value: monkeypatch.setenv("SOME_SETTING", value)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("1", True),
        ("true", True),
        (" Yes ", True),
        ("ON", True),
        ("0", False),
        ("No", False),
        ("off", False),
        ("", False),
    ],
)
def test_flag_reads_yes_and_no(variable, value, meaning):
    variable(value)
    assert env.flag("SOME_SETTING", default=not meaning) is meaning


def test_flag_unset_is_its_default():
    assert env.flag("NOT_SET_ANYWHERE", default=True) is True
    assert env.flag("NOT_SET_ANYWHERE", default=False) is False


def test_flag_unreadable_names_the_variable(variable):
    variable("maybe")
    with pytest.raises(ImproperlyConfigured, match=r"^SOME_SETTING='maybe' is neither true nor false\. Use 1 or 0\.$"):
        env.flag("SOME_SETTING", default=False)


def test_number_reads_whole_numbers(variable):
    variable(" 12 ")
    assert env.number("SOME_SETTING", 3) == 12
    variable("")
    assert env.number("SOME_SETTING", 3) == 3


@pytest.mark.parametrize("value", ["many", "1.5", "0x10"])
def test_number_unreadable_names_the_variable(variable, value):
    variable(value)
    with pytest.raises(ImproperlyConfigured, match=rf"^SOME_SETTING='{value}' is not a whole number\.$"):
        env.number("SOME_SETTING", 3)


def test_number_below_the_least_is_refused(variable):
    variable("-1")
    with pytest.raises(ImproperlyConfigured, match=r"^SOME_SETTING=-1 is too small: the least is 0\.$"):
        env.number("SOME_SETTING", 3)


def test_words_leave_empty_items_out(variable):
    variable(" a.example , ,b.example,")
    assert env.words("SOME_SETTING") == ["a.example", "b.example"]
    assert env.words("NOT_SET_ANYWHERE", "localhost,127.0.0.1") == ["localhost", "127.0.0.1"]
    assert env.words("NOT_SET_ANYWHERE") == []


def test_path_is_absolute_and_knows_home(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    variable("~/pictures")
    assert env.path("SOME_SETTING", Path("/elsewhere")) == tmp_path.resolve() / "pictures"
    variable("")
    assert env.path("SOME_SETTING", Path("/elsewhere/../there")) == Path("/there")


def test_text_is_stripped(variable):
    variable("  value \n")
    assert env.text("SOME_SETTING") == "value"
    assert env.text("NOT_SET_ANYWHERE", "other") == "other"
