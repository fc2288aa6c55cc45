"""What is measured, for whom, and what becomes of a sensor that fails or hangs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay import records
from mlflow_relay_daemon.attachment import Attachment
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.node_metrics import (
    HANGING_INTERVALS,
    Meter,
    NodeMetrics,
    Processes,
    RankProcess,
    node_number,
)
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.sensors import Sensor, Sensors, node_sensors
from mlflow_relay_daemon.spool.disk import Disk, lock_file, lock_holder
from mlflow_relay_daemon.spool.spool import Spool
from tests.support.relay import wait_until

INTERVAL_S = 10.0


def attachment(name: int, rank: int = 0, **more: object) -> Attachment:
    fields: dict[str, object] = {
        "session": bytes([name]) * 16,
        "run_id": "a" * 32,
        "run_key": "key",
        "experiment_name": "experiment",
        "run_name": "run",
        "rank": rank,
        "world_size": 4,
        "node": "node",
        "pid": 1,
        "primary": True,
        "start_ms": time.time_ns() // 1_000_000 - 60_000,
        "tags": {},
        "first_seq": 0,
    }
    return Attachment(**{**fields, **more})  # type: ignore[arg-type]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    """The runs of an offline daemon."""
    spool = Spool(Disk(), tmp_path / "spool", segment_bytes_max=1 << 20)
    yield Runs(spool, None, None, None)
    spool.close()


def kept(hosted: Hosted) -> list[records.Metrics]:
    """Return the metrics in a run's spool."""
    found = [
        records.unpack_record(raw)
        for _, piece, _ in hosted.run.pieces()
        for raw in piece.records
        if raw is not None
    ]
    assert all(isinstance(record, records.Metrics) for record in found)
    return found  # type: ignore[return-value]


def look_until_kept(metrics: NodeMetrics, hosted: Hosted, count: int) -> list[records.Metrics]:
    """Turn the clock on, interval by interval, until so many samples are kept."""
    clock_s = iter(range(0, 100_000, int(INTERVAL_S)))

    def turned() -> list[records.Metrics] | None:
        metrics.look(float(next(clock_s)))
        return found if len(found := kept(hosted)) >= count else None

    return wait_until(turned, f"{count} samples are kept")


def test_a_node_tells_its_state_under_mlflows_own_names() -> None:
    values = Sensors(node_sensors()).read()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.aggregate_metrics())
    assert theirs <= set(values)
    assert all(type(value) in (int, float) for value in values.values())


def test_a_sensor_that_fails_is_dropped_with_one_line_and_the_others_go_on(caplog) -> None:
    calls = []

    def broken() -> dict[str, float]:
        calls.append(1)
        raise RuntimeError("GPU is lost")

    sensors = Sensors([Sensor("power of gpu_0", broken), Sensor("cpu", lambda: {"cpu": 1.0})])
    with caplog.at_level(logging.WARNING):
        assert [sensors.read() for _ in range(5)] == [{"cpu": 1.0}] * 5
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "node metrics: power of gpu_0 is left out from now on: GPU is lost"
    ]


