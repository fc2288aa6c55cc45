"""What one rank has printed, as lines in the run's folder.

    terminal/rank_<n>.json        how far it has been read, the lines that can still change, and
                                  how much of the text counts; replaced atomically
    terminal/rank_<n>.<part>.txt  the lines that are final

The text is fsynced before the JSON names its length, so whatever a crash leaves behind that length
is cut off, and what it was made of is read again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_relay_daemon.screen import Screen
from mlflow_relay_daemon.spool.disk import Disk

log = logging.getLogger(__name__)

FOLDER = "terminal"
VERSION = 1
#: Beyond it only the beginning and the end are kept.
TEXT_BYTES_MAX, HEAD_BYTES, TAIL_BYTES = 32 << 20, 1 << 20, 8 << 20


_STATE_FILE = re.compile(r"rank_(\d+)\.json")


class Printed(NamedTuple):
    """One record of what a rank has printed."""

    rank: int
    session: bytes
    seq: int
    data: bytes


class Transcript:
    """One rank's. Used by the run's lane alone."""

    def __init__(self, disk: Disk, run_folder: Path, rank: int) -> None:
        self.rank = rank
        self._disk, self._folder = disk, run_folder / FOLDER
        self._folder_is_made = False
        self._state = self._read()
        self._screen = Screen(self._state["screen"])

    @property
    def is_published(self) -> bool:
        """Whether the artifact has all of it."""
        return bool(self._state["published_bytes"] == self._state["printed_bytes"])

    def add(self, printed: Sequence[Printed]) -> None:
        """Take in what a rank has printed; what was taken in before is passed over.

        Raises: OSError: nothing of it is taken in. Crash: safe at any line, see above.
        """
        state = {**self._state, "sessions": dict(self._state["sessions"])}
        screen = Screen(self._state["screen"])
        final: list[str] = []
        for each in printed:
            name = each.session.hex()
            if each.seq >= state["sessions"].get(name, 0):
                state["sessions"][name] = each.seq + 1
                state["printed_bytes"] += len(each.data)
                final += screen.feed(each.data)
        if state["sessions"] == self._state["sessions"]:
            return
        state["screen"] = screen.save()
        if final:
            self._append(state, "".join(f"{line}\n" for line in final).encode())
        self._save(state)
        self._screen = screen

    def text(self) -> bytes:
        """Return all that a terminal would show."""
        rest = "".join(f"{line}\n" for line in self._screen.lines())
        return self._final_text() + rest.encode()

    def mark_published(self) -> None:
        """All that has been printed up to now is in the artifact. Raises: OSError."""
        self._save({**self._state, "published_bytes": self._state["printed_bytes"]})

    # ── files ──

    def _append(self, state: dict[str, Any], data: bytes) -> None:
        if state["text_bytes"] + len(data) > TEXT_BYTES_MAX:
            data = _shortened(self._final_text() + data)
            state["part"] += 1
            state["text_bytes"] = 0
        path = self._text_path(state["part"])
        self._make_folder()
        fd = self._disk.open(path) if path.exists() else self._disk.create(path)
        try:
            self._disk.truncate(fd, state["text_bytes"])
            self._disk.write(fd, data)
            self._disk.sync(fd)
        finally:
            os.close(fd)
        state["text_bytes"] += len(data)

    def _make_folder(self) -> None:
        """Also where it is there: who made it may have died before its name was on the disk."""
        if not self._folder_is_made:
            self._disk.make_folder(self._folder)
            self._folder_is_made = True

    def _save(self, state: dict[str, Any]) -> None:
        self._make_folder()
        self._disk.replace(self._state_path, json.dumps(state).encode(), durable=True)
        old, self._state = self._state, state
        if old["part"] < state["part"]:
            self._disk.unlink(self._text_path(old["part"]))

    def _final_text(self) -> bytes:
        length = self._state["text_bytes"]
        if not length:
            return b""
        with self._text_path(self._state["part"]).open("rb") as file:
            return file.read(length)

    def _read(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "version": VERSION,
            "sessions": {},
            "screen": Screen().save(),
            "part": 0,
            "text_bytes": 0,
            "printed_bytes": 0,
            "published_bytes": 0,
        }
        try:
            state = {**fresh, **json.loads(self._state_path.read_bytes())}
            Screen(state["screen"])
        except FileNotFoundError:
            return fresh
        except (ValueError, TypeError, KeyError) as error:
            log.error("%s is damaged: %s: what was printed before is lost", self._state_path, error)
            return fresh
        return state

    @property
    def _state_path(self) -> Path:
        return self._folder / f"rank_{self.rank}.json"

    def _text_path(self, part: int) -> Path:
        return self._folder / f"rank_{self.rank}.{part}.txt"


class Transcripts:
    """Those of one run. Used by the run's lane alone."""

    def __init__(self, disk: Disk, run_folder: Path) -> None:
        self.disk, self._run_folder = disk, run_folder
        self.by_rank: dict[int, Transcript] = {}
        for path in (run_folder / FOLDER).glob("rank_*.json"):
            found = _STATE_FILE.fullmatch(path.name)
            if found:
                self._of(int(found[1]))

    def add(self, printed: Sequence[Printed]) -> None:
        """Take in what was printed; it is on the disk when this returns. Raises: OSError."""
        by_rank: dict[int, list[Printed]] = {}
        for each in printed:
            by_rank.setdefault(each.rank, []).append(each)
        for rank, its in by_rank.items():
            self._of(rank).add(its)

    def _of(self, rank: int) -> Transcript:
        if rank not in self.by_rank:
            self.by_rank[rank] = Transcript(self.disk, self._run_folder, rank)
        return self.by_rank[rank]


def _shortened(text: bytes) -> bytes:
    """Return the beginning and the end of a text, whole lines of both, and what was left out."""
    head = text[: text.rfind(b"\n", 0, HEAD_BYTES) + 1]
    tail = text[text.find(b"\n", len(text) - TAIL_BYTES) + 1 :]
    left_out = text[len(head) : len(text) - len(tail)].count(b"\n")
    return head + b"[... %d lines are left out here ...]\n" % left_out + tail
