"""log-batch requests by turns to several addresses, one connection each.

    python log_batch.py '{"runs": [["http://...", "<run id>", "direct"], ...], "requests": 40,
                          "metrics": 1000, "pause_s": 0.2}'

After each request there is a pause: what the local endpoint delivers meanwhile is not to slow down
the next one. Prints JSON: ms of each request, by name.
"""

from __future__ import annotations

import http.client
import json
import sys
import time


def main(job: dict) -> None:
    found: dict[str, list[float]] = {name: [] for _, _, name in job["runs"]}
    connections = {
        name: http.client.HTTPConnection(uri.removeprefix("http://"), timeout=60)
        for uri, _, name in job["runs"]
    }
    for request in range(job["requests"]):
        for _, run_id, name in job["runs"]:
            metrics = [
                {"key": f"m{index}", "value": index * 0.1, "timestamp": 1_700_000_000_000, "step": request}
                for index in range(job["metrics"])
            ]  # fmt: skip
            body = json.dumps({"run_id": run_id, "metrics": metrics}).encode()
            time.sleep(job["pause_s"])
            connection, headers = connections[name], {"Content-Type": "application/json"}
            connection.close()  # the server closes idle ones: each turn pays for a new one
            connection.connect()
            begin_s = time.perf_counter()
            connection.request("POST", "/api/2.0/mlflow/runs/log-batch", body, headers)
            answer = connection.getresponse()
            content = answer.read()
            found[name].append((time.perf_counter() - begin_s) * 1000)
            if answer.status != 200:
                raise SystemExit(f"{name}: {answer.status} {content[:300]!r}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
