"""The artifacts of one run: those that the server does not have as they are, one after the other.

What was uploaded is kept in the run's progress by path, with the CRC of size and digest: a file
that changed since is uploaded again, in the place of the one that is there.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from zlib import crc32

from mlflow_relay import clock
from mlflow_relay.fingerprint import open_regular, sample_digest
from mlflow_relay.records import PLACE, Artifact
from mlflow_relay.values import check_artifact_path
from mlflow_relay_daemon.artifacts.source import NoSuchContent, NotReadable, Source
from mlflow_relay_daemon.artifacts.stores import Store
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.dead_letters import Letters
from mlflow_relay_daemon.sinks import Refused, ServerAway, SinkError, Temporary

#: Of one file, before the run's other files are tried without it.
TRIES = 3


class Wanted(NamedTuple):
    """One file that is to be on the server."""

    path: str  #: from the run's artifact root
    size: int
    mark: int  #: of size and digest
    open: Callable[
        [], AbstractContextManager[Source]
    ]  #: raises NoSuchContent, NotReadable, OSError


class Uploaded(NamedTuple):
    """What a call did."""

    files: int
    bytes: int
    failures: list[str]  #: what was not uploaded and may be, by the next call


def wanted_record(artifact: Artifact, file: Path) -> Wanted:
    """Return what a rank logged as an artifact; its bytes are in the file."""
    mark = mark_of(artifact.size, artifact.digest)
    return Wanted(artifact.path, artifact.size, mark, lambda: Source(artifact, file, _take))


def wanted_file(path: str, file: Path) -> Wanted:
    """Return a file as it is now. Raises: ValueError: no name for an artifact; OSError."""
    fd = open_regular(os.fspath(file))
    try:
        found = os.fstat(fd)
        digest = sample_digest(fd, found.st_size)
    finally:
        os.close(fd)
    name = os.fsencode(file.absolute())
    artifact = Artifact(
        found.st_mtime_ns // 1_000_000,
        check_artifact_path(path),
        uuid.uuid4().hex,
        PLACE,
        name,
        found.st_size,
        found.st_mtime_ns,
        digest,
    )
    return wanted_record(artifact, file)


def wanted_folder(folder: Path, notes: list[str]) -> Iterator[Wanted]:
    """Yield all files below a folder; those that cannot be read are named in the notes."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(parent, name)
            try:
                yield wanted_file(file.relative_to(folder).as_posix(), file)
            except (OSError, ValueError) as error:
                notes.append(f"artifact {file} was left out: {error}")


def local_folder(artifact_uri: str, run_id: str) -> Path | None:
    """Return the folder that an artifact URI names; None: it is none, or not on this machine."""
    parts = urlsplit(artifact_uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    folder = Path(unquote(parts.path))
    return folder if folder.is_absolute() and is_artifact_root(folder, run_id) else None


def is_artifact_root(folder: Path, run_id: str) -> bool:
    """Return whether a folder is there that can hold the files of a run.

    MLflow keeps them within a folder that bears the run's id. Any other one is not the run's:
    nobody's home is to be published because a URI says "/", or nothing.
    """
    return run_id in folder.parts and folder.is_dir()


def mark_of(size: int, digest: bytes) -> int:
    """Return what stands for a file's content in a progress."""
    return crc32(digest, size & 0xFFFFFFFF)


def bring(
    wanted: Sequence[Wanted],
    seen: dict[str, int],
    store: Callable[[], Store],
    letters: Letters,
    report: Callable[[], None],
) -> Uploaded:
    """Upload what is not there as it is; `seen` says what is, and is kept up to date.

    Args:    report: called after each file.
    Raises:  SinkError: no store; Stopped.
    """
    files = sent = 0
    failures: list[str] = []
    for each in wanted:
        if seen.get(each.path) == each.mark:
            continue
        try:
            _put(each, store())
        except (NoSuchContent, Refused) as error:
            now_ms = clock.now_ms()
            entry = Entry("artifact", each.path, each.path, now_ms, None)
            letters.add([Objection(entry, str(error))], now_ms)
        except ServerAway as error:
            failures.append(f"artifact {each.path}: {error}")
            break  # nor will the next one go
        except (NotReadable, OSError, SinkError) as error:
            failures.append(f"artifact {each.path}: {error}")
            continue
        else:
            files, sent = files + 1, sent + each.size
        seen[each.path] = each.mark
        report()
    return Uploaded(files, sent, failures)


def _put(wanted: Wanted, store: Store) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            with wanted.open() as source:
                store.put(wanted.path, source)
        except Temporary:
            if attempt == TRIES:
                raise
            time.sleep(attempt)
        else:
            return


def _take(size: int) -> None:
    """A sync takes what the line gives."""
