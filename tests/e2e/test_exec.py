"""`mlflow-relay exec`: a command, the node's daemon beside it, and what is left when a job ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TcpProxy
from tests.support.jobs import PREAMBLE, assert_exactly, now_ms, only_run, own_params
from tests.support.relay import Node, wait_until
from tests.support.scenes import fresh_name
from tests.support.seeds import new_seed

EXEC = [sys.executable, "-m", "mlflow_relay_daemon", "exec"]

#: Logs steps, and writes how many calls have returned where the test reads it, whatever happens to
#: this process. argv: rank, file, steps, what SIGTERM does ("die", or seconds to go on).
RANK = (
    PREAMBLE
    + """
rank, path, steps, on_term = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
told = []
if on_term != "die":
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
while not os.path.exists(os.environ["MLFLOW_RELAY_SOCKET"]):
    time.sleep(0.01)  # a training imports torch meanwhile
run = mlflow_relay.start_run(rank=rank, world_size=int(os.environ["SIZE"]), rank_metrics="all")
count = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for step in range(steps):
    run.log_metrics({f"m{rank}": rank * 1e6 + step}, step=step)
    os.pwrite(count, b"%08d" % (step + 1), 0)
    if told and time.monotonic() - told[0] > float(on_term):
        break
    time.sleep(0.002)
run.end()
"""
)


@pytest.fixture
def node(tmp_path, mlflow_proxy) -> Iterator[Node]:
    """A node without a daemon: `exec` starts it."""
    with Node(tmp_path / "node", mlflow_proxy.uri) as node:
        yield node
        wait_until(lambda: not daemon_pid(node), "the daemon has left by itself")


def daemon_pid(node: Node) -> int:
    """Return the pid that holds the daemon's lock of this node, 0 for none."""
    from mlflow_relay_daemon.spool.disk import lock_holder

    try:
        fd = os.open(node.runtime / "daemon.lock", os.O_RDWR)
    except FileNotFoundError:
        return 0
    try:
        return lock_holder(fd) or 0
    finally:
        os.close(fd)


