"""Every crash state of a scripted life of the spool, recovered and looked through.

The system calls of the spool's disk are recorded into a model that knows, for each file and name,
what is on the disk and what is only in the page cache. After each call the power may fail: then
what was not synced may be there, be gone, or be there in part, by sectors of 512 bytes; names that
were not synced, too. Or the daemon alone is killed: then all is there, and nothing of it is safer
than before. Each such state is laid out as a folder and opened by a new daemon.

Source: INTERNALS.md, crash states.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlflow_relay.frames import Header
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.spool import disk as disk_module
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState
from tests.support.spools import RUN_ID, SESSION, found_in, frame_of_metrics, metrics, new_card

SECTOR = 512
OTHER = bytes(16)
SEGMENT_BYTES = 16_000
METRICS = 30  #: of each record: frames of a few sectors
START_MS = 1_795_412_345_678


# ── the model of a disk ──


@dataclass(frozen=True)
class File:
    """A file's content on the disk, and as processes see it. Offsets in `bad` were dropped by a
    failed fsync: a later one returns 0 and lies about them."""

    durable: bytes = b""
    cached: bytes = b""
    bad: frozenset[int] = frozenset()

    def synced(self) -> File:
        lied = bytearray(self.cached)
        for at in self.bad:
            if at < len(lied):
                lied[at] = 0
        return replace(self, durable=bytes(lied))


FOLDER = -1  #: stands for an inode where a name is a folder's


@dataclass(frozen=True)
class State:
    """Files by inode; names, on the disk and as processes see them."""

    files: dict[int, File] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)

    def with_file(self, inode: int, file: File) -> State:
        return replace(self, files={**self.files, inode: file})


@dataclass(frozen=True)
class Known:
    """What the rest of the world knows at a moment: what was acknowledged to it, and settled."""

    acked: dict[bytes, int] = field(default_factory=dict)
    settled: dict[bytes, int] = field(default_factory=dict)  #: or on its way to be
    letters: int = 0
    mlflow_run_id: str | None = None


class RecordingOs:
    """The os module of `spool.disk`, keeping the model beside the real files below a folder."""

    def __init__(self, real: ModuleType, root: Path, state: State | None = None) -> None:
        self._real, self.root = real, root
        self.state = state or State()
        self.inodes: dict[int, int] = {}  #: real inode number → the model's
        self._next = max(self.state.files, default=0) + 1
        self.states: list[tuple[str, State, Known]] = []
        self.known = Known()
        self.sync_fails_after = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def note(self, what: str) -> None:
        """A moment at which the power may fail."""
        self.states.append((what, self.state, self.known))

    def _name(self, path: Any) -> str:
        return str(Path(path).relative_to(self.root))

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        is_new = not self._real.path.exists(path)
        fd = self._real.open(path, flags, mode)
        if not flags & os.O_DIRECTORY and Path(path).is_relative_to(self.root):
            name, real_inode = self._name(path), self._real.fstat(fd).st_ino
            if is_new:
                self.inodes[real_inode] = self._next
                self.state = replace(
                    self.state.with_file(self._next, File()),
                    cached={**self.state.cached, name: self._next},
                )
                self._next += 1
                self.note(f"create {name}")
            elif flags & os.O_TRUNC:
                inode = self.inodes[real_inode]
                self.state = self.state.with_file(
                    inode, replace(self.state.files[inode], cached=b"", bad=frozenset())
                )
                self.note(f"truncate {name}")
        return int(fd)

    def write(self, fd: int, data: bytes) -> int:
        written = self._real.write(fd, data)
        inode = self.inodes[self._real.fstat(fd).st_ino]
        file = self.state.files[inode]
        cached = file.cached + data[:written]
        self.state = self.state.with_file(inode, replace(file, cached=cached))
        self.note(f"write {written}")
        return int(written)

    def ftruncate(self, fd: int, size: int) -> None:
        self._real.ftruncate(fd, size)
        inode = self.inodes[self._real.fstat(fd).st_ino]
        file = self.state.files[inode]
        bad = frozenset(at for at in file.bad if at < size)
        self.state = self.state.with_file(inode, replace(file, cached=file.cached[:size], bad=bad))
        self.note(f"cut to {size}")

    def fdatasync(self, fd: int) -> None:
        self._sync(fd)

    def fsync(self, fd: int) -> None:
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        found = self._real.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            path = Path(self._real.readlink(f"/proc/self/fd/{fd}"))
            if path.is_relative_to(self.root):
                self._sync_folder(self._name(path))
            return
        inode = self.inodes[found.st_ino]
        file = self.state.files[inode]
        if self.sync_fails_after == 0:
            lost = range(len(file.durable), len(file.cached))
            self.state = self.state.with_file(inode, replace(file, bad=file.bad | set(lost)))
            self.sync_fails_after = -1
            self.note("failed fsync")
            raise OSError(errno.EIO, "Input/output error")
        self.sync_fails_after -= self.sync_fails_after > 0
        self.state = self.state.with_file(inode, file.synced())
        self.note("fsync")

    def _sync_folder(self, folder: str) -> None:
        def inside(names: dict[str, int]) -> dict[str, int]:
            return {name: each for name, each in names.items() if str(Path(name).parent) == folder}

        outside = {
            name: each
            for name, each in self.state.durable.items()
            if str(Path(name).parent) != folder
        }
        self.state = replace(self.state, durable={**outside, **inside(self.state.cached)})
        self.note(f"fsync of {folder}")

    def rename(self, old: Any, new: Any) -> None:
        self._real.rename(old, new)
        names = dict(self.state.cached)
        names[self._name(new)] = names.pop(self._name(old))
        self.state = replace(self.state, cached=names)
        self.note(f"rename to {self._name(new)}")

    def folder_made(self, path: Path) -> None:
        if path.is_relative_to(self.root) and self._name(path) not in self.state.cached:
            self.state = replace(self.state, cached={**self.state.cached, self._name(path): FOLDER})
            self.note(f"mkdir {self._name(path)}")

    def removed(self, path: Path) -> None:
        names = dict(self.state.cached)
        if names.pop(self._name(path), None) is not None:
            self.state = replace(self.state, cached=names)
            self.note(f"unlink {self._name(path)}")


class RecordedDisk(Disk):
    """What of the real disk goes through pathlib, not os."""

    def __init__(self, recorder: RecordingOs) -> None:
        super().__init__()
        self._recorder = recorder

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        self._recorder.folder_made(path)
        super().make_folder(path)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._recorder.removed(path)


@contextlib.contextmanager
def recording(root: Path, state: State | None = None) -> Iterator[RecordingOs]:
    """Record what the spool's disk does below a folder."""
    real = disk_module.os
    recorder = RecordingOs(real, root, state)
    disk_module.os = recorder  # type: ignore[assignment]
    try:
        yield recorder
    finally:
        disk_module.os = real


