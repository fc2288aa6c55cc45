"""docs/deploy: each recipe is read from its page and tried, as far as one machine allows.

What stands in for a cluster are small programs with the names of its commands: srun starts tasks with
Slurm's variables, ssh runs a command with folders of its own per host.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import MlflowServer
from tests.support.relay import Node, _clean_environ, finish, wait_until
from tests.support.scenes import fresh_name

DEPLOY = Path(__file__).parents[2] / "docs/deploy"
SERVER_ON_THE_PAGE = "http://mlflow.example.org:5000"

TRAIN = """
import mlflow_relay
with mlflow_relay.start_run("deploy", rank_metrics="prefix") as run:
    for step in range(20):
        run.log_metric("loss", float(step), step=step)
print(run.run_id)
"""

SRUN = """#!/bin/bash
export SLURM_CLUSTER_NAME=pretend SLURM_JOB_ID=$PRETEND_JOB SLURM_STEP_ID=0 SLURM_NODEID=0
export SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=4 SLURM_STEP_NUM_NODES=1 SLURM_NNODES=1
code=0
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""

SSH = """#!/bin/bash
host=$1; shift
export MLFLOW_RELAY_SOCKET=$PRETEND_RUN/$host/relay.sock MLFLOW_RELAY_SPOOL=$HOME/spool-$host
cd "$PRETEND_CWD" && exec bash -c "$*"
"""


def recipe(page: str, name: str) -> str:
    """Return the code block behind a marker on a page."""
    text = (DEPLOY / page).read_text(encoding="utf-8")
    [found] = re.findall(rf"<!-- recipe: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    return found


def all_recipes() -> set[tuple[str, str]]:
    return {
        (path.name, name)
        for path in DEPLOY.glob("*.md")
        for name in re.findall(r"<!-- recipe: ([\w-]+) -->", path.read_text(encoding="utf-8"))
    }


class Cluster:
    """A home, a PATH with stand-ins, and a folder with train.py."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.run = Path(tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"))
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in (("srun", SRUN), ("ssh", SSH)):
            self.program(name, text)
        for name in ("python", "mlflow-relay"):
            command = f'exec "{sys.executable}"' + (
                " -m mlflow_relay_daemon" if "-" in name else ""
            )
            self.program(name, f'#!/bin/bash\n{command} "$@"\n')
        (folder / "train.py").write_text(TRAIN)
        self.environ = {
            **_clean_environ(),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "MLFLOW_RELAY_SOCKET": str(self.run / "relay.sock"),
            "MLFLOW_RELAY_FREE_BYTES_MIN": "0",
            "PRETEND_JOB": fresh_name("job"),
            "PRETEND_RUN": str(self.run),
            "PRETEND_CWD": str(folder),
        }

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def bash(self, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a recipe."""
        return subprocess.run(
            ["bash", "-c", script.replace(SERVER_ON_THE_PAGE, self.uri)],
            env={**self.environ, **environ}, cwd=self.folder, capture_output=True, text=True,
            timeout=110, check=False,
        )  # fmt: skip

    def daemons(self) -> list[Path]:
        """Return the runtime folders whose daemon lives."""
        from mlflow_relay_daemon.spool.disk import lock_holder

        found = []
        for lock in self.run.rglob("daemon.lock"):
            with lock.open("r+b") as file:
                if lock_holder(file.fileno()):
                    found.append(lock.parent)
        return found


@pytest.fixture
def cluster(tmp_path, mlflow_server) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, mlflow_server.uri)
    try:
        yield cluster
        wait_until(lambda: not cluster.daemons(), "the daemons have left by themselves")
    finally:
        shutil.rmtree(cluster.run)


def points_of(server: MlflowServer, relay_run_id: str) -> tuple[str, list[Any]]:
    """Return the status and the points of the one MLflow run of a relay run."""
    client = server.client()
    found = client.search_runs(
        [each.experiment_id for each in client.search_experiments()],
        f"tags.`relay.run_id` = '{relay_run_id}'",
    )
    assert len(found) == 1
    return found[0].info.status, server.all_points(found[0].info.run_id)


def test_the_slurm_script_of_a_user_makes_one_run_of_all_tasks(cluster, mlflow_server):
    done = cluster.bash(recipe("slurm.md", "slurm-exec"))
    assert done.returncode == 0, done.stderr
    [run_id] = set(done.stdout.split())
    status, points = points_of(mlflow_server, run_id)
    assert (status, len(points)) == ("FINISHED", 80)


