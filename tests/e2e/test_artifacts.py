"""Artifacts from the call to the store, with real ranks, a real daemon and real MLflow servers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import MlflowServer
from tests.support import proxy as faults
from tests.support.relay import Node, finish, last_json, wait_until
from tests.support.seeds import new_seed

UPLOADS = b"/api/2.0/mlflow-artifacts/artifacts/"


def stored(server: MlflowServer, run: dict[str, Any]) -> Path:
    """Return the folder in which the server keeps the run's artifacts."""
    return server.folder / "artifacts" / run["experiment_id"] / run["mlflow_run_id"] / "artifacts"


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def staged(node: Node) -> list[Path]:
    return [path for path in (node.spool / "staging").rglob("*") if path.is_file()]


def ledger(node: Node, run_id: str) -> list[dict[str, Any]]:
    lines = (node.spool / "runs" / run_id / "artifacts.jsonl").read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line]


EVERYTHING = """
    import sys, pathlib, mlflow_relay, json, os
    folder = pathlib.Path(sys.argv[1])
    with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
        run.log_metric("loss", 0.5, step=1)
        run.log_artifacts(folder, "tree")
        for text in ("first", "second", "third"):
            run.log_text(text, "same.txt")
        run.log_text("", "empty.txt")
        run.log_table({"a": [1, 2]}, "table.json")
        run.log_artifact(folder / "a b.txt", copy=False)
    print(json.dumps(run.run_id))
"""
NAMES = ["a b.txt", "ünï/日本 語.txt", "q?&=;+.txt", "100% sure.txt", "deep/er/and/deeper.bin"]


def make_tree(folder: Path) -> dict[str, bytes]:
    content = {name: os.urandom(1000 + len(name)) for name in NAMES}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return content


