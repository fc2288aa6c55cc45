"""Fixtures that tests of all folders may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support import MlflowServer, TcpProxy

#: Written together with the code that they test, and not yet seen green from end to end since the
#: last changes: they are run by `make unproven`, and move into `make test` file by file. An entry
#: here is a debt, not a verdict.
UNPROVEN = ("e2e/test_disk.py",)


#: Tests run in pytest's own process, whose output is pytest's.
os.environ["MLFLOW_RELAY_TERMINAL"] = "none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(UNPROVEN):
            item.add_marker("unproven")


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