def test_the_offline_slurm_script_keeps_all_in_the_users_home(cluster):
    done = cluster.bash(recipe("slurm.md", "slurm-offline"))
    assert done.returncode == 0, done.stderr
    assert "mlflow-relay sync" in done.stderr.splitlines()[-1]
    states = cluster.folder / ".local/state/mlflow-relay"
    shown = cluster.bash(f"mlflow-relay status --all-nodes {states} --json")
    [run] = json.loads(shown.stdout)["runs"]
    assert run["waiting_records"] == 84, "20 calls and the end of each task"


def test_prolog_and_epilog_never_fail_and_the_epilog_delivers(cluster, mlflow_server, tmp_path):
    cluster.program("systemctl", '#!/bin/bash\necho "$@" >> "$HOME/asked"; exit 3\n')
    assert cluster.bash(recipe("slurm.md", "slurm-prolog")).returncode == 0
    assert (tmp_path / "asked").read_text().splitlines() == [
        "is-active --quiet mlflow-relay", "restart mlflow-relay",
    ]  # fmt: skip
    told = cluster.bash(recipe("slurm.md", "slurm-task-prolog")).stdout
    assert told == "export MLFLOW_RELAY_SOCKET=/run/mlflow-relay/relay.sock\n"

    epilog = recipe("slurm.md", "slurm-epilog").replace("/opt/mlflow-relay/bin", str(cluster.bin))
    assert cluster.bash(epilog).returncode == 0, "also without a daemon"
    settings = {"batch_age_s": 60}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        finish([node.rank(TRAIN, environ={"MLFLOW_RELAY_RUN_KEY": fresh_name("key")})])
        assert cluster.bash(epilog, MLFLOW_RELAY_SOCKET=str(node.socket)).returncode == 0
        assert node.run()["waiting_records"] == 0


def test_the_ssh_script_makes_one_run_of_two_machines(cluster, mlflow_server):
    done = cluster.bash(recipe("ssh.md", "ssh"))
    assert done.returncode == 0, done.stderr
    [run_id] = set(done.stdout.split())
    _, points = points_of(mlflow_server, run_id)
    assert len(points) == 40
    assert len({path.name for path in cluster.folder.glob("spool-node*")}) == 2


# ── Kubernetes ──


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load(recipe("kubernetes.md", "kubernetes")))


def test_the_manifest_fits_kubernetes_own_schema(manifest):
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(manifest, validate.latest_version(), strict=True)


def test_the_sidecar_of_the_manifest_is_set_up_by_its_variables_and_its_probes_answer(
    manifest, tmp_path
):
    pod = manifest["spec"]["template"]["spec"]
    [sidecar], [train] = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    environ = {each["name"]: each["value"] for each in sidecar["env"]}
    place = {each["name"]: each.get("value") for each in train["env"]}
    assert place["MLFLOW_RELAY_SOCKET"] == environ["MLFLOW_RELAY_SOCKET"]
    drain_s = float(environ["MLFLOW_RELAY_DRAIN_TIMEOUT_S"])
    assert drain_s < pod["terminationGracePeriodSeconds"]

    port = environ["MLFLOW_RELAY_HTTP_PORT"]
    mounts = {"/relay": tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"),
              "/spool": str(tmp_path / "spool"), "/token": str(tmp_path)}  # fmt: skip
    os.chmod(mounts["/relay"], 0o777)  # as an emptyDir is
    for name, value in environ.items():
        for inside, outside in mounts.items():
            if value.startswith(inside):
                environ[name] = outside + value.removeprefix(inside)
    environ |= {"MLFLOW_RELAY_HTTP_PORT": "0", "MLFLOW_RELAY_OFFLINE": "1"}
    runtime = Path(environ["MLFLOW_RELAY_SOCKET"]).parent
    try:
        with Node(tmp_path / "node", "x", runtime=runtime) as node:
            node._daemon_environ |= environ
            node.start()
            found = str(node.status()["daemon"]["http_port"])
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                command = [sys.executable, *sidecar[probe]["exec"]["command"][1:]]
                command = [word.replace(port, found) for word in command]
                assert subprocess.run(command, check=False).returncode == 0
            finish([node.rank(TRAIN, environ={"MLFLOW_RELAY_RUN_KEY": "pod"})])
            assert node.run()["accepted_records"] == 21
            node.kill()
            assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    finally:
        shutil.rmtree(mounts["/relay"])


