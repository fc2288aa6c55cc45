"""Ranks that are killed and come back, and what each of their lives has logged."""

from __future__ import annotations

import mmap
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator

from tests.support.relay import Node, wait_until

KEYS = 3
PATIENCE_S = 120.0

_SCRIPT = """
import mmap, os, sys, time
import mlflow_relay

path, key, rank, world_size, step = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
pause_s = float(sys.argv[6])
with open(path, "r+b") as file:
    shared = mmap.mmap(file.fileno(), 32)
words = memoryview(shared).cast("Q")
run = mlflow_relay.start_run("torture", run_key=key, rank=rank, world_size=world_size)
while not words[2]:
    values = {f"m{j}": rank * 1e6 + step + j / 16 for j in range(3)}
    begin_ns = time.perf_counter_ns()
    run.log_metrics(values, step=step)
    took_ns = time.perf_counter_ns() - begin_ns
    step += 1
    words[0] = step
    words[1] = max(words[1], took_ns)
    if step % 100:
        time.sleep(pause_s)
run.end()
"""


class Life:
    """One process of a rank."""

    def __init__(
        self, node: Node, key: str, rank: int, world_size: int, first: int, pause_s: float
    ) -> None:
        self.first, self._rank = first, rank
        self.prefix = f"rank_{rank}/" if rank else ""
        self.key = f"{self.prefix}m0"
        self.began_ms, self.ended_ms = time.time_ns() // 1_000_000, 1 << 62
        self.was_killed = False
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="relay-count-") as file:
            file.write(struct.pack("@4Q", first, 0, 0, 0))
            file.flush()
            self._shared = mmap.mmap(file.fileno(), 32)
            self._words = memoryview(self._shared).cast("Q")
            self._node = node
            self.process: subprocess.Popen[str] = node.rank(
                _SCRIPT, file.name, key, rank, world_size, first, pause_s
            )
            self._wait_until_it_has_the_counter(file.name)

    def _wait_until_it_has_the_counter(self, path: str) -> None:
        """Return when the rank has the file open or mapped: then its name is not needed."""

        def has_it() -> bool:
            assert self.process.poll() is None, self.process.communicate()[0]
            with open(f"/proc/{self.process.pid}/maps", encoding="utf-8") as file:
                return path in file.read()

        wait_until(has_it, "the rank has its counter", PATIENCE_S)

    @property
    def calls(self) -> int:
        """The step behind the last call that had returned."""
        return int(self._words[0])

    @property
    def longest_ns(self) -> int:
        return int(self._words[1])

    def points(self, step: int) -> Iterator[tuple[str, float]]:
        """Yield (key, value) of what this rank logs at a step."""
        for j in range(KEYS):
            yield f"{self.prefix}m{j}", self._rank * 1e6 + step + j / 16

    def end(self, *, kill: bool) -> None:
        """End it, by force or by its own `end()`."""
        self.was_killed = kill
        if kill:
            self.process.kill()
        else:
            self._words[2] = 1
        output = self.process.communicate(timeout=PATIENCE_S)[0]
        self.ended_ms = time.time_ns() // 1_000_000
        self._node.ranks.remove(self.process)
        assert kill or self.process.returncode == 0, f"the rank ended badly: {output}"

    def close(self) -> None:
        self._words.release()
        self._shared.close()


class Rank:
    """One rank through its lives; of a hundred log calls each is followed by a pause, but one."""

    def __init__(
        self, node: Node, key: str, number: int, world_size: int, pause_s: float = 0.004
    ) -> None:
        self._make = lambda first: Life(node, key, number, world_size, first, pause_s)
        self.lives = [self._make(0)]
        self._lives_now = True

    @property
    def calls(self) -> int:
        return self.lives[-1].calls

    def kill_and(self, *, comes_back: bool) -> bool:
        """Kill it; let it come back, now or from the dead. Return whether it had lived."""
        lived = self._lives_now
        if lived:
            self.lives[-1].end(kill=True)
            self._lives_now = False
        if comes_back:
            # One call may have returned and not been counted: its step is left out.
            self.lives.append(self._make(self.calls + 1))
            self._lives_now = True
        return lived

    def end(self) -> None:
        if self._lives_now:
            self.lives[-1].end(kill=False)
            self._lives_now = False

    def word(self) -> str:
        """Return how its part of the run ended, as far as can be told from outside."""
        last = self.lives[-1]
        if not last.was_killed:
            return "ended"
        # Without a call that has returned, the daemon may never have heard of that life.
        return "vanished" if last.calls > last.first else "unknown"

    def close(self) -> None:
        for life in self.lives:
            life.close()
