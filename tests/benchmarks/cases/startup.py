"""How long do import, start_run and end() take, with MLflow up, down, or a black hole?"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator

from tests.benchmarks.bench import NOBODY, OWN, Bench, medians
from tests.benchmarks.outcome import Outcome, Table, Target
from tests.support import MlflowServer

MODULES = {
    "MLflow": "mlflow",
    "wandb": "wandb",
    "neptune-scale": "neptune_scale",
    "trackio": "trackio",
    "TensorBoard": "tensorboardX",
}
#: MLflow tries for minutes where nobody answers: no case of ours waits for that.
PEER_TIMEOUT_S = 15.0


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    _imports(bench, outcome)
    with MlflowServer(bench.scratch("server")) as server, _black_hole() as hole:
        _starts(bench, outcome, {"up": server.uri, "down": NOBODY, "black hole": hole})
    return outcome


def _imports(bench: Bench, outcome: Outcome) -> None:
    from tests.benchmarks.bench import code_path

    python = {} if bench.peers is None else {"python": bench.peers}
    modules = {name: ("mlflow_relay", code_path(path)) for name, path in bench.relays.items()}
    modules["(floor: zmq alone)"] = "zmq", ""
    if bench.peers is not None:
        modules |= {name: (module, "") for name, module in MODULES.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in modules}
    for _ in range(bench.pick(3, 5)):
        for name, (module, path) in modules.items():
            environ = {**os.environ, "PYTHONPATH": path}
            job = {"what": "import", "module": module}
            found[name].append(bench.script("startup", job, environ=environ, **python))  # type: ignore[arg-type]
    ms = {name: medians(each)["import_ms"] for name, each in found.items()}
    rows: list[list] = [[name, each] for name, each in ms.items()]
    outcome.tables.append(Table("Import", ["", "ms"], rows, is_race=True))
    outcome.targets.append(Target("import mlflow_relay", ms[OWN], "ms", most=60))


def _starts(bench: Bench, outcome: Outcome, uris: dict[str, str]) -> None:
    rows: list[list] = []
    for state, uri in uris.items():
        for name in bench.relays:
            with bench.node(name, uri) as node:
                job = {"what": "run", "logger": OWN, "uri": uri, "folder": str(node.folder)}
                found = medians(
                    [bench.script("startup", job, environ=node.environ) for _ in range(5)]
                )
            rows.append([name, state, found["start_ms"], found["end_ms"]])
            if name == OWN:
                what = f"MLflow {state}"
                outcome.targets += [
                    Target(f"start_run, {what}", found["start_ms"], "ms", most=20),
                    Target(f"end(), {what}", found["end_ms"], "ms", most=100),
                ]
        for name in ("MLflow sync", "MLflow async") if bench.peers is not None else ():
            job = {"what": "run", "logger": name, "uri": uri, "folder": str(bench.folder)}
            try:
                found = bench.script("startup", job, python=bench.peers, timeout_s=PEER_TIMEOUT_S)  # type: ignore[arg-type]
                rows.append([name, state, found["start_ms"], found["end_ms"]])
            except subprocess.TimeoutExpired:
                rows.append([name, state, f"> {PEER_TIMEOUT_S:g} s", None])
            except RuntimeError:
                rows.append([name, state, "raises", None])
    columns = ["", "MLflow server", "start ms", "end() ms"]
    note = (
        "Without the import. The relay's end() waits for the daemon's fsync, MLflow's for MLflow."
    )
    outcome.tables.append(Table("Start and end of a run", columns, rows, note, is_race=True))


@contextlib.contextmanager
def _black_hole() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1000)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
