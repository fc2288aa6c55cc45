"""What operators meet: wrong configuration, status, flush, runs, url, check, an offline daemon.

Every error is one line on stderr that says what to do, and an exit code that a script can use.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlflow_relay._version import __version__
from mlflow_relay_daemon.cli import COMMANDS
from tests.support import MlflowServer, TcpProxy
from tests.support.proxy import answer
from tests.support.relay import Node, finish, last_json, wait_until
from tests.support.scenes import (
    STEADY,
    dead_letters,
    fingerprint,
    fresh_name,
    in_order,
    log_lines,
    plain_connection,
    steady_points,
    stored,
    wait_for,
)

#: Logs as many calls as each line of its stdin says, two metrics each; says how many there are.
ON_CALL = """
    import sys, mlflow_relay
    run = mlflow_relay.start_run(
        sys.argv[1], sys.argv[2], run_key=sys.argv[3], rank=int(sys.argv[4]),
        world_size=int(sys.argv[5]), rank_metrics="prefix",
    )
    print(run.run_id, flush=True)
    calls = 0
    for line in sys.stdin:
        for _ in range(int(line)):
            run.log_metrics({"a": calls, "b": -calls}, step=calls)
            calls += 1
        print(calls, flush=True)
    run.end()
"""

#: Logs thrice of what the smallest quota holds, and is killed.
LARGE_TEXTS = """
    import os, signal, sys, mlflow_relay
    run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
    for i in range(1000):
        run.log_metrics({"a": i, "b": -i}, step=i)
        run.set_tags({"text": "x" * 3000 + str(i)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


class OnCall:
    """A rank that logs when it is told."""

    def __init__(
        self,
        node: Node,
        *,
        name: str = "",
        key: str = "",
        rank: int = 0,
        world_size: int = 1,
        experiment: str = "",
    ) -> None:
        self.key = key or fresh_name("key")
        self.experiment = experiment or fresh_name("operators")
        arguments = self.experiment, name or fresh_name("run"), self.key, rank, world_size
        self.process = node.rank(ON_CALL, *arguments)
        self.run_id: str = self.process.stdout.readline().strip()
        self.calls = 0
        assert re.fullmatch("[0-9a-f]{32}", self.run_id)

    def log(self, calls: int) -> None:
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        self.calls = int(self.process.stdout.readline())

    def end(self) -> None:
        finish([self.process])


def points_of(calls: int, prefix: str = "") -> list[tuple[str, float, int]]:
    places = [(f"{prefix}{key}", sign * i, i) for i in range(calls) for key, sign in SIGNS]
    return in_order(places)


SIGNS = (("a", 1.0), ("b", -1.0))


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("operators"), mlflow_server.uri) as node:
        node.start()
        yield node


@pytest.fixture
def node(tmp_path, mlflow_proxy) -> Iterator[Node]:
    """A node of this test's own, behind the proxy; its daemon is not started."""
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"drain_timeout_s": 0}) as node:
        yield node


def the_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line of an error; nothing else may have been said."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("mlflow-relay: ")
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert done.stdout == ""
    return lines[0]


def ask(server: MlflowServer, path: str, **body: str) -> Any:
    """Ask MLflow's REST API one thing; its own client takes seconds to import."""
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


