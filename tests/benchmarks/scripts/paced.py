"""Ranks of the real client at a steady pace: how long from a log call to its ack?

    python paced.py '{"ranks": 8, "metrics": 10, "points_per_s": 10000, "seconds": 15}'

Each rank is a process; prints JSON: p50, p99, max in ms over all calls of all ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import deque

LOOK_S = 0.0005


def rank(number: int, job: dict, answers) -> None:
    import mlflow_relay

    run = mlflow_relay.start_run("bench", run_key="paced", rank=number, world_size=job["ranks"])
    journal = run._session.journal
    metrics = {f"train/loss_{index}": index * 1.1 for index in range(job["metrics"])}
    pause_s = job["metrics"] * job["ranks"] / job["points_per_s"]
    waiting: deque[tuple[int, float]] = deque()
    waited_ms: list[float] = []
    next_s = end_s = time.monotonic()
    end_s += job["seconds"]
    while (now_s := time.monotonic()) < end_s:
        if now_s >= next_s:
            run.log_metrics(metrics, step=len(waited_ms))
            waiting.append((journal.next_seq, now_s))
            next_s += pause_s
        acked = journal.acked
        while waiting and waiting[0][0] <= acked:
            waited_ms.append((time.monotonic() - waiting.popleft()[1]) * 1e3)
        time.sleep(LOOK_S)
    run.end()
    answers.put(waited_ms)


def main(job: dict) -> None:
    answers = multiprocessing.Queue()
    ranks = [
        multiprocessing.Process(target=rank, args=(number, job, answers))
        for number in range(job["ranks"])
    ]
    for each in ranks:
        each.start()
    found = sorted(ms for _ in ranks for ms in answers.get())
    for each in ranks:
        each.join()
    last = len(found) - 1
    print(json.dumps({"p50": found[last // 2], "p99": found[last * 99 // 100], "max": found[-1]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
