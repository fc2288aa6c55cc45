"""Fixtures that tests of all folders may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.support import MlflowServer, TcpProxy

#: Tests run in pytest's own process, whose output is pytest's.
os.environ["MLFLOW_RELAY_TERMINAL"] = "none"
# A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One real MLflow server for the whole session; tests that kill it start one of their own."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def mlflow_proxy(mlflow_server: MlflowServer) -> Iterator[TcpProxy]:
    """A proxy in front of the session's server, healthy until told otherwise."""
    with TcpProxy(mlflow_server.uri) as proxy:
        yield proxy
