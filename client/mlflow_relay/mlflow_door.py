"""Where this process meets the daemon: `relay://` → socket, local endpoint, token.

relay://                          the usual socket, or MLFLOW_RELAY_SOCKET
relay:///run/mlflow-relay/relay.sock
relay://?autostart=1&journal_bytes_max=268435456&end_timeout_s=5
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from . import settings
from ._version import __version__
from .autostart import start_daemon
from .control import NoDaemon, ask, probe
from .errors import RelayError
from .paths import default_socket

SCHEME = "relay"
TOKEN_NAME = "http-token"  # noqa: S105  # the file's name, beside the socket
#: What plugin and daemon say to each other besides MLflow's API.
API_VERSION = 1
START_TIMEOUT_S = 20.0
_OPTIONS = frozenset({"autostart", "journal_bytes_max", "end_timeout_s"})


class Options(NamedTuple):
    """What a relay:// address says."""

    socket: Path
    autostart: bool
    journal_bytes_max: int
    end_timeout_s: float


class Endpoint(NamedTuple):
    """The daemon's local endpoint."""

    url: str
    token: str


def read_uri(uri: str) -> Options:
    """Return what an address says; what it does not say is asked of the environment.

    Raises: RelayError: it cannot be read; says why.
    """
    parts = urlsplit(uri)
    if parts.scheme != SCHEME or parts.netloc:
        raise RelayError(f"{uri!r}: write relay:// or relay:///path/to/relay.sock")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(given) - _OPTIONS)
    if unknown:
        known = ", ".join(sorted(_OPTIONS))
        raise RelayError(f"{uri!r}: {unknown[0]!r} is no option; there are {known}")
    names = {name: f"MLFLOW_RELAY_{name.upper()}" for name in _OPTIONS}
    env = {**os.environ, **{names[name]: value for name, value in given.items()}}
    return Options(
        Path(parts.path) if parts.path else default_socket(),
        settings.autostart(env),
        settings.journal_bytes_max(env),
        settings.end_timeout_s(env),
    )


class Door:
    """Finds the daemon's endpoint; asks again when the daemon is another."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._lock = Lock()
        self._known: tuple[tuple[int, int], Endpoint] | None = None

    def endpoint(self) -> Endpoint:
        """Return where the daemon answers now.

        Raises: NoDaemon: there is none; at once, not after MLflow's minutes of retries.
        """
        try:
            probe(self.options.socket)
        except NoDaemon:
            if not self.options.autostart:
                raise
            self._start()
        with self._lock:
            mark = self._mark()
            if self._known is None or mark is None or self._known[0] != mark:
                endpoint = self._ask()
                self._known = (self._mark() or (0, 0), endpoint)
            return self._known[1]

    @property
    def last(self) -> Endpoint | None:
        """Where the daemon answered when it was asked last."""
        return self._known[1] if self._known else None

    def _mark(self) -> tuple[int, int] | None:
        """Return what changes when the endpoint is started anew."""
        try:
            found = os.stat(self.options.socket.parent / TOKEN_NAME)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _ask(self) -> Endpoint:
        answer = ask(self.options.socket, "door")
        if answer["api"] != API_VERSION:
            raise RelayError(
                f"this mlflow-relay ({__version__}) and its daemon ({answer['version']}) do not "
                "understand each other: update the older one, and restart the daemon"
            )
        _leave_out_proxies()
        return Endpoint(f"http://127.0.0.1:{answer['port']}", str(answer["token"]))

    def _start(self) -> None:
        self.options.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        start_daemon(self.options.socket)
        until_s = monotonic() + START_TIMEOUT_S
        while not self._answers() and monotonic() < until_s:
            sleep(0.05)
        probe(self.options.socket)

    def _answers(self) -> bool:
        try:
            probe(self.options.socket)
        except NoDaemon:
            return False
        return True


def _leave_out_proxies() -> None:
    """A cluster's HTTP proxy cannot reach this node's loopback."""
    for name in ("no_proxy", "NO_PROXY"):
        listed = os.environ.get(name, "")
        if name in os.environ and "127.0.0.1" not in listed and listed.strip() != "*":
            os.environ[name] = f"{listed},127.0.0.1"
    if not {"no_proxy", "NO_PROXY"} & set(os.environ):
        os.environ["NO_PROXY"] = "127.0.0.1"