# ── crash states ──

Layout = dict[str, bytes | None]  #: content by name; None: a folder


def layouts_after_power_failure(state: State) -> Iterator[tuple[str, Layout]]:
    """Yield what may be found on the disk: each of names and data kept, lost or torn."""
    for names_kept, names in (("kept", state.cached), ("lost", state.durable)):
        for what, contents in contents_after_power_failure(state):
            layout: Layout = {}
            for name, inode in names.items():
                parent = str(Path(name).parent)
                if parent == "." or parent in names:
                    layout[name] = None if inode == FOLDER else contents[inode]
            yield f"names {names_kept}, data {what}", layout


def contents_after_power_failure(state: State) -> Iterator[tuple[str, dict[int, bytes]]]:
    lost = {inode: file.durable for inode, file in state.files.items()}
    kept = {inode: file.synced().durable for inode, file in state.files.items()}
    yield "lost", lost
    yield "kept", kept
    for inode, file in state.files.items():
        if file.cached == file.durable:
            continue
        begin, end = len(file.durable), len(kept[inode])
        first = (begin // SECTOR + 1) * SECTOR
        for cut in range(first, end, SECTOR):
            yield f"torn at {cut}", {**kept, inode: kept[inode][:cut]}
            zeroes = kept[inode][:cut] + bytes(end - cut)
            yield f"torn at {cut}, zeroes behind", {**kept, inode: zeroes}
            hole_at = max(begin, cut - SECTOR)
            hole = kept[inode][:hole_at] + bytes(cut - hole_at) + kept[inode][cut:]
            yield f"hole at {hole_at}", {**kept, inode: hole}
        if begin < end:  # the size was written, the data was not
            yield "all zeroes", {**kept, inode: file.durable + bytes(end - begin)}


def layout_after_kill(state: State) -> Layout:
    """Return what a new daemon finds where the old one was killed: all of it."""
    return {
        name: None if inode == FOLDER else state.files[inode].cached
        for name, inode in state.cached.items()
    }


def lay_out(layout: Layout, root: Path) -> None:
    for name in sorted(layout):
        content = layout[name]
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


# ── what must hold ──


@contextlib.contextmanager
def opened(disk: Disk, root: Path) -> Iterator[Spool]:
    spool = Spool(disk, root, segment_bytes_max=SEGMENT_BYTES)
    try:
        yield spool
    finally:
        spool.close()


def check(spool: Spool, known: Known, *, in_order: bool) -> dict[bytes, int]:
    """Assert that all is there that was promised; return which numbers the spool claims to have."""
    run = spool.runs.get(RUN_ID)
    if run is None:
        assert not any(known.acked.values()), "the run is gone"
        assert not known.mlflow_run_id
        return {}
    claims = {}
    found = found_in(run)
    for session in (SESSION, OTHER):
        seqs = [seq for owner, seq, _ in found if owner == session]
        acked, settled = known.acked.get(session, 0), known.settled.get(session, 0)
        claims[session] = run.next_seq(session)
        # Where all is delivered and all ranks have gone, nobody is left to be asked again.
        assert claims[session] >= acked or settled == acked, f"asks for {claims[session]} again"
        missing = set(range(settled, claims[session])) - set(seqs)
        assert not missing, f"claims to have {sorted(missing)}"
        if in_order:
            first_times = list(dict.fromkeys(seqs))
            assert first_times == sorted(first_times)
    for _, seq, record in found:
        assert record == metrics(seq, size=METRICS)
    assert len(DeadLetters(Disk(), run.folder).list()) >= known.letters
    if known.mlflow_run_id is not None:
        assert run.card.mlflow_run_id == known.mlflow_run_id
    # It goes on: the rank sends what is not there, and it is found behind the rest.
    for session in (SESSION, OTHER):
        run.append([frame_of_metrics(claims[session], 2, session, size=METRICS)])
        assert run.next_seq(session) == claims[session] + 2
    return claims


@dataclass
class Explorer:
    """Opens states, each once."""

    root: Path
    opened: int = 0
    failures: list[str] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)

    def explore(self, states: list[tuple[str, State, Known]], failures_max: int = 5) -> None:
        for number, (what, state, known) in enumerate(states):
            for how, layout in layouts_after_power_failure(state):
                self._try(f"{number} after {what}: {how}", layout, known)
            self._try_kill(f"{number} after {what}: killed", state, known)
            if len(self.failures) >= failures_max:
                return

    def _is_new(self, layout: Layout, known: Known, extra: object = None) -> bool:
        key = hash((frozenset(layout.items()), str(known), extra))
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _try(self, name: str, layout: Layout, known: Known) -> None:
        if not self._is_new(layout, known):
            return
        with self._folder(layout) as folder, self._noted(name), opened(Disk(), folder) as spool:
            check(spool, known, in_order="hole" not in name)

    def _try_kill(self, name: str, state: State, known: Known) -> None:
        """A daemon is killed, a new one opens the spool and tells the ranks what it has; they let
        go of that; then the power fails."""
        layout = layout_after_kill(state)
        if not self._is_new(layout, known, str(sorted(state.durable)) + str(state.files)):
            return
        claims: dict[bytes, int] = {}
        with self._folder(layout) as folder, self._noted(name):
            with recording(folder, state) as recorder:
                for path, inode in state.cached.items():
                    recorder.inodes[os.stat(folder / path).st_ino] = inode
                spool = Spool(RecordedDisk(recorder), folder, segment_bytes_max=SEGMENT_BYTES)
                after = recorder.state
            try:
                run = spool.runs.get(RUN_ID)
                if run is not None:
                    claims = {each: run.next_seq(each) for each in (SESSION, OTHER)}
                check(spool, known, in_order=True)
            finally:
                spool.close()
        promised = replace(known, acked={**known.acked, **claims})
        if any(file.bad for file in state.files.values()):
            return  # killed between a failed fsync and the cut: nobody could know of it any more
        layouts = dict(layouts_after_power_failure(after))
        for how in ("names lost, data lost", "names kept, data lost"):
            self._try(f"{name}, opened, then power failure: {how}", layouts[how], promised)

    @contextlib.contextmanager
    def _folder(self, layout: Layout) -> Iterator[Path]:
        self.opened += 1
        with tempfile.TemporaryDirectory(dir=self.root) as path:
            lay_out(layout, Path(path))
            yield Path(path)

    @contextlib.contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any is a finding, and the next state is tried
            self.failures.append(f"{name}: {error!r}")


