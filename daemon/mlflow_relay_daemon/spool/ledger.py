"""One run's artifacts: those that wait for their upload, and how the others ended.

Lines of JSON in the run's folder, appended and fsynced: a line for each artifact before the
watermark passes its record, a line for its end before the file that was staged for it is removed.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_relay.records import PLACE, Artifact
from mlflow_relay_daemon.spool.disk import Disk

log = logging.getLogger(__name__)

NAME = "artifacts.jsonl"
#: How an artifact can end: MLflow's store has it, a later one of that name took its place, it will
#: never be taken (it is a dead letter then).
UPLOADED, REPLACED, REFUSED = "uploaded", "replaced", "refused"
ENDS = (UPLOADED, REPLACED, REFUSED)
#: A shorter file is left as it is.
COMPACT_LINES_MIN = 200
#: What status shows of a ledger.
COUNTS = (
    *("accepted", "settled_to", "waiting", "waiting_bytes"),
    *("uploaded", "uploaded_bytes", "replaced", "refused"),
)
#: What status shows of uploads under way where there are none.
NOT_UPLOADING: dict[str, Any] = {"sending": 0, "sent_bytes": 0, "last_error": None}


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
        self._writing = threading.Lock()  # held while the disk writes; taken before the other
        self._lock = threading.Lock()  # guards what follows, for those who only look
        self._name_is_synced = False
        self._lines = 0
        self.waiting: dict[int, Artifact] = {}  #: by number, oldest first
        self.counts = dict.fromkeys(ENDS, 0)
        self.uploaded_bytes = self.waiting_bytes = 0
        self.staged_bytes = 0  #: of those that wait, what is not the user's own file
        self.refused: dict[str, Artifact] = {}  #: by id: their files are kept, with a dead letter
        self.next_number = 0
        self._latest: dict[str, int] = {}  # path → number of the last that was accepted
        self._ids: set[str] = set()
        self._read()

    def accept(self, artifacts: Iterable[Artifact]) -> None:
        """Take artifacts in; they are on the disk when this returns. One that is known already (a
        batch is delivered anew after a crash) is passed over. Raises: OSError."""
        with self._writing:
            new = {each.id: each for each in artifacts if each.id not in self._ids}
            self._accept(list(new.values()))

    def settle(self, ends: Iterable[End]) -> list[tuple[str, Artifact]]:
        """Artifacts are done with; that is on the disk when this returns.

        Returns: how each ended, and the artifact. Raises: OSError.
        """
        with self._writing:
            known = [end for end in ends if end.number in self.waiting]
            self._append([_ended(end) for end in known])
            with self._lock:
                return [(end.how, self._take_out(end.number, end.how)) for end in known]

    def is_replaced(self, number: int) -> bool:
        """Return whether a later artifact of the same name has come."""
        with self._lock:
            artifact = self.waiting.get(number)
            return artifact is not None and self._latest[artifact.path] != number

    def first(self, fits: Callable[[int, Artifact], bool]) -> tuple[int, Artifact] | None:
        """Return the oldest that waits and fits."""
        with self._lock:
            return next((item for item in self.waiting.items() if fits(*item)), None)

    def waiting_from(self, number: int, count: int) -> list[tuple[int, Artifact]]:
        """Return so many that wait, from this number on."""
        with self._lock:
            return list(islice((each for each in self.waiting.items() if each[0] >= number), count))

    def wanted_ids(self) -> set[str]:
        """Return the ids of those whose files are still needed."""
        with self._lock:
            return {each.id for each in self.waiting.values()} | set(self.refused)

    def try_again(self, ids: Iterable[str]) -> int:
        """Let refused ones wait again, as the latest of their names; return how many. Raises:
        OSError."""
        with self._writing:
            chosen = [self.refused[each] for each in ids if each in self.refused]
            self._accept(chosen)
            return len(chosen)

    def forget(self, ids: Iterable[str]) -> list[Artifact]:
        """Forget refused ones; return them, for their files. Raises: OSError."""
        with self._writing:
            chosen = [each for each in ids if each in self.refused]
            self._append([{"forgotten": each} for each in chosen])
            with self._lock:
                return [self.refused.pop(each) for each in chosen]

    def status(self) -> dict[str, Any]:
        """Return what status shows, named by COUNTS."""
        with self._lock:
            counts = (
                self.next_number,
                next(iter(self.waiting), self.next_number),
                len(self.waiting),
                self.waiting_bytes,
                self.counts[UPLOADED],
                self.uploaded_bytes,
                self.counts[REPLACED],
                self.counts[REFUSED],
            )
        return dict(zip(COUNTS, counts, strict=True)) | NOT_UPLOADING

    # ── the file ──

    def _accept(self, artifacts: list[Artifact]) -> None:
        numbered = list(enumerate(artifacts, self.next_number))
        self._append([_accepted(number, artifact) for number, artifact in numbered])
        with self._lock:
            for number, artifact in numbered:
                self._take_in(number, artifact)

    def _take_in(self, number: int, artifact: Artifact) -> None:
        self.waiting[number] = artifact
        self._latest[artifact.path] = number
        self._ids.add(artifact.id)
        self.refused.pop(artifact.id, None)
        self.next_number = number + 1
        self._count_bytes(artifact, 1)

    def _take_out(self, number: int, how: str) -> Artifact:
        artifact = self.waiting.pop(number)
        self.counts[how] += 1
        self._count_bytes(artifact, -1)
        if how == REFUSED:
            self.refused[artifact.id] = artifact
        if how == UPLOADED:
            self.uploaded_bytes += artifact.size
        return artifact

    def _count_bytes(self, artifact: Artifact, sign: int) -> None:
        self.waiting_bytes += sign * artifact.size
        if artifact.where != PLACE:
            self.staged_bytes += sign * artifact.size

    def compact(self) -> None:
        """Put one line in the place of all, if all are done with: no segment is left from which a
        record could come again. Raises: OSError."""
        with self._writing:
            if self.waiting or self.refused or self._lines < COMPACT_LINES_MIN:
                return
            line = {
                "next": self.next_number,
                "counts": self.counts,
                "uploaded_bytes": self.uploaded_bytes,
            }
            self._disk.replace(self._path, json.dumps(line).encode() + b"\n", durable=True)
            self._ids.clear()
            self._latest.clear()
            self._lines = 1

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
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
                self._lines += len(lines)
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
            self._lines += 1
            try:
                self._read_line(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                # Torn by a crash: its record was not settled, and comes again; or, of an end, the
                # artifact is uploaded once more.
                log.warning("%s: a line that cannot be read is passed over", self._path)

    def _read_line(self, line: dict[str, Any]) -> None:
        if "forgotten" in line:
            self.refused.pop(line["forgotten"], None)
            return
        if "counts" in line:
            self.counts = {how: int(line["counts"][how]) for how in ENDS}
            self.next_number, self.uploaded_bytes = int(line["next"]), int(line["uploaded_bytes"])
            return
        number = int(line["n"])
        if "end" not in line:
            self._take_in(number, _artifact(line))
        elif number in self.waiting and line["end"] in ENDS:
            self._take_out(number, line["end"])


def _ended(end: End) -> dict[str, Any]:
    return {"n": end.number, "end": end.how, "sha256": end.sha256}


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
