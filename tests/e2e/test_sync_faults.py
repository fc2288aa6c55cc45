"""`mlflow-relay sync` where the disk says no: a source that may not be read, a server that is full."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import MlflowServer
from tests.support.lineage import only
from tests.support.relay import _clean_environ
from tests.support.scenes import fill, fingerprint, small_disk
from tests.support.stores import anemoi_run, new_card, start_sync, sync, write_mlruns, write_spool
from tests.support.users import MALLORY

POINTS = 40


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user of the machine can enter."""
    folder = Path(tempfile.mkdtemp(prefix="relay-shared-", dir="/dev/shm"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def sync_as_somebody(*arguments: object) -> tuple[int, list[str]]:
    """Call `mlflow-relay sync` as a user who owns nothing of it; return code and lines of stderr."""
    if os.geteuid() == 0:  # root may read everything
        process = MALLORY.relay(
            "sync", *arguments, environ=_clean_environ(), stderr=subprocess.PIPE
        )
    else:
        process = start_sync(*arguments)
    _, errors = process.communicate(timeout=100)
    assert "Traceback" not in errors, errors
    return process.returncode, errors.strip().splitlines()


def open_to_all(folder: Path) -> None:
    """Let everybody read what is in it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextlib.contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Let nobody but root read these."""
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_a_source_that_may_not_be_read_is_said_in_one_line(shared, mlflow_server):
    write_mlruns(shared / "store" / "mlruns", [anemoi_run(POINTS)])
    write_spool(shared / "spool", new_card(uuid.uuid4().hex), points=POINTS)
    (shared / "mlflow.db").write_bytes(b"SQLite format 3\0")
    open_to_all(shared)
    before = fingerprint(shared)
    for name in ("store", "store/mlruns", "spool", "spool/runs", "mlflow.db"):
        path = shared / name
        with locked(path):
            code, lines = sync_as_somebody(path, "--tracking-uri", mlflow_server.uri)
        assert (code, len(lines)) == (1, 1), lines
        assert "Permission denied" in lines[0]
        assert str(path) in lines[0]
    assert fingerprint(shared) == before


def test_a_run_that_may_not_be_read_stops_no_other(shared, mlflow_server):
    bad, good = sorted((anemoi_run(POINTS), anemoi_run(POINTS)), key=lambda each: each.run_id)
    store = write_mlruns(shared / "mlruns", [good, bad])
    # The first one that a listing shows must not end it.
    shut = store / "0"
    shutil.copytree(next(path for path in store.iterdir() if path.is_dir()), shut)
    nodes = shared / "nodes"
    for name in ("a", "b", "c"):
        write_spool(nodes / name, new_card(uuid.uuid4().hex), points=POINTS)
    segment = next((nodes / "b").glob("runs/*/*.segment"))
    paths = [shut, next(store.glob(f"[1-9]*/{bad.run_id}")), nodes / "a", segment]
    open_to_all(shared)
    with locked(*paths):
        code, lines = sync_as_somebody(store, nodes, "--tracking-uri", mlflow_server.uri)
    assert code == 1
    assert all("cannot be read: Permission denied" in line for line in lines), lines
    assert [sum(str(path) in line for line in lines) for path in paths] == [1, 1, 1, 1], lines
    (open_node,) = (path.name for path in (nodes / "c" / "runs").iterdir())
    assert len(mlflow_server.all_points(only(mlflow_server, open_node).info.run_id)) == POINTS
    shutil.rmtree(shut)
    there = only(mlflow_server, good.run_id).info.run_id
    assert mlflow_server.all_points(there) == good.points()
    # Whoever may read it brings the rest.
    sync(store, nodes, "--tracking-uri", mlflow_server.uri)
    there = only(mlflow_server, bad.run_id).info.run_id
    assert mlflow_server.all_points(there) == bad.points()


def test_a_server_whose_disk_is_full_is_said_and_the_next_call_is_exact(tmp_path):
    run = anemoi_run(4000)
    store = write_mlruns(tmp_path / "mlruns", [run])
    before = fingerprint(store)
    with small_disk(tmp_path / "server", 64) as disk, MlflowServer(disk) as server:
        sync(write_mlruns(tmp_path / "before", [anemoi_run(POINTS)]), "--tracking-uri", server.uri)
        filler = fill(disk)
        for room in (0, 512 << 10):  # for nothing; for a run and some of its points
            os.truncate(filler, filler.stat().st_size - room)
            process = start_sync(store, "--tracking-uri", server.uri, "--patience", "2")
            _, errors = process.communicate(timeout=100)
            (line,) = (line for line in errors.splitlines() if "given up" in line)
            assert process.returncode == 75, errors
            assert "database or disk is full" in line
            assert "Traceback" not in errors
            print(line)
        there = only(server, run.run_id).info.run_id
        print(len(server.all_points(there)), "points before there was room again")
        filler.unlink()
        done = sync(store, "--tracking-uri", server.uri)
        assert [each["state"] for each in done["runs"]] == ["done"]
        there = only(server, run.run_id).info.run_id
        assert server.all_points(there) == run.points()
    assert fingerprint(store) == before
