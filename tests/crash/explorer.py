"""Opens every crash state of a recorded life, and counts those that break a promise."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool
from tests.crash.life import SEGMENT_BYTES, SESSIONS, check, live, opened
from tests.crash.power import (
    Known,
    Layout,
    State,
    lay_out,
    layout_after_kill,
    layout_of,
    layouts_after_power_failure,
    random_layouts,
)
from tests.crash.recorder import RecordedDisk, RecordingOs, recording
from tests.support.spools import RUN_ID

Moment = tuple[str, State, Known]


@dataclass
class Explorer:
    """Opens states, each once.

    Args:
        root: where they are laid out, one at a time.
        failures_max: it gives up after so many.
    """

    root: Path
    failures_max: int = 5
    opened: int = 0
    failures: list[str] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def explore(self, moments: list[Moment], rng: random.Random | None = None) -> None:
        """Open what a power failure or a kill may leave at each moment.

        Args: rng: also as many layouts by chance: any names, any sectors of any file.
        """
        for number, (what, state, known) in enumerate(moments):
            layouts = list(layouts_after_power_failure(state))
            if rng is not None:
                some = random_layouts(state, rng, len(layouts))
                layouts += [("by chance, hole", layout) for layout in some]
            for how, layout in layouts:
                self._try(f"{number} after {what}: {how}", layout, known)
            self._try_kill(f"{number} after {what}: killed", state, known)
            if len(self.failures) >= self.failures_max:
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
                    claims = {each: run.next_seq(each) for each in SESSIONS}
                check(spool, known, in_order=True)
            finally:
                spool.close()
        promised = replace(known, acked={**known.acked, **claims})
        if any(file.bad for file in state.files.values()):
            return  # killed between a failed fsync and the cut: nobody could know of it any more
        durable = {inode: file.durable for inode, file in after.files.items()}
        for which, names in (("lost", after.durable), ("kept", after.cached)):
            how = f"{name}, opened, then power failure: names {which}, data lost"
            self._try(how, layout_of(names, durable), promised)

    @contextlib.contextmanager
    def _folder(self, layout: Layout) -> Iterator[Path]:
        self.opened += 1
        path = f"{self.root}/{self.opened}"
        os.mkdir(path)
        lay_out(layout, path)
        try:
            yield Path(path)
        finally:
            _remove(path)

    @contextlib.contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any is a finding, and the next state is tried
            self.failures.append(f"{name}: {error!r}")


def _remove(folder: str) -> None:
    """Remove a folder of files and folders: as shutil.rmtree, at a third of its time."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(folder)


def record_life(
    folder: Path,
    make_disk: Callable[[RecordingOs], Disk] = RecordedDisk,
    life: Callable[[RecordingOs, Disk], None] = live,
) -> list[Moment]:
    """Return the moments of a life that is lived in a new folder. Raises: what the life raises."""
    folder.mkdir()
    with recording(folder) as recorder:
        life(recorder, make_disk(recorder))
    return recorder.states
