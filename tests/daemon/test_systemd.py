"""The systemd units: exposure, syntax, where they go; and what the daemon tells systemd, to a
stand-in that listens where systemd would."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.relay import Node, _clean_environ, finish, wait_until

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
EXPOSURE_MAX = 1.5

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def install(root: Path, *arguments: str, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_relay_daemon", "install-units", *arguments],
        env={**_clean_environ(), **(environ or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def analyze(*arguments: object) -> str:
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


# ── the files ──


@needs_systemd
def test_the_system_unit_is_exposed_no_more_than_promised():
    said = analyze("security", "--offline=true", UNITS / "mlflow-relay.service")
    exposure = re.search(r"exposure level for mlflow-relay.service: ([\d.]+)", said)
    assert exposure, said
    assert float(exposure[1]) <= EXPOSURE_MAX


@needs_systemd
def test_units_are_verified_where_they_are_installed(tmp_path):
    said = install(tmp_path, "--root", str(tmp_path))
    unit = tmp_path / "etc/systemd/system/mlflow-relay.service"
    assert f"written   {unit}" in said
    assert analyze("verify", unit) == ""
    install(tmp_path, "--user", environ={"XDG_CONFIG_HOME": str(tmp_path / "config")})
    assert analyze("verify", tmp_path / "config/systemd/user/mlflow-relay.service") == ""


def test_install_units_says_what_it_did_and_does_it_once(tmp_path):
    first = install(tmp_path, "--root", str(tmp_path))
    assert first.count("written ") == 3
    assert "systemctl enable --now mlflow-relay" in first
    assert install(tmp_path, "--root", str(tmp_path)).count("unchanged ") == 3
    (tmp_path / "etc/tmpfiles.d/mlflow-relay.conf").write_text("mine")
    assert "replaced " in install(tmp_path, "--root", str(tmp_path))


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers")
def test_sysusers_and_tmpfiles_make_user_and_folders_in_a_scratch_root(tmp_path):
    install(tmp_path, "--root", str(tmp_path))
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    for program, arguments in (("sysusers", ()), ("tmpfiles", ("--create",))):
        if os.geteuid() != 0:
            pytest.skip("only root makes users")
        done = subprocess.run(
            [f"systemd-{program}", f"--root={tmp_path}", *arguments, "mlflow-relay.conf"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "mlflow-relay:" in (tmp_path / "etc/passwd").read_text()
    journals = (tmp_path / "run/mlflow-relay/journals").stat()
    assert oct(journals.st_mode) == "0o43730"
    assert f":{journals.st_gid}:" in (tmp_path / "etc/group").read_text()


def test_every_setting_of_a_unit_is_one_of_ours():
    from mlflow_relay_daemon.config import SETTINGS

    known = {setting.variable for setting in SETTINGS.values()}
    for path in UNITS.rglob("*.service"):
        assert set(re.findall(r"MLFLOW_RELAY_\w+", path.read_text())) <= known


def syscalls(group: str) -> set[str]:
    """Return the names in a group of systemd's, those of groups in it too."""
    found = set()
    for line in analyze("syscall-filter", group).splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= syscalls(word) if word.startswith("@") else {word}
    return found


def allowed_syscalls() -> set[str]:
    """Return what the unit's SystemCallFilter= lines leave, read in their order."""
    found: set[str] = set()
    unit = (UNITS / "mlflow-relay.service").read_text()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        for word in line.removeprefix("~").split():
            names = syscalls(word) if word.startswith("@") else {word}
            found = found - names if line.startswith("~") else found | names
    return found


