"""A process of its own for mlflow's artifact repositories: the daemon stays small, for mlflow costs
169 MB.

    python -m mlflow_relay_daemon.artifacts.helper <uploads side by side>

One JSON object per line: requests {"id", "uri", "path", "file"} on stdin, answers {"id", "error",
"kind"} on stdout; "error" is null if the file is there. It ends when stdin does, whatever it is
doing: an upload that goes on after its daemon is gone could overtake that of the next.
"""

from __future__ import annotations

import json
import os
import posixpath
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: Kinds of errors: the same upload may succeed later; it never will.
TEMPORARY, PERMANENT = "temporary", "permanent"
_PERMANENT_CODES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "NOT_IMPLEMENTED")


def main(threads: int) -> None:
    # Whatever a repository prints, in Python or in C, is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def serve(request: dict[str, Any]) -> None:
        answer = {"id": request["id"], **put(request["uri"], request["path"], request["file"])}
        with lock:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    pool = ThreadPoolExecutor(threads)
    for line in sys.stdin:
        pool.submit(serve, json.loads(line))
    os._exit(0)


def put(uri: str, path: str, file: str) -> dict[str, str | None]:
    """Bring a file to a repository; return what to answer."""
    folder, name = posixpath.split(path)
    try:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        # A repository names what it stores as the file is named.
        with tempfile.TemporaryDirectory(prefix="mlflow-relay-") as named:
            link = os.path.join(named, name)
            os.symlink(file, link)
            repository: Any = get_artifact_repository(uri)
            repository.log_artifact(link, folder or None)
    except Exception as error:  # noqa: BLE001  # boto's, Google's, Azure's, a plugin's, mlflow's
        is_permanent = getattr(error, "error_code", "") in _PERMANENT_CODES
        kind = PERMANENT if is_permanent else TEMPORARY
        return {"error": f"{type(error).__name__}: {error}", "kind": kind}
    return {"error": None, "kind": None}


if __name__ == "__main__":
    main(int(sys.argv[1]))
