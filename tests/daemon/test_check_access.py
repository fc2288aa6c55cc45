"""`mlflow-relay check`: token file, group, HTTP port, logout."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlflow_relay_daemon.commands import _check_access as access
from mlflow_relay_daemon.commands._check_access import FAIL, OK, WARN
from mlflow_relay_daemon.config import Config, load_config
from tests.support.relay import Node
from tests.support.users import ALICE, MALLORY, python_for_all, skip_unless_root


def config(folder: Path, **settings: object) -> Config:
    flags = {"spool": str(folder / "spool"), "socket": str(folder / "relay.sock"), **settings}
    return load_config(flags, environ={"HOME": str(folder)})


@pytest.mark.parametrize(
    ("content", "mode", "state", "words"),
    [
        ("token", 0o600, OK, "the token in "),
        ("token", 0o644, WARN, "open to all users"),
        ("", 0o600, FAIL, "is empty"),
        (None, 0, FAIL, "No such file"),
    ],
)
def test_a_token_file_is_read_and_never_shown(tmp_path, content, mode, state, words):
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    found = access.check_secrets(config(tmp_path, token_file=str(file)))
    assert (found.state, words in found.text) == (state, True)
    assert found.mend or state == OK
    assert found.text.count("token") <= 2


def test_a_port_is_free_taken_or_the_daemons(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = access.check_http(config(tmp_path, http_port=port))
        assert (found.state, "in use" in found.text) == (WARN, True)
    assert access.check_http(config(tmp_path, http_port=port)).state == OK
    assert access.check_http(config(tmp_path)).state == OK
    with Node(tmp_path, "x", settings={"http_port": 0, "offline": True}) as node:
        node.start()
        found = access.check_http(config(tmp_path, socket=str(node.socket), http_port=1))
        assert found.text == f"http://127.0.0.1:{node.status()['daemon']['http_port']}/relay/"


def test_a_group_is_served_by_its_members(tmp_path):
    assert "own user alone" in access.check_group(config(tmp_path)).text
    own = str(os.getgid())
    assert access.check_group(config(tmp_path, group=own)).state == OK


def test_another_users_daemon_serves_those_who_may_make_journals(tmp_path):
    skip_unless_root()
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"))
    try:
        (folder / "journals").mkdir()
        os.chown(folder, 61_001, 61_001)
        folder.chmod(0o711)
        os.chown(folder / "journals", 61_001, ALICE.groups[0])
        (folder / "journals").chmod(0o3730)
        python_for_all()
        environ = {"PATH": "/bin", "MLFLOW_RELAY_SOCKET": str(folder / "relay.sock")}
        for user, state in ((ALICE, "ok"), (MALLORY, "FAIL")):
            output, _ = user.relay("check", environ=environ).communicate(timeout=60)
            [line] = [line for line in output.splitlines() if line[6:11] == "group"]
            assert line.startswith(state)
    finally:
        shutil.rmtree(folder)


def test_a_logout_is_warned_of_where_systemd_cleans_up(tmp_path, monkeypatch):
    shm = config(tmp_path, socket="/dev/shm/somewhere/relay.sock")
    elsewhere = config(tmp_path, socket="/var/somewhere/relay.sock")  # tests may run in /dev/shm
    monkeypatch.setattr(access.os, "getuid", lambda: 54_321)
    monkeypatch.setattr(access, "SYSTEMD", tmp_path)
    found = access.check_logout(shm)
    assert (found.state, "enable-linger" in found.mend) == (WARN, True)
    assert access.check_logout(elsewhere).state == OK
    monkeypatch.setattr(access, "SYSTEMD", tmp_path / "missing")
    assert access.check_logout(shm).state == OK
