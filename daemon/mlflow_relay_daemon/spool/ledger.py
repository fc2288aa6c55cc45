"""One run's artifacts: those that wait for their upload, and how the others ended.

Lines of JSON in the run's folder, appended and fsynced: a line for each artifact before the
watermark passes its record, a line for its end before the file that was staged for it is removed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_relay.records import Artifact
from mlflow_relay_daemon.spool.disk import Disk

log = logging.getLogger(__name__)

NAME = "artifacts.jsonl"
#: How an artifact can end: MLflow's store has it, a later one of that name took its place, it will
#: never be taken (it is a dead letter then).
UPLOADED, REPLACED, REFUSED = "uploaded", "replaced", "refused"
ENDS = (UPLOADED, REPLACED, REFUSED)


class End(NamedTuple):
    """How one artifact ended."""

    number: int
    how: str  #: one of ENDS
    sha256: str = ""  #: of what was uploaded


class Ledger:
    """The artifacts of one run. Safe for several threads.

    Artifacts are numbered from 0 in the order in which they were accepted.
    """

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._path = disk, folder / NAME
        self._lock = threading.Lock()
        self._name_is_synced = False
        self.waiting: dict[int, Artifact] = {}  #: by number, oldest first
        self.counts = dict.fromkeys(ENDS, 0)
        self.uploaded_bytes = 0
        self.next_number = 0
        self._latest: dict[str, int] = {}  # path → number, of those that wait
        self._ids: set[str] = set()
        self._read()

    def accept(self, artifacts: Iterable[Artifact]) -> None:
        """Take artifacts in; they are on the disk when this returns. One that is known already (a
        batch is delivered anew after a crash) is passed over. Raises: OSError."""
        with self._lock:
            new = {each.id: each for each in artifacts if each.id not in self._ids}
            if not new:
                return
            numbered = list(enumerate(new.values(), self.next_number))
            self._append([_accepted(number, artifact) for number, artifact in numbered])
            for number, artifact in numbered:
                self._take_in(number, artifact)

    def settle(self, ends: Iterable[End]) -> None:
        """Artifacts are done with; that is on the disk when this returns. Raises: OSError."""
        with self._lock:
            known = [end for end in ends if end.number in self.waiting]
            if not known:
                return
            self._append([{"n": end.number, "end": end.how, "sha256": end.sha256} for end in known])
            for end in known:
                self._take_out(end.number, end.how)

    def is_replaced(self, number: int) -> bool:
        """Return whether a later artifact of the same name waits."""
        with self._lock:
            artifact = self.waiting.get(number)
            return artifact is not None and self._latest[artifact.path] != number

    def oldest_first(self) -> list[tuple[int, Artifact]]:
        """Return what waits."""
        with self._lock:
            return list(self.waiting.items())

    def waiting_bytes(self) -> int:
        """Return the size of all that waits."""
        with self._lock:
            return sum(each.size for each in self.waiting.values())

    def settled_to(self) -> int:
        """Return the number before which all are done with."""
        with self._lock:
            return next(iter(self.waiting), self.next_number)

    def ids(self) -> set[str]:
        """Return the ids of those that wait: their staged files are wanted."""
        with self._lock:
            return {each.id for each in self.waiting.values()}

    # ── the file ──

    def _take_in(self, number: int, artifact: Artifact) -> None:
        self.waiting[number] = artifact
        self._latest[artifact.path] = number
        self._ids.add(artifact.id)
        self.next_number = number + 1

    def _take_out(self, number: int, how: str) -> None:
        artifact = self.waiting.pop(number)
        if self._latest.get(artifact.path) == number:
            del self._latest[artifact.path]
        self.counts[how] += 1
        if how == UPLOADED:
            self.uploaded_bytes += artifact.size

    def _append(self, lines: list[dict[str, Any]]) -> None:
        data = b"\n" + b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        fd = self._disk.open(self._path) if self._path.exists() else self._disk.create(self._path)
        with open(fd, "ab", buffering=0, closefd=True):
            size = os.fstat(fd).st_size
            try:
                # The leading newline ends a line that a crash may have torn.
                self._disk.write(fd, data)
                self._disk.sync(fd)
                if not self._name_is_synced:
                    self._disk.sync_folder(self._path.parent)
                    self._name_is_synced = True
            except OSError:
                with suppress(OSError):
                    self._disk.truncate(fd, size)  # they will come again
                raise

    def _read(self) -> None:
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        for line in filter(None, lines):
            try:
                self._read_line(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                # Torn by a crash: its record was not settled, and comes again; or, of an end, the
                # artifact is uploaded once more.
                log.warning("%s: a line that cannot be read is passed over", self._path)

    def _read_line(self, line: dict[str, Any]) -> None:
        number = int(line["n"])
        if "end" not in line:
            self._take_in(number, _artifact(line))
        elif number in self.waiting and line["end"] in ENDS:
            self._take_out(number, line["end"])


def _accepted(number: int, artifact: Artifact) -> dict[str, Any]:
    values = artifact._asdict()
    return {
        "n": number,
        **values,
        "file": os.fsdecode(artifact.file),  # JSON's escapes hold what is no UTF-8
        "digest": artifact.digest.hex(),
    }


def _artifact(line: dict[str, Any]) -> Artifact:
    values = {name: line[name] for name in Artifact._fields}
    values["file"] = os.fsencode(line["file"])
    values["digest"] = bytes.fromhex(line["digest"])
    return Artifact(**values)
