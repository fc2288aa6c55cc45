"""A model test of the spool: hypothesis makes up lives, and shrinks what breaks a promise.

The spool lives on the disk of `power`; beside it stands what was promised to the world (`Known`).
After each kill, power failure and reload both are compared.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.spool import Spool
from tests.crash import life
from tests.crash.life import SEGMENT_BYTES, SESSIONS, check
from tests.crash.power import (
    FOLDER,
    File,
    Known,
    Layout,
    State,
    lay_out,
    layout_after_kill,
    random_layouts,
)
from tests.crash.recorder import RecordedDisk, RecordingOs, recording
from tests.support.spools import found_in, new_card

groups = st.lists(st.tuples(st.sampled_from(SESSIONS), st.integers(1, 9)), min_size=1, max_size=4)
chances = st.integers(0, (1 << 32) - 1)


class FullDisk(RecordedDisk):
    """A disk that takes a part of what is written when it is full."""

    is_full = False

    def write(self, fd: int, data: bytes | memoryview) -> None:
        if not self.is_full:
            super().write(fd, data)
            return
        self._recorder.write(fd, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")


class SpoolMachine(RuleBasedStateMachine):
    """One spool, through many daemons' lives."""

    cases: ClassVar[int] = 0
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        SpoolMachine.cases += 1
        logging.disable(logging.CRITICAL)
        self.root = Path(tempfile.mkdtemp(prefix="relay-model-", dir="/dev/shm"))
        self.folders = 0
        self.patched = contextlib.ExitStack()

    @initialize()
    def begin(self) -> None:
        self._found_on({}, Known())

    def teardown(self) -> None:
        self.patched.close()
        with contextlib.suppress(AttributeError):
            self.spool.close()
        shutil.rmtree(self.root)
        logging.disable(logging.NOTSET)

    # ── what ranks and lanes do ──

    @rule(group=groups)
    def append_and_ack(self, group: list[tuple[bytes, int]]) -> None:
        SpoolMachine.steps += 1
        life.append(self.recorder, self.run, *group)

    @rule(pieces=st.integers(1, 5))
    def deliver(self, pieces: int) -> None:
        SpoolMachine.steps += 1
        life.settle(self.recorder, self.run, pieces)

    @rule()
    def deliver_all_and_end(self) -> None:
        SpoolMachine.steps += 1
        life.settle(self.recorder, self.run, 999)
        with contextlib.suppress(OSError):  # a card that cannot be written is tried again
            life.end(self.recorder, self.run)
            life.come_back(self.run)

    @rule()
    def keep_a_dead_letter(self) -> None:
        SpoolMachine.steps += 1
        with contextlib.suppress(OSError):
            life.add_letter(self.recorder, DeadLetters(self.disk, self.run.folder))

    # ── what the disk does ──

    @rule(is_full=st.booleans())
    def fill_or_clear(self, is_full: bool) -> None:
        SpoolMachine.steps += 1
        self.disk.is_full = is_full

    @rule(after=st.integers(0, 2))
    def let_an_fsync_fail(self, after: int) -> None:
        SpoolMachine.steps += 1
        self.recorder.sync_fails_after = after

    @rule(chance=chances)
    def write_back(self, chance: int) -> None:
        """The kernel writes some of it back by itself, data and names."""
        SpoolMachine.steps += 1
        rng, state = random.Random(chance), self.recorder.state
        for inode, file in state.files.items():
            if rng.random() < 0.5 and not file.bad:
                state = state.with_file(inode, file.synced())
        self.recorder.state = replace(state, durable=state.cached) if rng.random() < 0.5 else state

    # ── crashes ──

    @rule()
    def reload(self) -> None:
        SpoolMachine.steps += 1
        self._restart()

    @rule(chance=chances)
    def crash_by_power_failure(self, chance: int) -> None:
        SpoolMachine.steps += 1
        state, known = self.recorder.state, self.recorder.known
        layouts = list(random_layouts(state, random.Random(chance), 1))
        self._close()
        self._found_on(layouts[0] if layouts else layout_after_kill(state), known)

    @rule(chance=chances)
    @precondition(lambda self: self.run.segment_bytes())
    def corrupt(self, chance: int) -> None:
        """A byte of a segment is another on a copy: the copy opens, and nothing in it is wrong."""
        SpoolMachine.steps += 1
        rng, layout = random.Random(chance), layout_after_kill(self.recorder.state)
        name = rng.choice([each for each in layout if each.endswith(".segment")])
        data = bytearray(layout[name] or b"")
        if not data:
            return
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        folder = self._new_folder({**layout, name: bytes(data)})
        with life.opened(Disk(), folder) as spool:
            for run in spool.runs.values():
                for _, seq, record in found_in(run):
                    assert record == life.record(seq), f"record {seq} is another"

    # ── inside ──

    def _new_folder(self, layout: Layout) -> Path:
        self.folders += 1
        folder = self.root / str(self.folders)
        folder.mkdir()
        lay_out(layout, str(folder))
        return folder

    def _found_on(self, layout: Layout, known: Known) -> None:
        """A daemon finds this on the disk after the power is back."""
        folder = self._new_folder(layout)
        state = _as_durable(layout)
        self.recorder: RecordingOs = self.patched.enter_context(recording(folder, state))
        for name, inode in state.cached.items():
            self.recorder.inodes[os.stat(folder / name).st_ino] = inode
        self.recorder.known = known
        self._open()

    def _open(self) -> None:
        self.disk = FullDisk(self.recorder)
        self.spool = Spool(self.disk, self.recorder.root, segment_bytes_max=SEGMENT_BYTES)
        known = self.recorder.known
        check(self.spool, known, in_order=False)
        self.run: RunSpool = self.spool.open_run(new_card(SESSIONS))
        claims = {each: self.run.next_seq(each) for each in SESSIONS}
        settled = {each: min(known.settled.get(each, 0), claims[each]) for each in SESSIONS}
        if not (self.run.folder / "card.json").exists():
            self.run.save_card()
        self.recorder.known = replace(known, acked=claims, settled=settled)

    def _restart(self) -> None:
        """A daemon is killed and the next one opens what it left; the page cache stays."""
        self.spool.close()
        self.recorder.sync_fails_after = -1
        self._open()

    def _close(self) -> None:
        self.spool.close()
        self.patched.close()


def _as_durable(layout: Layout) -> State:
    """Return the state of a disk after a power failure: what is there is there for good."""
    names, files = {}, {}
    for inode, (name, content) in enumerate(sorted(layout.items()), 1):
        names[name] = FOLDER if content is None else inode
        if content is not None:
            files[inode] = File(content, content)
    return State(files, dict(names), dict(names))