def test_all_that_was_logged_is_on_the_server_byte_by_byte_and_nothing_is_left_staged(
    tmp_path, mlflow_server
):
    content = make_tree(tmp_path / "tree")
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        run_id = last_json(finish([node.rank(EVERYTHING, tmp_path / "tree")])[0])
        run = node.wait_until_ended(run_id)
        found = files_in(stored(mlflow_server, run))
        assert found == {
            **{f"tree/{name}": data for name, data in content.items()},
            "same.txt": b"third",
            "empty.txt": b"",
            "table.json": b'{"columns": ["a"], "data": [[1], [2]]}',
            "a b.txt": content["a b.txt"],
        }
        assert staged(node) == []
        artifacts = run["artifacts"]
        assert (artifacts["accepted"], artifacts["waiting"], artifacts["refused"]) == (11, 0, 0)
        assert artifacts["uploaded"] + artifacts["replaced"] == 11
        assert artifacts["settled_to"] == 11
        assert node.status()["disk"]["staged_bytes"] == 0
        ends = {line["n"]: line for line in ledger(node, run_id) if "end" in line}
        by_number = {line["n"]: line for line in ledger(node, run_id) if "path" in line}
        for number, end in ends.items():
            if end["end"] == "uploaded":
                path = stored(mlflow_server, run) / by_number[number]["path"]
                assert end["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        seen = mlflow_server.client().get_run(run["mlflow_run_id"])
        assert seen.info.status == "FINISHED"
        assert "relay.artifacts_waiting" not in seen.data.tags
        assert "table.json" in seen.data.tags["mlflow.loggedArtifacts"]


LOGS_AND_WAITS = """
    import sys, mlflow_relay, json, pathlib
    with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
        for index in range(int(sys.argv[2])):
            run.log_text(f"text {index}", f"many/{index}.txt")
            run.log_metric("index", index, step=index)
        print(json.dumps(run.run_id), flush=True)
        sys.stdin.readline()
"""


def test_a_store_that_is_away_holds_up_no_metric_and_the_end_says_what_is_to_come(
    tmp_path, mlflow_server, mlflow_proxy
):
    """The tracking server is up, and its artifact endpoint is not."""
    mlflow_proxy.fail(faults.answer(503, b"the store is away"), on=UPLOADS)
    with Node(tmp_path, mlflow_proxy.uri, settings={"artifact_wait_s": "0.5"}) as node:
        node.start()
        rank = node.rank(LOGS_AND_WAITS, tmp_path, 5)
        assert rank.stdout is not None
        run_id = json.loads(rank.stdout.readline())
        wait_until(lambda: node.status()["runs"], "the run is known")
        wait_until(
            lambda: node.run(run_id)["artifacts"]["last_error"], "the store's refusal is seen"
        )
        wait_until(lambda: node.run(run_id)["delivered_points"] == 5, "metrics are delivered")
        assert node.status()["server"]["state"] == "up"
        rank.communicate("\n", timeout=60)
        run = wait_until(
            lambda: (run := node.run(run_id))["status"] == "FINISHED" and run, "the end is told"
        )
        client = mlflow_server.client()
        tags = client.get_run(run["mlflow_run_id"]).data.tags
        assert tags["relay.artifacts_waiting"] == "5"
        assert (run["state"], run["artifacts"]["waiting"]) == ("ending", 5)
        assert "503" in run["artifacts"]["last_error"]
        shown = node.command("status").stdout
        assert "5 artifacts" in shown
        flushed = node.command("flush", "--timeout", "1")
        assert flushed.returncode == 75
        assert "5 artifacts: " in flushed.stdout
        node.kill()  # what waits is on the disk
        node.start()
        assert node.run(run_id)["artifacts"]["waiting"] == 5
        mlflow_proxy.heal()
        assert node.command("flush", "--timeout", "60").returncode == 0
        run = node.wait_until_ended(run_id)
        wait_until(
            lambda: (
                client.get_run(run["mlflow_run_id"]).data.tags["relay.artifacts_waiting"] == "0"
            ),
            "the tag says that all are there",
        )
        assert len(files_in(stored(mlflow_server, run))) == 5
        assert staged(node) == []


CHANGES = """
    import sys, pathlib, mlflow_relay, json
    folder = pathlib.Path(sys.argv[1])
    with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
        for name in ("linked", "in place", "gone", "fifo", "good"):
            run.log_artifact(folder / name, copy=name == "linked")
        print(json.dumps(run.run_id))
"""


def test_a_file_that_has_changed_or_vanished_or_became_a_fifo_is_a_dead_letter_with_the_reason(
    tmp_path, mlflow_server
):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("linked", "in place", "gone", "fifo", "good"):
        (folder / name).write_bytes(b"x" * 2_000_000)
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        environ = {
            "MLFLOW_RELAY_LINK_BYTES_MIN": "1",
            "MLFLOW_RELAY_END_TIMEOUT_S": "0",
            "MLFLOW_RELAY_STAGING": str(tmp_path / "staging"),
        }
        # The daemon comes only when the files have changed: the rank has long left.
        finish([node.rank(CHANGES, folder, environ=environ)])
        for name in ("linked", "in place"):
            with (folder / name).open("r+b") as file:
                file.seek(1_000_000)
                file.write(b"changed in place")
        (folder / "gone").unlink()
        (folder / "fifo").unlink()
        os.mkfifo(folder / "fifo")
        node.start()
        run = node.wait_until_ended()
        assert set(files_in(stored(mlflow_server, run))) == {"good"}
        letters = json.loads(node.command("dead-letters", "list", "--json").stdout)["dead_letters"]
        reasons = {letter["key"]: letter["reason"] for letter in letters}
        assert {letter["kind"] for letter in letters} == {"artifact"}
        assert set(reasons) == {"linked", "in place", "gone", "fifo"}
        assert "hard link" in reasons["linked"]
        assert "copy=False" in reasons["in place"]
        assert "is gone" in reasons["gone"]
        assert "FIFO" in reasons["fifo"]

        (folder / "gone").write_bytes(b"another")
        retried = node.command("dead-letters", "retry", "--run", run["run_id"])
        assert retried.stdout.startswith("4 "), retried
        wait_until(lambda: node.run()["dead_letters"] == 4, "they are refused once more")
        run_folder = tmp_path / "staging" / run["run_id"]
        assert len(list(run_folder.iterdir())) == 1  # the hard link is kept with its letter
        assert node.command("dead-letters", "drop", "--yes").returncode == 0
        assert list(run_folder.iterdir()) == []
        assert node.run()["dead_letters"] == 0


def test_a_daemon_killed_in_the_middle_of_an_upload_goes_on_where_it_was(tmp_path, mlflow_server):
    folder = tmp_path / "files"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.bin").write_bytes(os.urandom(3 << 20))
    slow = {"artifact_bytes_per_s": str(6 << 20), "artifact_uploads": "1"}
    with Node(tmp_path / "node", mlflow_server.uri, settings=slow) as node:
        node.start()
        script = EVERYTHING.replace('"tree"', '"."').replace('folder, "."', "folder")
        script = script.replace("a b.txt", "5.bin")
        run_id = last_json(finish([node.rank(script, folder)])[0])

        def is_in_the_middle() -> bool:
            artifacts = node.run(run_id)["artifacts"]
            return artifacts["uploaded"] >= 2 and artifacts["sent_bytes"] > 0

        wait_until(is_in_the_middle, "some are there, one is on its way")
        node.kill()
        before = {line["n"] for line in ledger(node, run_id) if line.get("end") == "uploaded"}
        node._daemon_environ.pop("MLFLOW_RELAY_ARTIFACT_BYTES_PER_S")
        node.start()
        run = node.wait_until_ended(run_id)
        found = stored(mlflow_server, run)
        for index in range(6):
            assert sha256(found / f"{index}.bin") == sha256(folder / f"{index}.bin")
        ends = [line["n"] for line in ledger(node, run_id) if "end" in line]
        assert before
        assert len(ends) == len(set(ends))  # what was there has not been sent again
        assert staged(node) == []


KILLED = """
    import sys, os, signal, mlflow_relay
    run = mlflow_relay.start_run("artifacts", run_key=sys.argv[1])
    for index in range(50):
        run.log_text(f"text {index}", f"{index}.txt")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_killed_after_its_calls_loses_none_of_its_files(tmp_path, mlflow_server):
    with Node(tmp_path, mlflow_server.uri) as node:
        state = {"XDG_STATE_HOME": str(tmp_path / "state")}  # where ranks stage without a daemon
        rank = node.rank(KILLED, tmp_path, environ=state)
        rank.wait(60)
        node.start()
        run = node.wait_until_ended()
        assert run["status"] == "FAILED"
        found = files_in(stored(mlflow_server, run))
        assert found == {f"{index}.txt": f"text {index}".encode() for index in range(50)}


def test_other_stores_are_reached_through_a_process_that_comes_and_goes(tmp_path):
    """A SQLite store keeps its artifacts in a folder: mlflow's own repository writes there."""
    from mlflow import MlflowClient

    content = make_tree(tmp_path / "tree")
    uri, store = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "store"
    # With a place of its own: else it would be a folder beside this checkout.
    MlflowClient(uri).create_experiment("artifacts", store.as_uri())
    with Node(tmp_path / "node", uri) as node:
        node._daemon_environ["MLFLOW_RELAY_ARTIFACT_WAIT_S"] = "60"
        node.start()
        assert node.daemon is not None
        run_id = last_json(finish([node.rank(EVERYTHING, tmp_path / "tree")])[0])
        run = node.wait_until_ended(run_id)
        (helper,) = helpers_of(node)
        found = files_in(store / run["mlflow_run_id"] / "artifacts")
        assert found["same.txt"] == b"third"
        assert {name: found[f"tree/{name}"] for name in content} == content
        helper.kill()  # the next file has another
        script = """
            import sys, mlflow_relay
            with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
                run.log_text("after the helper's death", "later.txt")
        """
        finish([node.rank(script, f"{tmp_path} later")])
        wait_until(lambda: len(node.status()["runs"]) == 2, "the other run is known")
        (later,) = {run["run_id"] for run in node.status()["runs"]} - {run_id}
        assert node.wait_until_ended(later)["artifacts"]["uploaded"] == 1
        (helper,) = helpers_of(node)
        assert node.stop() == 0
        wait_until(lambda: not helper.is_running(), "the helper goes with its daemon")


def helpers_of(node: Node) -> list[psutil.Process]:
    assert node.daemon is not None
    children = psutil.Process(node.daemon.pid).children()
    return [each for each in children if "artifacts.helper" in " ".join(each.cmdline())]


def test_the_quota_keeps_ranks_from_staging_more_and_metrics_go_on(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.fail(faults.answer(503, b"the store is away"), on=UPLOADS)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(3_000_000))
    script = """
        import sys, time, pathlib, mlflow_relay, json
        with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
            for index in range(3):
                run.log_artifact(pathlib.Path(sys.argv[1]) / "large", f"{index}")
                run.log_metric("a", index, step=index)
                time.sleep(1.0)
    """
    settings = {"spool_bytes_max": "5MB", "artifact_wait_s": "0"}
    with Node(tmp_path / "node", mlflow_proxy.uri, settings=settings) as node:
        node.start()
        finish([node.rank(script, folder)])
        run = wait_until(lambda: (r := node.run())["status"] == "FINISHED" and r, "the run ended")
        assert run["delivered_points"] == 3
        assert [line["where"] for line in ledger(node, run["run_id"])] == ["copy", "place", "place"]
        assert node.status()["disk"]["staged_bytes"] == 3_000_000
        mlflow_proxy.heal()
        run = node.wait_until_ended()
        assert set(files_in(stored(mlflow_server, run))) == {"0/large", "1/large", "2/large"}


def test_uploads_keep_to_the_rate_that_they_are_given(tmp_path, mlflow_server):
    """2 MB at 1 MB/s take a second at least: the first piece goes at once, the rest must wait."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "5.bin").write_bytes(bytes(2 << 20))
    settings = {"artifact_bytes_per_s": str(1 << 20)}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        script = """
            import sys, pathlib, mlflow_relay
            with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
                run.log_artifact(pathlib.Path(sys.argv[1]) / "5.bin")
        """
        begin_s = time.monotonic()
        finish([node.rank(script, folder)])
        node.wait_until_ended()
        assert time.monotonic() - begin_s > 1.0


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_ten_thousand_small_artifacts(tmp_path, mlflow_server):
    with Node(tmp_path, mlflow_server.uri) as node:
        node.start()
        script = LOGS_AND_WAITS.replace("sys.stdin.readline()", "")
        run_id = last_json(finish([node.rank(script, tmp_path, 10_000)], 300)[0])
        run = node.wait_until_ended(run_id, 500)
        found = files_in(stored(mlflow_server, run))
        assert found == {f"many/{i}.txt": f"text {i}".encode() for i in range(10_000)}
        assert staged(node) == []
        print(node.status()["daemon"])


CHECKPOINT = """
    import sys, pathlib, mlflow_relay, json, time
    with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
        run.log_metric("tick", 0, step=0)
        while run.mlflow_run_id is None:
            time.sleep(0.05)
        begin_s = time.perf_counter()
        run.log_artifact(sys.argv[1], "checkpoints")
        call_s = time.perf_counter() - begin_s
        pathlib.Path(sys.argv[1]).unlink()
        print(json.dumps({"run_id": run.run_id, "call_s": call_s}), flush=True)
        step = 0
        while not pathlib.Path(sys.argv[2]).exists():
            step += 1
            run.log_metric("tick", time.time(), step=step)
            time.sleep(0.1)
"""


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_a_checkpoint_of_two_gigabytes(tmp_path, mlflow_server):
    """Figures are printed: how long the call took, how late metrics were, what memory it took."""
    source, done = tmp_path / "model.ckpt", tmp_path / "done"
    block = os.urandom(16 << 20)
    with source.open("wb") as file:
        for index in range(128):
            file.write(index.to_bytes(8, "little") + block[8:])
    wanted = sha256(source)
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = node.rank(CHECKPOINT, source, done)
        assert rank.stdout is not None
        told = json.loads(rank.stdout.readline())
        run_id = told["run_id"]
        memory, lags_s = [], []

        def look() -> dict[str, Any]:
            status = node.status()
            memory.append(status["daemon"]["memory_bytes"])
            (run,) = status["runs"]
            points = mlflow_server.all_points(run["mlflow_run_id"])
            newest_s = max(value for _, value, _, _ in points)
            if newest_s:
                lags_s.append(time.time() - newest_s)
            return run

        wait_until(lambda: look()["artifacts"]["sent_bytes"] > 500 << 20, "in the middle", 300)
        node.kill()
        node.start()
        meanwhile_s = sorted(lags_s)
        wait_until(lambda: look()["artifacts"]["uploaded"] == 1, "it is there", 600)
        done.touch()
        rank.communicate(timeout=60)
        run = node.wait_until_ended(run_id)
        assert sha256(stored(mlflow_server, run) / "checkpoints" / "model.ckpt") == wanted
        (end,) = [line for line in ledger(node, run_id) if "end" in line]
        assert end["sha256"] == wanted
        assert staged(node) == []
        middle_s, most_s = meanwhile_s[len(meanwhile_s) // 2], meanwhile_s[-1]
        print(
            f"call {1000 * told['call_s']:.1f} ms; metrics late by {middle_s:.2f} s (median), "
            f"{most_s:.2f} s (most), after the kill {max(lags_s):.2f} s (most); "
            f"memory at most {max(memory) / 1e6:.0f} MB"
        )
        assert max(memory) < 120e6


MANY_VERSIONS = """
    import sys, random, time, mlflow_relay, json
    rng, last = random.Random(int(sys.argv[2])), {}
    with mlflow_relay.start_run("artifacts", run_key=sys.argv[1]) as run:
        for index in range(400):
            name = f"{rng.randrange(40)}.txt"
            last[name] = f"{index} " + "x" * rng.choice([1, 1000, 100_000])
            run.log_text(last[name], name)
            time.sleep(0.02)
    print(json.dumps({"run_id": run.run_id, "last": {n: len(t) for n, t in last.items()},
                      "index": {n: t.split()[0] for n, t in last.items()}}))
"""


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_kills_of_the_daemon_at_any_moment_leave_the_last_version_of_each_file(
    tmp_path, mlflow_server
):
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    with Node(tmp_path, mlflow_server.uri, settings={"artifact_uploads": "4"}) as node:
        node.start()
        rank = node.rank(MANY_VERSIONS, tmp_path, seed)
        kills = 0
        while rank.poll() is None:
            time.sleep(rng.uniform(0.1, 1.5))
            node.kill()
            node.start()
            kills += 1
        told = last_json(finish([rank])[0])
        run = node.wait_until_ended(told["run_id"])
        found = files_in(stored(mlflow_server, run))
        assert {name: len(data) for name, data in found.items()} == told["last"]
        assert {n: data.split()[0].decode() for n, data in found.items()} == told["index"]
        assert staged(node) == []
        assert kills >= 5
        print(f"{kills} kills")
