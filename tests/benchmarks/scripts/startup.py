"""Import, start and end, each timed once in a process of its own.

python startup.py '{"what": "import", "module": "mlflow_relay"}'
python startup.py '{"what": "run", "logger": "mlflow-relay", "folder": ..., "uri": ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main(job: dict) -> dict[str, float]:
    begin_s = time.perf_counter()
    if job["what"] == "import":
        importlib.import_module(job["module"])
        return {"import_ms": (time.perf_counter() - begin_s) * 1e3}
    import loggers

    module = {"mlflow-relay": "mlflow_relay"}.get(job["logger"], "mlflow")
    importlib.import_module(module)
    start_s = time.perf_counter()
    log, end = loggers.LOGGERS[job["logger"]](job)
    start_ms = (time.perf_counter() - start_s) * 1e3
    for step in range(10):
        log({"loss": 1.0 / (step + 1)}, step)
    end_s = time.perf_counter()
    end()
    return {"start_ms": start_ms, "end_ms": (time.perf_counter() - end_s) * 1e3}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
