"""What lies in the folder of journals, and whose it is. Changes nothing there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mlflow_relay import journal_files
from mlflow_relay.errors import FormatError
from mlflow_relay.frames import ENTRY_BYTES
from mlflow_relay.journal_files import BASE_SUFFIX, ENTRIES_AT, ENTRIES_SUFFIX, NEW_SUFFIX
from mlflow_relay.messages import SESSION_BYTES
from mlflow_relay_daemon.foreign import open_foreign


class Contents(NamedTuple):
    """Files of journals. What is neither, and every folder, is somebody else's, and left alone."""

    bases: dict[bytes, Path]  #: by session
    orphans: dict[bytes, list[Path]]  #: by session: entries, or a base in the making, without one
    nameless: list[Path]  #: base files with the name of no session


def read(folder: Path) -> Contents:
    """Return what is there. Raises: OSError: the folder cannot be read."""
    found = Contents({}, {}, [])
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries if each.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return found
    for name in (each for each in names if each.endswith(BASE_SUFFIX)):
        session = _session_of(name.removesuffix(BASE_SUFFIX))
        if session is None:
            found.nameless.append(folder / name)
        else:
            found.bases[session] = folder / name
    for name in (each for each in names if each.endswith((ENTRIES_SUFFIX, NEW_SUFFIX))):
        session = _session_of(name.partition(".")[0])
        if session is not None and session not in found.bases:
            found.orphans.setdefault(session, []).append(folder / name)
    return found


def entries_of(folder: Path, session: bytes) -> list[Path]:
    """Return a session's entries files in the order of their records; spares, and what cannot be
    read, last.

    Not by name: a file that was made in a hurry may have been used before one with a lower number.
    """

    def place(path: Path) -> tuple[bool, int, str]:
        first_seq = first_seq_of(path)
        return first_seq is None, first_seq or 0, path.name

    found = folder.glob(f"{session.hex()}.*{ENTRIES_SUFFIX}")
    plain = (each for each in found if stat.S_ISREG(each.lstat().st_mode))
    return sorted(plain, key=place)


def first_seq_of(path: Path) -> int | None:
    """Return the first sequence number of an entries file; None: a spare, or not to be told."""
    try:
        return journal_files.first_seq_of(_head_of(path, ENTRIES_AT))
    except FormatError:
        return None


def holds_nothing(paths: Iterable[Path]) -> bool:
    """Return whether no record was ever put into these files, or into what they would become."""
    for path in paths:
        is_entries = path.name.endswith(ENTRIES_SUFFIX)
        head = _head_of(path, ENTRIES_AT + ENTRY_BYTES) if is_entries else b""
        if is_entries and not journal_files.holds_nothing(head):
            return False
    return True


def age_s(paths: Iterable[Path], now_s: float) -> float:
    """Return for how long none of these files was changed."""
    return now_s - max(path.stat().st_mtime for path in paths)


def _head_of(path: Path, size: int) -> bytes:
    """Return a file's first bytes. Raises: FormatError: it is a link, a pipe, ...; OSError."""
    fd = open_foreign(path)
    try:
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _session_of(text: str) -> bytes | None:
    try:
        session = bytes.fromhex(text)
    except ValueError:
        return None
    return session if len(session) == SESSION_BYTES and session.hex() == text else None
