"""Experiments by name and id, as far as this daemon has heard of them: for when the server is away.

One that is made while the server is away gets an id of its own, derived from its name, so that all
nodes make up the same. The experiment itself is made with its first run; from then on its id means
the server's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

from mlflow_relay_daemon.spool.disk import Disk

log = logging.getLogger(__name__)

NAME = "experiments.json"
DEFAULT_ID, DEFAULT_NAME = "0", "Default"


class Experiments:
    """What is known of experiments; kept in one small file of the spool.

    Args: server: whose ids these are.
    """

    def __init__(self, disk: Disk, folder: Path, server: str) -> None:
        self._disk, self._path, self._server = disk, folder / NAME, server
        self._lock = threading.Lock()
        self._ids = _read(self._path, server)  # by name; None: not made yet
        self._ids.setdefault(DEFAULT_NAME, DEFAULT_ID)

    def learn(self, name: str, experiment_id: str) -> None:
        """The server has said so."""
        self._note(name, experiment_id)

    def make_later(self, name: str) -> str:
        """Return the id that an experiment has until the server gives it one. Raises: OSError."""
        self._note(name, None)
        return own_id(name)

    def id_of(self, name: str) -> str | None:
        """Return the id of an experiment; None: never heard of it."""
        with self._lock:
            if name not in self._ids:
                return None
            return self._ids[name] or own_id(name)

    def name_of(self, experiment_id: str) -> str | None:
        """Return the name of an experiment; None: never heard of it."""
        with self._lock:
            return next(
                (
                    name
                    for name, known in self._ids.items()
                    if experiment_id in (known, own_id(name))
                ),
                None,
            )

    def servers_id(self, experiment_id: str) -> str | None:
        """Return the server's id of an experiment; None: it has none yet."""
        name = self.name_of(experiment_id)
        if name is None or experiment_id != own_id(name):
            return experiment_id
        with self._lock:
            return self._ids[name]

    def own_ids(self) -> dict[str, str]:
        """Return names by the ids that were made up here."""
        with self._lock:
            return {own_id(name): name for name in self._ids}

    def known(self) -> list[dict[str, Any]]:
        """Return all experiments as MLflow's JSON."""
        with self._lock:
            names = list(self._ids)
        return [self.as_json(name) for name in names]

    def as_json(self, name: str) -> dict[str, Any]:
        """Return one experiment as MLflow's JSON."""
        experiment_id = self.id_of(name)
        return {
            "experiment_id": experiment_id,
            "name": name,
            "artifact_location": f"mlflow-artifacts:/{experiment_id}",
            "lifecycle_stage": "active",
        }

    def _note(self, name: str, experiment_id: str | None) -> None:
        with self._lock:
            if name in self._ids and self._ids[name] == experiment_id:
                return
            self._ids[name] = experiment_id
            kept = {"version": 1, "server": self._server, "ids": self._ids}
            data = json.dumps(kept, indent=1).encode()
            self._disk.replace(self._path, data, durable=True)


def own_id(name: str) -> str:
    """Return the id made up for a name: 18 digits, as MLflow's own stores without a database."""
    digest = hashlib.sha256(b"mlflow-relay experiment\0" + name.encode()).digest()
    return str(10**17 + int.from_bytes(digest[:8], "big") % (9 * 10**17))


def _read(path: Path, server: str) -> dict[str, str | None]:
    try:
        kept = json.loads(path.read_bytes())
        ids = dict(kept["ids"])
        return ids if kept["server"] == server else dict.fromkeys(ids)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): experiments are asked for anew", path, error)
        return {}
