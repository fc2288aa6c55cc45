"""A model of a disk: which bytes and names are on it, which only in the page cache, and what is
left of both when the power fails.

The system calls of the spool's disk are recorded into it (`recorder.py`). After each the power may
fail: then what was not synced may be there, be gone, or be there in part, by sectors; names that
were not synced, too.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

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
