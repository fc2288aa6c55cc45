"""One logger's calls, timed. Runs as a script in the environment that has the logger, alone.

    python loggers.py '{"logger": "wandb offline", "metrics": 10, "pace_s": 0.004, ...}'

Job:    logger, folder (scratch), uri (MLflow's), metrics (per call), kind ("float", "numpy",
        "torch"), calls_max, seconds_max, pace_s; kill: end by SIGKILL after the last call.
Prints: JSON: calls, p50, p99, p99.9, max in µs, cpu_us per call (of this process, all threads).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable

Log = Callable[[dict, int], None]
End = Callable[[], None]


def mlflow_relay(job: dict) -> tuple[Log, End]:
    import mlflow_relay

    run = mlflow_relay.start_run("bench", run_key=job["folder"], rank=0, world_size=1)
    return run.log_metrics, run.end


def mlflow_sync(job: dict) -> tuple[Log, End]:
    import mlflow

    mlflow.set_tracking_uri(job["uri"])
    mlflow.start_run()
    return mlflow.log_metrics, mlflow.end_run


def mlflow_async(job: dict) -> tuple[Log, End]:
    import mlflow

    mlflow.set_tracking_uri(job["uri"])
    mlflow.start_run()

    def log(metrics: dict, step: int) -> None:
        mlflow.log_metrics(metrics, step=step, synchronous=False)

    return log, mlflow.end_run


def wandb_offline(job: dict) -> tuple[Log, End]:
    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline", WANDB_DIR=job["folder"])
    import wandb

    run = wandb.init(project="bench", dir=job["folder"], mode="offline")
    return run.log, run.finish


def neptune_offline(job: dict) -> tuple[Log, End]:
    os.environ["NEPTUNE_LOGGER_LEVEL"] = "critical"
    from neptune_scale import Run

    run = Run(
        project="bench/bench", experiment_name="e", mode="offline", log_directory=job["folder"]
    )
    return run.log_metrics, run.close


def trackio(job: dict) -> tuple[Log, End]:
    os.environ["TRACKIO_DIR"] = job["folder"]
    import trackio

    trackio.init(project="bench", embed=False)
    return trackio.log, trackio.finish


def tensorboard(job: dict) -> tuple[Log, End]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(job["folder"])

    def log(metrics: dict, step: int) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def bare(job: dict) -> tuple[Log, End]:
    """The least that a call can do that keeps its values: pack, CRC, copy into a mapped file."""
    import mmap
    import struct
    from zlib import crc32

    size = 64 << 20
    memory = os.memfd_create("bare")
    os.posix_fallocate(memory, 0, size)
    kept = mmap.mmap(memory, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    form = struct.Struct(f">qq{job['metrics']}d")
    at = 0

    def log(metrics: dict, step: int) -> None:
        nonlocal at
        record = form.pack(time.time_ns() // 1_000_000, step, *metrics.values())
        entry = crc32(record).to_bytes(4, "little") + record
        end = at + len(entry)
        kept[at:end] = entry
        at = end if end < size - 65_536 else 0

    return log, kept.close


LOGGERS: dict[str, Callable[[dict], tuple[Log, End]]] = {
    "mlflow-relay": mlflow_relay,
    "MLflow sync": mlflow_sync,
    "MLflow async": mlflow_async,
    "wandb offline": wandb_offline,
    "neptune-scale offline": neptune_offline,
    "trackio": trackio,
    "TensorBoard": tensorboard,
    "bare": bare,
}


def values(kind: str, count: int) -> list:
    numbers = [index * 1.1 for index in range(count)]
    if kind == "numpy":
        import numpy as np

        return [np.float32(number) for number in numbers]
    if kind == "torch":
        import torch

        return [torch.tensor(number) for number in numbers]
    return numbers


def main(job: dict) -> None:
    log, _ = LOGGERS[job["logger"]](job)
    keys = [f"train/loss_{index}" for index in range(job["metrics"])]
    metrics = dict(zip(keys, values(job.get("kind", "float"), len(keys)), strict=False))
    for step in range(job.get("warm_up", 3)):
        log(metrics, step)
    pace_s, first = job.get("pace_s", 0.0), job.get("warm_up", 3)
    taken_ns: list[int] = []
    until_s = time.monotonic() + job.get("seconds_max", 1e9)
    cpu_s = time.process_time()
    for step in range(first, first + job["calls_max"]):
        begin_ns = time.perf_counter_ns()
        log(metrics, step)
        taken_ns.append(time.perf_counter_ns() - begin_ns)
        if pace_s:
            time.sleep(pace_s)
        if time.monotonic() > until_s:
            break
    cpu_s = time.process_time() - cpu_s
    if job.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    ranked = sorted(each / 1e3 for each in taken_ns)
    last = len(ranked) - 1
    names = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    found = {name: ranked[round(share * last)] for name, share in names.items()}
    cpu_us = cpu_s / len(ranked) * 1e6
    print(json.dumps({**found, "calls": len(ranked), "cpu_us": cpu_us}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # the end of a run is another case's question, and takes some peers minutes