# ── wrong configuration ──


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("spol = 1", ["spol", "did you mean spool"]),
        ("retry_wait_s_max = -1", ["retry_wait_s_max", "-1", "from 0.01"]),
        ("free_bytes_min = -1", ["free_bytes_min", "-1", "from 0 to"]),
        ('spool_bytes_max = "999KB"', ["spool_bytes_max", "999KB", "from 1MB"]),
        ('segment_bytes_max = "-5MB"', ["segment_bytes_max", "-5MB"]),
        ("delivery_threads = 0", ["delivery_threads", "0", "from 1 to 64"]),
        ("this is no toml", ["is not TOML"]),
        ('[daemon]\nspool = "/x"', ["daemon", "no setting"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_file_key_and_range(node, tmp_path, content, said):
    file = tmp_path / "relay.toml"
    file.write_text(content)
    line = the_line(node.command("daemon", "--config", str(file)), 78)
    assert str(file) in line
    for words in said:
        assert words in line


def test_a_wrong_flag_or_variable_is_one_line_that_names_it(node):
    flag = the_line(node.command("daemon", "--free-bytes-min=-1"), 78)
    assert "--free-bytes-min" in flag
    environ = {**node._daemon_environ, "MLFLOW_RELAY_BATCH_AGE_S": "soon"}
    variable = the_line(run_daemon(environ), 78)
    assert "MLFLOW_RELAY_BATCH_AGE_S" in variable
    assert "soon" in variable
    unknown = the_line(node.command("daemon", "--spol", "/x"), 64)
    assert "--spool" in unknown
    missing = the_line(node.command("daemon", "--config", "/there/is/none.toml"), 78)
    assert "/there/is/none.toml" in missing
    relay = the_line(node.command("daemon", "--tracking-uri", "relay://"), 78)
    assert "relay://" in relay
    folder = the_line(node.command("daemon", "--tracking-uri", "/some/folder"), 1)
    assert "sqlite:///" in folder


def run_daemon(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlflow_relay_daemon", "daemon", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_socket_path_of_more_than_107_bytes_is_refused_in_one_line(node):
    fits = node.runtime / ("s" * (106 - len(str(node.runtime))))
    assert len(str(fits)) == 107
    line = the_line(node.command("daemon", "--socket", f"{fits}x"), 78)
    assert "108 bytes" in line
    assert "107" in line
    assert "MLFLOW_RELAY_SOCKET" in line
    umlauts = node.runtime / ("ü" * (107 - len(str(node.runtime))))
    the_line(node.command("daemon", "--socket", str(umlauts)), 78)
    node.socket = fits
    node._daemon_environ["MLFLOW_RELAY_SOCKET"] = str(fits)
    node.start()  # 107 are enough for everybody
    assert node.status()["daemon"]["socket"] == str(fits)
    assert node.stop() == 0


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Bind a folder to itself, read-only: root ignores permissions, but not this."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    done = subprocess.run(
        ["mount", "--bind", folder, folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no folder can be made read-only for root here: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_spool_that_cannot_be_written_is_refused_in_one_line(node, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    (folder / "old").mkdir()
    with read_only(folder):
        for spool in (folder / "spool", folder, folder / "old"):
            line = the_line(node.command("daemon", "--spool", str(spool)), 1)
            assert str(spool) in line
            assert "--spool" in line
    file = tmp_path / "file"
    file.write_text("in the way")
    for spool in (file, file / "below"):
        line = the_line(node.command("daemon", "--spool", str(spool)), 1)
        assert str(spool) in line
        assert "--spool" in line
    assert file.read_text() == "in the way"
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "runs").write_text("in the way")
    line = the_line(node.command("daemon", "--spool", str(blocked)), 1)
    assert str(blocked) in line


def test_a_socket_that_cannot_be_made_is_refused_in_one_line(node, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    line = the_line(node.command("daemon", "--socket", str(file / "relay.sock")), 1)
    assert "--socket" in line
    folder = node.runtime / "folder.sock"
    (folder / "something").mkdir(parents=True)
    line = the_line(node.command("daemon", "--socket", str(folder)), 1)
    assert str(folder) in line
    assert "--socket" in line
    assert (folder / "something").is_dir()


def test_a_second_daemon_is_refused_in_one_line_and_the_first_one_serves_on(
    shared_node, mlflow_server, tmp_path
):
    node = shared_node
    rank = OnCall(node)
    rank.log(10)
    elsewhere = str(node.runtime / "elsewhere" / "relay.sock")
    same_spool = the_line(node.command("daemon", "--socket", elsewhere), 1)
    assert str(node.spool) in same_spool
    assert "--spool" in same_spool
    # The journals beside the socket belong to one daemon, too.
    other = str(tmp_path / "other")
    for socket in (node.socket, node.runtime / "other.sock"):
        line = the_line(node.command("daemon", "--spool", other, "--socket", str(socket)), 1)
        assert str(node.runtime) in line
        assert "--socket" in line
    both = the_line(node.command("daemon"), 1)
    assert str(node.runtime) in both or str(node.spool) in both
    # By another name it is the same spool.
    link = tmp_path / "link"
    link.symlink_to(node.spool)
    the_line(node.command("daemon", "--socket", elsewhere, "--spool", str(link)), 1)
    rank.log(10)
    rank.end()
    run = node.wait_until_ended(rank.run_id)
    found = stored(mlflow_server, run["mlflow_run_id"])
    assert (found.status, found.points) == ("FINISHED", points_of(20))


def test_a_daemon_that_was_killed_leaves_nothing_in_the_way_of_the_next(node):
    node.start()
    node.kill()
    assert node.socket.exists()  # it had no time to remove it
    node.start()
    assert node.status()["daemon"]["pid"] == node.daemon.pid
    assert node.stop() == 0
    assert not node.socket.exists()


# ── status ──

NUMBER, TEXT, MAYBE_TEXT, MAYBE_NUMBER = (int,), (str,), (str, type(None)), (int, type(None))
SCHEMA: dict[str, Any] = {
    "schema_version": NUMBER,
    "time_ms": NUMBER,
    "daemon": {
        "pid": NUMBER, "version": TEXT, "started_ms": NUMBER, "spool": TEXT, "socket": TEXT,
        "tracking_uri": TEXT, "offline": (bool,), "memory_bytes": NUMBER, "cpu_s": (float,),
        "sessions_open": NUMBER, "accepts_ranks": (bool,),
    },
    "server": {
        "state": TEXT, "since_ms": NUMBER, "last_error": MAYBE_TEXT, "next_try_ms": MAYBE_NUMBER,
    },
    "disk": {
        "spool_bytes": NUMBER, "spool_bytes_max": MAYBE_NUMBER, "free_bytes": NUMBER,
        "free_bytes_min": NUMBER, "full": (bool,),
    },
    "counters": {
        "bad_messages": NUMBER, "fsync_failures": NUMBER, "quarantined_files": NUMBER,
        "damaged_records": NUMBER, "resent_frames": NUMBER,
    },
}  # fmt: skip
RUN_SCHEMA: dict[str, Any] = {
    "run_id": TEXT, "run_key": TEXT, "experiment_name": TEXT, "run_name": TEXT,
    "mlflow_run_id": MAYBE_TEXT, "experiment_id": MAYBE_TEXT, "state": TEXT, "status": TEXT,
    "ranks_alive": NUMBER, "ranks_seen": NUMBER, "world_size": NUMBER, "accepted_records": NUMBER,
    "delivered_records": NUMBER, "settled_records": NUMBER, "delivered_points": NUMBER,
    "waiting_records": NUMBER, "waiting_bytes": NUMBER, "journal_records": NUMBER,
    "oldest_waiting_ms": MAYBE_NUMBER, "dead_letters": NUMBER, "lost_records": NUMBER,
    "damaged_records": NUMBER, "last_error": MAYBE_TEXT, "start_ms": NUMBER,
    "end_ms": MAYBE_NUMBER, "url": MAYBE_TEXT,
}  # fmt: skip


def assert_schema(found: dict[str, Any], schema: dict[str, Any]) -> None:
    for name, kinds in schema.items():
        if isinstance(kinds, dict):
            assert_schema(found[name], kinds)
        else:
            assert type(found[name]) in kinds, (name, found[name])


def status_of(node: Node, code: int = 0) -> dict[str, Any]:
    done = node.command("status", "--json")
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    assert_schema(found, SCHEMA)
    for run in found["runs"]:
        assert_schema(run, RUN_SCHEMA)
    return found


def test_status_tells_the_numbers_as_they_are(node, mlflow_proxy):
    node.start()
    empty = status_of(node)
    assert empty["runs"] == []
    assert empty["schema_version"] == 1
    assert empty["daemon"]["pid"] == node.daemon.pid
    assert empty["daemon"]["version"] == __version__
    assert empty["daemon"]["tracking_uri"] == mlflow_proxy.uri
    assert empty["server"]["state"] == "unknown"
    assert 0 < empty["daemon"]["memory_bytes"] < 500 << 20
    assert "no runs" in node.command("status").stdout

    name, ranks = two_ranks(node, world_size=3)  # the third one never comes
    for rank in ranks:
        rank.log(50)
    wait_for(node, "all is delivered", delivered_records=100, delivered_points=200)
    now = status_of(node)
    (run,) = now["runs"]
    assert now["server"]["state"] == "up"
    assert now["daemon"]["sessions_open"] == 2
    assert (run["run_id"], run["run_key"]) == (ranks[0].run_id, ranks[0].key)
    assert (run["run_name"], run["experiment_name"]) == (name, ranks[0].experiment)
    assert (run["state"], run["status"]) == ("running", "RUNNING")
    assert (run["ranks_alive"], run["ranks_seen"], run["world_size"]) == (2, 2, 3)
    assert run["accepted_records"] == run["settled_records"] == 100
    assert run["waiting_records"] == run["waiting_bytes"] == run["journal_records"] == 0
    assert run["oldest_waiting_ms"] is None
    assert run["url"].endswith(f"/#/experiments/{run['experiment_id']}/runs/{run['mlflow_run_id']}")
    for rank in ranks:
        rank.end()
    wait_for(node, "no rank lives", ranks_alive=0, accepted_records=102)


def two_ranks(node: Node, world_size: int) -> tuple[str, list[OnCall]]:
    """Start ranks 0 and 1 of a run; return its name and the ranks."""
    names = {"name": fresh_name("name"), "key": fresh_name("key"), "experiment": fresh_name("e")}
    ranks = [OnCall(node, rank=rank, world_size=world_size, **names) for rank in range(2)]
    return names["name"], ranks


def test_status_tells_what_waits_while_the_server_is_away(node, mlflow_proxy, mlflow_server):
    node.start()
    name, ranks = two_ranks(node, world_size=2)
    for rank in ranks:
        rank.log(50)
    wait_for(node, "all is delivered", delivered_records=100)
    mlflow_proxy.refuse()
    for rank in ranks:
        rank.log(25)
    wait_for(node, "all is in the spool", accepted_records=150)
    wait_until(lambda: node.status()["server"]["state"] == "down", "the server is found away")
    now = status_of(node, 1)
    (run,) = now["runs"]
    assert run["waiting_records"] == 50
    assert run["settled_records"] == run["delivered_records"] == 100
    assert 50 * 40 < run["waiting_bytes"] < 50 * 200
    assert run["start_ms"] <= run["oldest_waiting_ms"] <= now["time_ms"]
    assert "cannot be reached" in now["server"]["last_error"]
    table = node.command("status").stdout
    assert "the server is down" in table
    assert name in table

    # One rank is killed, the other one ends, and the server is back.
    ranks[0].process.kill()
    ranks[1].end()
    wait_for(node, "no rank lives", ranks_alive=0)
    (run,) = status_of(node, 1)["runs"]
    assert (run["state"], run["ranks_seen"]) == ("ending", 2)
    mlflow_proxy.heal()
    node.wait_until_ended()
    (run,) = status_of(node)["runs"]
    assert (run["status"], run["accepted_records"], run["waiting_records"]) == ("FAILED", 151, 0)
    assert run["delivered_points"] == 300
    assert run["start_ms"] < run["end_ms"] <= now["time_ms"] + 60_000
    found = stored(mlflow_server, run["mlflow_run_id"])
    assert found.points == in_order(points_of(75) + points_of(75, "rank_1/"))
    assert found.status == "FAILED"


def test_status_of_one_run_and_of_one_that_is_not_there(shared_node):
    rank = OnCall(shared_node)
    rank.log(1)
    wait_until(
        lambda: any(run["run_id"] == rank.run_id for run in shared_node.status()["runs"]),
        "the run is there",
    )
    one = shared_node.command("status", "--run", rank.run_id[:8], "--json")
    assert [run["run_id"] for run in json.loads(one.stdout)["runs"]] == [rank.run_id]
    none = shared_node.command("status", "--run", "no-such-run")
    assert "no-such-run" in the_line(none, 64)
    rank.end()


def test_status_without_a_daemon_reads_the_spool_and_changes_nothing_in_it(node, mlflow_proxy):
    never = node.command("status", "--json")
    assert never.returncode == 0
    assert not node.spool.exists(), "not even the folder is made"
    assert json.loads(never.stdout)["runs"] == []

    node.start()
    rank = OnCall(node)
    rank.log(30)
    wait_for(node, "the first part is delivered", delivered_records=30)
    mlflow_proxy.refuse()
    rank.log(12)
    wait_for(node, "the second part is in the spool", accepted_records=42)
    rank.end()
    wait_for(node, "the rank is gone", ranks_alive=0)
    known = node.run()
    assert node.stop() == 1
    before = fingerprint(node.spool)
    for command in (("status", "--json"), ("status",), ("runs",), ("runs", "--json")):
        done = node.command(*command)
        assert done.returncode == 0, done.stderr
        (note,) = done.stderr.splitlines()
        assert "no daemon answers" in note
        assert str(node.spool) in note
    assert fingerprint(node.spool) == before
    found = json.loads(node.command("status", "--json").stdout)
    assert found["daemon"] is None
    assert found["server"] is None
    (run,) = found["runs"]
    assert_schema(run, RUN_SCHEMA)
    for name in ("run_id", "mlflow_run_id", "accepted_records", "delivered_records", "status"):
        assert run[name] == known[name]
    assert (run["waiting_records"], run["ranks_alive"]) == (13, 0)  # twelve calls and the end
    for command in (("flush",), ("dead-letters", "list")):
        line = the_line(node.command(*command), 69)
        assert "mlflow-relay daemon" in line
    assert fingerprint(node.spool) == before


# ── flush ──


def test_flush_delivers_all_that_was_accepted_before_it(tmp_path, mlflow_server):
    """With a batch age of a minute nothing would be delivered by itself."""
    settings: dict[str, object] = {"batch_age_s": 60}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        nothing = node.command("flush")
        assert nothing.returncode == 0
        assert "nothing to flush" in nothing.stdout
        rank = OnCall(node)
        for calls in (40, 80):
            rank.log(40)
            done = node.command("flush", "--timeout", "60")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "40 records settled" in done.stdout
            run = node.run()
            assert run["waiting_records"] == run["journal_records"] == 0
            assert stored(mlflow_server, run["mlflow_run_id"]).points == points_of(calls)
        named = node.command("flush", rank.run_id[:8], run["mlflow_run_id"], run["run_name"])
        assert named.returncode == 0
        unknown = node.command("flush", "no-such-run")
        assert "no-such-run" in the_line(unknown, 64)
        rank.end()


def test_flush_says_per_run_what_is_left_while_the_server_is_away(node, mlflow_proxy):
    node.start()
    mlflow_proxy.refuse()
    ranks = [OnCall(node), OnCall(node)]
    ranks[0].log(7)
    ranks[1].log(11)
    wait_until(
        lambda: [run["accepted_records"] for run in node.status()["runs"]] in ([7, 11], [11, 7]),
        "all is in the spool",
    )
    done = node.command("flush", "--timeout", "1")
    assert done.returncode == 75, done.stdout + done.stderr
    left = [line for line in done.stdout.splitlines() if line.startswith("left: ")]
    assert len(left) == 2
    for rank, records in ((ranks[0], 7), (ranks[1], 11)):
        (line,) = [line for line in left if rank.run_id[:8] in line]
        assert f"{records} records" in line
        assert "server is down" in line
    assert "nothing is lost" in done.stdout
    mlflow_proxy.heal()
    assert node.command("flush", "--timeout", "60").returncode == 0
    for rank in ranks:
        rank.end()


def test_flush_says_why_a_run_is_blocked_and_goes_on_when_that_is_mended(node, mlflow_server):
    node.start()
    rank = OnCall(node)
    rank.log(5)
    mlflow_run_id = wait_for(node, "five are delivered", delivered_records=5)["mlflow_run_id"]
    ask(mlflow_server, "runs/delete", run_id=mlflow_run_id)
    rank.log(5)
    run = wait_for(node, "the run is blocked", state="blocked")
    assert "active" in run["last_error"] or "deleted" in run["last_error"]
    done = node.command("flush", "--timeout", "60")
    assert done.returncode == 1
    (left,) = [line for line in done.stdout.splitlines() if line.startswith("left: ")]
    assert "5 records" in left
    assert "blocked" in left
    shown = node.command("status")
    assert shown.returncode == 1
    assert f"mlflow-relay flush {rank.run_id[:8]}" in shown.stdout
    ask(mlflow_server, "runs/restore", run_id=mlflow_run_id)
    assert node.command("flush", "--timeout", "60").returncode == 0
    assert stored(mlflow_server, mlflow_run_id).points == points_of(10)
    rank.end()
    assert node.wait_until_ended()["status"] == "FINISHED"
    assert status_of(node)["runs"][0]["last_error"] is None


def test_flush_tells_of_what_mlflow_refuses_meanwhile(tmp_path, mlflow_server):
    settings: dict[str, object] = {"batch_age_s": 60}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        rank = node.rank(
            """
            import sys, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
            run.log_metrics({"good": 1.0, "bad@key": 2.0}, step=1)
            print(run.run_id, flush=True)
            sys.stdin.read()
            """,
            fresh_name("refused"),
            fresh_name("key"),
        )
        run_id = rank.stdout.readline().strip()
        done = node.command("flush", "--timeout", "60")
        assert done.returncode == 1, done.stdout
        assert "refused 1 record" in done.stdout
        assert "dead-letters list" in done.stdout
        assert [each["key"] for each in dead_letters(node, run_id)] == ["bad@key"]
        finish([rank])


# ── runs, url ──


def test_runs_and_url_lead_to_what_is_in_mlflow(shared_node, mlflow_server):
    node = shared_node
    names = [fresh_name("first"), fresh_name("second")]
    experiment = fresh_name("pages")
    ranks = [OnCall(node, name=name, experiment=experiment) for name in names]
    for rank in ranks:
        rank.log(3)
        rank.end()
    runs = [node.wait_until_ended(rank.run_id) for rank in ranks]

    listed = json.loads(node.command("runs", "--json").stdout)
    assert listed["schema_version"] == 1
    by_id = {run["run_id"]: run for run in listed["runs"]}
    assert [by_id[rank.run_id]["run_name"] for rank in ranks] == names
    assert [run["start_ms"] for run in listed["runs"]] == sorted(
        (run["start_ms"] for run in listed["runs"]), reverse=True
    )
    table = node.command("runs", "--full-ids")
    assert table.returncode == 0
    for rank, run in zip(ranks, runs, strict=True):
        (line,) = [line for line in table.stdout.splitlines() if rank.run_id in line]
        assert run["mlflow_run_id"] in line
        assert "finished" in line

    page = node.command("url", names[0]).stdout.strip()
    found = re.fullmatch(rf"{mlflow_server.uri}/#/experiments/(\d+)/runs/([0-9a-f]+)", page)
    assert found is not None
    info = ask(mlflow_server, f"runs/get?run_id={found[2]}")["run"]["info"]
    assert (info["experiment_id"], info["run_name"]) == (found[1], names[0])
    compared = node.command("url", *names).stdout
    for run in runs:
        assert run["mlflow_run_id"] in compared
        assert run["experiment_id"] in compared
    assert "no-such-run" in the_line(node.command("url", "no-such-run"), 64)


def test_url_of_a_run_that_is_not_in_mlflow_yet_says_so(node, mlflow_proxy):
    mlflow_proxy.refuse()
    node.start()
    rank = OnCall(node)
    rank.log(1)
    wait_for(node, "the run is there", accepted_records=1)
    line = the_line(node.command("url", rank.run_id), 1)
    assert "not in MLflow yet" in line
    rank.end()


# ── check ──


def findings(node: Node, code: int, *arguments: str) -> dict[str, dict[str, str]]:
    done = node.command("check", "--json", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)["checks"]}


def test_check_finds_what_is_well_and_what_is_not(node, mlflow_proxy):
    node.start()
    found = findings(node, 0)
    for name in ("config", "runtime", "disk", "lock", "daemon", "server", "secrets"):
        assert found[name]["state"] == "ok", found[name]
    assert found["spool"]["state"] in ("ok", "warn")
    assert "MLflow 3" in found["server"]["text"] or "MLflow 2" in found["server"]["text"]
    assert str(node.daemon.pid) in found["lock"]["text"]
    assert len(node.command("check").stdout.splitlines()) == len(found)

    mlflow_proxy.refuse()
    found = findings(node, 1)
    assert found["server"]["state"] == "FAIL"
    assert "cannot be reached" in found["server"]["text"]
    assert found["server"]["mend"]

    mlflow_proxy.heal()
    mlflow_proxy.fail(answer(401, b"who are you?"))
    found = findings(node, 1)
    assert found["server"]["state"] == "FAIL"
    assert "401" in found["server"]["text"]
    assert "MLFLOW_TRACKING_TOKEN" in found["server"]["text"] + found["server"]["mend"]

    mlflow_proxy.heal()
    assert node.stop() == 0
    found = findings(node, 0)
    assert found["daemon"]["state"] == "warn"
    assert "mlflow-relay daemon" in found["daemon"]["mend"]


def test_refused_credentials_are_shown_and_nothing_is_lost(node, mlflow_proxy, mlflow_server):
    mlflow_proxy.fail(answer(401, b"who are you?"))
    node._daemon_environ["MLFLOW_TRACKING_TOKEN"] = "s3cret-t0ken"
    node.start()
    rank = OnCall(node)
    rank.log(20)
    wait_until(lambda: node.status()["server"]["state"] == "down", "the server refuses us")
    now = status_of(node, 1)
    assert "401" in now["server"]["last_error"]
    assert "MLFLOW_TRACKING_TOKEN" in now["server"]["last_error"]
    assert node.command("flush", "--timeout", "1").returncode == 75
    mlflow_proxy.heal()
    rank.end()
    run = node.wait_until_ended()
    assert stored(mlflow_server, run["mlflow_run_id"]).points == points_of(20)
    everything = [node.log.read_text(), json.dumps(node.status())]
    everything += [path.read_text(errors="replace") for path in node.spool.rglob("*.json*")]
    assert not any("s3cret" in text for text in everything)


# ── help ──


def test_version_and_help_are_there_for_every_command(shared_node):
    version = shared_node.command("--version")
    assert (version.returncode, version.stdout) == (0, f"mlflow-relay {__version__}\n")
    for command in ([], ["daemon"], ["status"], ["dead-letters", "retry"]):
        done = shared_node.command(*command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: mlflow-relay")
    for flag in ("--spool", "--socket", "--tracking-uri", "--config", "--offline", "--exit-when"):
        assert flag in shared_node.command("daemon", "--help").stdout
    overview = shared_node.command("--help").stdout
    assert all(f"  {name} " in overview for name in COMMANDS)
    unknown = the_line(shared_node.command("stauts"), 64)
    assert "status" in unknown


# ── offline ──


def test_an_offline_daemon_collects_without_a_connection_and_a_later_one_delivers_all(
    tmp_path, mlflow_server
):
    with TcpProxy(mlflow_server.uri) as proxy:
        settings: dict[str, object] = {"offline": "true"}
        with Node(tmp_path / "node", proxy.uri, settings=settings) as node:
            node.start()
            rank = node.rank(STEADY, fresh_name("offline"), fresh_name("key"))
            run_id = rank.stdout.readline().strip()
            wait_for(node, "the rank is attached", ranks_alive=1)
            wait_until(lambda: node.run()["accepted_records"] > 50, "it collects")
            calls = last_json(finish([rank])[0])["calls"]
            wait_for(node, "all is collected", accepted_records=calls + 1, ranks_alive=0)
            now = status_of(node)
            assert now["server"]["state"] == "offline"
            assert now["daemon"]["offline"] is True
            assert now["runs"][0]["waiting_records"] == calls + 1
            flushed = node.command("flush", "--timeout", "5")
            assert flushed.returncode != 0
            assert "offline" in flushed.stdout + flushed.stderr
            assert "not asked" in findings(node, 0, "--offline")["server"]["text"]
            assert node.stop() == 0
            assert proxy.connections == 0

            node._daemon_environ["MLFLOW_RELAY_OFFLINE"] = "false"
            node.start()
            run = node.wait_until_ended(run_id)
            found = stored(mlflow_server, run["mlflow_run_id"])
            assert (found.status, found.points) == ("FINISHED", steady_points(calls))
            assert proxy.connections > 0


def test_an_offline_daemon_that_leaves_takes_from_memory_what_a_dead_rank_left(tmp_path):
    """That may be more than one look takes, and the node may be switched off next."""
    with Node(tmp_path / "node", "", settings={"offline": "true", "drain_timeout_s": 60}) as node:
        rank = OnCall(node)
        rank.log(400_000)  # tens of megabytes
        rank.process.kill()
        rank.process.wait()
        node.start()
        assert node.stop() == 0
        assert list((node.runtime / "journals").iterdir()) == []
        [run] = json.loads(node.command("status", "--json").stdout)["runs"]
        assert run["accepted_records"] == 400_000


@pytest.mark.parametrize(
    "settings", [{"drain_timeout_s": 0}, {"spool_bytes_max": "2MB"}], ids=["no time", "no space"]
)
def test_a_daemon_that_has_to_leave_something_in_memory_says_where(tmp_path, settings):
    with Node(tmp_path / "node", "", settings={"offline": "true", **settings}) as node:
        rank = OnCall(node)
        rank.log(400_000)
        rank.process.kill()
        rank.process.wait()
        node.start()
        assert node.stop() == 1
        [line] = log_lines(node, "dead ranks left in memory")
        assert str(node.runtime / "journals") in line


def test_a_drain_makes_space_for_what_a_dead_rank_left(tmp_path, mlflow_server):
    settings = {"spool_bytes_max": "1MB", "segment_bytes_max": "64kB", "drain_timeout_s": 60}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        rank = node.rank(LARGE_TEXTS, fresh_name("operators"), fresh_name("key"))
        assert rank.wait(60) == -signal.SIGKILL
        node.start()
        assert node.stop() == 0
        assert list((node.runtime / "journals").iterdir()) == []
        [run] = json.loads(node.command("status", "--json").stdout)["runs"]
        assert stored(mlflow_server, run["mlflow_run_id"]).points == points_of(1000)
        assert log_lines(node, "the quota of 1000000 bytes is reached"), "it had no space"


# ── coming and going ──


def test_sigterm_delivers_what_it_can_and_says_what_is_left(node, mlflow_proxy, mlflow_server):
    node._daemon_environ["MLFLOW_RELAY_DRAIN_TIMEOUT_S"] = "30"
    node._daemon_environ["MLFLOW_RELAY_BATCH_AGE_S"] = "60"
    node.start()
    rank = OnCall(node)
    rank.log(200)
    wait_for(node, "all is in the spool", accepted_records=200)
    assert node.stop() == 0  # drained
    assert not node.socket.exists()
    run = json.loads(node.command("status", "--json").stdout)["runs"][0]
    assert stored(mlflow_server, run["mlflow_run_id"]).points == points_of(200)

    node._daemon_environ["MLFLOW_RELAY_DRAIN_TIMEOUT_S"] = "0.2"
    mlflow_proxy.refuse()
    node.start()
    rank.log(3)
    wait_for(node, "all is in the spool", accepted_records=203)
    assert node.stop() == 1
    (line,) = log_lines(node, "are not in MLflow yet")
    assert "3 records" in line
    assert str(node.spool) in line
    node._daemon_environ["MLFLOW_RELAY_BATCH_AGE_S"] = "0.05"
    mlflow_proxy.heal()
    node.start()
    rank.end()
    run = node.wait_until_ended()
    found = stored(mlflow_server, run["mlflow_run_id"])
    assert (found.status, found.points) == ("FINISHED", points_of(203))


def test_a_daemon_with_nothing_to_do_leaves_when_it_was_asked_to(node, mlflow_server):
    node._daemon_environ["MLFLOW_RELAY_EXIT_WHEN_IDLE_S"] = "4"  # a rank takes one to come
    node.start()
    rank = OnCall(node)
    rank.log(5)
    wait_for(node, "five are delivered", delivered_records=5)
    mlflow_run_id = node.run()["mlflow_run_id"]
    with plain_connection(node.socket):  # is nobody to stay for
        rank.end()
        assert node.daemon.wait(60) == 0
    assert stored(mlflow_server, mlflow_run_id).status == "FINISHED"
    assert not node.socket.exists()
