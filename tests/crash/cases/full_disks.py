"""Real disks that others fill to the last byte while a daemon with ranks runs, and then free again."""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.crash.outcome import Job, Outcome
from tests.support import MlflowServer, ext4
from tests.support.jobs import status_when
from tests.support.relay import Node, wait_until
from tests.support.scenes import log_lines, records_on_disk, small_disk, stored

MEGABYTES = 16
PATIENCE_S = 300.0
RANKS = 2
KINDS = ("tmpfs", "ext4")

#: Logs a metric and a tag of 4 KB again and again until its stdin is closed; says how many times.
_RANK = """
import sys, threading, time
import mlflow_relay

key, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = mlflow_relay.start_run("full disks", run_key=key, rank=rank, world_size=world_size)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
step, longest_s = 0, 0.0
while not stop.wait(0.004):
    begin_s = time.perf_counter()
    run.log_metrics({"a": step + 0.5}, step=step)
    run.set_tag(f"bulk {rank} {step % 50}", f"{step} " * 800)
    longest_s = max(longest_s, time.perf_counter() - begin_s)
    step += 1
run.end()
print(step, longest_s, flush=True)
"""


class FullDisks:
    """Rounds of one job each."""

    def __init__(self, server: MlflowServer) -> None:
        self._server = server
        self.counts: Counter[str] = Counter()
        self.longest_call_s = self.longest_drain_s = 0.0

    def play(self, folder: Path, kind: str, rng: random.Random, times: int) -> None:
        """Play one round: fill the disk so many times. Raises: AssertionError: a promise is broken."""
        with (
            _disk(folder / "disk", kind) as disk,
            Node(folder / "node", self._server.uri, spool=disk / "spool") as node,
        ):
            node.start()
            key = f"{kind}-{rng.random()}"
            ranks = [node.rank(_RANK, key, rank, RANKS) for rank in range(RANKS)]
            status_when(node, key, lambda run: run["delivered_records"], "it runs", PATIENCE_S)
            for _ in range(times):
                time.sleep(rng.uniform(0.0, 0.5))  # the moment is the point
                self._fill_for_a_while(node, disk, rng)
            calls = [self._end(rank) for rank in ranks]
            begin_s = time.monotonic()
            over = status_when(
                node, key, lambda run: run["state"] == "ended", "it ends", PATIENCE_S
            )
            self.longest_drain_s = max(self.longest_drain_s, time.monotonic() - begin_s)
            names = ("dead_letters", "lost_records", "damaged_records")
            assert not any(over[name] for name in names), {name: over[name] for name in names}
            self._check(over["mlflow_run_id"], calls)
            assert log_lines(node, "Traceback") == []
            assert node.stop() == 0, "the daemon left something behind"

    def _fill_for_a_while(self, node: Node, disk: Path, rng: random.Random) -> None:
        """Fill the disk, let the daemon meet that and perhaps its end, and free it."""
        filler = disk / "filler"

        def has_met_it() -> bool:
            _write_until_full(filler)  # again and again: delivery gives space back meanwhile
            return bool(node.status()["disk"]["full"])

        wait_until(has_met_it, "the daemon has met it", PATIENCE_S)
        self.counts["times filled"] += 1
        if rng.random() < 0.5:
            node.kill()
            node.start()
            self.counts["daemons killed on a full disk"] += 1
        accepted = node.run()["accepted_records"]
        on_disk = records_on_disk(node.spool, node.run()["run_id"])
        # Asked last: what is settled by then may be on the disk no more.
        assert accepted <= on_disk + node.run()["settled_records"], "acknowledged, and not kept"
        time.sleep(rng.uniform(0.0, 1.0))
        filler.unlink()
        wait_until(lambda: not node.status()["disk"]["full"], "it goes on", PATIENCE_S)

    def _end(self, rank: subprocess.Popen[str]) -> int:
        """Let a rank end; return how many steps it had logged."""
        said = rank.communicate(timeout=PATIENCE_S)[0].split()
        assert rank.returncode == 0, said
        self.longest_call_s = max(self.longest_call_s, float(said[-1]))
        self.counts["log calls"] += 2 * int(said[-2])
        return int(said[-2])

    def _check(self, mlflow_run_id: str, calls: list[int]) -> None:
        found = stored(self._server, mlflow_run_id)
        assert found.status == "FINISHED"
        prefixes = ["", *(f"rank_{rank}/" for rank in range(1, RANKS))]
        points = [
            (f"{prefix}a", step + 0.5, step)
            for prefix, steps in zip(prefixes, calls, strict=True)
            for step in range(steps)
        ]
        assert sorted(found.points) == sorted(points)
        last = {
            f"bulk {rank} {step % 50}": f"{step} " * 800
            for rank, steps in enumerate(calls)
            for step in range(steps)
        }
        assert found.tags == last
        self.counts["points compared"] += len(points)


def run(job: Job) -> Outcome:
    outcome = Outcome(
        f"A daemon whose spool is on a disk of {MEGABYTES} MB (tmpfs and ext4 on a loop device, by "
        f"turns) and {RANKS} ranks that log a point and 4 KB every 4 ms; others fill the disk to its "
        "last byte, for a second or so, one to three times, and half of the time the daemon is "
        "killed meanwhile. Nothing is acknowledged that is not on the disk; when there is space, it "
        "goes on by itself; in the end every point and the last of every tag is in MLflow, once",
        0,
        "rounds",
    )
    outcome.skipped = ext4.why_not()
    if outcome.skipped:
        return outcome
    with MlflowServer(job.folder / "mlflow") as server:
        disks = FullDisks(server)
        for number in itertools.count():
            if job.is_over:
                break
            kind = KINDS[number % len(KINDS)]
            outcome.count += 1
            disks.counts[f"rounds on {kind}"] += 1
            try:
                rng = random.Random(f"{job.seed}/{number}")
                disks.play(job.folder / str(number), kind, rng, rng.randint(1, 3))
            except (AssertionError, OSError) as error:
                outcome.found(f"{kind}, round {job.seed}/{number}: {error}")
    outcome.goal = outcome.count
    outcome.figures = {
        **{name: f"{count:,}" for name, count in disks.counts.items()},
        "longest log call": f"{disks.longest_call_s * 1e3:.1f} ms",
        "longest drain": f"{disks.longest_drain_s:.1f} s",
    }
    return outcome


def _write_until_full(filler: Path) -> None:
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 1):
            while file.write(bytes(size)) == size:
                pass


@contextlib.contextmanager
def _disk(place: Path, kind: str) -> Iterator[Path]:
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "tmpfs":
        with small_disk(place, MEGABYTES) as folder:
            yield folder
    else:
        with ext4.Ext4(place, MEGABYTES) as disk:
            yield disk.folder
