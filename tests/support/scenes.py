"""What the tests of bad data, bad bytes, full disks and operators share.

Ranks that try things and tell what came of it, peers that say what they like on the socket, what
MLflow stored of a run, and a disk of a few megabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket as sockets
import sqlite3
import subprocess
import textwrap
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import zmq

from mlflow_relay import frames, journal_files, messages, records
from mlflow_relay_daemon.spool import segment
from tests.support.relay import PATIENCE_S, Node, finish, last_json, wait_until
from tests.support.servers import MlflowServer

#: What the relay and MLflow set by themselves.
_OWN_TAGS = ("mlflow.", "relay.")
_OWN_PARAMS = ("training.run_id", "metadata.run_id")  # the default of the setting lineage_params

# ── ranks ──

#: Tries calls one by one; each is followed by a metric, a param and a tag that must arrive.
_TRYING = """
import json, sys, time
import mlflow_relay

experiment, run_key, rank, world_size = sys.argv[1:5]
run = mlflow_relay.start_run(
    experiment, run_key=run_key, rank=int(rank), world_size=int(world_size), rank_metrics="all"
)
results, neighbours = [], 0

def attempt(call, *arguments, **options):
    global neighbours
    try:
        call(*arguments, **options)
        results.append(None)
    except Exception as error:
        results.append([type(error).__name__, str(error)])
    run.log_metrics({f"good/{rank}": neighbours * 0.5}, step=neighbours)
    run.log_param(f"good {rank} {neighbours}", neighbours)
    run.set_tag(f"good-{rank}-{neighbours}", neighbours)
    neighbours += 1

begin_ms = time.time_ns() // 1_000_000
"""
_TRIED = """
end_ms = time.time_ns() // 1_000_000
run.end()
print(json.dumps({
    "run_id": run.run_id, "results": results, "neighbours": neighbours,
    "begin_ms": begin_ms, "end_ms": end_ms,
}))
"""

#: Logs ten metrics every 2 ms until its stdin is closed.
STEADY = """
import json, sys, threading
import mlflow_relay

run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
print(run.run_id, flush=True)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
calls = 0
while not stop.wait(0.002):
    run.log_metrics({f"m{j}": calls * 10.0 + j for j in range(10)}, step=calls)
    calls += 1
run.end()
print(json.dumps({"run_id": run.run_id, "calls": calls}))
"""


#: Key, value, step of a point; when it was logged is compared elsewhere.
Place = tuple[str, float, int]


def in_order(points: list[Place]) -> list[Place]:
    """Return points sorted by key and step."""
    return sorted(points, key=lambda point: (point[0], point[2], repr(point[1])))


def show(figure: str) -> None:
    """Print a measured figure or a seed: pytest shows it with -s, and if the test fails."""
    print(figure)


def fresh_name(what: str) -> str:
    """Return a name that no other test uses."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


@dataclass
class Stored:
    """What MLflow has of one run, without what relay and MLflow set themselves."""

    status: str
    points: list[Place]  #: as `in_order` has them
    times_ms: list[int]
    params: dict[str, str]
    tags: dict[str, str]
    all_tags: dict[str, str]


def stored(server: MlflowServer, mlflow_run_id: str) -> Stored:
    """Return what the server's database holds of a run."""
    found = server.all_points(mlflow_run_id)
    uri = f"file:{server.database}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30.0)) as database:
        query = "SELECT key, value FROM {} WHERE run_uuid = ?"
        params = dict(database.execute(query.format("params"), (mlflow_run_id,)).fetchall())
        tags = dict(database.execute(query.format("tags"), (mlflow_run_id,)).fetchall())
        ((status,),) = database.execute(
            "SELECT status FROM runs WHERE run_uuid = ?", (mlflow_run_id,)
        ).fetchall()
    return Stored(
        status=status,
        points=in_order([(key, value, step) for key, value, _, step in found]),
        times_ms=[timestamp_ms for _, _, timestamp_ms, _ in found],
        params={key: value for key, value in params.items() if key not in _OWN_PARAMS},
        tags={key: value for key, value in tags.items() if not key.startswith(_OWN_TAGS)},
        all_tags=tags,
    )


