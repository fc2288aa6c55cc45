"""What users of MLflow write, run unchanged on a server and through each door; and what is there
afterwards, to be compared field by field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

#: Everything in it is MLflow's own; times and random values come from its arguments alone.
FLUENT = """
import sys, json, os
import mlflow, numpy, pandas
from mlflow import MlflowClient

name = sys.argv[1]
mlflow.set_experiment(name)
with mlflow.start_run(run_name="parent", tags={"team": "ens"}, description="a run") as parent:
    mlflow.log_param("lr", 0.01)
    mlflow.log_params({"depth": 3, "long": "x" * 500})
    for step in range(5):
        mlflow.log_metric("loss", 1.0 / (step + 1), step=step, timestamp=1_700_000_000_000 + step)
    mlflow.log_metrics({"nan": float("nan"), "inf": float("inf")}, step=7)
    mlflow.log_metric("later", 1.0, synchronous=False).wait()
    mlflow.set_tags({"a": 1, "gone": "x"})
    mlflow.delete_tag("gone")
    mlflow.log_text("hello", "notes/a.txt")
    mlflow.log_dict({"b": 1}, "b.json")
    mlflow.log_table({"q": ["x", "y"], "a": [1, 2]}, "table.json")
    mlflow.log_table({"q": ["z"], "a": [3]}, "table.json")
    mlflow.log_image(numpy.zeros((4, 4, 3), dtype="uint8"), "image.png")
    data = mlflow.data.from_pandas(pandas.DataFrame({"x": [1, 2]}), source="here.csv", name="set")
    mlflow.log_input(data, context="training")
    with mlflow.start_run(run_name="child", nested=True):
        mlflow.log_metric("inner", 2.0)
try:
    with mlflow.start_run(run_name="broken"):
        mlflow.log_metric("m", 1.0)
        raise RuntimeError("on purpose")
except RuntimeError:
    pass

client = MlflowClient()
experiment = client.get_experiment_by_name(name).experiment_id
run = client.create_run(experiment, run_name="by client", start_time=1_700_000_000_000)
client.log_metric(run.info.run_id, "m", 1.5, timestamp=1_700_000_000_001, step=3)
client.log_param(run.info.run_id, "p", "v")
client.set_tag(run.info.run_id, "t", "v")
client.update_run(run.info.run_id, name="renamed")
client.set_terminated(run.info.run_id, "KILLED", end_time=1_700_000_009_000)
late = client.get_run(run.info.run_id)
assert late.info.status == "KILLED", late.info
assert late.data.metrics == {"m": 1.5} and late.data.params == {"p": "v"}, late.data
with mlflow.start_run(run_id=run.info.run_id):
    mlflow.log_metric("again", 1.0)
doomed = client.create_run(experiment, run_name="doomed")
client.delete_run(doomed.info.run_id)
left = client.create_run(experiment, run_name="left open")
client.log_metric(left.info.run_id, "m", 1.0)

answers = {
    "history": [[p.value, p.step, p.timestamp] for p in client.get_metric_history(parent.info.run_id, "loss")],
    "found": sorted(mlflow.search_runs(search_all_experiments=False)["tags.mlflow.runName"]),
    "files": sorted(f.path for f in client.list_artifacts(parent.info.run_id)),
    "text": mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/notes/a.txt"),
    "table": mlflow.load_table("table.json", run_ids=[parent.info.run_id]).to_dict("list"),
}
for wrong in (
    lambda: client.log_metric(parent.info.run_id, "bad@key", 1.0),
    lambda: client.log_param(parent.info.run_id, "lr", "0.02"),
    lambda: client.log_param(parent.info.run_id, "a//b", "1"),
    lambda: client.log_metric("f" * 32, "m", 1.0),
    lambda: client.log_metric(doomed.info.run_id, "m", 1.0),
    lambda: client.get_run("e" * 32),
    lambda: client.delete_tag(parent.info.run_id, "never"),
    lambda: client.create_experiment(name),
):
    try:
        wrong()
        answers.setdefault("errors", []).append("none")
    except mlflow.MlflowException as error:
        answers.setdefault("errors", []).append(error.error_code)
print(json.dumps(answers))
"""

#: The same for a client of 2023, MLflow 2.9 without NumPy and pandas (mlflow-skinny).
OLD_CLIENT = """
import json, sys
import mlflow
from mlflow import MlflowClient

name = sys.argv[1]
mlflow.set_experiment(name)
with mlflow.start_run(run_name="parent", tags={"team": "ens"}, description="a run") as parent:
    mlflow.log_params({"lr": 0.01, "long": "x" * 500})
    for step in range(5):
        mlflow.log_metric("loss", 1.0 / (step + 1), step=step)
    mlflow.log_metrics({"nan": float("nan"), "inf": float("inf")}, step=7)
    mlflow.set_tags({"a": 1, "gone": "x"})
    mlflow.delete_tag("gone")
    mlflow.log_text("hello", "notes/a.txt")
    mlflow.log_dict({"b": 1}, "b.json")
    with mlflow.start_run(run_name="child", nested=True):
        mlflow.log_metric("inner", 2.0)
client = MlflowClient()
experiment = client.get_experiment_by_name(name).experiment_id
run = client.create_run(experiment, run_name="by client", start_time=1_700_000_000_000)
client.log_metric(run.info.run_id, "m", 1.5, timestamp=1_700_000_000_001, step=3)
client.update_run(run.info.run_id, name="renamed")
client.set_terminated(run.info.run_id, "KILLED", end_time=1_700_000_009_000)
answers = {
    "version": mlflow.__version__,
    "history": [[p.value, p.step] for p in client.get_metric_history(parent.info.run_id, "loss")],
    "found": sorted(r.info.run_name for r in client.search_runs([experiment])),
    "files": sorted(f.path for f in client.list_artifacts(parent.info.run_id)),
    "text": mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/notes/a.txt"),
}
for wrong in (
    lambda: client.log_metric(parent.info.run_id, "bad@key", 1.0),
    lambda: client.log_param(parent.info.run_id, "lr", "0.02"),
    lambda: client.get_run("e" * 32),
):
    try:
        wrong()
        answers.setdefault("errors", []).append("none")
    except mlflow.MlflowException as error:
        answers.setdefault("errors", []).append(error.error_code)
