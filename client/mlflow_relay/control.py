"""One question to the daemon, over its socket: for the drop-ins, which need its local endpoint."""

from __future__ import annotations

import socket as sockets
from pathlib import Path
from typing import Any

import zmq

from ._version import __version__
from .errors import RelayError
from .messages import CONTROL, REPLY, pack_map, unpack_map

#: Starting the endpoint imports a web server: a second on a busy node.
ANSWER_TIMEOUT_S = 20.0


class NoDaemon(RelayError):
    """Nobody listens at the socket."""


def probe(path: Path) -> None:
    """Raises: NoDaemon: nobody listens at the socket."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return  # somebody listens, and is busy
        except OSError as error:
            raise NoDaemon(
                f"no daemon answers at {path} ({error.strerror}): start one with `mlflow-relay "
                "daemon`, let this process do it with MLFLOW_RELAY_AUTOSTART=1, or name its "
                "socket in MLFLOW_RELAY_SOCKET"
            ) from None


def ask(path: Path, command: str) -> dict[str, Any]:
    """Return the daemon's answer to a command without arguments.

    Raises: NoDaemon; RelayError: it refuses, does not answer, or speaks another version.
    """
    probe(path)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"ipc://{path}")
        dealer.send_multipart((CONTROL, pack_map({"command": command})))
        if not dealer.poll(int(ANSWER_TIMEOUT_S * 1000)):
            raise RelayError(
                f"the daemon at {path} does not answer: its disk may be stuck, or it is of another "
                "version than this client; see its log, or restart it"
            )
        kind, payload = dealer.recv_multipart()
    answer = unpack_map(payload)
    if kind != REPLY or not answer.get("ok"):
        reason = str(answer.get("error", "no reason given"))
        if "is no command of this daemon" in reason:
            reason += f": it is older than this client ({__version__}), restart it after the update"
        raise RelayError(f"the daemon at {path} refuses: {reason}")
    return answer
