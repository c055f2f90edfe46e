"""The short version of `make chaos`: kills while the real trainer trains; then everything is compared."""

import pytest

from tests.chaos.__main__ import surroundings, try_fault
from tests.chaos.faults import FAULTS

SHORT = ("kill trainer",)


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    with surroundings("sqlite", tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost(around, name):
    fault = next(fault for fault in FAULTS if fault.name == name)
    result = try_fault(around, fault, seed=3)
    assert result.broken == []
