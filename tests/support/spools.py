"""What tests of the spool need: cards, frames of known records, a disk that fails when told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_relay.frames import Header, pack_entry, pack_frame, read_frame
from mlflow_relay.records import MetricsPacker, pack_end, pack_params, pack_tags
from mlflow_relay_daemon.attachment import Attachment
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool

RUN_ID = "0123456789abcdef" * 2
SESSION = bytes(range(16))
START_MS = 1_795_412_345_678


def attachment(
    session: bytes = SESSION,
    *,
    run_id: str = RUN_ID,
    rank: int = 0,
    primary: bool = True,
    first_seq: int = 0,
    start_ms: int = START_MS,
    experiment_name: str = "aifs",
) -> Attachment:
    """Return what a rank says of itself, of a job on one node."""
    return Attachment(
        session=session,
        run_id=run_id,
        run_key="a key",
        experiment_name=experiment_name,
        run_name="o96",
        rank=rank,
        world_size=4,
        node="node7",
        pid=4711,
        primary=primary,
        start_ms=start_ms,
        tags={"mlflow.user": "ada"},
        first_seq=first_seq,
        node_count=1,
    )


def new_card(sessions: Iterable[bytes] = (SESSION,), run_id: str = RUN_ID) -> Card:
    """Return a run's card that knows these sessions."""
    card = attachment(run_id=run_id).new_card()
    for rank, session in enumerate(sessions):
        card.sessions[session.hex()] = attachment(session, rank=rank).session_card()
    return card


def metrics(seq: int, *, size: int = 2) -> bytes:
    """Return the record of the call that has this sequence number; no two are equal."""
    values = {f"m{index}": seq + index / 16 for index in range(size)}
    return MetricsPacker().pack(values, seq, START_MS + seq)


def param(key: str, value: str) -> bytes:
    return pack_params({key: value}, START_MS)


def tag(key: str, value: str) -> bytes:
    return pack_tags({key: value}, START_MS)


def end(status: str = "FINISHED", reason: str = "", at_ms: int = START_MS + 99_000) -> bytes:
    return pack_end(status, reason, at_ms)


def frame(
    first_seq: int, records: Sequence[bytes], session: bytes = SESSION
) -> tuple[Header, bytes]:
    """Return a frame as intake takes it."""
    data = pack_frame(session, first_seq, len(records), b"".join(map(pack_entry, records)))
    return read_frame(data), data


def frame_of_metrics(
    first_seq: int, count: int, session: bytes = SESSION, *, size: int = 2
) -> tuple[Header, bytes]:
    """Return a frame of `metrics` records."""
    return frame(first_seq, [metrics(first_seq + n, size=size) for n in range(count)], session)


def found_in(run: RunSpool) -> list[tuple[bytes, int, bytes]]:
    """Return what a lane would find from the watermark on: (session, sequence number, record)."""
    return [
        (piece.header.session, piece.header.first_seq + index, record)
        for _, piece, _ in run.pieces()
        if piece.header is not None
        for index, record in enumerate(piece.records)
        if record is not None
    ]


def seqs_in(run: RunSpool, session: bytes = SESSION) -> list[int]:
    """Return the sequence numbers of one session's records, in the order of the segments."""
    return [seq for owner, seq, _ in found_in(run) if owner == session]


@dataclass
class Failure:
    """A rule: which operation fails, and how."""

    operation: str
    name: str  #: a part of the file's name
    error: int
    after: int  #: so many go well before
    times: int
    written: int | None  #: of a write: so many bytes are written all the same
    done: bool  #: of the others: it has happened, and only the answer is lost

    def applies(self, operation: str, name: str) -> bool:
        if operation != self.operation or self.name not in name or self.times == 0:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


class FailingDisk(Disk):
    """The real disk, until told otherwise; remembers what was asked of it.

    Attributes:
        asked: (operation, file's name, error or None), in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[Failure] = []
        self.asked: list[tuple[str, str, int | None]] = []
        self.free: int | None = None

    def fail(
        self,
        operation: str,
        name: str = "",
        error: int = errno.EIO,
        *,
        after: int = 0,
        times: int = 1,
        written: int | None = None,
        done: bool = False,
    ) -> None:
        """Let an operation fail: create, open, write, sync, sync_folder, truncate, unlink,
        make_folder or rename."""
        self.failures.append(Failure(operation, name, error, after, times, written, done))

    def mend(self) -> None:
        self.failures.clear()

    def count(self, operation: str, name: str = "") -> int:
        return sum(each[0] == operation and name in each[1] for each in self.asked)

    def _due(self, operation: str, path: Path) -> Failure | None:
        failure = next((each for each in self.failures if each.applies(operation, path.name)), None)
        self.asked.append((operation, path.name, failure.error if failure else None))
        return failure

    def _check(self, operation: str, path: Path) -> None:
        failure = self._due(operation, path)
        if failure is not None and not failure.done:
            raise OSError(failure.error, os.strerror(failure.error))

    @staticmethod
    def _file(fd: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))

    def create(self, path: Path) -> int:
        self._check("create", path)
        return super().create(path)

    def open(self, path: Path) -> int:
        self._check("open", path)
        return super().open(path)

    def write(self, fd: int, data: bytes) -> None:
        failure = self._due("write", self._file(fd))
        if failure is None:
            super().write(fd, data)
            return
        if failure.written:
            os.write(fd, data[: failure.written])
        raise OSError(failure.error, os.strerror(failure.error))

    def sync(self, fd: int) -> None:
        self._check("sync", self._file(fd))
        super().sync(fd)

    def sync_folder(self, path: Path) -> None:
        self._check("sync_folder", path)
        super().sync_folder(path)

    def truncate(self, fd: int, size: int) -> None:
        self._check("truncate", self._file(fd))
        super().truncate(fd, size)

    def unlink(self, path: Path) -> None:
        self._check("unlink", path)
        super().unlink(path)

    def make_folder(self, path: Path) -> None:
        self._check("make_folder", path)
        super().make_folder(path)

    def replace(self, path: Path, data: bytes, *, durable: bool) -> None:
        failure = self._due("rename", path)
        if failure is not None:
            path.with_name(path.name + ".new").write_bytes(data)
            raise OSError(failure.error, os.strerror(failure.error))
        super().replace(path, data, durable=durable)

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self.free is None else self.free

    def assert_no_failed_file_was_trusted(self, suffix: str) -> None:
        """After a failed fsync of a file, nothing more is written to it: it would be lost, too."""
        failed: set[str] = set()
        for operation, name, error in self.asked:
            if suffix in name:
                if operation == "create" and error is None:
                    failed.discard(name)  # another file, of the same name
                if operation == "write":
                    assert name not in failed, f"{name} was written to after its fsync had failed"
                if operation in ("sync", "write") and error is not None:
                    failed.add(name)