def test_a_run_with_a_living_rank_gets_samples_and_others_none(runs: Runs) -> None:
    living = runs.attach(attachment(1, node_rank=3))
    ended = runs.attach(attachment(2, run_id="b" * 32))
    runs.close_session(ended, bytes([2]) * 16, lost=0)
    metrics = NodeMetrics(runs, OwnRecords(runs), interval_s=INTERVAL_S, pid_of=None)
    samples = look_until_kept(metrics, living, 3)
    assert kept(ended) == []
    for sample in samples:
        assert {key.rpartition("/")[0] for key in sample.keys} == {"system/node_3"}
        assert "system/node_3/cpu_utilization_percentage" in sample.keys
        assert set(sample.steps) == {(sample.timestamp_ms - living.run.card.start_ms) // 1000}
    first = dict(zip(samples[0].keys, samples[0].values, strict=True))
    assert first["system/node_3/network_receive_megabytes"] == 0.0, "counted from the run's start"


def test_a_run_gets_no_sample_when_its_last_rank_has_gone(runs: Runs) -> None:
    hosted = runs.attach(attachment(1))
    metrics = NodeMetrics(runs, OwnRecords(runs), interval_s=INTERVAL_S, pid_of=None)
    look_until_kept(metrics, hosted, 1)
    runs.close_session(hosted, bytes([1]) * 16, lost=0)
    before = len(kept(hosted))
    for now_s in range(1000, 1100, 10):
        metrics.look(float(now_s))
    assert len(kept(hosted)) == before
    assert set(hosted.run.card.sessions) == {"01" * 16}, "the daemon is no rank of the run"


def test_a_sample_that_the_disk_does_not_take_is_left_out_and_later_ones_come(runs: Runs) -> None:
    hosted = runs.attach(attachment(1))
    metrics = NodeMetrics(runs, OwnRecords(runs), interval_s=INTERVAL_S, pid_of=None)
    runs.spool.bytes_max = 1  # the quota is reached
    for now_s in range(0, 100, 10):
        metrics.look(float(now_s))
        time.sleep(0.01)
    assert kept(hosted) == []
    runs.spool.bytes_max = None
    assert look_until_kept(metrics, hosted, 2)


def test_what_the_daemon_adds_counts_on_through_the_lives_of_its_spool(tmp_path: Path) -> None:
    accepted = []
    for life in range(3):
        spool = Spool(Disk(), tmp_path / "spool", segment_bytes_max=1 << 20)
        runs = Runs(spool, None, None, None)
        hosted = runs.attach(attachment(1))
        own = OwnRecords(runs)
        own.append(hosted, [records.pack_tags({"life": str(life)}, life)])
        own.append(hosted, [records.pack_tags({"life": str(life)}, life)] * 2)
        accepted.append(hosted.run.accepted_records)
        spool.close()
    assert accepted == [3, 6, 9]


def test_a_sensor_that_hangs_is_said_once_and_holds_up_nobody(monkeypatch, caplog, runs) -> None:
    release = threading.Event()

    def hangs() -> dict[str, float]:
        release.wait(60)
        return {}

    hang = Sensor("gpu", hangs)
    monkeypatch.setattr("mlflow_relay_daemon.node_metrics.node_sensors", lambda: [hang])
    runs.attach(attachment(1))
    metrics = NodeMetrics(runs, OwnRecords(runs), interval_s=INTERVAL_S, pid_of=None)
    with caplog.at_level(logging.WARNING):
        for now_s in range(0, int(INTERVAL_S * HANGING_INTERVALS * 3), 5):
            metrics.look(float(now_s))
    release.set()
    assert [record.getMessage() for record in caplog.records] == [
        "node metrics: a sensor does not answer; there are none until it does"
    ]


def test_the_process_of_a_rank_is_found_by_its_lock_and_measured(tmp_path: Path) -> None:
    fd = lock_file(tmp_path / "lock")
    assert fd is not None
    assert lock_holder(fd) is None, "one's own lock is in nobody's way"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        found = lock_holder(fd)
        os.write(writer, str(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode() == str(os.getpid())
    for each in (reader, writer, fd):
        os.close(each)
    processes = Processes()
    mine = RankProcess("a" * 32, 5, os.getpid())
    gone = RankProcess("a" * 32, 6, child)
    values = processes.read([mine, gone])
    assert list(values) == [("a" * 32, 5)]
    assert values["a" * 32, 5]["memory_usage_megabytes"] > 10
    assert values["a" * 32, 5]["threads"] >= 1


def test_metrics_of_rank_processes_stand_below_their_node(runs: Runs) -> None:
    hosted = runs.attach(attachment(1, rank=2, node_rank=1))
    metrics = NodeMetrics(
        runs, OwnRecords(runs), interval_s=INTERVAL_S, pid_of=lambda session: os.getpid()
    )
    sample = look_until_kept(metrics, hosted, 1)[0]
    assert "system/node_1/rank_2/memory_usage_megabytes" in sample.keys


@pytest.mark.parametrize(
    ("told", "number"),
    [([(4, None), (5, None)], 4), ([(4, 2), (5, 2)], 2), ([(4, None), (5, 2)], 2)],
)
def test_a_node_has_the_number_that_ranks_were_told_else_its_lowest_rank(
    runs: Runs, told: list[tuple[int, int | None]], number: int
) -> None:
    for index, (rank, node_rank) in enumerate(told, 1):
        hosted = runs.attach(attachment(index, rank=rank, node_rank=node_rank))
    assert node_number(hosted.run.card) == number


def test_a_meter_measures_only_when_it_is_asked() -> None:
    before = threading.active_count()
    meter = Meter()
    assert meter.take() is None
    assert threading.active_count() == before, "an idle daemon has no thread for it"
    assert meter.ask([])
    assert wait_until(meter.take, "a sample").node
    assert meter.take() is None