@dataclass
class Tried:
    """What came of the calls that a rank tried."""

    run: dict[str, Any]  #: the relay's status of the run
    stored: Stored  #: without the neighbours, which all arrived: `play` has looked
    letters: list[dict[str, Any]]
    results: list[list[Any]]  #: per rank and attempt: None, or [error, its text]


def play(node: Node, server: MlflowServer, *scripts: str, name: str = "tried") -> Tried:
    """Run one rank for each script, wait until all is delivered, and read all of it back.

    A script calls `attempt(function, ...)`, with `run` at hand. Each attempt is followed by a
    metric, a param and a tag that are good; all of them must be in MLflow, and nothing but them
    and what is returned.
    """
    experiment, key = fresh_name(name), fresh_name("key")
    ranks = [
        node.rank(_TRYING + textwrap.dedent(script) + _TRIED, experiment, key, rank, len(scripts))
        for rank, script in enumerate(scripts)
    ]
    told = [last_json(output) for output in finish(ranks)]
    run = node.wait_until_ended(told[0]["run_id"])
    found = stored(server, run["mlflow_run_id"])
    points, params, tags = [], {}, {}
    for rank, each in enumerate(told):
        for number in range(each["neighbours"]):
            points.append((f"good/{rank}", number * 0.5, number))
            params[f"good {rank} {number}"] = str(number)
            tags[f"good-{rank}-{number}"] = str(number)
    good = [each for each in found.points if each[0].startswith("good/")]
    assert good == in_order(points)
    assert {key: value for key, value in found.params.items() if key in params} == params
    assert {key: value for key, value in found.tags.items() if key in tags} == tags
    begin_ms, end_ms = min(t["begin_ms"] for t in told), max(t["end_ms"] for t in told)
    assert all(begin_ms <= time_ms <= end_ms for time_ms in found.times_ms)
    found.points = [each for each in found.points if not each[0].startswith("good/")]
    found.params = {key: value for key, value in found.params.items() if key not in params}
    found.tags = {key: value for key, value in found.tags.items() if key not in tags}
    letters = dead_letters(node, run["run_id"])
    assert run["dead_letters"] == len(letters)
    assert run["lost_records"] == run["damaged_records"] == 0
    return Tried(run, found, letters, [each["results"] for each in told])