def start(
    node: Node, *command: object, options: tuple[str, ...] = (), group: int | None = None, **environ
) -> subprocess.Popen[str]:
    """Start `mlflow-relay exec` in a process group of its own, or in this one."""
    process = subprocess.Popen(
        [*EXEC, *options, "--", *map(str, command)],
        env={**node._daemon_environ, **{name: str(value) for name, value in environ.items()}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.setpgid(0, group or 0),  # noqa: PLW1509  # 3.10 has no process_group=
    )
    node.ranks.append(process)
    return process


def python(script: str, *arguments: object) -> tuple[object, ...]:
    return (sys.executable, "-c", script, *arguments)


# ── the command ──


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_exit_status_is_the_commands(node, script, code):
    process = start(node, *python(script))
    process.communicate()
    assert process.returncode == code


def test_a_command_that_cannot_be_run_is_one_line(node):
    missing = start(node, "no-such-command-here")
    assert missing.communicate()[1].splitlines() == [
        "mlflow-relay: no-such-command-here: there is no such command: check its name and PATH"
    ]
    assert missing.returncode == 127
    closed = start(node, node.folder)
    closed.communicate()
    assert closed.returncode == 126


def test_four_ranks_of_a_node_share_one_daemon_that_leaves_when_all_is_delivered(
    node, mlflow_server, tmp_path
):
    key = fresh_name("key")
    ranks = [
        start(node, *python(RANK, rank, tmp_path / f"{rank}", 200, "die"), SIZE=4,
              MLFLOW_RELAY_RUN_KEY=key)
        for rank in range(4)
    ]  # fmt: skip
    pids = {wait_until(lambda: daemon_pid(node), "a daemon lives")}
    for rank in ranks:
        assert rank.communicate(timeout=60) == ("", ""), "exec says nothing when all is well"
        assert rank.returncode == 0
        pids.add(daemon_pid(node))
    assert len(pids - {0}) == 1, "one daemon"
    run = only_run(mlflow_server, key)
    assert run.info.status == "FINISHED"
    assert own_params(run) == {}
    assert_exactly(
        mlflow_server.all_points(run.info.run_id), expected(dict.fromkeys(range(4), 200))
    )


def expected(calls: dict[int, int]) -> list[tuple[str, int, float]]:
    return [(f"m{rank}", i, rank * 1e6 + i) for rank, count in calls.items() for i in range(count)]


def test_what_is_left_when_the_server_is_away_is_said_with_the_way_to_deliver_it(
    node, mlflow_proxy, tmp_path
):
    mlflow_proxy.refuse()
    process = start(node, *python(RANK, 0, tmp_path / "0", 10, "die"), SIZE=1,
                    options=("--drain-timeout", "1"), MLFLOW_RELAY_RUN_KEY=fresh_name("key"))  # fmt: skip
    said = process.communicate()[1].splitlines()
    assert process.returncode == 0
    [line] = said
    assert line == (
        "mlflow-relay: 11 records are not in MLflow yet; nothing is lost, they are kept on disk: "
        f"`mlflow-relay sync {node.spool} --tracking-uri URI` delivers them"
    )


def test_a_daemon_that_dies_is_started_again(node, mlflow_server, tmp_path):
    key = fresh_name("key")
    process = start(node, *python(RANK, 0, tmp_path / "0", 5000, "0"), SIZE=1,
                    MLFLOW_RELAY_RUN_KEY=key)  # fmt: skip
    first = wait_until(lambda: daemon_pid(node), "a daemon lives")
    wait_until(lambda: calls_in(tmp_path / "0") > 10, "the rank logs")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: daemon_pid(node) not in (0, first), "another daemon lives")
    process.terminate()
    process.communicate()
    wait_until(lambda: not daemon_pid(node), "it has delivered all, and left")
    run = only_run(mlflow_server, key)
    assert_exactly(
        mlflow_server.all_points(run.info.run_id), expected({0: calls_in(tmp_path / "0")})
    )


def calls_in(path: Path) -> int:
    try:
        return int(path.read_bytes() or 0)
    except FileNotFoundError:
        return 0


# ── signals ──

COUNTS = """
import signal, sys, time
got = []
for each in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(each, lambda number, _: got.append(number))
print("ready", flush=True)
time.sleep(0.1) or sys.stdin  # what comes early waits for the handler
while len(got) < 2 or got[-1] != signal.SIGUSR2:
    signal.sigtimedwait([], 0.01)
print(*got, flush=True)
"""


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_comes_once_whether_it_is_sent_to_one_process_or_to_all(node, to_all):
    process = start(node, *python(COUNTS))
    assert process.stdout.readline() == "ready\n"
    send = os.killpg if to_all else os.kill
    send(process.pid, signal.SIGUSR1)
    time.sleep(0.5)  # two of the same kind that are pending at once are one
    send(process.pid, signal.SIGUSR2)
    out, _ = process.communicate()
    assert out.split() == [str(int(signal.SIGUSR1)), str(int(signal.SIGUSR2))]


# ── a job step that is ended ──


