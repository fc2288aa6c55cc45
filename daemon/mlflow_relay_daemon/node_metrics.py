"""Metrics of this node, once for each run that has a living rank here.

    main loop     look at the ranks ─▶ who lives? ─▶ ask for a sample ─▶ ... ─▶ sample → spool
    this thread                                      measure (may take long, or for ever)

A GPU library can hang with its driver, so nothing is measured in the thread that acknowledges.
A sample is kept only for runs whose ranks are known to have lived after it was taken: so it never
makes a run longer than its ranks did.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil

from mlflow_relay import clock, records
from mlflow_relay.values import METRICS_PER_RECORD_MAX, chunks
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.sensors import (
    COUNTERS,
    MB,
    Sensors,
    Values,
    node_sensors,
    nvidia_memory_by_pid,
)
from mlflow_relay_daemon.spool.card import Card

log = logging.getLogger(__name__)

#: mlflow.utils.mlflow_tags: the UI groups what begins with system/node_<number>/.
PREFIX = "system/node_{node}/"
RANK_PREFIX = "rank_{rank}/"
#: A measurement that takes longer than so many intervals hangs; said once.
HANGING_INTERVALS = 3


class RankProcess(NamedTuple):
    """A process that is to be measured, too."""

    run_id: str
    rank: int
    pid: int


@dataclass(frozen=True)
class Sample:
    """What was measured at one moment."""

    time_ms: int
    node: Values
    ranks: dict[tuple[str, int], Values] = field(default_factory=dict)  #: by run id and rank


class NodeMetrics:
    """Measures this node every `interval_s` as long as a run has a living rank.

    Args:
        pid_of: the process that holds a session's journal, None if it cannot be told; None: ranks'
            processes are not measured.
    """

    def __init__(
        self,
        runs: Runs,
        own: OwnRecords,
        *,
        interval_s: float,
        pid_of: Callable[[bytes], int | None] | None,
    ) -> None:
        self._runs, self._own = runs, own
        self._interval_s = interval_s
        self._pid_of = pid_of
        self._meter = Meter()
        self._due_s: float | None = None  # None: no run is active
        self._is_first = True
        self._base: dict[str, Values] = {}  # of counters, by run

    def look(self, now_s: float) -> None:
        """Keep the latest sample, and ask for the next one when it is time.

        To be called when it has just been found out which ranks live.
        """
        active = {
            run_id: hosted
            for run_id, hosted in self._runs.by_id.items()
            if _living_sessions(hosted.run.card)
        }
        for gone in set(self._base) - set(active):
            del self._base[gone]
        sample = self._meter.take()
        if not active:
            self._due_s = None
            return
        if self._due_s is None:
            # What is measured first says how busy the node was before the run: not for its curve.
            self._due_s, self._is_first = now_s, True
        if sample is not None and not self._is_first:
            for hosted in active.values():
                self._keep(hosted, sample)
        if now_s >= self._due_s and self._meter.ask(self._processes(active.values())):
            self._is_first = sample is None and self._is_first
            self._due_s = now_s + self._interval_s
        elif now_s >= self._due_s + HANGING_INTERVALS * self._interval_s:
            self._meter.report_hanging()

    def _processes(self, active: Collection[Hosted]) -> list[RankProcess]:
        if self._pid_of is None:
            return []
        found = []
        for hosted in active:
            card = hosted.run.card
            for name in _living_sessions(card):
                pid = self._pid_of(bytes.fromhex(name))
                if pid is not None:
                    found.append(RankProcess(card.run_id, card.sessions[name].rank, pid))
        return found

    def _keep(self, hosted: Hosted, sample: Sample) -> None:
        card = hosted.run.card
        if sample.time_ms < card.start_ms:
            return
        base = self._base.setdefault(
            card.run_id, {key: sample.node[key] for key in COUNTERS if key in sample.node}
        )
        prefix = PREFIX.format(node=node_number(card))
        values = {prefix + key: value - base.get(key, 0.0) for key, value in sample.node.items()}
        for (run_id, rank), of_rank in sample.ranks.items():
            if run_id == card.run_id:
                before = prefix + RANK_PREFIX.format(rank=rank)
                values |= {before + key: value for key, value in of_rank.items()}
        step = (sample.time_ms - card.start_ms) // 1000
        packer = records.MetricsPacker()
        packed = [
            packer.pack(part, step, sample.time_ms)
            for part in chunks(values, METRICS_PER_RECORD_MAX)
        ]
        if not packed:
            return
        try:
            self._own.append(hosted, packed)
        except OSError as error:  # the ranks' own records have the same trouble, and say it
            log.debug("run %s: a sample of node metrics is left out: %s", card.run_id, error)


class Meter:
    """Measures in a thread of its own, which starts with the first question."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._is_busy = self._is_reported = False
        self._processes: list[RankProcess] = []
        self._sample: Sample | None = None
        self._thread: threading.Thread | None = None

    def ask(self, processes: list[RankProcess]) -> bool:
        """Have a sample made; return False if the last one is still under way."""
        if self._is_busy:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="node metrics", daemon=True)
            self._thread.start()
        self._processes, self._is_busy, self._is_reported = processes, True, False
        self._asked.set()
        return True

    def take(self) -> Sample | None:
        """Return a sample that was made since the last call."""
        sample, self._sample = self._sample, None
        return sample

    def report_hanging(self) -> None:
        """Say once that a sensor does not come back."""
        if self._is_busy and not self._is_reported:
            self._is_reported = True
            log.warning("node metrics: a sensor does not answer; there are none until it does")

    def _work(self) -> None:
        sensors, processes = Sensors(node_sensors()), Processes()
        while True:
            self._asked.wait()
            self._asked.clear()
            node = sensors.read()
            ranks = processes.read(self._processes)
            self._sample = Sample(clock.now_ms(), node, ranks)
            self._is_busy = False


class Processes:
    """Measures the ranks' processes."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._has_gpu_memory = True

    def read(self, wanted: list[RankProcess]) -> dict[tuple[str, int], Values]:
        """Return what could be measured, by run id and rank; who is gone is left out."""
        self._known = {each.pid: p for each in wanted if (p := self._known.get(each.pid))}
        gpu_memory = self._gpu_memory() if wanted else {}
        found = {}
        for run_id, rank, pid in wanted:
            try:
                process = self._known.setdefault(pid, psutil.Process(pid))
                with process.oneshot():
                    values: Values = {
                        "cpu_utilization_percentage": process.cpu_percent(),
                        "memory_usage_megabytes": round(process.memory_info().rss / MB, 1),
                        "threads": process.num_threads(),
                    }
            except psutil.Error:
                continue  # it has ended just now, or is not ours to look at
            found[run_id, rank] = values | gpu_memory.get(pid, {})
        return found

    def _gpu_memory(self) -> dict[int, Values]:
        if not self._has_gpu_memory:
            return {}
        try:
            return nvidia_memory_by_pid()
        except Exception as error:  # noqa: BLE001  # whatever the vendor's library raises
            self._has_gpu_memory = False
            if not isinstance(error, ImportError):
                log.info("node metrics: no GPU memory of processes: %s", error)
            return {}


def node_number(card: Card) -> int:
    """Return the number of this node among the run's nodes: as its ranks were told, else the lowest
    rank here, which no other node has."""
    ranks = [session for session in list(card.sessions.values()) if session.primary]
    told = [session.node_rank for session in ranks if session.node_rank is not None]
    return min(told) if told else min((session.rank for session in ranks), default=0)


def _living_sessions(card: Card) -> list[str]:
    return [name for name, each in list(card.sessions.items()) if each.primary and not each.closed]
