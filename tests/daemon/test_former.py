"""The ids of runs that have left the spool."""

from __future__ import annotations

import pytest

from mlflow_relay_daemon.spool.former import FormerRuns
from tests.support.spools import FailingDisk

FIRST, SECOND, THIRD = "a" * 32, "b" * 32, "c" * 32


def test_what_was_added_is_known_to_the_next_daemon(tmp_path):
    former = FormerRuns(FailingDisk(), tmp_path / "former")
    assert former.get(FIRST) is None
    for relay_run_id, mlflow_run_id in ((FIRST, "1"), (SECOND, "2"), (FIRST, "1"), (SECOND, "3")):
        former.add(relay_run_id, mlflow_run_id)
    for each in (former, FormerRuns(FailingDisk(), tmp_path / "former")):
        assert (each.get(FIRST), each.get(SECOND)) == ("1", "3")
    assert (tmp_path / "former").read_text().count("\n") == 3


@pytest.mark.parametrize("cut", range(1, 36))
def test_a_line_that_a_crash_has_cut_off_is_no_id_and_spoils_no_other(tmp_path, cut):
    path = tmp_path / "former"
    former = FormerRuns(FailingDisk(), path)
    former.add(FIRST, "1")
    former.add(SECOND, "2")
    path.write_bytes(path.read_bytes()[:-cut])
    former = FormerRuns(FailingDisk(), path)
    assert (former.get(FIRST), former.get(SECOND)) == ("1", None)
    former.add(THIRD, "3")
    former = FormerRuns(FailingDisk(), path)
    assert (former.get(FIRST), former.get(SECOND), former.get(THIRD)) == ("1", None, "3")
