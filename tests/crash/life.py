"""Lives of a spool, scripted and by chance, and what must hold of what a crash leaves of them."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mlflow_relay.frames import Header
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState
from tests.crash.power import Known
from tests.crash.recorder import RecordingOs
from tests.support import spools
from tests.support.spools import RUN_ID, SESSION, found_in, frame, new_card

OTHER = bytes(16)
SESSIONS = (SESSION, OTHER)
SEGMENT_BYTES = 16_000
METRICS = 30  #: of each record: frames of a few sectors
START_MS = 1_795_412_345_678


@functools.cache
def record(seq: int) -> bytes:
    """Return the record of a sequence number."""
    return spools.metrics(seq, size=METRICS)


def frame_of(first_seq: int, count: int, session: bytes) -> tuple[Header, bytes]:
    return frame(first_seq, [record(first_seq + each) for each in range(count)], session)


@contextlib.contextmanager
def opened(disk: Disk, root: Path) -> Iterator[Spool]:
    spool = Spool(disk, root, segment_bytes_max=SEGMENT_BYTES)
    try:
        yield spool
    finally:
        spool.close()


# ── what must hold ──


def check(spool: Spool, known: Known, *, in_order: bool) -> dict[bytes, int]:
    """Assert that all is there that was promised; return which numbers the spool claims to have."""
    run = spool.runs.get(RUN_ID)
    if run is None:
        assert not any(known.acked.values()), "the run is gone"
        assert not known.mlflow_run_id
        return {}
    claims = {}
    found = found_in(run)
    for session in SESSIONS:
        seqs = [seq for owner, seq, _ in found if owner == session]
        acked, settled = known.acked.get(session, 0), known.settled.get(session, 0)
        claims[session] = run.next_seq(session)
        # Where all is delivered and all ranks have gone, nobody is left to be asked again.
        assert claims[session] >= acked or settled >= acked, f"asks for {claims[session]} again"
        missing = set(range(settled, claims[session])) - set(seqs)
        assert not missing, f"claims to have {sorted(missing)}"
        if in_order:
            first_times = list(dict.fromkeys(seqs))
            assert first_times == sorted(first_times)
    for _, seq, found_record in found:
        assert found_record == record(seq)
    assert len(DeadLetters(Disk(), run.folder).list()) >= known.letters
    if known.mlflow_run_id is not None:
        assert run.card.mlflow_run_id == known.mlflow_run_id
    # It goes on: the rank sends what is not there, and it is found behind the rest.
    for session in SESSIONS:
        run.append([frame_of(claims[session], 2, session)])
        wanted = run.next_seq(session)
        # Behind a hole more may stand, which is whole again now.
        assert wanted == claims[session] + 2 or (wanted > claims[session] and not in_order)
    return claims


# ── what a life is made of ──


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
    # What was delivered once stays delivered, though a daemon that lost its watermark begins anew:
    # the watermark of before may come back with the next power failure.
    before = recorder.known.settled
    settled = {each: max(before.get(each, 0), seen.next_seq(each)) for each in SESSIONS}
    recorder.known = replace(recorder.known, settled=settled)
    run.settle(mark)
    recorder.note("settled")


def attach(recorder: RecordingOs, run: RunSpool) -> None:
    """Do as intake does when ranks attach: what it says to have is acknowledged by that."""
    acked = {session: run.next_seq(session) for session in SESSIONS}
    recorder.known = replace(recorder.known, acked=acked)
    recorder.note("attached")


def append(recorder: RecordingOs, run: RunSpool, *frames: tuple[bytes, int]) -> None:
    """Do as intake does: acknowledge when it is written."""
    acked = dict(recorder.known.acked)
    group = []
    for session, count in frames:
        group.append(frame_of(acked.get(session, 0), count, session))
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
        end(recorder, run)
        come_back(run)
        append(recorder, run, (SESSION, 3))  # a rank has come back


def end(recorder: RecordingOs, run: RunSpool) -> None:
    """All ranks are gone, and MLflow knows the end: the space is returned."""
    run.card.state = RunState.ENDED
    for each in run.card.sessions.values():
        each.closed = True
    run.save_card()
    recorder.note("over")
    run.return_space()
    recorder.note("space returned")


def come_back(run: RunSpool) -> None:
    """The ranks are there again."""
    for each in run.card.sessions.values():
        each.closed = False
    run.save_card()


def live_by_chance(recorder: RecordingOs, disk: Disk, rng: random.Random) -> None:
    """A life of random length in which anything may happen at any time, several daemons long."""
    for _ in range(rng.randint(1, 3)):
        with opened(disk, recorder.root) as spool:
            run = spool.open_run(new_card(SESSIONS))
            run.save_card()
            attach(recorder, run)
            letters = DeadLetters(disk, run.folder)
            for _ in range(rng.randint(3, 12)):
                do_something(recorder, run, letters, rng)


def do_something(
    recorder: RecordingOs, run: RunSpool, letters: DeadLetters, rng: random.Random
) -> None:
    """Take one step of a life, whichever."""
    what = rng.choices(("append", "settle", "letter", "card", "end"), (8, 5, 1, 1, 1))[0]
    if what == "append":
        # The fsync of the frames, or, where a segment is begun, of its head.
        recorder.sync_fails_after = rng.choice((-1, -1, -1, -1, -1, 0, 1))
        groups = [(rng.choice(SESSIONS), rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]
        append(recorder, run, *groups)
        recorder.sync_fails_after = -1
    elif what == "settle":
        settle(recorder, run, rng.choice((1, 2, 3, 99)))
    elif what == "letter":
        add_letter(recorder, letters)
    elif what == "card":
        run.card.mlflow_run_id, run.card.state = "m1", RunState.OPEN
        run.save_card()
        recorder.known = replace(recorder.known, mlflow_run_id="m1")
        recorder.note("card written")
    else:
        settle(recorder, run, 99)
        end(recorder, run)
        come_back(run)