class Step:
    """What Slurm makes of a step on one node: a group of tasks, SIGTERM, and KillWait later SIGKILL
    to all that is left of it, the daemon too."""

    def __init__(self, node: Node, folder: Path, size: int, on_term: list[str], drain_s: float):
        folder.mkdir()
        self.node, self.folder, self.size = node, folder, size
        self.key = fresh_name("step")
        self.tasks: list[subprocess.Popen[str]] = []
        for rank in range(size):
            script = python(RANK, rank, folder / str(rank), 1_000_000, on_term[rank])
            group = self.tasks[0].pid if self.tasks else None
            task = start(node, *script, group=group, options=("--drain-timeout", str(drain_s)),
                         SIZE=size, MLFLOW_RELAY_RUN_KEY=self.key, PRETEND_STEP=self.key)  # fmt: skip
            self.tasks.append(task)

    def calls(self) -> dict[int, int]:
        return {rank: calls_in(self.folder / str(rank)) for rank in range(self.size)}

    def end(self, kill_wait_s: float) -> None:
        os.killpg(self.tasks[0].pid, signal.SIGTERM)
        daemon = daemon_pid(self.node)
        if daemon:  # Slurm's proctrack finds it, whatever session it is in
            os.kill(daemon, signal.SIGTERM)
        until_s = time.monotonic() + kill_wait_s
        while time.monotonic() < until_s and (
            any(task.poll() is None for task in self.tasks) or daemon_pid(self.node)
        ):
            time.sleep(0.02)
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for task in self.tasks:
            task.communicate()

    def processes(self) -> list[int]:
        """Return all that carry the step's variable, as its cgroup would."""
        found = []
        for entry in os.scandir("/proc"):
            try:
                environ = Path(entry.path, "environ").read_bytes() if entry.name.isdigit() else b""
            except OSError:
                continue
            if f"PRETEND_STEP={self.key}".encode() in environ.split(b"\0"):
                found.append(int(entry.name))
        return found


def end_a_step(node: Node, server, proxy: TcpProxy, folder: Path, seed: int, kill_wait_s: float):
    """One try: whatever a call had accepted before the end is in MLflow afterwards, once."""
    rng = random.Random(seed)
    on_term = [rng.choice(["die", "0", str(kill_wait_s / 3), "1000"]) for _ in range(2)]
    drain_s = kill_wait_s * rng.choice([0.1, 0.8])
    is_away = rng.random() < 0.3
    begin_ms = now_ms()
    step = Step(node, folder, 2, on_term, drain_s)
    wait_until(lambda: min(step.calls().values()) > 0, "both ranks log")
    time.sleep(rng.uniform(0, 1))
    if is_away:
        proxy.refuse()
    step.end(kill_wait_s)
    proxy.heal()
    accepted = step.calls()
    print(f"seed {seed}: on SIGTERM {on_term}, drain {drain_s:.1f} s, server away {is_away}, "
          f"{sum(accepted.values())} calls, {(now_ms() - begin_ms) / 1000:.1f} s")  # fmt: skip
    # The next job on this node, or an operator, starts a daemon again.
    node.start()
    ended = node.wait_until_ended(run_of(node, step.key))
    node.stop()
    assert ended["lost_records"] == ended["damaged_records"] == ended["dead_letters"] == 0
    run = only_run(server, step.key)
    points = [(key, step_, value) for key, value, _, step_ in server.all_points(run.info.run_id)]
    assert len(points) == len(set(points)), "no point twice"
    missing = set(expected(accepted)) - set(points)
    assert not missing, f"{len(missing)} accepted points are lost"
    # The call that was under way when the process died may have been accepted, too.
    assert len(points) - sum(accepted.values()) <= 2


def run_of(node: Node, key: str) -> str:
    from tests.support.jobs import run_id_of

    wait_until(
        lambda: run_id_of(key) in {r["run_id"] for r in node.status()["runs"]}, "it is known"
    )
    return run_id_of(key)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_accepted_is_lost_when_a_step_is_ended(node, mlflow_server, mlflow_proxy, tmp_path, seed):  # fmt: skip
    end_a_step(node, mlflow_server, mlflow_proxy, tmp_path / "step", seed, kill_wait_s=3)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_nothing_accepted_is_lost_in_fifty_steps_with_slurms_own_times(
    node, mlflow_server, mlflow_proxy, tmp_path
):
    seed = new_seed()
    for i in range(50):
        end_a_step(node, mlflow_server, mlflow_proxy, tmp_path / f"{i}", seed + i, kill_wait_s=30)