# ── the script ──


def settle(recorder: RecordingOs, run: RunSpool, pieces: int) -> None:
    """Do as the lane does when it has delivered some frames."""
    mark = Watermark(**vars(run.mark))
    seen = Sequences(mark.sequences)
    for _, piece, behind in [each for each, _ in zip(run.pieces(), range(pieces), strict=False)]:
        header: Header | None = piece.header
        if header is not None:
            seen.add(header.session, header.first_seq, header.next_seq)
            mark.settled_records += header.records
        mark.segment, mark.offset = behind
    mark.sequences = seen.save()
    settled = {session: seen.next_seq(session) for session in (SESSION, OTHER)}
    recorder.known = replace(recorder.known, settled=settled)
    run.settle(mark)
    recorder.note("settled")


def append(recorder: RecordingOs, run: RunSpool, *frames: tuple[bytes, int]) -> None:
    """Do as intake does: acknowledge when it is written."""
    acked = dict(recorder.known.acked)
    group = []
    for session, count in frames:
        group.append(frame_of_metrics(acked.get(session, 0), count, session, size=METRICS))
        acked[session] = acked.get(session, 0) + count
    try:
        run.append(group)
    except OSError:
        recorder.note("not acknowledged")
        return
    recorder.known = replace(recorder.known, acked=acked)
    recorder.note("acknowledged")


