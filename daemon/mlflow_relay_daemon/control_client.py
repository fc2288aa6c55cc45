"""Talks to the daemon of this node: one question, one answer.

Request:  [CONTROL, map {"command": str, **arguments}]
Reply:    [REPLY, map {"ok": true, ...}] or [REPLY, map {"ok": false, "error": "one line"}]
Source:   mlflow_relay.messages
"""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from mlflow_relay.errors import FormatError
from mlflow_relay.messages import CONTROL, REPLY, pack_map, unpack_map
from mlflow_relay_daemon.endpoint import hidden_path
from mlflow_relay_daemon.exits import DEGRADED, NO_DAEMON, CommandError

ANSWER_TIMEOUT_S = 5.0  # a daemon that is alive answers within one fsync; 5 s outlasts a slow disk


class NoDaemon(CommandError):
    """Nobody answers at the socket."""

    exit_code = NO_DAEMON


class ClosedToUser(NoDaemon):
    """There is a daemon, and its socket is not for this user."""


class DaemonRefused(CommandError):
    """The daemon answered that it cannot do this, and why."""

    exit_code = DEGRADED


class ControlClient:
    """A connection to the daemon at a socket; a context manager."""

    def __init__(self, socket: Path, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._path = socket
        self._timeout_s = timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer: zmq.Socket[bytes] | None = None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close at once; an unanswered question is forgotten."""
        self._hang_up()
        self._context.term()

    # --- the questions ------------------------------------------------------------------------

    def ping(self) -> dict[str, Any]:
        """Return pid and version of the daemon."""
        return self.ask("ping")

    def status(self) -> dict[str, Any]:
        """Return the status object (docs: `mlflow-relay status --json`)."""
        status = self.ask("status").get("status")
        if not isinstance(status, dict):
            raise self._stranger()
        return status

    def flush(self, runs: Sequence[str] = ()) -> dict[str, int]:
        """Make the daemon try at once.

        Returns: per relay run id the records accepted so far; a run is flushed when its
                 settled_records reach that number.
        """
        targets = self.ask("flush", runs=list(runs)).get("targets")
        if not isinstance(targets, dict):
            raise self._stranger()
        return {str(run): int(records) for run, records in targets.items()}

    def dead_letters(
        self, action: str, run: str | None = None, ids: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """List, retry or drop what MLflow refused; a retry waits for MLflow.

        Args:    action: list, retry or drop. run: of this relay run id only. ids: only these.
        Returns: {"dead_letters": [...]} for list, else {"count": n}.
        """
        chosen = None if ids is None else list(ids)
        ask = self.ask_patiently if action == "retry" else self.ask
        return ask("dead_letters", action=action, run=run, ids=chosen)

    def link(self, run: str, to: str, kind: str | None = None) -> list[dict[str, str]]:
        """Name the run that a waiting link of a run is to go to.

        Args:    run: its relay run id. to: a relay run id or an MLflow run id.
                 kind: "resume" or "fork"; None: the one that waits.
        Returns: the links that were decided: kind, asked (the id before), to.
        """
        found: list[dict[str, str]] = self.ask("lineage", action="link", run=run, to=to, kind=kind)[
            "links"
        ]
        return found

    def drop_links(self, run: str) -> list[dict[str, str]]:
        """Give up the waiting links of a run; return them, as `link` does."""
        found: list[dict[str, str]] = self.ask("lineage", action="drop", run=run)["links"]
        return found

    def relatives(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return what the server knows of these runs, and of their resumes and forks."""
        found: list[dict[str, Any]] = self.ask("lineage", action="relatives", ids=list(ids))["runs"]
        return found

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to one command.

        Raises:  NoDaemon: nobody answered in time. DaemonRefused: it said no.
        """
        dealer = self._dealer or self._call_up()
        dealer.send_multipart([CONTROL, pack_map({"command": command, **arguments})])
        if not dealer.poll(int(self._timeout_s * 1000)):
            self._hang_up()  # a late answer must not be taken for that to the next question
            raise NoDaemon(
                f"the daemon at {self._path} is there but did not answer within {self._timeout_s:g}"
                " s: its disk may be stuck, see its log; try again, or restart it"
            )
        return self._understand(dealer.recv_multipart())

    def ask_patiently(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a command that waits for the server, as long as the daemon lives.

        Raises:  NoDaemon: nobody answers pings, or a new daemon does. DaemonRefused: it said no.
        """
        dealer = self._dealer or self._call_up()
        pid = self.ping()["pid"]
        dealer.send_multipart([CONTROL, pack_map({"command": command, **arguments})])
        while not dealer.poll(int(self._timeout_s * 1000)):
            with ControlClient(self._path, self._timeout_s) as other:
                if other.ping()["pid"] != pid:
                    raise NoDaemon("the daemon was restarted meanwhile: try again")
        return self._understand(dealer.recv_multipart())

    # --- the wire -----------------------------------------------------------------------------

    def _call_up(self) -> zmq.Socket[bytes]:
        hidden = hidden_path(self._path)
        path = hidden if hidden.exists() and not self._path.exists() else self._path
        # ZeroMQ retries a dead address in silence until the timeout; a plain connect knows at once.
        probe_socket(path)
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0  # no MAXMSGSIZE: the status of thousands of runs may pass a frame's limit
        dealer.connect(f"ipc://{path}")
        self._dealer = dealer
        return dealer

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._dealer.close(linger=0)
            self._dealer = None

    def _understand(self, frames: list[bytes]) -> dict[str, Any]:
        if len(frames) != 2 or frames[0] != REPLY:
            raise self._stranger()
        try:
            reply = unpack_map(frames[1])
        except FormatError:
            raise self._stranger() from None
        if not reply.get("ok"):
            raise DaemonRefused(f"the daemon refused: {reply.get('error', 'it gave no reason')}")
        return reply

    def _stranger(self) -> DaemonRefused:
        self._hang_up()
        return DaemonRefused(
            f"what answers at {self._path} speaks another version: restart the daemon, or use the "
            "mlflow-relay it came with"
        )


def probe_socket(path: Path) -> None:
    """Return if somebody listens at the socket.

    Raises:  NoDaemon: with the reason and the mend.
    """
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (TimeoutError, BlockingIOError):
            return  # somebody listens, and is busy
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise ClosedToUser(
                    f"the daemon's socket {path} is closed to this user: run as the user that "
                    "started it, or as a member of its group"
                ) from None
            raise NoDaemon(
                f"no daemon answers at {path}: start one with `mlflow-relay daemon`, or name its "
                "socket with --socket or MLFLOW_RELAY_SOCKET"
            ) from None
