"""The demo as its user runs it; and the count at its end, on data where something is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlflow_relay_daemon.demo.all_reduce import AllReduce
from mlflow_relay_daemon.demo.compare import compare
from mlflow_relay_daemon.demo.report import Bridge, Report, duration_text, quantile, table
from mlflow_relay_daemon.demo.trainer import loss_and_gradient
from mlflow_relay_daemon.demo.witness import Witness, read_testimony
from tests.support.relay import PATIENCE_S, wait_until
from tests.support.servers import free_port

DEMO_S_MAX = 90.0
COMMAND = [sys.executable, "-m", "mlflow_relay_daemon", "demo"]
#: What a user's shell may hold; the demo is about itself and must not care.
FOREIGN_ENVIRON = {
    "MLFLOW_TRACKING_URI": "http://192.0.2.1:5000",
    "MLFLOW_RELAY_OFFLINE": "true",
    "MLFLOW_RELAY_SOCKET": "/nonexistent/relay.sock",
    "MLFLOW_RELAY_RUN_KEY": "another-training",
    "MLFLOW_EXPERIMENT_NAME": "another experiment",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "http_proxy": "http://192.0.2.1:3128",
    "HTTP_PROXY": "http://192.0.2.1:3128",
}


# ── as a process ──


class Demo:
    """A demo of which every process and every file can be found again."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._mark = f"RELAY_TEST_MARK={uuid.uuid4()}"
        self._temporary = folder / "temporary"
        self._temporary.mkdir()
        self._output = folder / "output"
        self._errors = folder / "errors"
        name, value = self._mark.split("=")
        environ = {**os.environ, **FOREIGN_ENVIRON, "TMPDIR": str(self._temporary), name: value}
        self._started_s = time.monotonic()
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        """Wait until the demo has said this."""

        def said() -> bool:
            ended = self.process.poll() is not None
            if ended and "still waiting for the MLflow server" in self.errors:
                pytest.skip("this machine is too busy just now to start an MLflow server twice")
            assert not ended or text in self.output, self.output + self.errors
            return text in self.output

        wait_until(said, f"the demo says {text!r}", timeout_s=DEMO_S_MAX)

    def finish(self, timeout_s: float = DEMO_S_MAX) -> int:
        """Wait until it has ended; return the exit code."""
        code = self.process.wait(timeout_s)
        took_s = time.monotonic() - self._started_s
        print(f"{self.output}{self.errors}took {took_s:.1f} s")  # shown if it fails
        return code

    def children(self, part: str = "") -> list[int]:
        """Return the processes that descend from it, those whose command line has this in it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it ended just now
            if self._mark.encode() in environ and part.encode() in command:
                found.append(int(folder.name))
        return found

    def files(self) -> list[Path]:
        """Return what there is of its files and folders."""
        named = f"mlflow-relay-demo-{self.process.pid}-*"
        roots = (self._temporary, Path("/dev/shm"), Path("/tmp"))
        return [each for root in roots for each in root.glob(named)]

    def assert_nothing_is_left(self) -> None:
        assert self.children() == []
        assert self.files() == []
        assert list(self._temporary.iterdir()) == []


def figure(output: str, name: str) -> str:
    """Return what the table says under this name."""
    found = re.search(rf"^│ {re.escape(name)} +│ +(.+?) │", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


def test_the_demo_loses_nothing_doubles_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with Demo(tmp_path) as demo:
        demo.wait_for("the daemon is back")
        files = demo.files()
        code = demo.finish()
        assert time.monotonic() - started_s < DEMO_S_MAX

        assert code == 0
        output = demo.output
        points = int(figure(output, "points accepted").replace(",", ""))
        assert points >= 20_000
        assert figure(output, "delivered") == f"{points:,}"
        for name in ("lost", "duplicates", "wrong"):
            assert figure(output, name) == "0"
        assert figure(output, "runs in MLflow") == "1"
        assert "FINISHED" in output
        assert float(figure(output, "server away").removesuffix(" s")) >= 3
        assert float(figure(output, "daemon dead").removesuffix(" s")) >= 1
        assert float(figure(output, "test accuracy").removesuffix("%")) > 90
        assert re.search(
            r"^The run in MLflow: http://127\.0\.0\.1:\d+/#/experiments/", output, re.MULTILINE
        )
        assert demo.errors == ""
        assert "\x1b" not in output
        assert len(files) == 2, "the test looks where the demo's files are"
        demo.assert_nothing_is_left()


def test_a_rank_that_dies_ends_the_demo_with_1_and_nothing_is_left(tmp_path: Path) -> None:
    with Demo(tmp_path) as demo:
        demo.wait_for("4 ranks train one model")
        [rank] = wait_until(lambda: demo.children("demo.trainer")[2:3], "ranks")
        os.kill(rank, signal.SIGKILL)

        assert demo.finish() == 1
        assert re.fullmatch(r"mlflow-relay: rank \d ended with .*\n", demo.errors)
        demo.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with Demo(tmp_path) as demo:
        demo.wait_for("A relay daemon runs")
        assert len(demo.children()) >= 3, "the demo, a server, a daemon"
        demo.process.send_signal(number)

        assert demo.finish(PATIENCE_S) == 128 + number
        assert "nothing is left" in demo.errors
        demo.assert_nothing_is_left()


@pytest.mark.torture  # half a minute, for one option
def test_keep_leaves_the_server_up_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port()
    with Demo(tmp_path, "--keep", "--port", str(port)) as demo:
        demo.wait_for("Ctrl+C ends it.")
        found = re.search(r"http://127.0.0.1:(\d+)/#/experiments/(\d+)/runs/(\w+)", demo.output)
        assert found is not None
        assert int(found[1]) == port
        api = f"http://127.0.0.1:{port}/api/2.0/mlflow"
        with urllib.request.urlopen(f"{api}/runs/get?run_id={found[3]}") as answer:
            run = json.load(answer)["run"]
        assert run["info"]["status"] == "FINISHED"
        assert run["info"]["experiment_id"] == found[2]
        assert len(run["data"]["metrics"]) == 40
        demo.process.send_signal(signal.SIGINT)

        assert demo.finish(PATIENCE_S) == 0
        demo.assert_nothing_is_left()


def test_without_scikit_learn_the_demo_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['sklearn'] = None; sys.argv[1:] = ['demo']\n"
        "from mlflow_relay_daemon.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 78
    assert "pip install 'mlflow-relay[demo]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), Demo(tmp_path, "--port", str(port)) as demo:
        assert demo.finish(PATIENCE_S) == 1
        assert f"port {port}: " in demo.errors
        assert "--port" in demo.errors
        demo.assert_nothing_is_left()


# ── the count ──

LOGGED = [
    (key, step, step + len(key) / 3) for key in ("loss", "rank_1/loss", "lr") for step in range(50)
]
GOOD = Report(
    verdict=compare(LOGGED, LOGGED),
    statuses=["FINISHED"],
    ranks=1,
    steps=50,
    is_late=False,
    calls_s=[2e-6] * 49 + [3e-3],
    ends_s=[0.02],
    server_away=Bridge(9.87, 600),
    daemon_dead=Bridge(1.2, 80),
    accuracy=(0.1, 0.96),
    loss=(2.3, 0.14),
)


def test_all_points_in_any_order_are_good() -> None:
    verdict = compare(LOGGED, reversed(LOGGED))
    assert (verdict.logged, verdict.delivered) == (150, 150)
    assert verdict.is_good
    assert GOOD.is_good


def test_a_missing_point_is_lost() -> None:
    verdict = compare(LOGGED, [point for point in LOGGED if point[:2] != ("lr", 7)])
    assert verdict.lost == [("lr", 7)]
    assert (verdict.delivered, verdict.doubled, verdict.wrong) == (149, [], [])
    assert_fails(verdict, "lost", "1", "lr at step 7")


def test_a_point_that_is_there_twice_is_doubled() -> None:
    verdict = compare(LOGGED, [*LOGGED, LOGGED[60], LOGGED[60]])
    assert verdict.doubled == [("rank_1/loss", 10)] * 2
    assert (verdict.delivered, verdict.lost, verdict.wrong) == (150, [], [])
    assert_fails(verdict, "duplicates", "2", "rank_1/loss at step 10")


def test_a_point_with_another_value_is_wrong() -> None:
    changed = [(key, step, value + 1e-9 * (step == 3)) for key, step, value in LOGGED]
    verdict = compare(LOGGED, changed)
    assert verdict.wrong == [("loss", 3), ("lr", 3), ("rank_1/loss", 3)]
    assert (verdict.delivered, verdict.lost, verdict.doubled) == (147, [], [])
    assert_fails(verdict, "wrong", "3", "loss at step 3")


def test_a_point_that_nobody_logged_is_wrong() -> None:
    verdict = compare(LOGGED, [*LOGGED, ("lr", 50, 0.0), ("ghost", 0, math.nan)])
    assert verdict.wrong == [("ghost", 0), ("lr", 50)]
    assert verdict.delivered == 150
    assert_fails(verdict, "wrong", "2", "ghost at step 0")


def test_nan_is_the_same_as_nan_and_as_nothing_else() -> None:
    assert compare([("a", 0, math.nan)], [("a", 0, math.nan)]).is_good
    assert compare([("a", 0, math.nan)], [("a", 0, 0.0)]).wrong == [("a", 0)]
    assert compare([("a", 0, 0.0)], [("a", 0, math.nan)]).wrong == [("a", 0)]


@pytest.mark.parametrize("statuses", [[], ["RUNNING"], ["FAILED"], ["FINISHED", "FINISHED"]])
def test_anything_but_one_finished_run_is_bad(statuses: list[str]) -> None:
    assert not dataclasses.replace(GOOD, statuses=statuses).is_good


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    lost = compare(LOGGED, LOGGED[10:])
    for report in (GOOD, dataclasses.replace(GOOD, verdict=lost)):
        shown = rendered(report, width)
        assert all(len(line) <= width for line in shown.splitlines())
        for text in ("2.0 µs", "p99.9 3.0 ms", "9.9 s", "600 steps", "96.0%", "2.30 → 0.14"):
            assert text in shown


def assert_fails(verdict, name: str, count: str, place: str) -> None:
    """Assert that the demo would end with 1, and that its table would say why."""
    report = dataclasses.replace(GOOD, verdict=verdict)
    assert not report.is_good
    shown = rendered(report, 120)
    assert figure(shown, name) == count
    assert place in shown


def rendered(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_quantiles_are_values_that_were_measured() -> None:
    values = list(range(1000, 0, -1))
    assert [quantile(values, share) for share in (0, 0.5, 0.999, 1)] == [1, 500, 999, 1000]
    assert quantile([7], 0.5) == 7


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (4.24e-6, "4.2 µs"), (380e-6, "380 µs"), (0.0213, "21 ms"), (9.8, "9.8 s")],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# ── the training ──


def test_all_reduce_gives_every_rank_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=(4, 3, 650))  # ranks, rounds, numbers
    means: dict[int, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path, for a socket

        def work(rank: int) -> None:
            all_reduce = AllReduce(rank, 4, Path(folder) / "meeting")
            means[rank] = [all_reduce.mean(each) for each in values[rank]]

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    for rank in range(4):
        np.testing.assert_allclose(means[rank], values.mean(axis=0), rtol=1e-12)
        np.testing.assert_array_equal(means[rank], means[0])


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    random = np.random.default_rng(2)
    weights, images = random.normal(size=(5, 10)), random.normal(size=(8, 5))
    labels = random.integers(0, 10, size=8)
    _, gradient = loss_and_gradient(weights, images, labels)
    for place in ((0, 0), (4, 9), (2, 5)):
        nudge = np.zeros_like(weights)
        nudge[place] = 1e-6
        above, _ = loss_and_gradient(weights + nudge, images, labels)
        below, _ = loss_and_gradient(weights - nudge, images, labels)
        assert gradient[place] == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_a_witness_tells_what_was_logged_under_the_keys_of_its_rank(tmp_path: Path) -> None:
    seen = []
    for rank in (0, 2):
        witness = Witness(rank)
        log_metrics = witness.watch(lambda metrics, step: seen.append((step, metrics)))
        log_metrics({"loss": np.float64(0.1), "lr": 1}, step=4)
        witness.write(tmp_path)
    assert seen == [(4, {"loss": 0.1, "lr": 1})] * 2
    assert list(read_testimony(tmp_path, 0).points()) == [("loss", 4, 0.1), ("lr", 4, 1.0)]
    testimony = read_testimony(tmp_path, 2)
    assert list(testimony.points()) == [("rank_2/loss", 4, 0.1), ("rank_2/lr", 4, 1.0)]
    [call_s] = testimony.calls_s()
    assert 0 < call_s < 1
    assert testimony.calls_between(0, time.monotonic()) == 1
    assert testimony.calls_between(time.monotonic(), math.inf) == 0