def add_letter(recorder: RecordingOs, letters: DeadLetters) -> None:
    entry = Entry("metric", "a@b", 1.0, START_MS, recorder.known.letters)
    letters.add([Objection(entry, "not a name")], START_MS)
    recorder.known = replace(recorder.known, letters=recorder.known.letters + 1)
    recorder.note("letter kept")


def live(recorder: RecordingOs, disk: Disk) -> None:
    """A short life in which everything happens that happens in a long one."""
    with opened(disk, recorder.root) as spool:
        run = spool.open_run(new_card([SESSION, OTHER]))
        letters = DeadLetters(disk, run.folder)
        append(recorder, run, (SESSION, 3))
        append(recorder, run, (SESSION, 2), (OTHER, 4))
        run.card.mlflow_run_id, run.card.state = "m1", RunState.OPEN
        run.save_card()
        recorder.known = replace(recorder.known, mlflow_run_id="m1")
        recorder.note("card written")
        settle(recorder, run, 1)
        append(recorder, run, (SESSION, 8), (SESSION, 8))
        append(recorder, run, (OTHER, 5))  # a second segment
        add_letter(recorder, letters)
        settle(recorder, run, 3)
        recorder.sync_fails_after = 0
        append(recorder, run, (SESSION, 6), (OTHER, 3), (SESSION, 6))
        recorder.sync_fails_after = 1  # the head of the third segment is synced, the frames are not
        append(recorder, run, (SESSION, 6), (OTHER, 3), (SESSION, 6))
        append(recorder, run, (SESSION, 6), (OTHER, 3), (SESSION, 6))
        append(recorder, run, (SESSION, 2))
        settle(recorder, run, 2)
        add_letter(recorder, letters)
        append(recorder, run, (OTHER, 7))
        settle(recorder, run, 99)
        append(recorder, run, (SESSION, 1))
    # A second daemon, on what the first has left.
    with opened(disk, recorder.root) as spool:
        run = spool.runs[RUN_ID]
        for count in range(5, 13):
            append(recorder, run, (SESSION, count), (OTHER, count))
            append(recorder, run, (SESSION, 14 - count))
            settle(recorder, run, 2)
        settle(recorder, run, 99)
        run.card.state = RunState.ENDED
        for each in run.card.sessions.values():
            each.closed = True
        run.save_card()
        recorder.note("over")
        run.return_space()
        recorder.note("space returned")
        for each in run.card.sessions.values():
            each.closed = False
        run.save_card()
        append(recorder, run, (SESSION, 3))  # a rank has come back


