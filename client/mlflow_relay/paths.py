"""Where rank and daemon of a node meet: the socket, and the journals beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import RelayError

#: sun_path of a unix socket holds 108 bytes with the closing zero (unix(7)).
SOCKET_PATH_BYTES_MAX = 107
SYSTEM_RUNTIME_DIR = Path("/run/mlflow-relay")
#: Others may go through it, to be told that the socket is not for them.
SHARED_FOLDER_MODE = 0o711
#: setgid: the files in it belong to the group; sticky; members may not list it.
SHARED_JOURNALS_MODE = 0o3730


def default_socket() -> Path:
    """Return the socket that all processes of this user on this node agree on.

    MLFLOW_RELAY_SOCKET, else that of a system-wide daemon if one is installed, else one in memory
    (/dev/shm): a page of a journal on a disk can stall a log call while it is written back.
    XDG_RUNTIME_DIR is no help: batch jobs often do not have what a login shell has, and the two
    would not meet.
    """
    named = os.environ.get("MLFLOW_RELAY_SOCKET")
    if named:
        return Path(named)
    if (SYSTEM_RUNTIME_DIR / "relay.sock").exists():
        return SYSTEM_RUNTIME_DIR / "relay.sock"
    memory = Path("/dev/shm")  # noqa: S108  # the folder in it is ours alone: see private_dir
    root = memory if os.access(memory, os.W_OK) else Path("/tmp")  # noqa: S108
    return root / f"mlflow-relay-{os.getuid()}" / "relay.sock"


def journal_dir(socket: Path) -> Path:
    """Return the folder of the journals that belong to the daemon of this socket."""
    return socket.parent / "journals"


def staging_notice(socket: Path) -> Path:
    """Return the file in which the daemon of this socket says where files are to be staged."""
    return socket.parent / "staging.json"


def private_dir(path: Path) -> Path:
    """Make the folder, for this user alone (0700), and return it.

    Raises: RelayError: it cannot be made, or belongs to somebody else who could read what is
        written there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RelayError(f"cannot make the folder {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise RelayError(f"{path} is no folder (a link or a file stands there): remove it")
    if found.st_uid != os.getuid():
        raise RelayError(f"{path} belongs to uid {found.st_uid}: choose another socket path")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RelayError(f"others may write to {path}: chmod 700 it, or choose another socket path")
    return path


# ── a daemon for the members of a group ──


def share_runtime_dir(socket: Path, gid: int) -> None:
    """Open the daemon's own runtime folder to a group.

    Members may make files among the journals and reach what they know the name of; nobody but the
    daemon may list them, and names are 128 random bits. Only who made a file may remove it.

    Raises: OSError.
    """
    journals = journal_dir(socket)
    journals.mkdir(mode=0o700, exist_ok=True)
    # A hardened unit may do neither, and finds all as its tmpfiles made it.
    _set_mode(socket.parent, SHARED_FOLDER_MODE)
    if journals.stat().st_gid != gid:
        os.chown(journals, -1, gid)
    _set_mode(journals, SHARED_JOURNALS_MODE)


def _set_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:
        os.chmod(path, mode)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else 0


def is_shared(socket: Path) -> bool:
    """Return whether the daemon at this socket serves a group; another user's must be trusted.

    We trust one whose folder nobody but root or ourselves could have put there: not one in /tmp or
    /dev/shm, where anybody may make a folder of any name.

    Raises: RelayError: it is, and it is not open to us.
    """
    folder = socket.parent
    try:
        found, above = folder.lstat(), folder.parent.stat()
    except OSError:
        return False  # it will be our own
    if not stat.S_ISDIR(found.st_mode):
        return False
    if found.st_uid == os.getuid():
        return _mode(journal_dir(socket)) == SHARED_JOURNALS_MODE
    if above.st_uid not in (0, os.getuid()) or above.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    if not os.access(journal_dir(socket), os.W_OK | os.X_OK):
        raise RelayError(
            f"the daemon of uid {found.st_uid} at {socket} does not serve this user (uid "
            f"{os.getuid()}): ask its administrator to take you into its group, or set "
            "MLFLOW_RELAY_SOCKET to a path of your own"
        )
    return True
