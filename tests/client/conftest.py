"""A socket, and a daemon of the tests' own behind it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
def daemon(socket: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(socket) as daemon:
        yield daemon
        assert daemon.bad == []