@needs_systemd
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_daemon_makes_no_system_call_that_the_unit_forbids(tmp_path, mlflow_server):
    """A whole life, in folders as tmpfiles makes them: EPERM would be a crash at a bad moment."""
    settings = {"group": os.getgid(), "http_port": 0, "drain_timeout_s": 5}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        (node.runtime / "journals").mkdir()
        node.runtime.chmod(0o711)
        (node.runtime / "journals").chmod(0o3730)
        trace = tmp_path / "trace"
        with node.log.open("ab") as log:
            strace = subprocess.Popen(
                ["strace", "-f", "-qq", "-o", trace, sys.executable, "-m", "mlflow_relay_daemon",
                 "daemon"], env=node._daemon_environ, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            wait_until((node.runtime / "relay.sock").exists, "the daemon serves")
            daemon = wait_until(lambda: node.status()["daemon"], "the daemon answers")
            rank = """
                import mlflow_relay
                with mlflow_relay.start_run("units", run_key="units", rank=0, world_size=1) as run:
                    run.log_metric("a", 1.0)
            """
            finish([node.rank(rank)])
            node.wait_until_ended()
            url = f"http://127.0.0.1:{daemon['http_port']}/metrics"
            assert urllib.request.urlopen(url).status == 200
            os.kill(daemon["pid"], signal.SIGHUP)
            wait_until(lambda: "settings are reloaded" in node.log.read_text(), "it is reloaded")
            os.kill(daemon["pid"], signal.SIGTERM)
            assert strace.wait(60) == 0
        finally:
            strace.kill()
            strace.wait()
        lines = trace.read_text(errors="replace").splitlines()
    used = {match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))}
    assert len(used) > 40
    assert used - allowed_syscalls() == set()
    made = [line for line in lines if re.search(r"\b(chmod|fchmod|fchmodat|mkdir|openat)\(", line)]
    with_setgid = re.compile(r"\b0[2-7]\d{3}\)")  # RestrictSUIDSGID=
    assert [line for line in made if with_setgid.search(line)] == []
    assert [line for line in lines if "PROT_WRITE|PROT_EXEC" in line] == []  # MemoryDeny...=


# ── what systemd hears ──


class Systemd:
    """Listens at NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def listen(self) -> list[str]:
        """Return all that was said so far."""
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def has_heard(self, word: str, since: int = 0) -> bool:
        return any(each.startswith(word) for each in self.listen()[since:])

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"))  # a socket's path is short
    listener = Systemd(folder / "notify")
    yield listener
    listener.close()
    shutil.rmtree(folder)


@pytest.fixture
def node(tmp_path, systemd) -> Iterator[Node]:
    settings = {"offline": True, "drain_timeout_s": 1}
    with Node(tmp_path / "node", "x", settings=settings) as node:
        node._daemon_environ["NOTIFY_SOCKET"] = str(systemd.path)
        yield node


def test_ready_watchdog_reloading_and_stopping_are_told_in_their_order(node, systemd):
    node.start()
    assert systemd.has_heard("READY=1")
    assert not systemd.has_heard("WATCHDOG=1") or systemd.heard.index("READY=1") < (
        systemd.heard.index("WATCHDOG=1")
    )
    begin = len(systemd.heard)
    wait_until(lambda: systemd.listen()[begin:].count("WATCHDOG=1") >= 3, "the loop pings")
    begin = len(systemd.listen())
    node.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: systemd.has_heard("READY=1", begin), "it is ready again")
    words = [each.partition("=")[0] for each in systemd.heard[begin:]]
    at = words.index("RELOADING")
    assert words[at : at + 3] == ["RELOADING", "MONOTONIC_USEC", "READY"]
    begin = len(systemd.listen())
    node.stop()
    words = [each for each in systemd.listen()[begin:] if each != "WATCHDOG=1"]
    assert words[0] == "STOPPING=1"
    assert words[1] == "EXTEND_TIMEOUT_USEC=31000000"


def test_the_watchdog_hears_nothing_while_the_loop_stands_still(node, systemd):
    node.start()
    wait_until(lambda: systemd.has_heard("WATCHDOG=1"), "the loop pings")
    os.kill(node.daemon.pid, signal.SIGSTOP)
    systemd.listen()
    before = len(systemd.heard)
    time.sleep(1.2)  # two pings would have come; nothing can be waited for
    assert systemd.listen()[before:] == []
    os.kill(node.daemon.pid, signal.SIGCONT)
    wait_until(lambda: systemd.has_heard("WATCHDOG=1", before), "it pings again")


def test_a_spool_of_many_runs_asks_for_more_time_to_start(node, systemd):
    node.start()
    rank = """
        import sys, mlflow_relay
        for i in range(5):
            with mlflow_relay.start_run("units", run_key=f"{i}", rank=0, world_size=1) as run:
                run.log_metric("a", 1.0)
    """
    finish([node.rank(rank)])
    node.stop()
    before = len(systemd.listen())
    node.start()
    start = systemd.heard[before : systemd.listen().index("READY=1", before)]
    assert start.count("EXTEND_TIMEOUT_USEC=30000000") == 5
