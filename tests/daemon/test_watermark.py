"""The watermark: comes back, or is known to be damaged."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_relay.errors import FormatError
from mlflow_relay_daemon.spool import watermark
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from tests.support.spools import SESSION, FailingDisk

NUMBERS = st.integers(0, (1 << 63) - 1)
MARK = Watermark(3, 4096, 17, 1000, 990, 9900, 2, 1_795_412_345_678, {SESSION: (1000, [])})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    numbers=st.lists(NUMBERS, min_size=8, max_size=8),
    added=st.lists(st.tuples(st.binary(min_size=16, max_size=16), NUMBERS), max_size=5),
)
def test_a_watermark_comes_back(tmp_path, numbers, added):
    sequences = Sequences()
    for session, first_seq in added:
        sequences.add(session, first_seq, first_seq + 10)
    mark = Watermark(*numbers, sequences=sequences.save())

    watermark.write(Disk(), tmp_path, mark)
    found = watermark.read(tmp_path)

    assert found is not None
    assert vars(found) | {"sequences": {}} == vars(mark) | {"sequences": {}}
    again = Sequences(found.sequences)
    for session, first_seq in added:
        assert again.next_seq(session) == sequences.next_seq(session)
        assert not again.is_new(session, first_seq, first_seq + 10)


def test_a_new_run_has_none(tmp_path):
    assert watermark.read(tmp_path) is None


def test_every_flipped_byte_is_noticed(tmp_path):
    watermark.write(Disk(), tmp_path, MARK)
    path = tmp_path / watermark.NAME
    data = path.read_bytes()
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(FormatError):
                watermark.read(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    """As after a power failure: the file is replaced without an fsync, knowingly."""
    watermark.write(Disk(), tmp_path, MARK)
    path = tmp_path / watermark.NAME
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(FormatError):
            watermark.read(tmp_path)
        path.write_bytes(data[:end] + bytes(len(data) - end))
        with pytest.raises(FormatError):
            watermark.read(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=100))
def test_random_bytes_are_no_watermark(tmp_path, data):
    path = tmp_path / watermark.NAME
    for tried in (data, b"MRW\x01" + data):
        path.write_bytes(tried)
        with pytest.raises(FormatError):
            watermark.read(tmp_path)


@pytest.mark.parametrize("operation", ["write", "rename"])
def test_a_disk_that_fails_leaves_the_old_one(tmp_path, operation):
    disk = FailingDisk()
    watermark.write(disk, tmp_path, MARK)
    disk.fail(operation, watermark.NAME, errno.ENOSPC, written=5)
    with pytest.raises(OSError, match="No space"):
        watermark.write(disk, tmp_path, Watermark(9))

    found = watermark.read(tmp_path)
    assert found is not None
    assert found.segment == MARK.segment


def test_it_costs_no_fsync(tmp_path):
    """There is one after each batch; losing it costs a resend."""
    disk = FailingDisk()
    watermark.write(disk, tmp_path, MARK)

    assert disk.count("sync") == disk.count("sync_folder") == 0
