"""Hardships that are no kills: frozen parties, jumping clocks, too few descriptors, too little memory.

A trial plays one of them on a node of its own against a real server, and raises AssertionError if a
promise broke. Its docstring is what the report says of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from mlflow_relay import frames, messages, records
from tests.crash.cases.kills import check, wait_until_over
from tests.crash.cases.mortals import Rank
from tests.crash.cases.network import wait_until_alone
from tests.support import MlflowServer
from tests.support.jobs import (
    assert_exactly,
    ended_run,
    logged,
    now_ms,
    reports,
    run_id_of,
    start_rank,
)
from tests.support.relay import Node, wait_until

PAUSE_S = 0.02
PATIENCE_S = 120.0
RANKS = 2
JUMPING_CLOCK = Path(__file__).resolve().parents[1] / "support" / "jumping_clock"


@dataclass
class Scene:
    """Where a trial is played.

    Attributes:
        server: may be stopped for a while.
        folder: of this trial alone.
        longest_call_ns: of a log call, over all ranks.
    """

    server: MlflowServer
    folder: Path
    rng: random.Random
    key: str
    longest_call_ns: int = 0
    points: int = field(default=0)

    @contextlib.contextmanager
    def node(self, **settings: object) -> Iterator[Node]:
        """A node whose daemon runs; it must leave well."""
        settings = {"request_timeout_s": 5.0, **settings}
        with Node(self.folder / "node", self.server.uri, settings=settings) as node:
            node.start()
            yield node
            assert node.stop() == 0, "the daemon left something behind"

    def ranks(self, node: Node, world_size: int = RANKS) -> list[Rank]:
        """Return two ranks that log."""
        ranks = [Rank(node, self.key, number, world_size, PAUSE_S) for number in range(RANKS)]
        wait_until(lambda: all(rank.calls for rank in ranks), "all ranks log", PATIENCE_S)
        return ranks

    def end(self, node: Node, ranks: Sequence[Rank]) -> None:
        """Let all ranks end, and compare what MLflow has with what they logged."""
        for rank in ranks:
            rank.end()
        self.compare(node, ranks)

    def compare(self, node: Node, ranks: Sequence[Rank]) -> None:
        """The ranks have ended: compare."""
        wait_until_over(node, self.key, list(ranks))
        wait_until_alone(self.server, self.key)
        lives = [life for rank in ranks for life in rank.lives]
        self.points += check(self.server, self.key, list(ranks), lives)
        self.longest_call_ns = max(self.longest_call_ns, *(life.longest_ns for life in lives))
        for rank in ranks:
            rank.close()


def log_on(ranks: Sequence[Rank], calls: int = 50) -> None:
    """Return when each rank has logged so many times more."""
    until = [rank.calls + calls for rank in ranks]
    wait_until(
        lambda: all(rank.calls >= count for rank, count in zip(ranks, until, strict=True)),
        "the ranks log on",
        PATIENCE_S,
    )


def frozen_daemon(scene: Scene) -> None:
    """SIGSTOP of the daemon while ranks log, SIGCONT"""
    with scene.node() as node:
        ranks = scene.ranks(node)
        for _ in range(3):
            assert node.daemon is not None
            node.daemon.send_signal(signal.SIGSTOP)
            log_on(ranks)
            time.sleep(scene.rng.uniform(0, 3))  # an ack is overdue after 2 s
            node.daemon.send_signal(signal.SIGCONT)
            log_on(ranks, scene.rng.randint(0, 50))
        scene.end(node, ranks)


def frozen_rank(scene: Scene) -> None:
    """SIGSTOP of a rank, longer than a daemon listens for a sign of life, SIGCONT: it has not died"""
    with scene.node() as node:
        ranks = scene.ranks(node)
        wait_until(lambda: node.run()["ranks_alive"] == RANKS, "both are known", PATIENCE_S)
        process = ranks[1].lives[-1].process
        process.send_signal(signal.SIGSTOP)
        time.sleep(scene.rng.uniform(6, 12))  # it says ALIVE every 5 s
        run = node.run()
        assert (run["state"], run["ranks_alive"]) == ("running", RANKS), run
        process.send_signal(signal.SIGCONT)
        log_on(ranks)
        scene.end(node, ranks)


def frozen_server(scene: Scene) -> None:
    """SIGSTOP of the server: requests time out and are carried out later all the same, SIGCONT"""
    with scene.node() as node:
        scene.server.freeze()
        try:
            ranks = scene.ranks(node)  # the create is among what is carried out late
            time.sleep(scene.rng.uniform(1, 4))
        finally:
            scene.server.thaw()
        log_on(ranks)
        scene.server.freeze()
        try:
            log_on(ranks, 100)
        finally:
            scene.server.thaw()
        scene.end(node, ranks)


def clock_jumps(scene: Scene) -> None:
    """The wall clock of daemon and ranks (time.time) jumps by seconds to months, forth and back"""
    with Node(scene.folder / "node", scene.server.uri) as node:
        file = scene.folder / "clock"
        file.write_bytes(bytes(8))
        for environ in (node.environ, node._daemon_environ):
            paths = [str(JUMPING_CLOCK), environ.get("PYTHONPATH", "")]
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            environ["RELAY_TEST_CLOCK"] = str(file)
        node.start()
        ranks = scene.ranks(node)
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 8) as ahead_ns:
            for _ in range(6):
                jump_s = scene.rng.choice((-1, 1)) * scene.rng.choice((2, 3600, 30 * 86_400))
                ahead_ns[:] = (jump_s * 10**9).to_bytes(8, sys.byteorder, signed=True)
                log_on(ranks)
                assert node.run()["state"] in ("waiting", "running")
        for rank in ranks:
            # What its own clock said is its business.
            rank.lives[-1].began_ms = 0
            rank.end()
            rank.lives[-1].ended_ms = 1 << 62
        scene.compare(node, ranks)
        assert node.stop() == 0


def too_few_descriptors(scene: Scene) -> None:
    """RLIMIT_NOFILE leaves the daemon a handful, then more ranks come: they wait, the rest is served"""
    numbers = range(RANKS, RANKS + 12)
    with scene.node() as node:
        first = scene.ranks(node, numbers.stop)
        assert node.daemon is not None
        pid = node.daemon.pid
        used = max(int(each) for each in os.listdir(f"/proc/{pid}/fd"))  # the lowest free come next
        few = used + 1 + scene.rng.randint(0, 4)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        wait_until(lambda: "file descriptors are in use" in node.log.read_text(), "it is noticed")
        more = [Rank(node, scene.key, number, numbers.stop, PAUSE_S) for number in numbers]
        wait_until(lambda: all(rank.calls for rank in more), "they log all the same", PATIENCE_S)
        log_on([*first, *more])
        assert node.daemon.poll() is None, "it lives"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        scene.end(node, [*first, *more])


def too_little_memory(scene: Scene) -> None:
    """RLIMIT_AS leaves the daemon a few megabytes; if it dies of that, the next one has all"""
    with scene.node() as node:
        ranks = scene.ranks(node, RANKS + 1)
        log_on(ranks)
        assert node.daemon is not None
        pages = int(Path(f"/proc/{node.daemon.pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + scene.rng.choice((0, 1 << 20, 4 << 20))
        resource.prlimit(node.daemon.pid, resource.RLIMIT_AS, (limit, limit))
        big = Rank(node, scene.key, RANKS, RANKS + 1, 0.001)
        log_on([big], 5000)
        if node.daemon.poll() is None:
            node.kill()
        node.start()
        scene.end(node, [*ranks, big])


def thousand_sessions(scene: Scene) -> None:
    """1,000 sessions attach at once, each with a point of its own"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with scene.node() as node:
            crowd = Crowd(node, scene.key, 1000)
            crowd.come_and_go()
            run = ended_run(node, scene.server, scene.key)
            scene.points += 1000
            assert_exactly(
                scene.server.all_points(run.info.run_id),
                [(f"rank_{number}/loss", number, number / 2) for number in range(1000)],
            )
            assert run.info.status == "FINISHED"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def large_records(scene: Scene) -> None:
    """A rank that logs records of 1 MB among small ones"""
    script = """
        run = mlflow_relay.start_run("large", run_key=sys.argv[1], rank=0, world_size=1)
        for step in range(20):
            run.log_metrics(metrics(0, step), step=step)
            run.set_tags({f"tag {j}": f"{step} {j} ".ljust(8000, "é") for j in range(65)})
        run.end()
        report()
    """
    with scene.node() as node:
        reports([start_rank(node, script, scene.key)])
        run = ended_run(node, scene.server, scene.key)
        assert_exactly(scene.server.all_points(run.info.run_id), logged(0, range(20)))
        scene.points += 200
        for j in range(65):
            assert run.data.tags[f"tag {j}"] == f"19 {j} ".ljust(8000, "é")
        assert node.run()["dead_letters"] == 0
        assert run.info.status == "FINISHED"


