"""Gets the status object: from the daemon, or from the spool when none runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ClosedToUser, ControlClient, NoDaemon
from mlflow_relay_daemon.exits import CommandError


@dataclass(frozen=True)
class View:
    """A status object, and what the operator should know about where it comes from."""

    status: dict[str, Any]
    note: str | None = None  # one line; None: it comes from the daemon


def gather(config: Config) -> View:
    """Return what the daemon says, or what the spool holds.

    Raises:  CommandError: the spool cannot be read, or the daemon refuses.
    """
    try:
        with ControlClient(config.socket) as client:
            return View(client.status())
    except ClosedToUser:
        raise  # what this user's own spool holds is not what was asked for
    except NoDaemon as no_daemon:
        return View(
            _read_spool(config), f"{no_daemon}; shown is what the spool {config.spool} holds"
        )


def _read_spool(config: Config) -> dict[str, Any]:
    from mlflow_relay_daemon.status import read_spool

    try:
        return read_spool(config.spool)
    except OSError as error:
        raise CommandError(
            f"no daemon answers at {config.socket}, and the spool {config.spool} cannot be read: "
            f"{error.strerror or error}: run as its owner, or name another with --spool"
        ) from None
