"""Starts a daemon for this node when a rank asks for one and none is there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

log = logging.getLogger("mlflow_relay")

#: The daemon goes again when nobody has needed it for so long and all is delivered.
EXIT_WHEN_IDLE_S = 60


def start_daemon(socket: Path) -> None:
    """Start a daemon that outlives this process; of several ranks' daemons one wins by its lock.

    A failure is logged and nothing else: the journal keeps the records.
    """
    import subprocess  # only here: 5 ms of import that no other rank should pay

    command = [sys.executable, "-m", "mlflow_relay_daemon", "daemon", "--socket", str(socket)]
    command += ["--exit-when-idle", str(EXIT_WHEN_IDLE_S)]
    try:
        with open(socket.parent / "daemon.log", "ab") as output:
            subprocess.Popen(  # noqa: S603  # our own interpreter, our own module
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        log.error("no daemon could be started: %s", error)
