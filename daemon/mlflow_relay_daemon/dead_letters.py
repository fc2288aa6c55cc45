"""The records that MLflow refused for good: kept with the reason until somebody decides.

One JSON line each in the run's folder, on the disk before the watermark passes the record.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.spool.disk import Disk

NAME = "dead_letters.jsonl"


@dataclass(frozen=True)
class DeadLetter:
    """One refused entry."""

    id: int  #: counted within its run
    kind: str
    key: str
    value: float | str  #: NaN and infinities as text: JSON has none
    timestamp_ms: int
    step: int | None
    reason: str
    error_code: str
    refused_ms: int

    def entry(self) -> Entry:
        """Return what was refused."""
        value = float(self.value) if self.kind == "metric" else self.value
        return Entry(self.kind, self.key, value, self.timestamp_ms, self.step)


class Letters(Protocol):
    """Where a lane puts what was refused."""

    def add(self, objections: Iterable[Objection], now_ms: int) -> None:
        """Keep refused entries. Raises: OSError."""
        ...

    def list(self) -> list[DeadLetter]:
        """Return all, oldest first."""
        ...

    def remove(self, ids: set[int]) -> int:
        """Forget these; return how many there were. Raises: OSError."""
        ...


class DeadLetters:
    """The dead letters of one run. Safe for several threads."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._path = disk, folder / NAME
        self._lock = threading.Lock()
        self._name_is_synced = False  # who made the file may have died before that
        letters = self.list()
        self.count = len(letters)
        self._next_id = 1 + max((letter.id for letter in letters), default=0)

    def list(self) -> list[DeadLetter]:
        """Return all, oldest first. A line that cannot be read is passed over."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        letters = (_read_line(line) for line in lines)
        return [letter for letter in letters if letter is not None]

    def add(self, objections: Iterable[Objection], now_ms: int) -> None:
        """Keep refused entries; they are on the disk when this returns. Raises: OSError."""
        with self._lock:
            letters = [
                as_letter(self._next_id + index, objection, now_ms)
                for index, objection in enumerate(objections)
            ]
            if not letters:
                return
            is_new = not self._path.exists()
            fd = self._disk.create(self._path) if is_new else self._disk.open(self._path)
            with open(fd, "ab", buffering=0, closefd=True):
                size = os.fstat(fd).st_size
                try:
                    # The leading newline ends a line that a crash may have torn.
                    self._disk.write(fd, b"\n" + b"".join(map(_line, letters)))
                    self._disk.sync(fd)
                    if not self._name_is_synced:
                        self._disk.sync_folder(self._path.parent)
                        self._name_is_synced = True
                except OSError:
                    with suppress(OSError):
                        self._disk.truncate(fd, size)  # they will come again
                    raise
            self.count += len(letters)
            self._next_id += len(letters)

    def remove(self, ids: set[int]) -> int:
        """Forget these; return how many there were. Raises: OSError."""
        with self._lock:
            letters = self.list()
            kept = [letter for letter in letters if letter.id not in ids]
            self._disk.replace(self._path, b"".join(map(_line, kept)), durable=True)
            self.count = len(kept)
            return len(letters) - len(kept)


def as_letter(number: int, objection: Objection, now_ms: int) -> DeadLetter:
    """Return what is kept of an objection."""
    entry = objection.entry
    value: Any = entry.value
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return DeadLetter(
        id=number,
        kind=entry.kind,
        key=entry.key,
        value=value,
        timestamp_ms=entry.timestamp_ms,
        step=entry.step,
        reason=objection.reason,
        error_code=objection.error_code,
        refused_ms=now_ms,
    )


def _read_line(line: bytes) -> DeadLetter | None:
    """Return None for a line torn by a crash: its record was not settled, and is refused again."""
    try:
        letter = DeadLetter(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    number: object = letter.id  # JSON keeps no types
    return letter if isinstance(number, int) else None


def _line(letter: DeadLetter) -> bytes:
    return json.dumps(asdict(letter)).encode() + b"\n"