class Crowd:
    """Sessions that come at once, log one point each, and go.

    Args: world_size: how many they are.
    """

    def __init__(self, node: Node, run_key: str, world_size: int) -> None:
        self._node, self._run_key, self._size = node, run_key, world_size

    def come_and_go(self) -> None:
        """Return when the daemon has let all of them go."""
        with zmq.Context() as context:
            context.max_sockets = 2 * self._size
            sockets = [context.socket(zmq.DEALER) for _ in range(self._size)]
            poller, left = zmq.Poller(), dict(zip(sockets, range(self._size), strict=True))
            for socket, number in left.items():
                socket.linger = 0
                socket.connect(f"ipc://{self._node.socket}")
                poller.register(socket, zmq.POLLIN)
                socket.send_multipart((messages.ATTACH, self._card(number)))
            try:
                while left:
                    heard = poller.poll(PATIENCE_S * 1000)
                    assert heard, f"{len(left)} of {self._size} are not done"
                    for socket, _ in heard:
                        kind, _ = socket.recv_multipart()
                        if kind == messages.DETACHED:
                            poller.unregister(socket)
                            del left[socket]
                        else:
                            self._answer(socket, kind, left[socket])
            finally:
                for socket in sockets:
                    socket.close()

    def _answer(self, socket: zmq.Socket[bytes], kind: bytes, number: int) -> None:
        session = number.to_bytes(16, "little")
        if kind == messages.ATTACHED:
            packer = records.MetricsPacker(f"rank_{number}/")
            point = packer.pack({"loss": number / 2}, number, now_ms())
            entries = [point, records.pack_end("FINISHED", "", now_ms())]
            body = b"".join(map(frames.pack_entry, entries))
            socket.send_multipart((messages.DATA, frames.pack_frame(session, 0, 2, body)))
        elif kind == messages.ACK:
            socket.send_multipart((messages.DETACH, messages.pack_detach(session, 0)))

    def _card(self, number: int) -> bytes:
        return messages.pack_map(
            {
                "session": number.to_bytes(16, "little"),
                "run_id": run_id_of(self._run_key),
                "run_key": self._run_key,
                **dict.fromkeys(("experiment_name", "run_name", "node"), "crowd"),
                "rank": number,
                "world_size": self._size,
                "pid": 1,
                "primary": True,
                "start_ms": now_ms(),
                "tags": {},
            }
        )


TRIALS: dict[str, Callable[[Scene], None]] = {
    trial.__name__: trial
    for trial in (
        frozen_daemon,
        frozen_rank,
        frozen_server,
        clock_jumps,
        too_few_descriptors,
        too_little_memory,
        thousand_sessions,
        large_records,
    )
}
