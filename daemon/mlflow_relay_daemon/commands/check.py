"""`mlflow-relay check`: one line for each thing that a node needs, with the mend."""

from __future__ import annotations

import json
import os
import shutil
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from mlflow_relay._version import __version__
from mlflow_relay.paths import journal_dir
from mlflow_relay_daemon.commands._check_access import (
    FAIL,
    OK,
    WARN,
    Finding,
    check_group,
    check_http,
    check_logout,
    check_secrets,
)
from mlflow_relay_daemon.commands._json import SCHEMA_VERSION, print_json
from mlflow_relay_daemon.commands._options import PLACE, example, with_config
from mlflow_relay_daemon.commands._terminal import fold, stdout_width
from mlflow_relay_daemon.config import SETTINGS, Config, describe, unknown_variables
from mlflow_relay_daemon.control_client import ControlClient, NoDaemon
from mlflow_relay_daemon.exits import DEGRADED, DONE, CommandError
from mlflow_relay_daemon.spool.disk import lock_holder
from mlflow_relay_daemon.words import bytes_text, one_line

STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}

LOCK_NAME = "lock"  # in the spool's folder

SYNCS = 9  # the median of so many is steady, and takes a tenth of a second on a slow disk
SYNC_BYTES = 64_000
SYNC_SLOW_MS = 50.0  # an ack waits for one: half of the 100 ms that a log call's ack may take
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


@click.command(
    epilog="Exit code: 0 all is well (warnings included), 1 something FAILs, 78 bad "
    "configuration.\n\n" + example("mlflow-relay check", "mlflow-relay check --settings")
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--settings", is_flag=True, help="Print all settings as a file, with their origins.")
@with_config(*PLACE, "group", "tracking_uri", "token_file", "offline", "http_port")
def check(config: Config, as_json: bool, settings: bool) -> None:
    """Check this node's setup, and say how to mend it.

    Configuration, runtime folder, spool, its disk and lock, daemon, server and credentials, who may
    use the daemon, its HTTP port, and what a logout takes away.
    """
    if settings:
        _print_settings(config, as_json)
        return
    findings = []
    for finding in gather_findings(config):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "checks": [vars(f) for f in findings]})
    failed = any(finding.state == FAIL for finding in findings)
    click.get_current_context().exit(DEGRADED if failed else DONE)


# --- gather -----------------------------------------------------------------------------------


def gather_findings(config: Config) -> Iterator[Finding]:
    """Yield one finding after the other; a check that breaks is itself a finding."""
    checks: dict[str, Callable[[Config], Finding]] = {
        "config": check_config,
        "runtime": check_runtime_dir,
        "spool": check_spool,
        "disk": check_free_space,
        "lock": check_lock,
        "daemon": check_daemon,
        "server": check_server,
        "secrets": check_secrets,
        "group": check_group,
        "http": check_http,
        "logout": check_logout,
    }
    for name, function in checks.items():
        try:
            yield function(config)
        except OSError as error:
            where = error.filename or "the system"
            yield Finding(name, FAIL, f"{where}: {error.strerror}", "mend that and check again")


def check_config(config: Config) -> Finding:
    """Say where the settings come from; they are in range, or nobody would be here."""
    misspelt = unknown_variables()
    if misspelt:
        name, meant = next(iter(misspelt.items()))
        return Finding("config", WARN, f"{name} is no setting", f"did you mean {meant}?")
    origins = sorted({origin for origin in config.origin.values() if origin != "default"})
    return Finding("config", OK, "from " + (", ".join(origins) or "defaults alone"))


def check_runtime_dir(config: Config) -> Finding:
    """Check the folder of socket and journals: there, writable, and not open to everyone."""
    folder = config.socket.parent
    if not folder.exists():
        parent = _first_existing(folder)
        if not os.access(parent, os.W_OK | os.X_OK):
            return Finding("runtime", FAIL, f"{folder} cannot be made in {parent}",
                           "name another place with MLFLOW_RELAY_SOCKET")  # fmt: skip
        return Finding("runtime", OK, f"{folder} will be made")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IWOTH:
        return Finding("runtime", FAIL, f"{folder} is writable by everyone ({mode:04o})",
                       f"chmod 700 {folder}")  # fmt: skip
    if os.access(journal_dir(config.socket), os.W_OK | os.X_OK):
        return Finding("runtime", OK, f"{folder} ({mode:04o})")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("runtime", FAIL, f"{folder} is not writable for this user",
                       "run as its owner or in its group, or set MLFLOW_RELAY_SOCKET")  # fmt: skip
    return Finding("runtime", OK, f"{folder} ({mode:04o})")


def check_spool(config: Config) -> Finding:
    """Write and sync in the spool, as the daemon does before each ack."""
    folder = _first_existing(config.spool)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("spool", FAIL, f"{folder} is not writable for this user",
                       "run as its owner, or name another with --spool")  # fmt: skip
    sync_ms = _sync_time_ms(folder)
    will = "" if folder == config.spool else " (will be made)"
    text = f"{config.spool}{will}, {sync_ms:.1f} ms per fdatasync"
    file_system = _file_system(folder)
    if file_system in MEMORY_FILE_SYSTEMS:
        return Finding("spool", WARN, f"{text}, on {file_system}: memory, gone after a reboot",
                       "put it on a disk with --spool or MLFLOW_RELAY_SPOOL")  # fmt: skip
    if sync_ms > SYNC_SLOW_MS:
        return Finding("spool", WARN, f"{text} on {file_system}: slow, acks will be late",
                       "put it on a local disk with --spool or MLFLOW_RELAY_SPOOL")  # fmt: skip
    return Finding("spool", OK, f"{text} on {file_system}")


