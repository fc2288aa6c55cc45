"""Records the system calls of the spool's disk into the model of one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from mlflow_relay_daemon.spool import disk as disk_module
from mlflow_relay_daemon.spool.disk import Disk
from tests.crash.power import FOLDER, File, Known, State


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
        return os.path.relpath(path, self.root)

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
        def is_inside(name: str) -> bool:
            return (name.rpartition("/")[0] or ".") == folder

        outside = {name: each for name, each in self.state.durable.items() if not is_inside(name)}
        inside = {name: each for name, each in self.state.cached.items() if is_inside(name)}
        self.state = replace(self.state, durable={**outside, **inside})
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
