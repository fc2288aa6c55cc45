"""Checks of who may reach this node's daemon, with which secrets, and what may take it away."""

from __future__ import annotations

import os
import pwd
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow_relay_daemon.access import gid_of
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ControlClient
from mlflow_relay_daemon.exits import CommandError

OK, WARN, FAIL = "ok", "warn", "FAIL"

HOST = "127.0.0.1"
MEMORY = Path("/dev/shm")  # noqa: S108  # only looked at
SYSTEMD, LINGER = Path("/run/systemd/system"), Path("/var/lib/systemd/linger")
SYSTEM_UIDS = 1000  # users below it keep what they have: logind.conf(5), RemoveIPC


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: str  # OK, WARN or FAIL
    text: str
    mend: str = ""  # what to do; for WARN and FAIL


def check_secrets(config: Config) -> Finding:
    """Say which credentials are in force, never what they are, and what exposes them."""
    name = "secrets"
    if "@" in config.tracking_uri.partition("://")[2].partition("/")[0]:
        origin = config.origin.get("tracking_uri", "default")
        exposed = " and so in the list of processes" if origin.startswith("flag") else ""
        return Finding(name, WARN, f"the tracking URI ({origin}) holds a user{exposed}",
                       "use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")  # fmt: skip
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return Finding(name, WARN, "MLFLOW_TRACKING_INSECURE_TLS accepts any certificate",
                       "name the server's one with MLFLOW_TRACKING_SERVER_CERT_PATH")  # fmt: skip
    file = Path("~/.mlflow/credentials").expanduser()
    if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding(name, WARN, f"{file} is readable by others", f"chmod 600 {file}")
    if config.token_file is not None:
        return _check_token_file(config.token_file)
    # MLflow's own order of precedence
    if os.environ.get("MLFLOW_TRACKING_USERNAME") and os.environ.get("MLFLOW_TRACKING_PASSWORD"):
        return Finding(name, OK, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    if file.exists():
        return Finding(name, OK, str(file))
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return Finding(name, OK, "MLFLOW_TRACKING_TOKEN")
    return Finding(name, OK, "none set")


def _check_token_file(path: Path) -> Finding:
    from mlflow_relay_daemon.sinks import NotAllowed
    from mlflow_relay_daemon.sinks.credentials import read_token

    try:
        read_token(str(path))
    except NotAllowed as error:
        text, _, mend = str(error).rpartition(": ")
        return Finding("secrets", FAIL, text, mend)
    if stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO:
        return Finding("secrets", WARN, f"{path} is open to all users", f"chmod o= {path}")
    return Finding("secrets", OK, f"the token in {path}")


def check_group(config: Config) -> Finding:
    """Say whose daemon this is, and whether this user may use it."""
    folder = config.socket.parent
    owner = folder.stat().st_uid if folder.exists() else os.getuid()
    gid = gid_of(config.group)
    if owner not in (os.getuid(), 0) and os.getuid() != 0:
        journals = folder / "journals"
        if os.access(journals, os.W_OK | os.X_OK):
            return Finding("group", OK, f"the daemon of uid {owner} serves this user")
        return Finding("group", FAIL, f"the daemon of uid {owner} does not serve this user",
                       "ask for its group, or set MLFLOW_RELAY_SOCKET to a path")  # fmt: skip
    if gid is None:
        return Finding("group", OK, "none: the daemon is for its own user alone")
    if gid not in (os.getegid(), *os.getgroups()) and os.getuid() != 0:
        return Finding("group", FAIL, f"this user is not in the group {config.group}",
                       "the daemon must be a member of the group that it serves")  # fmt: skip
    return Finding("group", OK, f"members of {config.group} share the daemon")


def check_http(config: Config) -> Finding:
    """Look whether the HTTP port is the daemon's, or free for it."""
    port = config.http_port
    if port is None:
        return Finding("http", OK, "no HTTP port is set")
    with suppress(CommandError), ControlClient(config.socket) as client:
        found = client.status()["daemon"].get("http_port")
        if found is not None:
            return Finding("http", OK, f"http://{HOST}:{found}/relay/")
        return Finding("http", WARN, f"the daemon could not have port {port}",
                       "see its log; choose another http_port, or 0, and restart it")  # fmt: skip
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return Finding("http", WARN, f"port {port}: {error.strerror}",
                           "choose another http_port, or 0 for any that is free")  # fmt: skip
    return Finding("http", OK, f"port {port} is free")


def check_logout(config: Config) -> Finding:
    """Warn where systemd removes what a user has in /dev/shm when he logs out."""
    uid = os.getuid()
    if not config.socket.is_relative_to(MEMORY) or uid < SYSTEM_UIDS or not SYSTEMD.exists():
        return Finding("logout", OK, "nothing of the relay goes when you log out")
    with suppress(KeyError):
        if (LINGER / pwd.getpwuid(uid).pw_name).exists():
            return Finding("logout", OK, "you linger: /dev/shm stays when you log out")
    return Finding("logout", WARN, "systemd may remove socket and journals when you log out",
                   "loginctl enable-linger, or MLFLOW_RELAY_SOCKET outside /dev/shm")  # fmt: skip
