"""Each planted bug is caught by the test that is there for it: the suite is no decoration."""

from __future__ import annotations

import pytest

from tests.crash.cases.planted import TIMEOUT_S, try_all
from tests.crash.planted import BUGS


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[bool, str]]:
    return try_all()


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, verdicts):
    is_caught, said = verdicts[name]

    assert is_caught, said
