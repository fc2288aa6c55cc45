"""A model of a disk: which bytes and names are on it, which only in the page cache, and what is
left of both when the power fails.

The system calls of the spool's disk are recorded into it. After each the power may fail: then what
was not synced may be there, be gone, or be there in part, by sectors; names that were not synced,
too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mlflow_relay_daemon.spool import disk as disk_module
from mlflow_relay_daemon.spool.disk import Disk

SECTORS = (512, 4096)
#: Up to so many names that are not synced, each set of those that are kept is laid out.
NAMES_MAX = 3


@dataclass(frozen=True)
class File:
    """A file's content on the disk, and as processes see it. Offsets in `bad` were dropped by a
    failed fsync: a later one returns 0 and lies about them."""

    durable: bytes = b""
    cached: bytes = b""
    bad: frozenset[int] = frozenset()

    @functools.cached_property
    def kept(self) -> bytes:
        """What an fsync brings to the disk."""
        if not self.bad:
            return self.cached
        lied = bytearray(self.cached)
        for at in self.bad:
            if at < len(lied):
                lied[at] = 0
        return bytes(lied)

    def synced(self) -> File:
        return replace(self, durable=self.kept)


FOLDER = -1  #: stands for an inode where a name is a folder's


@dataclass(frozen=True)
class State:
    """Files by inode; names, on the disk and as processes see them; names in the order in which
    they changed."""

    files: dict[int, File] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def with_names(self, cached: dict[str, int]) -> State:
        """Return the state after a change of what processes see of names."""
        every = sorted(self.cached.keys() | cached.keys())
        new = tuple(each for each in every if self.cached.get(each) != cached.get(each))
        former = tuple(each for each in self.changed if each not in new)
        return replace(self, cached=cached, changed=former + new)

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
                state = self.state.with_file(self._next, File())
                self.state = state.with_names({**state.cached, name: self._next})
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
        inode = self.inodes.get(self._real.fstat(fd).st_ino)
        if inode is None:
            return int(written)  # a file of somebody else
        file = self.state.files[inode]
        cached = file.cached + data[:written]
        self.state = self.state.with_file(inode, replace(file, cached=cached))
        self.note(f"write {written}")
        return int(written)

    def ftruncate(self, fd: int, size: int) -> None:
        self._real.ftruncate(fd, size)
        inode = self.inodes.get(self._real.fstat(fd).st_ino)
        if inode is None:
            return
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
        inode = self.inodes.get(found.st_ino)
        if inode is None:
            return
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
        self.state = self.state.with_names(names)
        self.note(f"rename to {self._name(new)}")

    def folder_made(self, path: Path) -> None:
        if path.is_relative_to(self.root) and self._name(path) not in self.state.cached:
            self.state = self.state.with_names({**self.state.cached, self._name(path): FOLDER})
            self.note(f"mkdir {self._name(path)}")

    def removed(self, path: Path) -> None:
        names = dict(self.state.cached)
        if names.pop(self._name(path), None) is not None:
            self.state = self.state.with_names(names)
            self.note(f"unlink {self._name(path)}")


class RecordedDisk(Disk):
    """What of the real disk goes through pathlib, not os."""

    def __init__(self, recorder: RecordingOs) -> None:
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


# ── what a power failure leaves ──

Layout = dict[str, bytes | None]  #: content by name; None: a folder


def layouts_after_power_failure(state: State) -> Iterator[tuple[str, Layout]]:
    """Yield what may be found: each set of names, and data kept, lost or torn in each way."""
    for which, names in names_after_power_failure(state):
        for what, contents in contents_after_power_failure(state):
            yield f"names {which}, data {what}", layout_of(names, contents)


def random_layouts(state: State, rng: random.Random, count: int) -> Iterator[Layout]:
    """Yield some of all that may be found: any sectors of any file; names up to any change, for
    journaling file systems (ext4, XFS, btrfs) keep the order of these."""
    unsynced, pending = _unsynced(state), _pending(state)
    if not (unsynced or pending):
        return
    durable = {inode: file.durable for inode, file in state.files.items()}
    for _ in range(count):
        contents = dict(durable)
        for inode in unsynced:
            file = state.files[inode]
            if rng.random() < 0.3 or len(file.kept) <= len(file.durable):
                contents[inode] = rng.choice((file.kept, file.durable))
            else:
                contents[inode] = _some_sectors(file.kept, len(file.durable), rng)
        names = dict(state.durable)
        for name in pending[: rng.randint(0, len(pending))]:
            _take(names, name, state)
        yield layout_of(names, contents)


def _some_sectors(kept: bytes, begin: int, rng: random.Random) -> bytes:
    """Return the file with any of its unsynced sectors zero, and perhaps cut off at one."""
    sector = rng.choice(SECTORS)
    data = bytearray(kept)
    for end in [*range((begin // sector + 1) * sector, len(kept), sector), len(kept)]:
        at = max(begin, end - sector)
        if rng.random() < 0.5:
            data[at:end] = bytes(end - at)
    if rng.random() < 0.5:
        del data[max(begin, rng.randrange(begin, len(kept) + 1) // sector * sector) :]
    return bytes(data)


def names_after_power_failure(state: State) -> Iterator[tuple[str, dict[str, int]]]:
    pending = _pending(state)
    if len(pending) > NAMES_MAX:
        yield "lost", dict(state.durable)
        yield "kept", dict(state.cached)
        return
    for count in range(len(pending) + 1):
        for chosen in itertools.combinations(pending, count):
            names = dict(state.durable)
            for name in chosen:
                _take(names, name, state)
            which = "lost" if not chosen else "kept" if len(chosen) == len(pending) else chosen
            yield str(which), names


def _pending(state: State) -> list[str]:
    """Return the names that are not on the disk as processes see them, as they changed."""
    return [each for each in state.changed if state.durable.get(each) != state.cached.get(each)]


def _take(names: dict[str, int], name: str, state: State) -> None:
    """Have one name as processes see it."""
    if name in state.cached:
        names[name] = state.cached[name]
    else:
        del names[name]


def layout_of(names: dict[str, int], contents: dict[int, bytes]) -> Layout:
    layout: Layout = {}
    for name, inode in sorted(names.items()):
        parent = name.rpartition("/")[0]
        if not parent or parent in layout:
            layout[name] = None if inode == FOLDER else contents[inode]
    return layout


def contents_after_power_failure(state: State) -> Iterator[tuple[str, dict[int, bytes]]]:
    lost = {inode: file.durable for inode, file in state.files.items()}
    kept = {inode: file.kept for inode, file in state.files.items()}
    yield "lost", lost
    yield "kept", kept
    for inode in _unsynced(state):
        file = state.files[inode]
        yield f"of file {inode} lost", {**kept, inode: file.durable}
        for sector in SECTORS:
            for what, content in _torn(file.kept, len(file.durable), sector):
                yield f"of file {inode} {what}", {**kept, inode: content}


def _unsynced(state: State) -> list[int]:
    """Return the files that have a name and are not on the disk as processes see them."""
    named = {*state.durable.values(), *state.cached.values()} - {FOLDER}
    return sorted(each for each in named if state.files[each].cached != state.files[each].durable)


def _torn(kept: bytes, begin: int, sector: int) -> Iterator[tuple[str, bytes]]:
    """Yield the file with what was not synced torn at one sector."""
    end = len(kept)
    for cut in range((begin // sector + 1) * sector, end, sector):
        yield f"torn at {cut}", kept[:cut]
        yield f"torn at {cut}, zeroes behind", kept[:cut] + bytes(end - cut)
        hole_at = max(begin, cut - sector)
        yield f"hole at {hole_at}", kept[:hole_at] + bytes(cut - hole_at) + kept[cut:]
    if begin < end:  # the size was written, the data was not
        yield "all zeroes", kept[:begin] + bytes(end - begin)


def layout_after_kill(state: State) -> Layout:
    """Return what a new daemon finds where the old one was killed: all of it."""
    return {
        name: None if inode == FOLDER else state.files[inode].cached
        for name, inode in state.cached.items()
    }


def lay_out(layout: Layout, root: str) -> None:
    for name in sorted(layout):
        content = layout[name]
        if content is None:
            os.mkdir(f"{root}/{name}")
        else:
            fd = os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(fd, content)
            os.close(fd)
