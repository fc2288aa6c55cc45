"""The reserve: space that delivery has left when somebody else has filled the disk."""

from __future__ import annotations

import errno

import pytest

from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.reserve import RESERVE_BYTES, Reserve
from mlflow_relay_daemon.spool.spool import Spool


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reserve"


def test_it_takes_its_space_and_gives_it_free_once(path):
    reserve = Reserve(Disk(), path)
    assert reserve.missing_bytes == RESERVE_BYTES
    reserve.restore(2 * RESERVE_BYTES)
    assert path.stat().st_blocks * 512 >= RESERVE_BYTES
    assert reserve.missing_bytes == 0
    assert reserve.spend()
    assert not path.exists()
    assert not reserve.spend()


def test_what_was_spent_a_moment_ago_is_not_put_by_again(path):
    reserve = Reserve(Disk(), path)
    reserve.restore(2 * RESERVE_BYTES)
    reserve.spend()
    reserve.restore(RESERVE_BYTES + 4096)
    assert not path.exists()
    reserve.restore(2 * RESERVE_BYTES)
    assert path.exists()


def test_a_later_life_knows_that_it_is_there(path):
    Reserve(Disk(), path).restore(2 * RESERVE_BYTES)
    assert Reserve(Disk(), path).missing_bytes == 0


def test_ranks_get_no_space_until_it_is_there_again(tmp_path, monkeypatch):
    spool = Spool(Disk(), tmp_path / "spool", segment_bytes_max=1 << 20)
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: RESERVE_BYTES + 1000)
    monkeypatch.setattr("mlflow_relay_daemon.spool.spool.FREE_SPACE_EVERY_S", 0.0)
    spool.check_space(1001)
    spool.reserve.spend()
    spool.check_space(1000)
    with pytest.raises(OSError, match="are free") as full:
        spool.check_space(1001)
    assert full.value.errno == errno.ENOSPC
    spool.close()
