"""Processes of scripts/load.py, started together; and the bare pipe that they are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import zmq

from tests.benchmarks.bench import CHECKOUT, SCRIPTS, Bench, BenchNode, code_path

#: What one process sends for: one per core keeps the machine busy without a queue for it.
PROCESSES_MAX = 2
RECORDS, METRICS, FRAME_BYTES = 550, 10, 132_600  # a frame as a busy rank sends it


@dataclass
class Load:
    """So many clients, each with so many frames.

    Args: runs: the clients are spread over so many runs.
    """

    clients: int
    frames: int
    records: int = RECORDS
    metrics: int = METRICS
    runs: int = 1
    distinct: bool = False  #: each frame with points of its own
    first: int = 0  #: number of the first client: sessions differ by it

    @property
    def points(self) -> int:
        return self.clients * self.frames * self.records * self.metrics


class Senders:
    """The processes of one load; leaves none behind.

    Args: stay: sessions stay attached until the end of the `with`.
    """

    def __init__(
        self, mode: str, endpoint: str, load: Load, environ: dict[str, str], stay: bool = False
    ) -> None:
        count = min(PROCESSES_MAX, load.clients)
        self.processes: list[subprocess.Popen[str]] = []
        for index in range(count):
            share = load.clients // count + (index < load.clients % count)
            job = {
                "mode": mode,
                "endpoint": endpoint,
                "clients": share,
                "frames": load.frames,
                "records": load.records,
                "metrics": load.metrics,
                "runs": load.runs,
                "run_id": 1,
                "stay": stay,
                "distinct": load.distinct,
                "first": load.first + 1_000_000 * (index + 1),
            }
            command = [sys.executable, str(SCRIPTS / "load.py"), json.dumps(job)]
            self.processes.append(
                subprocess.Popen(
                    command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )

    def __enter__(self) -> Senders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"a sender ended with status {process.wait()}"
        return line

    def go(self) -> None:
        """Let all go on together once all are ready."""
        for process in self.processes:
            assert self._line(process).strip() == "ready"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def results(self) -> list[dict[str, Any]]:
        """Return what each found, once all are done."""
        return [json.loads(self._line(process)) for process in self.processes]


def send_to(node: BenchNode, load: Load) -> dict[str, Any]:
    """Send a load to a node; return points and bytes per second, ack times, daemon CPU.

    Everything that was sent is fsynced and acknowledged at `end_s`.
    """
    with Senders("relay", f"ipc://{node.socket}", load, node.environ) as senders:
        senders.go()
        senders.go()
        cpu_s = node.cpu_s
        found = senders.results()
        cpu_s = node.cpu_s - cpu_s
    took_s = max(each["end_s"] for each in found) - min(each["begin_s"] for each in found)
    points = sum(each["points"] for each in found)
    sent_bytes = sum(each["bytes"] for each in found)
    return {
        "points_per_s": points / took_s,
        "bytes_per_s": sent_bytes / took_s,
        "bytes": sent_bytes,
        "attach_s": max(each["attach_s"] for each in found),
        "ack_ms": [ms for each in found for ms in each["ack_ms"]],
        "cpu_us_per_point": cpu_s / points * 1e6,
    }


def bare_pipe(bench: Bench, load: Load, group_bytes: int = 1 << 20) -> float:
    """Return points per second of PUSH → write → fdatasync with the same frames.

    The floor that any intake over ZeroMQ stands on: no acks, no checks, no sessions.
    """
    folder = bench.scratch("bare")
    endpoint = f"ipc://{folder}/bare"
    context = zmq.Context()
    pull = context.socket(zmq.PULL)
    pull.bind(endpoint)
    fd = os.open(folder / "file", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    environ = {**os.environ, "PYTHONPATH": code_path(CHECKOUT)}
    try:
        with Senders("bare", endpoint, load, environ) as senders:
            senders.go()
            begin_s = time.monotonic()
            left = load.clients * load.frames
            while left:
                group = [pull.recv()]
                size = len(group[0])
                while size < group_bytes and len(group) < left:
                    try:
                        group.append(pull.recv(zmq.NOBLOCK))
                    except zmq.Again:
                        break
                    size += len(group[-1])
                os.write(fd, b"".join(group))
                os.fdatasync(fd)
                left -= len(group)
            return load.points / (time.monotonic() - begin_s)
    finally:
        context.destroy(linger=0)
        os.close(fd)
        os.unlink(folder / "file")