@pytest.fixture
def folder(caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    caplog.set_level(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="relay-crash-", dir="/dev/shm") as path:
        yield Path(path)


def explored(
    folder: Path, make_disk: Callable[[RecordingOs], Disk], failures_max: int = 5
) -> tuple[Explorer, int]:
    (folder / "life").mkdir()
    (folder / "after").mkdir()
    with recording(folder / "life") as recorder:
        try:
            live(recorder, make_disk(recorder))
        except OSError:
            assert make_disk is EarlyUnlink  # it stumbles itself over what it has removed
    explorer = Explorer(folder / "after")
    explorer.explore(recorder.states, failures_max)
    return explorer, len(recorder.states)


def test_whatever_was_acknowledged_is_found_after_any_crash(folder):
    explorer, moments = explored(folder, RecordedDisk)

    print(f"{moments} moments, {explorer.opened} states opened")
    assert explorer.failures == []
    assert explorer.opened > 1000


# ── the explorer itself: planted bugs must be found ──


class NoSync(RecordedDisk):
    """Acknowledges what is in the page cache."""

    def sync(self, fd: int) -> None:
        pass


class NoFolderSync(RecordedDisk):
    """Forgets that a file's name must be on the disk, too."""

    def sync_folder(self, path: Path) -> None:
        pass


class NoCut(RecordedDisk):
    """Leaves what failed where it is, and is told that all went well."""

    def write(self, fd: int, data: bytes) -> None:
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        try:
            super().sync(fd)
        except OSError:
            super().sync(fd)  # "a retry after a failed fdatasync succeeds and lies"


class EarlyUnlink(RecordedDisk):
    """Removes a segment before the next one is safe."""

    def create(self, path: Path) -> int:
        if path.suffix == ".segment":
            for older in sorted(path.parent.glob("*.segment"))[:-1]:
                self.unlink(older)
        return super().create(path)


@pytest.mark.parametrize("planted", [NoSync, NoFolderSync, NoCut, EarlyUnlink])
def test_a_planted_bug_is_found(folder, planted):
    explorer, _ = explored(folder, planted, failures_max=1)

    assert explorer.failures
