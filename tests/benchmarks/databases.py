"""MLflow servers with different databases behind them."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.support import MlflowServer
from tests.support.servers import free_port


class NoDatabase(Exception):
    """It is not on this machine; says what to install."""


@contextlib.contextmanager
def sqlite(bench: Bench) -> Iterator[MlflowServer]:
    """Serve from SQLite, MLflow's default."""
    with MlflowServer(bench.scratch("server")) as server:
        yield server


@contextlib.contextmanager
def postgresql(bench: Bench) -> Iterator[MlflowServer]:
    """Serve from a PostgreSQL of our own, with its defaults, in a scratch folder.

    Raises: NoDatabase.
    """
    binaries = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not binaries:
        raise NoDatabase("PostgreSQL: not installed (Debian, Ubuntu: apt install postgresql)")
    try:
        import psycopg2  # noqa: F401
    except ImportError:
        raise NoDatabase("PostgreSQL: pip install psycopg2-binary") from None
    # It refuses to run as root, and its user must reach the folder.
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="relay-postgresql-", dir="/tmp"))
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port = free_port()
    options = f"-p {port} -k {folder} -h 127.0.0.1"

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [f"{binaries[-1]}/{program}", *arguments],
            user=user,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    try:
        call("initdb", "-D", f"{folder}/data", "-U", "mlflow", "--auth=trust")
        call("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
            with MlflowServer(
                bench.scratch("server"), arguments=["--backend-store-uri", uri]
            ) as server:
                yield server
        finally:
            call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


SERVERS = {"SQLite": sqlite, "PostgreSQL": postgresql}