print(json.dumps(answers))
"""

#: Autologging, a logged model, the registry.
MODELS = """
import sys, json
import mlflow, numpy
from sklearn.linear_model import LogisticRegression

name = sys.argv[1]
mlflow.set_experiment(name)
x, y = numpy.arange(20.0).reshape(10, 2), numpy.array([0, 1] * 5)
mlflow.sklearn.autolog(log_models=False)
with mlflow.start_run(run_name="auto"):
    LogisticRegression(max_iter=20).fit(x, y)
mlflow.sklearn.autolog(disable=True)
registered = name.replace(" ", "_")
with mlflow.start_run(run_name="model"):
    model = LogisticRegression().fit(x, y)
    logged = mlflow.sklearn.log_model(
        model, name="clf", pip_requirements=["scikit-learn"], registered_model_name=registered
    )
same = [
    bool((mlflow.sklearn.load_model(uri).predict(x) == model.predict(x)).all())
    for uri in (logged.model_uri, f"models:/{registered}/1")
]
print(json.dumps({"loads back": same[0], "from the registry": same[1]}))
"""

#: What waits for the server and what cannot, in the middle of a training. It says "half" and waits:
#: the server goes away, and with it the word of whoever else is asked.
CUT_OFF = """
import json, sys, time
import mlflow, numpy, requests
from mlflow import MlflowClient
from sklearn.linear_model import LogisticRegression

name = sys.argv[1]
x, y = numpy.arange(20.0).reshape(10, 2), numpy.array([0, 1] * 5)
model = LogisticRegression().fit(x, y)
mlflow.set_experiment(name)
client, said = MlflowClient(), {}
others = client.create_run("0").info.run_id
client.set_terminated(others)
run = mlflow.start_run(run_name="cut off")
own = run.info.run_id
mlflow.log_metric("m", 1.0, step=0)
print("half", flush=True)
sys.stdin.readline()
for what, ask in {
    "log_metric": lambda: mlflow.log_metric("m", 2.0, step=1),
    "log_text": lambda: mlflow.log_text("hello", "a.txt"),
    "log_image": lambda: mlflow.log_image(numpy.zeros((4, 4, 3), dtype="uint8"), "image.png"),
    "set_terminated others": lambda: client.set_terminated(others, "KILLED"),
    "own run": lambda: sorted(p.step for p in client.get_metric_history(own, "m")),
    "set_experiment": lambda: mlflow.set_experiment(name).name,
    "log_model": lambda: mlflow.sklearn.log_model(model, name="clf", pip_requirements=["scikit-learn"]),
    "search_runs": lambda: mlflow.search_runs(),
    "search_registered_models": lambda: client.search_registered_models(),
    "create_registered_model": lambda: client.create_registered_model("new"),
    "list_artifacts": lambda: client.list_artifacts(own),
}.items():
    begin_s = time.monotonic()
    try:
        answer = ask()
        said[what] = {"answer": answer if isinstance(answer, (list, str)) else "done"}
    except (mlflow.MlflowException, requests.HTTPError) as error:  # of files MLflow raises the latter
        said[what] = {"error_code": getattr(error, "error_code", ""), "words": str(error)}
    said[what]["took_s"] = time.monotonic() - begin_s
mlflow.end_run()
print(json.dumps(said), flush=True)
"""

#: Set by the client of each process, by the door, or by the clock.
_OWN_TAGS = ("relay.", "mlflow.user", "mlflow.source", "mlflow.log-model")


def seen(client: Any, name: str) -> dict[str, Any]:
    """Return all runs of an experiment by name, without what must differ between two trainings."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(names), names
    return {run.info.run_name: seen_run(client, run, names) for run in runs}


def seen_run(client: Any, run: Any, names: dict[str, str]) -> dict[str, Any]:
    """Return one run, with names in the place of ids."""
    tags = {
        key: names.get(value, value)
        for key, value in run.data.tags.items()
        if not key.startswith(_OWN_TAGS)
    }
    for key in [key for key in tags if key.startswith("mlflow.loggedArtifacts")]:
        tags[key] = tags[key].replace(run.info.run_id, "")
    fixed = [run.info.start_time, run.info.end_time]
    return {
        "status": run.info.status,
        "stage": run.info.lifecycle_stage,
        "times": [time if time and time < 1_700_001_000_000 else bool(time) for time in fixed],
        "user": run.info.user_id,
        "params": run.data.params,
        "tags": tags,
        "points": {key: _points(client, run.info.run_id, key) for key in sorted(run.data.metrics)},
        "inputs": [
            (each.dataset.name, each.dataset.digest, [(t.key, t.value) for t in each.tags])
            for each in run.inputs.dataset_inputs
        ],
        "artifacts": {} if run.info.lifecycle_stage == "deleted" else _files(client, run),
    }


def _points(client: Any, run_id: str, key: str) -> list[Any]:
    return [
        (repr(p.value), p.step, p.timestamp if p.timestamp < 1_700_001_000_000 else "now")
        for p in client.get_metric_history(run_id, key)
    ]


def _files(client: Any, run: Any) -> dict[str, str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = Path(client.download_artifacts(run.info.run_id, "", folder))
        return {
            str(path.relative_to(found)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(found.rglob("*"))
            if path.is_file()
        }
