"""SIGKILL at random instants of a rank that does nothing but log: what had returned is there.

The oracle is outside the killed process: each call that has returned is counted in memory that the
test shares with it, by one aligned store.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay.frames import HEADER_BYTES, iter_entries, read_frame
from mlflow_relay.journal_files import read_base, salvage_entries
from mlflow_relay_daemon.spool.disk import try_lock
from tests.support.seeds import new_seed

KILLS = 30
LIFE_S_MAX = 0.06
SESSION = bytes(range(16))
FILE_BYTES = 64 << 10

#: One interpreter that forks a rank for each word on its stdin: starting Python takes longer than
#: a life here. The journal is small-filed, so that many a kill comes while it grows.
NURSERY = """
import mmap, os, signal, sys, threading
from pathlib import Path
from mlflow_relay.journal import Journal

def live(folder, sending):
    with open(folder / "returned", "r+b") as file:
        returned = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
    journal = Journal(folder, bytes(range(16)), b"card", bytes_max=1 << 30, file_bytes=65536)
    def send():
        while True:
            journal.prepare()
            while (frame := journal.next_frame()) is not None and sending:
                journal.mark_sent(frame)
            if sending:
                journal.ack(journal.acked + (journal.next_seq - journal.acked) // 2)
    threading.Thread(target=send, daemon=True).start()
    number = 0
    while True:
        kept = journal.append(number.to_bytes(8, "big") + bytes(number % 211))
        assert kept
        number += 1
        returned[0] = number

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    folder, sending = line.split()
    child = os.fork()
    if child == 0:
        try:
            live(Path(folder), sending == "sending")
        finally:
            os._exit(1)
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NURSERY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def rank(nursery: subprocess.Popen[str], folder: Path, how: str) -> Iterator[int]:
    """Bring up a rank; kill it at the end if it lives."""
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{folder} {how}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline())
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pid: int) -> None:
    until_s = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < until_s, "SIGKILL did not end the rank"
        time.sleep(0.0005)


@pytest.mark.parametrize("how", ["sending", "silent"])
def test_every_call_that_returned_is_in_the_journal_after_sigkill(nursery, how):
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    returned_in_all = unacked_in_all = 0
    files = []
    for _ in range(KILLS):
        with tempfile.TemporaryDirectory(prefix="relay-kills-", dir="/dev/shm") as path:
            folder = Path(path)
            (folder / "returned").write_bytes(bytes(8))
            with (folder / "returned").open("r+b") as file:
                shared = mmap.mmap(file.fileno(), 8)
            with rank(nursery, folder, how) as pid:
                until_s = time.monotonic() + 30
                while not any(shared[:]):
                    assert os.path.exists(f"/proc/{pid}"), "the rank ended by itself"
                    assert time.monotonic() < until_s
                time.sleep(rng.uniform(0, LIFE_S_MAX))
                os.kill(pid, signal.SIGKILL)
                wait_until_gone(pid)
            (returned,) = struct.unpack("@Q", shared[:])
            shared.close()

            acked, found = what_is_left(folder)

            assert sorted(found) == list(range(acked, acked + len(found)))
            assert returned <= acked + len(found) <= returned + 1
            for seq, record in found.items():
                assert record == seq.to_bytes(8, "big") + bytes(seq % 211)
            returned_in_all += returned
            unacked_in_all += len(found)
            files.append(len(list(folder.glob("*.entries"))))
    print(f"{KILLS} kills, {returned_in_all} calls, {unacked_in_all} in journals, {files} files")
    assert returned_in_all > 10 * KILLS
    assert unacked_in_all > KILLS
    if how == "silent":
        assert max(files) > 3


def what_is_left(folder: Path) -> tuple[int, dict[int, bytes]]:
    """Return what a daemon would find, as it would: the lock free, the base, the entries."""
    (base_path,) = folder.glob("*.journal")
    fd = os.open(base_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert try_lock(fd)
    finally:
        os.close(fd)
    base = read_base(base_path.read_bytes())
    assert (base.card, base.lost) == (b"card", 0)
    found: dict[int, bytes] = {}
    for path in sorted(folder.glob("*.entries")):
        salvage = salvage_entries(path.read_bytes(), SESSION, base.acked)
        assert salvage.damaged == 0
        for frame in salvage.frames:
            header = read_frame(frame)
            records = list(iter_entries(frame[HEADER_BYTES:]))
            assert None not in records
            found |= dict(enumerate(records, header.first_seq))  # type: ignore[arg-type]
    assert base.next_seq <= base.acked + len(found) <= base.next_seq + 1
    return base.acked, found
