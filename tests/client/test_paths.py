"""Where rank and daemon meet: the same place in both, and nobody else's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay import paths
from mlflow_relay.errors import RelayError
from mlflow_relay.paths import SOCKET_PATH_BYTES_MAX, default_socket, journal_dir, private_dir


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="relay-paths-", dir="/dev/shm") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def test_the_socket_is_the_one_that_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_RELAY_SOCKET", "/somewhere/else.sock")

    assert default_socket() == Path("/somewhere/else.sock")


def test_the_socket_is_that_of_the_system_daemon_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_RELAY_SOCKET", raising=False)
    monkeypatch.setattr(paths, "SYSTEM_RUNTIME_DIR", tmp_path)
    assert default_socket() != tmp_path / "relay.sock"

    (tmp_path / "relay.sock").touch()
    assert default_socket() == tmp_path / "relay.sock"


def test_the_default_is_in_memory_and_of_this_user_and_does_not_ask_the_login_shell(monkeypatch):
    monkeypatch.delenv("MLFLOW_RELAY_SOCKET", raising=False)
    monkeypatch.setattr(paths, "SYSTEM_RUNTIME_DIR", Path("/nowhere"))
    before = default_socket()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/12345")
    monkeypatch.setenv("TMPDIR", "/elsewhere")

    assert default_socket() == before
    assert before == Path(f"/dev/shm/mlflow-relay-{os.getuid()}/relay.sock")
    assert len(os.fsencode(before)) <= SOCKET_PATH_BYTES_MAX


def test_journals_lie_beside_the_socket():
    assert journal_dir(Path("/a/relay.sock")) == Path("/a/journals")


def test_a_folder_is_made_for_this_user_alone_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        made = private_dir(folder / "private")
    finally:
        os.umask(before)

    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert private_dir(folder / "private") == made  # again


@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
def test_what_is_no_folder_is_refused_by_name(folder, kind):
    path = folder / "there"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(folder if kind == "link to a folder" else folder / "nothing")
    with pytest.raises(RelayError, match=str(path)):
        private_dir(path)


AS_USER = """
import os, sys
from pathlib import Path
from mlflow_relay.errors import RelayError
from mlflow_relay.paths import private_dir
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    private_dir(Path(sys.argv[1]))
    print("taken")
except RelayError as error:
    print("refused:", error)
"""


def private_dir_as(user: int, path: Path) -> str:
    """Return what private_dir says to another user."""
    if os.geteuid() != 0:
        pytest.skip("acting for another user needs root")
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(path), str(user)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777, 0o1777])
def test_a_folder_that_somebody_else_laid_out_is_refused(folder, mode):
    """Who makes /dev/shm/mlflow-relay-<uid> before its user does could read all that is logged
    there, and speak as the daemon."""
    path = folder / "bait"
    path.mkdir()
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 54321, 54321)

    said = private_dir_as(54322, path)

    assert said.startswith(f"refused: {path} belongs to uid 54321")


def test_a_folder_of_ones_own_is_taken(folder):
    path = folder / "own"
    path.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(path, 54322, 54322)

    assert private_dir_as(54322, path) == "taken\n"


def test_a_parent_without_permission_is_an_error_that_says_so(folder):
    path = folder / "closed"
    path.mkdir(mode=0o700)

    said = private_dir_as(54322, path / "inside")

    assert said == f"refused: cannot make the folder {path / 'inside'}: Permission denied\n"
