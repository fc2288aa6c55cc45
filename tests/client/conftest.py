"""A socket, and a daemon of the tests' own behind it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay import session
from tests.support.fake_daemon import FakeDaemon


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, as sockets and journals have it in real life."""
    with tempfile.TemporaryDirectory(prefix="relay-client-", dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def socket(folder: Path) -> Path:
    return folder / "relay.sock"


@pytest.fixture
def daemon(socket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    # On a busy machine its thread may get no turn for longer than a rank waits for a sign of life.
    monkeypatch.setattr(session, "NO_DAEMON_GRACE_S", 10.0)
    with FakeDaemon(socket) as daemon:
        yield daemon
        assert daemon.bad == []
