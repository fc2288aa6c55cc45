"""The bare loop that delivery is compared with: `MlflowClient.log_batch` of 1000 metrics.

    python bare_log_batch.py '{"uri": ..., "threads": 2, "batches": 20}'

Each thread has a run of its own. Prints JSON: points_per_s, cpu_us per point (of this process).
"""

from __future__ import annotations

import json
import sys
import threading
import time

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

POINTS = 1000  # mlflow.utils.validation.MAX_METRICS_PER_BATCH


def main(job: dict) -> dict[str, float]:
    client = MlflowClient(job["uri"])
    runs = [client.create_run("0").info.run_id for _ in range(job["threads"])]
    now_ms = time.time_ns() // 1_000_000

    def loop(run_id: str) -> None:
        for batch in range(job["batches"]):
            metrics = [
                Metric(
                    f"train/loss_{index % 10}",
                    index * 1.1,
                    now_ms + index,
                    batch * 100 + index // 10,
                )
                for index in range(POINTS)
            ]
            client.log_batch(run_id, metrics)

    threads = [threading.Thread(target=loop, args=(run_id,)) for run_id in runs]
    begin_s, cpu_s = time.monotonic(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s, cpu_s = time.monotonic() - begin_s, time.process_time() - cpu_s
    points = job["threads"] * job["batches"] * POINTS
    return {"points_per_s": points / took_s, "cpu_us": cpu_s / points * 1e6}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