def dead_letters(node: Node, run_id: str) -> list[dict[str, Any]]:
    """Return what `dead-letters list` says of a run."""
    done = node.command("dead-letters", "list", "--run", run_id, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["dead_letters"]
    return found


def steady_points(calls: int) -> list[Place]:
    """Return what a STEADY rank logged, as `stored` has it."""
    return in_order([(f"m{j}", i * 10.0 + j, i) for i in range(calls) for j in range(10)])


# ── peers ──


class Peer:
    """A ZeroMQ peer of the daemon that says what it likes; a context manager."""

    def __init__(self, socket: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self._context.socket(zmq.DEALER)
        self.dealer.linger = 0
        self.dealer.connect(f"ipc://{socket}")

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)

    def send(self, *parts: bytes) -> None:
        self.dealer.send_multipart(parts)

    def receive(self, timeout_s: float = PATIENCE_S) -> list[bytes]:
        """Return the next message that is not NEWS. Raises: AssertionError: none came."""
        while True:
            assert self.dealer.poll(int(timeout_s * 1000)), f"no answer within {timeout_s:g} s"
            parts = self.dealer.recv_multipart()
            if parts[0] != messages.NEWS:
                return parts

    def settle(self) -> list[list[bytes]]:
        """Return what the daemon has answered to all that was sent so far."""
        question = uuid.uuid4().hex[:8]
        self.send(messages.CONTROL, messages.pack_map({"command": question}))
        answers: list[list[bytes]] = []
        while True:
            answer = self.receive()
            if answer[0] == messages.REPLY and question.encode() in answer[1]:
                return answers
            answers.append(answer)

    def attach(self, **changes: Any) -> dict[str, Any]:
        """Attach a session and return what was told; it must be taken."""
        told = attachment(**changes)
        self.send(messages.ATTACH, messages.pack_map(told))
        answer = self.receive()
        assert answer[0] == messages.ATTACHED, answer
        return told


def attachment(**changes: Any) -> dict[str, Any]:
    """Return the fields of an ATTACH of a new session of a new run."""
    fields: dict[str, Any] = {
        "session": os.urandom(messages.SESSION_BYTES),
        "run_id": uuid.uuid4().hex,
        "run_key": "key",
        "experiment_name": "bad bytes",
        "run_name": "",
        "rank": 0,
        "world_size": 1,
        "node": "node",
        "pid": 1,
        "primary": True,
        "start_ms": time.time_ns() // 1_000_000,
        "tags": {"mlflow.user": "somebody"},
        "first_seq": 0,
    }
    return {**fields, **changes}


def metric_frame(session: bytes, first_seq: int, *values: float, key: str = "x") -> bytes:
    """Return a frame with one record for each value; the step is the sequence number."""
    packer = records.MetricsPacker()
    now_ms = time.time_ns() // 1_000_000
    body = b"".join(
        frames.pack_entry(packer.pack({key: value}, first_seq + index, now_ms))
        for index, value in enumerate(values)
    )
    return frames.pack_frame(session, first_seq, len(values), body)


def plain_connection(socket: Path) -> sockets.socket:
    """Return a connection of the daemon's socket that does not speak ZeroMQ."""
    plain = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    plain.connect(str(socket))
    return plain


def log_lines(node: Node, text: str) -> list[str]:
    """Return the lines of the daemon's log that hold a text."""
    return [line for line in node.log.read_text(errors="replace").splitlines() if text in line]


# ── disks ──


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a tmpfs of so many megabytes for as long as the context lasts; skip without root."""
    if os.geteuid() != 0:
        pytest.skip("a small tmpfs needs root")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        # Lazily: what a failed test left open must not keep the mount.
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk of a folder to the last byte; return the file that does it."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            size = max(4096, min(1 << 20, shutil.disk_usage(folder).free // 2))
            file.write(bytes(size))
    assert shutil.disk_usage(folder).free == 0
    return filler


def records_on_disk(spool: Path, run_id: str) -> int:
    """Return how many records whole frames hold in the segments of a run."""
    found = 0
    for number in segment.numbers_in(spool / "runs" / run_id):
        path = segment.path_of(spool / "runs" / run_id, number)
        with path.open("rb") as file:
            end = path.stat().st_size
            start = segment.first_frame(file.fileno(), end)
            for piece in segment.iter_pieces(file.fileno(), start, end):
                found += piece.header.records if piece.header and piece.whole else 0
    return found


def journal_counters(node: Node) -> tuple[int, int, int]:
    """Return (accepted, acknowledged, lost) of the only journal of a node."""
    (base,) = (node.runtime / "journals").glob("*" + journal_files.BASE_SUFFIX)
    return journal_files.read_counters(base.read_bytes())


def fingerprint(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return size, time of change and content of every file and folder below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns, content)
    return found


def wait_for(node: Node, what: str, **expected: Any) -> dict[str, Any]:
    """Return the status of the only run once its fields are as expected."""

    def fits() -> dict[str, Any] | None:
        runs = node.status()["runs"]
        if len(runs) != 1 or any(runs[0][name] != value for name, value in expected.items()):
            return None
        run: dict[str, Any] = runs[0]
        return run

    return wait_until(fits, what)
