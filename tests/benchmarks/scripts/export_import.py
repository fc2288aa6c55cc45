"""mlflow-export-import, out of a server and into it again, timed.

python export_import.py '{"uri": ..., "batches": 50, "folder": ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient


def main(job: dict) -> dict[str, float]:
    os.environ["MLFLOW_TRACKING_URI"] = job["uri"]  # it asks at import
    from mlflow_export_import.run.export_run import RunExporter
    from mlflow_export_import.run.import_run import RunImporter

    client = MlflowClient(job["uri"])
    run_id = client.create_run("0").info.run_id
    now_ms = time.time_ns() // 1_000_000
    for batch in range(job["batches"]):
        metrics = [
            Metric(f"loss_{index % 10}", 1.0, now_ms + index, batch * 100 + index // 10)
            for index in range(1000)
        ]
        client.log_batch(run_id, metrics)
    begin_s = time.monotonic()
    RunExporter(client).export_run(run_id, job["folder"])
    middle_s = time.monotonic()
    RunImporter(client).import_run("imported", job["folder"])
    return {"export_s": middle_s - begin_s, "import_s": time.monotonic() - middle_s}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