def check_free_space(config: Config) -> Finding:
    """Compare the free space with the floor below which nothing is acknowledged."""
    free = shutil.disk_usage(_first_existing(config.spool)).free
    text = f"{bytes_text(free)} free, floor {bytes_text(config.free_bytes_min)}"
    if free < config.free_bytes_min:
        return Finding("disk", FAIL, text, "free some space, or lower free_bytes_min")
    if free < 2 * config.free_bytes_min:
        return Finding("disk", WARN, text, "free some space before the floor is reached")
    return Finding("disk", OK, text)


def check_lock(config: Config) -> Finding:
    """Look who holds the spool, without taking it: there is one daemon per spool."""
    try:
        fd = os.open(config.spool / LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:
        return Finding("lock", OK, "free, no daemon has used this spool yet")
    try:
        holder = lock_holder(fd)
    finally:
        os.close(fd)
    if holder is None:
        return Finding("lock", OK, "free")
    if holder == 0:  # the kernel does not know pids of another node or container
        return Finding("lock", FAIL, "held by a daemon of another node or container",
                       "give each node a spool of its own with --spool")  # fmt: skip
    return Finding("lock", OK, f"held by the daemon with pid {holder}")


def check_daemon(config: Config) -> Finding:
    """Ask the daemon who it is."""
    try:
        with ControlClient(config.socket) as client:
            answer = client.ping()
    except NoDaemon as no_daemon:
        text, _, mend = str(no_daemon).partition(": ")
        return Finding("daemon", WARN, text, mend)
    except CommandError as error:
        text, _, mend = str(error).partition(": ")
        return Finding("daemon", FAIL, text, mend or "restart the daemon")
    text = f"pid {answer.get('pid')}, version {answer.get('version')}"
    if answer.get("version") != __version__:
        return Finding("daemon", WARN, f"{text}, but this command is {__version__}",
                       "restart the daemon to bring it up to date")  # fmt: skip
    return Finding("daemon", OK, text)


def check_server(config: Config) -> Finding:
    """Reach the server with the daemon's own code and this shell's credentials."""
    from mlflow_relay_daemon.sinks import NotAllowed, SinkError
    from mlflow_relay_daemon.sinks.redact import redact_uri

    uri = one_line(redact_uri(config.tracking_uri))
    if config.offline:
        return Finding("server", OK, f"{uri} not asked: offline")
    if config.tracking_uri.startswith("sqlite:///"):
        return _check_sqlite(config.tracking_uri, uri)
    from mlflow_relay_daemon.sinks.open import open_sink

    try:
        sink = open_sink(config.tracking_uri, token_file=config.token_file)
        try:
            version = sink.ping()
        finally:
            sink.close()
    except (NotAllowed, ValueError) as error:
        return Finding("server", FAIL, str(error))  # these say what to do
    except SinkError as error:
        return Finding("server", FAIL, str(error), "check address, network and the server's log")
    return Finding("server", OK, f"{uri}, MLflow {version or 'of unknown version'}")


def _check_sqlite(full_uri: str, shown_uri: str) -> Finding:
    """Check the file without mlflow, which takes seconds to import."""
    file = Path(full_uri.removeprefix("sqlite:///").partition("?")[0])
    place = file if file.exists() else _first_existing(file.parent)
    if not os.access(place, os.W_OK):
        return Finding("server", FAIL, f"{shown_uri}: {place} is not writable for this user",
                       "name a server or another store with --tracking-uri")  # fmt: skip
    return Finding("server", OK, f"{shown_uri}, a local store")


def _first_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _sync_time_ms(folder: Path) -> float:
    """Return the median time of appending and syncing one group; leaves nothing behind."""
    times_ms = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(SYNCS):
            started_s = time.perf_counter()
            os.write(file.fileno(), bytes(SYNC_BYTES))
            os.fdatasync(file.fileno())
            times_ms.append((time.perf_counter() - started_s) * 1000)
    return statistics.median(times_ms)


def _file_system(path: Path) -> str:
    """Return the type of the file system, as /proc/mounts has it."""
    best, kind = "", "an unknown file system"
    real = str(path.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, found, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        inside = mount in ("/", real) or real.startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


# --- print ------------------------------------------------------------------------------------


def finding_text(finding: Finding) -> str:
    """Return one finding as a line. Pure."""
    mend = f": {finding.mend}" if finding.mend else ""
    return f"{finding.state:<4}  {finding.name:<8}{one_line(finding.text + mend)}"


def _print_finding(finding: Finding) -> None:
    lines = fold(finding_text(finding), stdout_width(), " " * 14)
    state, rest = lines[0][:4], lines[0][4:]
    click.echo(click.style(state, fg=STYLES[finding.state]) + rest)
    for line in lines[1:]:
        click.echo(line)


def _print_settings(config: Config, as_json: bool) -> None:
    rows = describe(config)
    if as_json:
        values = {name: {"value": value, "origin": origin} for name, value, origin in rows}
        print_json({"schema_version": SCHEMA_VERSION, "settings": values})
        return
    for line in settings_lines(rows):
        click.echo(line)


def settings_lines(rows: list[tuple[str, str, str]]) -> list[str]:
    """Return all settings as a file that can be kept: defaults stand in it as comments. Pure."""
    lines = ["# The settings of mlflow-relay on this node. A variable MLFLOW_RELAY_<NAME> wins."]
    for name, value, origin in rows:
        setting = SETTINGS[name]
        bare = setting.kind in ("seconds", "count", "switch") and value != "none"
        written = value if bare else json.dumps(value, ensure_ascii=False)
        lines += ["", f"# {setting.help}", f"# Allowed: {setting.allowed}. From: {origin}."]
        lines.append(f"{'# ' if origin == 'default' else ''}{name} = {written}")
    return lines
