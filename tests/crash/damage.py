"""A spool and a dead rank's journal, damaged at one place, and what a daemon makes of them.

In one process: the daemon's own rooms, and a sink in memory. The journals' ranks have died.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import random
import re
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mlflow_relay.journal import Journal
from mlflow_relay.messages import pack_map
from mlflow_relay.records import Metrics, unpack_record
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.lane.lane import REST_WAIT_S
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool
from tests.crash.power import Layout, lay_out
from tests.support.fake_sink import FakeSink
from tests.support.spools import attachment, end, frame, metrics

SPOOLED, DEAD = bytes(range(16)), bytes(range(1, 17))
SEGMENT_BYTES = 64 << 10
METRICS = 10
FRAME_RECORDS = 10
DEAD_RECORDS = 40
KINDS = ("flip", "cut", "zero", "double")
#: The dead rank's records are told from the others by their numbers.
DEAD_FROM = 10_000
DEAD_ONES = set(range(DEAD_FROM, DEAD_FROM + DEAD_RECORDS))
FAR = 1 << 62
#: How the names of the files end that are damaged.
DAMAGED = ("segment", "watermark", "json", "journal", "entries")

#: As the sink keeps it: key, value, time, step.
Point = tuple[str, bytes, int, int]


class Spoilt(NamedTuple):
    """Where a file is damaged, and how."""

    path: str
    kind: str
    at: int
    size: int = 1  #: of what is zeroed or doubled

    def apply(self, data: bytes) -> bytes:
        at, behind = self.at, self.at + self.size
        match self.kind:
            case "flip":
                return data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]
            case "cut":
                return data[:at]
            case "zero":
                return data[:at] + bytes(min(self.size, len(data) - at)) + data[behind:]
            case _:
                return data[:behind] + data[at:]


@dataclass(frozen=True)
class Scene:
    """What lies there before it is damaged."""

    files: Layout
    sink: FakeSink  #: with what was delivered already
    frames: dict[str, list[tuple[int, int, range]]]  #: by segment: start, end, sequence numbers
    spooled: int  #: records of SPOOLED, an END not among them

    def places(self, rng: random.Random) -> Iterator[Spoilt]:
        """Yield every byte of every file, damaged in every way, by chance; files take turns."""
        turns = []
        for path in sorted(self.files):
            content = self.files[path]
            if content is None or not path.endswith(DAMAGED):
                continue
            places = [(kind, at) for kind in KINDS for at in range(_in_use(path, content))]
            rng.shuffle(places)
            turns.append([Spoilt(path, kind, at, _size(kind, rng)) for kind, at in places])
        for turn in itertools.zip_longest(*turns):
            yield from (spoilt for spoilt in turn if spoilt is not None)


def _size(kind: str, rng: random.Random) -> int:
    return rng.choice((1, 1, 8, 512, 4096)) if kind in ("zero", "double") else 1


def _in_use(path: str, content: bytes) -> int:
    """Return the bytes of a file that mean something: behind them an entries file is empty."""
    return len(content.rstrip(b"\0")) if path.endswith("entries") else len(content)


def card_of(session: bytes, **fields: object) -> bytes:
    known = vars(attachment(session)) | {"session": session} | fields
    del known["first_seq"]
    return pack_map(known)


def make_scene(folder: Path) -> Scene:
    """Return a run of two segments, a tenth of it delivered, and the journal of a rank that died."""
    sink = FakeSink()
    with Daemon(folder, sink) as daemon:
        hosted = daemon.runs.attach(attachment(SPOOLED))
        daemon.runs.attach(attachment(DEAD, rank=1))
        seq = 0
        while len(segment.numbers_in(hosted.run.folder)) < 2:
            seq = _spool(daemon, hosted, seq)
            if seq == 10 * FRAME_RECORDS:
                daemon.work(hosted, steps=2)  # the run is made, and a batch delivered
        for _ in range(5):
            seq = _spool(daemon, hosted, seq)
        daemon.runs.append(hosted, [frame(seq, [end()], SPOOLED)])
        daemon.runs.close_session(hosted, SPOOLED, 0)
    (folder / "journals").mkdir()
    journal = Journal(
        folder / "journals", DEAD, card_of(DEAD, rank=1), bytes_max=1 << 20, file_bytes=64 << 10
    )
    for number in range(DEAD_RECORDS):
        assert journal.append(metrics(DEAD_FROM + number, size=METRICS))
    files: Layout = {}
    for path in sorted(folder.rglob("*")):
        files[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    journal.close(unlink=True)
    return Scene(files, sink, _frames(folder, files), seq)


def _spool(daemon: Daemon, hosted: Hosted, seq: int) -> int:
    records = [metrics(seq + index, size=METRICS) for index in range(FRAME_RECORDS)]
    daemon.runs.append(hosted, [frame(seq, records, SPOOLED)])
    return seq + FRAME_RECORDS


def _frames(folder: Path, files: Layout) -> dict[str, list[tuple[int, int, range]]]:
    found = {}
    for name, content in files.items():
        if name.endswith("segment") and content is not None:
            with (folder / name).open("rb") as file:
                fd, size = file.fileno(), len(content)
                pieces = list(segment.iter_pieces(fd, segment.first_frame(fd, size), size))
            found[name] = [
                (each.start, each.end, range(each.header.first_seq, each.header.next_seq))
                for each in pieces
                if each.header is not None
            ]
    return found


class Daemon:
    """A daemon without socket and threads, on what lies in a folder."""

    def __init__(self, folder: Path, sink: FakeSink) -> None:
        self.breaker = Breaker(base_s=0.001, cap_s=0.002)
        self.spool = Spool(Disk(), folder / "spool", segment_bytes_max=SEGMENT_BYTES)
        self.runs = Runs(self.spool, sink, self.breaker, None, LineageParams(run=(), fork=()))
        self.watcher = Watcher(folder / "journals", self.runs, Counters())

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.breaker.stop()
        for watched in self.watcher._watched.values():
            os.close(watched.fd)
        self.spool.close()

    def look(self) -> None:
        """As often as it takes: on a busy machine the first look may run out of its time."""
        self.watcher.look({}, time.monotonic())
        while self.watcher.is_behind:
            self.watcher.look({}, time.monotonic())

    def work(self, hosted: Hosted, steps: int = 1000) -> None:
        assert hosted.lane is not None
        for _ in range(steps):
            if hosted.lane.work() not in (0.0, REST_WAIT_S):
                return


class Verdict(NamedTuple):
    """What became of the records after the damage."""

    missing: set[int]  #: of SPOOLED
    missing_dead: set[int]  #: of DEAD
    damaged: int  #: as MLflow was told
    quarantined: int


def recover(scene: Scene, spoilt: Spoilt) -> Verdict:
    """Damage the scene, and let a daemon deliver what it can. Raises: whatever it must not."""
    folder = Path(tempfile.mkdtemp(prefix="relay-damage-", dir="/dev/shm"))
    sink = _copy(scene.sink)
    try:
        content = scene.files[spoilt.path]
        assert content is not None
        lay_out({**scene.files, spoilt.path: spoilt.apply(content)}, str(folder))
        with Daemon(folder, sink) as daemon:
            for _ in range(2):
                daemon.look()
                for hosted in list(daemon.runs.by_id.values()):
                    daemon.work(hosted)
            quarantined = daemon.spool.quarantined
    finally:
        shutil.rmtree(folder)
    return _verdict(scene, sink, quarantined)


def _copy(sink: FakeSink) -> FakeSink:
    other = FakeSink()
    other.experiments = dict(sink.experiments)
    for name, run in sink.runs.items():
        other.runs[name] = replace(run, tags=dict(run.tags), points=set(run.points))
    return other


def _verdict(scene: Scene, sink: FakeSink, quarantined: int) -> Verdict:
    run = sink.only_run()
    found = Counter(map(operator.itemgetter(3), run.points))
    wrong = run.points - all_points(scene.spooled)
    assert not wrong, f"nobody logged {sorted(wrong)[:3]}"
    parts = [number for number, count in found.items() if count != METRICS]
    assert not parts, f"of the records {parts[:5]} not all has arrived"
    return Verdict(
        set(range(scene.spooled)) - found.keys(),
        DEAD_ONES - found.keys(),
        int(run.tags.get("relay.damaged_records", 0)),
        quarantined,
    )


@functools.cache
def all_points(spooled: int) -> frozenset[Point]:
    """Return what was logged, as the sink keeps it."""
    points: set[Point] = set()
    for number in (*range(spooled), *DEAD_ONES):
        record = unpack_record(metrics(number, size=METRICS))
        assert isinstance(record, Metrics)
        points |= {
            (key, struct.pack(">d", value), record.timestamp_ms, step)
            for key, value, step in zip(record.keys, record.values, record.steps, strict=True)
        }
    return frozenset(points)


def check(scene: Scene, spoilt: Spoilt) -> None:
    """Damage the scene; assert that the loss is bounded by what was hit, and counted."""
    verdict = recover(scene, spoilt)
    if _looks_like_a_later_release(scene, spoilt):
        assert verdict.missing_dead == DEAD_ONES, "all of it is left alone"
        assert not verdict.missing or spoilt.path.startswith("spool/")
        return
    lost = verdict.missing | verdict.missing_dead
    if spoilt.path not in scene.frames and not spoilt.path.endswith("entries"):
        assert not lost, f"{len(lost)} records are lost"
    if spoilt.path.endswith("entries"):
        assert not verdict.missing, "records of another rank are lost"
    elif spoilt.path in scene.frames:
        assert not verdict.missing_dead, "records of another rank are lost"
        beyond = verdict.missing - hit_by(scene, spoilt)
        assert not beyond, f"records {sorted(beyond)[:5]} were not hit, and are lost"
    if spoilt.path == max(scene.frames, default=""):
        # Its tail looks as if it had never been whole, and is not counted.
        assert verdict.damaged <= len(lost) + 1, f"{verdict.damaged} counted, {len(lost)} lost"
    elif _is_counter(spoilt):
        assert verdict.damaged >= len(lost), f"{verdict.damaged} counted, {len(lost)} lost"
    elif not verdict.quarantined:
        assert verdict.damaged == len(lost), f"{verdict.damaged} counted, {len(lost)} lost"


def _looks_like_a_later_release(scene: Scene, spoilt: Spoilt) -> bool:
    """Another number stands in the version of a journal's file, of a segment or of the card: what it
    is of is kept for who can read it."""
    content = scene.files[spoilt.path]
    assert content is not None
    damaged = spoilt.apply(content)
    if spoilt.path.endswith("card.json"):
        version = re.search(rb'^{\n  "version": (\d+),\n', damaged)
        return version is not None and int(version[1]) > 1
    if spoilt.path in scene.frames:
        return damaged[:3] == content[:3] and damaged[3:4] not in (b"", b"\0", content[3:4])
    if not spoilt.path.startswith("journals/"):
        return False
    return len(damaged) >= 64 and damaged[:3] == content[:3] and damaged[3] not in (0, content[3])


def _is_counter(spoilt: Spoilt) -> bool:
    """It is in the count of a journal's records, which has no CRC: it changes by one store."""
    return spoilt.path.endswith("journal") and spoilt.kind == "flip" and 16 <= spoilt.at < 24


def hit_by(scene: Scene, spoilt: Spoilt) -> set[int]:
    """Return the records of the frames that the damage touches."""
    end_at = FAR if spoilt.kind == "cut" else spoilt.at + spoilt.size
    return {
        number
        for start, behind, numbers in scene.frames[spoilt.path]
        if start <= end_at and behind > spoilt.at
        for number in numbers
    }
