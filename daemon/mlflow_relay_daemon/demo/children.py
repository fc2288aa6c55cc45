"""The processes of the demo: an MLflow server, a daemon, ranks. Nothing of them is left behind.

Each has a session of its own, so that Ctrl+C reaches only the one who tidies up. They get an
environment without what the user has set for MLflow or a launcher: the demo is about itself.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from mlflow_relay_daemon.control_client import ControlClient
from mlflow_relay_daemon.exits import CommandError

from . import trainer

RANKS = 4
HOST = "127.0.0.1"
#: Below Linux's range for outgoing connections (32768 and up): while the server is down, nobody's
#: client socket can be given its port.
PORTS = range(20000, 32000)
PORT_ATTEMPTS = 100
#: Four journals take 64 MB; where /dev/shm has less (64 MB in a plain container), they go on disk.
MEMORY_BYTES_MIN = 256 << 20

_FOREIGN = ("MLFLOW_", "SLURM_", "PMI", "OMPI_", "MV2_", "PALS_", "TORCHELASTIC_", "GROUP_")
_FOREIGN_NAMES = ("NODE_RANK", "NOTIFY_SOCKET", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SERVER_ENVIRON = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # starts faster; not needed here
    "MLFLOW_DISABLE_TELEMETRY": "true",  # the demo stays on this machine
    "DO_NOT_TRACK": "true",
}


class Folders:
    """Where the demo keeps everything: files on a disk, and socket and journals in memory."""

    def __init__(self) -> None:
        name = f"mlflow-relay-demo-{os.getpid()}-"
        memory = Path("/dev/shm")  # noqa: S108  # a folder of our own is made in it, 0700
        has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES_MIN
        # A unix socket's path is short, TMPDIR may not be.
        self.runtime = _new_folder(name, str(memory) if has_room else "/tmp")  # noqa: S108
        try:
            self.files = _new_folder(name, None)
        except CommandError:
            self.runtime.rmdir()
            raise

    def remove(self) -> None:
        for folder in (self.files, self.runtime):
            shutil.rmtree(folder, ignore_errors=True)


class Child:
    """A process and those that it starts; its output goes into a file."""

    may_finish = False  #: by itself, before it is killed

    def __init__(self, name: str, log: Path) -> None:
        self.name, self._log = name, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, environ: dict[str, str] | None = None) -> None:
        """Start `python -m COMMAND`."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own modules
                [sys.executable, "-m", *command],
                env={**_clean_environ(), **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL, for those that it has started as well."""
        if self._process is not None:
            if self._process.poll() is None or not self.may_finish:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def exit_code(self) -> int | None:
        """Return None while it runs, or while it is meant not to."""
        return None if self._process is None else self._process.poll()

    def has_finished(self) -> bool:
        return self.exit_code() == 0

    def last_line(self) -> str:
        """Return what it said last, '' if nothing yet."""
        with suppress(FileNotFoundError), self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            # What follows the last newline is still being written.
            lines = log.read().decode(errors="replace").rpartition("\n")[0].splitlines()
            return next((line for line in reversed(lines) if line.strip()), "")
        return ""

    def check(self) -> None:
        """Raises: CommandError: it has ended, and should not have, or not so."""
        code = self.exit_code()
        if code or (code == 0 and not self.may_finish):
            raise CommandError(
                f"{self.name} ended with {code}, which is not part of the story: "
                f"{self.last_line() or 'it said nothing'}"
            )


class Server(Child):
    """`mlflow server` on SQLite; on the same port each time."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__("the MLflow server", folder / "server.log")
        self._folder = folder
        self.port = port
        self.uri = f"http://{HOST}:{port}"

    def begin(self) -> None:
        """Start; `is_up` tells when it answers."""
        self.start(
            *("mlflow", "server", "--host", HOST, "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
            environ=_SERVER_ENVIRON,
        )

    def is_up(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().read() == b"OK"
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class Daemon(Child):
    """`mlflow-relay daemon`, with a settings file of its own."""

    def __init__(self, folders: Folders, tracking_uri: str) -> None:
        super().__init__("the daemon", folders.files / "daemon.log")
        self.socket = folders.runtime / "relay.sock"
        self._config = folders.files / "mlflow-relay.toml"
        self._settings = {
            "spool": str(folders.files / "spool"),
            "socket": str(self.socket),
            "tracking_uri": tracking_uri,
            "free_bytes_min": 0,
            "node_metrics": False,  # every point in MLflow is to be one that a rank has noted
            "retry_wait_s_max": 1,  # the default, 30 s, is for outages of hours
        }

    def begin(self) -> None:
        """Start; `is_up` tells when it answers."""
        # As far as texts and numbers go, TOML writes values as JSON does.
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self._settings.items()
        ]
        self._config.write_text("".join(lines), encoding="utf-8")
        self.start("mlflow_relay_daemon", "daemon", "--config", str(self._config))

    def is_up(self) -> bool:
        try:
            with ControlClient(self.socket, timeout_s=1.0) as client:
                return bool(client.ping()["pid"] == self.pid)
        except CommandError:
            return False


class Rank(Child):
    """One process of the training, started as torchrun would."""

    may_finish = True

    def __init__(self, rank: int, folders: Folders) -> None:
        super().__init__(f"rank {rank}", folders.files / f"rank_{rank}.log")
        self._rank, self._folders = rank, folders

    def begin(self, step_s: float, socket: Path) -> None:
        meeting_place = self._folders.runtime / "all_reduce"
        self.start(
            *(trainer.__name__, str(self._folders.files), str(meeting_place), str(step_s)),
            environ={
                "RANK": str(self._rank),
                "LOCAL_RANK": str(self._rank),
                "WORLD_SIZE": str(RANKS),
                "LOCAL_WORLD_SIZE": str(RANKS),
                "MLFLOW_RELAY_SOCKET": str(socket),
                # Matrices of 32 x 65: threads would only wait for each other.
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            },
        )


def _new_folder(name: str, parent: str | None) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=name, dir=parent))
    except OSError as error:
        raise CommandError(
            f"no temporary folder can be made: {error.strerror} ({error.filename}): set TMPDIR to "
            "a folder that has space"
        ) from error


def _clean_environ() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name.upper() not in _FOREIGN_NAMES
    }


def choose_port(wanted: int | None) -> int:
    """Return this port, or a free one. Raises: CommandError: it is taken, or none is free."""
    if wanted is not None:
        return _checked(wanted)
    for port in random.sample(PORTS, PORT_ATTEMPTS):
        with suppress(CommandError):
            return _checked(port)
    raise CommandError(f"no free port from {PORTS.start} to {PORTS.stop}: name one with --port")


def _checked(port: int) -> int:
    with sockets.socket() as probe:
        probe.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise CommandError(f"port {port}: {error.strerror}: choose another --port") from None
    return port
