"""The spools of all nodes in one folder of a shared file system, read without their daemons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.spool.disk import lock_holder
from mlflow_relay_daemon.spool.spool import LOCK, RUNS
from mlflow_relay_daemon.status import read_spool
from mlflow_relay_daemon.words import one_line


@dataclass(frozen=True)
class NodeSpool:
    """One node's spool."""

    name: str  # of its folder, which is the node's name by default
    folder: Path
    is_served: bool  # a daemon holds it
    status: dict[str, Any]  # as without a daemon


def read_nodes(folder: Path) -> list[NodeSpool]:
    """Return the spools in a folder by name.

    Raises: CommandError: there is none, or one cannot be read: a sum without it would be untrue.
    """
    found = [_read(path) for path in sorted(_spools(folder))]
    if not found:
        raise CommandError(
            f"{folder}: there is no spool in it: name the folder that holds the nodes' spools, "
            "such as ~/.local/state/mlflow-relay"
        )
    return found


def merged(nodes: list[NodeSpool]) -> dict[str, Any]:
    """Return one status object for all of them, each run with its `node`. Pure."""
    statuses = [node.status for node in nodes]
    disks = [status["disk"] for status in statuses]
    return {
        "schema_version": statuses[0]["schema_version"],
        "time_ms": max(status["time_ms"] for status in statuses),
        "daemon": None,
        "server": None,
        "disk": {**disks[0], "spool_bytes": sum(disk["spool_bytes"] for disk in disks)},
        "counters": {
            name: sum(status["counters"][name] for status in statuses)
            for name in statuses[0]["counters"]
        },
        "nodes": [
            {"node": node.name, "spool": str(node.folder), "served": node.is_served}
            for node in nodes
        ],
        "runs": [{**run, "node": node.name} for node in nodes for run in node.status["runs"]],
    }  # fmt: skip


def node_lines(status: dict[str, Any]) -> list[str]:
    """Return what is known of the nodes, above the table of runs. Pure."""
    nodes = status["nodes"]
    silent = [node["node"] for node in nodes if not node["served"]]
    lines = [f"nodes   {len(nodes)}, with a daemon {len(nodes) - len(silent)}"]
    waiting = {run["node"] for run in status["runs"] if run["waiting_records"]}
    lines += [
        f"! {one_line(name)}: records wait, and no daemon serves this spool: `mlflow-relay sync` "
        "delivers them"
        for name in silent
        if name in waiting
    ]
    return lines


def _spools(folder: Path) -> Iterator[Path]:
    try:
        paths = [folder, *folder.iterdir()]
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}: name another folder") from None
    return (path for path in paths if (path / RUNS).is_dir())


def _read(folder: Path) -> NodeSpool:
    try:
        return NodeSpool(folder.name, folder, _is_served(folder), read_spool(folder))
    except OSError as error:
        raise CommandError(
            f"{folder}: {error.strerror or error}: run as its owner, or name another folder"
        ) from None


def _is_served(folder: Path) -> bool:
    """A POSIX lock is seen from other nodes, too, where the file system is mounted with locks."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        return lock_holder(fd) is not None
    finally:
        os.close(fd)