# ── monitoring ──


@pytest.fixture(scope="module")
def metric_names(tmp_path_factory) -> set[str]:
    """All names that a daemon exports."""
    import urllib.request

    settings = {"http_port": 0, "offline": True}
    with Node(tmp_path_factory.mktemp("metrics"), "x", settings=settings) as node:
        node.start()
        port = node.status()["daemon"]["http_port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
            text = reply.read().decode()
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\bmlflow_relay_[a-z_]+[a-z]\b", text)) - {"mlflow_relay_daemon"}


@pytest.mark.parametrize("file", ["alerts.yml", "grafana-dashboard.json", "monitoring.md"])
def test_every_metric_that_is_named_is_there(file, metric_names):
    named = named_in((DEPLOY / file).read_text())
    exported = metric_names | {name.removesuffix("_bucket") for name in metric_names}
    assert named
    assert named <= exported


def test_every_metric_is_explained(metric_names):
    explained = named_in((DEPLOY / "monitoring.md").read_text())
    own = {name for name in metric_names if name.startswith("mlflow_relay_")}
    plain = {re.sub(r"_(bucket|count|sum)$", "", name) for name in own}
    assert {name for name in plain if not name.endswith("_created")} <= explained


def test_the_dashboard_has_a_query_in_each_panel():
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert dashboard["uid"] == "mlflow-relay"
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) >= 12


ALERT_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'mlflow_relay_disk_full{{instance="n1"}}'
        values: '0x5 1x10'
      - series: 'mlflow_relay_oldest_waiting_seconds{{instance="n1"}}'
        values: '0+60x60'
    alert_rule_test:
      - eval_time: 4m
        alertname: RelayDiskFull
        exp_alerts: []
      - eval_time: 10m
        alertname: RelayDiskFull
        exp_alerts: [{{exp_labels: {{severity: critical, instance: n1}}}}]
      - eval_time: 14m
        alertname: RelayBacklogOld
        exp_alerts: []
    promql_expr_test:
      - expr: 'mlflow_relay_oldest_waiting_seconds > 900'
        eval_time: 30m
        exp_samples: [{{labels: 'mlflow_relay_oldest_waiting_seconds{{instance="n1"}}', value: 1800}}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_alert_rules_are_good_and_fire_when_they_should(tmp_path):
    rules = DEPLOY / "alerts.yml"
    checked = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    bare = re.sub(r"\n *annotations:\n(?: {10}.*\n)+", "\n", rules.read_text())
    (tmp_path / "rules.yml").write_text(bare)
    (tmp_path / "tests.yml").write_text(ALERT_TESTS.format(rules=tmp_path / "rules.yml"))
    tested = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "tests.yml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr


# ── the pages ──


def test_every_recipe_is_tried():
    source = Path(__file__).read_text(encoding="utf-8")
    tried = set(re.findall(r'recipe\("([\w.]+)", "([\w-]+)"\)', source))
    assert all_recipes() == tried


def test_every_setting_and_command_on_the_pages_is_one_of_ours():
    from mlflow_relay_daemon.cli import COMMANDS
    from mlflow_relay_daemon.config import SETTINGS
    from tests.test_readme import OTHER_VARIABLES

    known = {setting.variable for setting in SETTINGS.values()} | OTHER_VARIABLES
    pages = [*DEPLOY.glob("*.md"), DEPLOY.parent / "security.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert set(re.findall(r"MLFLOW_RELAY_[A-Z_]*[A-Z]", text)) <= known
    commands = set(re.findall(r"\bmlflow-relay ([a-z-]+)", text))
    assert commands - set(COMMANDS) <= {"sync", "node", "mlflow-relay", "group", "daemon"} | {
        word for word in commands if word.startswith("-")
    }


@pytest.mark.parametrize(
    ("page", "path"),
    [
        (page, path)
        for page in [*DEPLOY.glob("*.md"), DEPLOY.parent / "security.md"]
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    ],
    ids=lambda each: Path(each).name,
)
def test_a_link_on_a_page_leads_somewhere(page, path):
    assert (page.parent / path).is_file()
