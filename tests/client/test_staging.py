"""Files are kept as they are now, by whatever way the file system allows."""

from __future__ import annotations

import errno
import json
import os
import socket as sockets
from pathlib import Path

import pytest

from mlflow_relay import staging
from mlflow_relay.fingerprint import DIGEST_BYTES_MAX, sample_digest
from mlflow_relay.paths import staging_notice
from mlflow_relay.records import COPY, LINK, PLACE

NEVER = float("inf")


def reflinks(folder: Path) -> bool:
    """Return whether this file system has reflinks: then nothing is ever linked."""
    (folder / "a").write_bytes(b"a")
    made = staging.stage_file(str(folder / "a"), folder / "b", 0)
    (folder / "b").unlink()
    return made.where == COPY


def test_a_small_file_is_copied_and_may_be_changed_at_once(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"first")
    staged = staging.stage_file(str(source), tmp_path / "staged", 1 << 20)
    source.write_bytes(b"second, and longer")
    assert staged.where == COPY
    assert staged.file == os.fsencode(tmp_path / "staged")
    assert staged.size == 5
    assert (tmp_path / "staged").read_bytes() == b"first"
    assert (tmp_path / "staged").stat().st_mode & 0o777 == 0o600


def test_a_large_file_is_linked_and_may_be_replaced_at_once(tmp_path):
    if reflinks(tmp_path):
        pytest.skip("this file system has reflinks")
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5000)
    staged = staging.stage_file(str(source), tmp_path / "staged", 5000)
    (tmp_path / "new").write_bytes(b"y")
    os.rename(tmp_path / "new", source)
    assert staged.where == LINK
    assert (tmp_path / "staged").read_bytes() == b"x" * 5000


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "name").symlink_to("real")
    for least in (0, NEVER):
        target = tmp_path / f"staged {least}"
        staging.stage_file(str(tmp_path / "name"), target, least)
        assert target.read_bytes() == b"content"
        assert not target.is_symlink()


def test_what_lies_on_another_file_system_is_copied(tmp_path):
    source = Path("/dev/shm") / f"relay-staging-{os.getpid()}"
    source.write_bytes(b"elsewhere")
    try:
        if os.stat(source).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("one file system only")
        staged = staging.stage_file(str(source), tmp_path / "staged", 0)
    finally:
        source.unlink()
    assert (staged.where, (tmp_path / "staged").read_bytes()) == (COPY, b"elsewhere")


def test_a_large_copy_is_whole(tmp_path):
    content = os.urandom(5 << 20)
    (tmp_path / "source").write_bytes(content)
    staging.stage_file(str(tmp_path / "source"), tmp_path / "staged", NEVER)
    assert (tmp_path / "staged").read_bytes() == content


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "device"])
def test_what_is_no_file_is_refused_at_once_and_by_name(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    else:
        with sockets.socket(sockets.AF_UNIX) as made:
            made.bind(str(path))
    if kind == "socket":
        with pytest.raises(OSError, match="it"):
            staging.stage_file(str(path), tmp_path / "staged", 0)
    else:
        with pytest.raises(ValueError, match="not a regular file"):
            staging.stage_file(str(path), tmp_path / "staged", 0)
    assert not (tmp_path / "staged").exists()


def test_a_file_of_the_kernel_that_says_it_is_empty_is_copied_all_the_same(tmp_path):
    staged = staging.stage_file("/proc/self/status", tmp_path / "staged", NEVER)
    assert b"Name:" in (tmp_path / "staged").read_bytes()
    assert staged.size > 0


def test_a_copy_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "source").write_bytes(b"content")
    with pytest.raises(FileNotFoundError):
        staging.stage_file(str(tmp_path / "source"), tmp_path / "no folder" / "staged", 0)
    full = Path("/dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.EEXIST)):
        staging.stage_bytes(b"content", full)


def test_a_file_that_stays_is_only_described(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"content")
    monkeypatch.chdir(tmp_path)
    staged = staging.leave_in_place("source")
    assert (staged.where, staged.file) == (PLACE, os.fsencode(tmp_path / "source"))
    assert staged.modified_ns == (tmp_path / "source").stat().st_mtime_ns
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


@pytest.mark.parametrize("size", [0, 1, DIGEST_BYTES_MAX, DIGEST_BYTES_MAX + 1, 3 << 20])
def test_the_digest_tells_a_change_at_either_end_and_of_the_length(tmp_path, size):
    def digest(content: bytes) -> bytes:
        (tmp_path / "file").write_bytes(content)
        with (tmp_path / "file").open("rb") as file:
            return sample_digest(file.fileno(), len(content))

    content = bytes(size)
    seen = {digest(content), digest(content + b"\0")}
    if size:
        seen |= {digest(b"\1" + content[1:]), digest(content[:-1] + b"\1")}
    assert len(seen) == (4 if size > 1 else 3 if size else 2)
    assert digest(content) in seen


# ── where ──


def notice(place: Path, **fields: object) -> Path:
    socket = place / "relay.sock"
    told = {"version": 1, "folder": str(place), "free_bytes_min": 0, "bytes_left": None}
    staging_notice(socket).write_text(json.dumps(told | fields))
    return socket


def test_the_environment_names_the_folder_else_the_daemon_does_else_it_is_the_default(tmp_path):
    socket = notice(tmp_path)
    assert staging.find_room(socket, {"MLFLOW_RELAY_STAGING": "/x"}).root == Path("/x")
    assert staging.find_room(socket, {}).root == tmp_path
    default = staging.find_room(tmp_path / "other" / "relay.sock", {"XDG_STATE_HOME": "/state"})
    assert default.root == Path("/state/mlflow-relay") / os.uname().nodename / "staging"


def test_the_default_is_in_the_spool_that_a_daemon_without_settings_has(tmp_path):
    from mlflow_relay_daemon.config import default_spool
    from mlflow_relay_daemon.spool.staging import NAME

    for environ in ({"XDG_STATE_HOME": str(tmp_path)}, {"HOME": os.path.expanduser("~")}):
        assert staging.default_staging(environ) == default_spool(environ) / NAME


@pytest.mark.parametrize(
    "fields", [{"version": 2}, {"folder": "/no such folder"}, {"folder": 3}, {"bytes_left": ...}]
)
def test_a_notice_that_is_of_no_use_is_passed_over(tmp_path, fields):
    socket = notice(tmp_path)
    if ... in fields.values():
        staging_notice(socket).write_text("{")
    else:
        notice(tmp_path, **fields)
    found = staging.find_room(socket, {"XDG_STATE_HOME": "/state"})
    assert found.root.is_relative_to("/state")


def test_there_is_no_room_beyond_the_quota_or_below_the_floor(tmp_path):
    room = staging.find_room(notice(tmp_path, bytes_left=10), {})
    room.check(10)
    with pytest.raises(OSError, match="quota"):
        room.check(11)
    room = staging.find_room(notice(tmp_path, free_bytes_min=1 << 60), {})
    with pytest.raises(OSError, match="would be free"):
        room.check(1)


def test_the_folder_of_a_run_is_for_this_user_alone(tmp_path):
    folder = staging.run_folder(tmp_path / "spool" / "staging", "ab" * 16)
    for each in (folder, folder.parent, folder.parent.parent):
        assert each.stat().st_mode & 0o777 == 0o700
    os.chmod(tmp_path / "spool" / "staging", 0o777)
    with pytest.raises(OSError, match="others may write"):
        staging.run_folder(tmp_path / "spool" / "staging", "cd" * 16)
