"""What `relay://` writes through, without MLflow."""

from __future__ import annotations

from threading import Event, Thread

import pytest

from mlflow_relay import clock, mlflow_writer, records
from mlflow_relay.mlflow_door import Options
from mlflow_relay.mlflow_writer import RunWriter

PLACE = {
    "relay_run_id": "r" * 32,
    "mlflow_run_id": "m" * 32,
    "experiment_name": "default",
    "run_name": "hello",
    "params": {},
}


@pytest.fixture
def writer(socket, daemon):
    writer = RunWriter(PLACE, Options(socket, False, 64 << 20, 30.0), is_rank=True)
    yield writer
    writer.end("FINISHED", clock.now_ms())


def tag(value: int) -> bytes:
    return records.pack_tags({"at": str(value)}, clock.now_ms())


def test_what_was_logged_is_settled_while_another_thread_logs_on(writer, daemon, monkeypatch):
    """A thread that logs in a loop must not keep another from reading its run."""
    monkeypatch.setattr(mlflow_writer, "SETTLE_TIMEOUT_S", 60.0)
    stop = Event()

    def log_on() -> None:
        while not stop.wait(0.0001):
            writer.append(tag(0))

    other = Thread(target=log_on)
    other.start()
    try:
        for at in range(1, 20):
            writer.append(tag(at))
            assert writer.settle()
            kept = [each.items["at"] for each in daemon.records()]
            assert str(at) in kept
    finally:
        stop.set()
        other.join()


def test_what_no_daemon_takes_is_not_settled(writer, daemon, monkeypatch):
    monkeypatch.setattr(mlflow_writer, "SETTLE_TIMEOUT_S", 0.2)
    daemon.acks = False
    writer.append(tag(1))
    assert not writer.settle()
    daemon.acks = True
    monkeypatch.setattr(mlflow_writer, "SETTLE_TIMEOUT_S", 60.0)
    writer.append(tag(2))
    assert writer.settle()
