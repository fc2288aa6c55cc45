"""The calls that make artifacts: what is staged, what is recorded, what is refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as plotly
import pytest
import yaml

import mlflow_relay
from mlflow_relay.records import (
    Artifact,
    Tags,
    pack_artifact,
    unpack_record,
)
from mlflow_relay.run import Run
from mlflow_relay.values import ARTIFACT_PATH_BYTES_MAX, check_artifact_path
from tests.support.fake_daemon import FakeDaemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with (
        tempfile.TemporaryDirectory(prefix="relay-run-", dir="/dev/shm") as path,
        FakeDaemon(Path(path) / "relay.sock") as daemon,
    ):
        yield daemon


@pytest.fixture
def run(daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "SLURM_", "OMPI_", "PMI")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_RELAY_STAGING", str(tmp_path / "staging"))
    with mlflow_relay.start_run(
        socket=daemon.socket, run_key=str(tmp_path), rank=0, world_size=1
    ) as run:
        yield run


class Logged:
    """What a run has recorded, by artifact path."""

    def __init__(self, daemon: FakeDaemon, run: Run) -> None:
        run.end()
        self.records = [each for session in daemon.kept for each in daemon.records(session)]
        artifacts = [each for each in self.records if isinstance(each, Artifact)]
        self.order = [each.path for each in artifacts]
        self.by_path = {each.path: each for each in artifacts}
        self.lost = next(iter(daemon.detached.values()))

    def content(self, path: str) -> bytes:
        return Path(os.fsdecode(self.by_path[path].file)).read_bytes()

    def tags(self) -> dict[str, str]:
        return {
            k: v for each in self.records if isinstance(each, Tags) for k, v in each.items.items()
        }


def test_a_file_goes_to_the_root_or_into_a_folder_and_is_safe_when_the_call_returns(
    run, daemon, tmp_path
):
    file = tmp_path / "config.yaml"
    file.write_text("a: 1")
    run.log_artifact(file)
    run.log_artifact(str(file), "deep/folder")
    file.unlink()
    logged = Logged(daemon, run)
    assert logged.order == ["config.yaml", "deep/folder/config.yaml"]
    assert logged.content("config.yaml") == logged.content("deep/folder/config.yaml") == b"a: 1"
    staged = Path(os.fsdecode(logged.by_path["config.yaml"].file))
    assert staged.parent == tmp_path / "staging" / run.run_id
    assert len({each.id for each in logged.by_path.values()}) == 2


def test_a_folder_is_logged_as_mlflow_does(run, daemon, tmp_path):
    tree = tmp_path / "tree"
    names = [
        "a.txt",
        "sub/with space.txt",
        "sub/ünïcode 日本.txt",
        "sub/deeper/100%.txt",
        ".hidden",
    ]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "empty").mkdir()
    run.log_artifact(tree)  # a folder under its own name
    run.log_artifacts(tree, "there")
    run.log_artifacts(tree)
    logged = Logged(daemon, run)
    wanted = {prefix + name for name in names for prefix in ("tree/", "there/", "")}
    assert set(logged.order) == wanted
    assert all(logged.content(path).decode() in path for path in wanted)


def test_what_cannot_be_taken_of_a_folder_is_named_and_counted_and_stops_nothing(
    run, daemon, tmp_path, caplog
):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "good").write_text("good")
    os.mkfifo(tree / "fifo")
    (tree / "dangling").symlink_to("nowhere")
    (Path(os.fsdecode(os.fsencode(tree) + b"/not utf-8 \xff"))).write_text("name")
    run.log_artifacts(tree)
    logged = Logged(daemon, run)
    assert logged.order == ["good"]
    assert logged.lost == 3
    for word in ("fifo", "dangling", "not utf-8"):
        assert word in caplog.text


def test_a_wrong_argument_raises_at_the_call(run, daemon, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.log_artifact(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="FIFO"):
        run.log_artifact(tmp_path / "fifo")
    with pytest.raises(ValueError, match="FIFO"):
        run.log_artifact(tmp_path / "fifo", copy=False)
    with pytest.raises(NotADirectoryError):
        run.log_artifacts(tmp_path / "file")
    with pytest.raises(ValueError, match="plain relative path"):
        run.log_artifact(tmp_path / "file", "../up")
    with pytest.raises(ValueError, match="plain relative path"):
        run.log_text("x", "/etc/passwd")
    with pytest.raises(TypeError, match="text"):
        run.log_text(b"x", "a.txt")
    assert Logged(daemon, run).order == []


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b"])
def test_an_artifact_path_is_plain(path):
    with pytest.raises(ValueError, match="artifact path"):
        check_artifact_path(path)


def test_an_artifact_path_has_a_length_that_stores_take():
    check_artifact_path("ü" * 127 + "/" + "a" * 255)
    for path in ("ü" * 128, "a" * 256, "/".join(["a" * 200] * 5)):
        with pytest.raises(ValueError, match="bytes"):
            check_artifact_path(path)
    assert ARTIFACT_PATH_BYTES_MAX == 800


def test_a_file_stays_where_it_is_if_that_is_wished(run, daemon, tmp_path, monkeypatch):
    (tmp_path / "huge").write_bytes(b"x" * 3_000_000)
    monkeypatch.chdir(tmp_path)
    run.log_artifact("huge", copy=False)
    logged = Logged(daemon, run)
    assert logged.by_path["huge"].file == os.fsencode(tmp_path / "huge")
    assert logged.by_path["huge"].where == "place"
    assert not (tmp_path / "staging").exists()


def test_where_there_is_no_room_files_stay_and_content_is_counted_as_lost(
    run, daemon, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("content")
    (tmp_path / "no folder").write_text("a file stands where the folder should be")
    monkeypatch.setenv("MLFLOW_RELAY_STAGING", str(tmp_path / "no folder" / "staging"))
    run.log_text("lost", "text.txt")
    (tmp_path / "staging").mkdir(mode=0o777)
    (tmp_path / "staging").chmod(0o777)
    monkeypatch.setenv("MLFLOW_RELAY_STAGING", str(tmp_path / "staging"))
    run.log_artifact(tmp_path / "file")
    run.log_text("lost too", "text.txt")
    logged = Logged(daemon, run)
    assert {path: each.where for path, each in logged.by_path.items()} == {"file": "place"}
    assert logged.lost == 2
    assert "no room for a copy" in caplog.text


def test_a_run_that_has_ended_takes_no_file_and_keeps_none(run, tmp_path):
    run.end()
    with pytest.raises(mlflow_relay.RelayError, match="has ended"):
        run.log_text("late", "late.txt")
    assert list((tmp_path / "staging" / run.run_id).iterdir()) == []


def test_a_record_comes_back_as_it_was():
    artifact = Artifact(7, "a/b", "0f" * 16, "copy", b"/x/\xff", 3, -4, b"0" * 16)
    assert unpack_record(pack_artifact(artifact)) == artifact


# ── content ──


def test_text_and_dicts(run, daemon):
    run.log_text("grüße\n", "notes/a.txt")
    run.log_dict({"a": [1, np.float32(0.5)], "path": Path("/x")}, "d.json")
    run.log_dict({"b": {"c": "ü"}}, "d.yaml")
    run.log_dict([1, 2], "no ending")
    logged = Logged(daemon, run)
    assert logged.content("notes/a.txt").decode() == "grüße\n"
    assert json.loads(logged.content("d.json")) == {"a": [1, 0.5], "path": "/x"}
    assert yaml.safe_load(logged.content("d.yaml")) == {"b": {"c": "ü"}}
    assert json.loads(logged.content("no ending")) == [1, 2]


def test_a_figure_of_matplotlib_or_plotly(run, daemon):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    run.log_figure(figure, "a.png")
    run.log_figure(figure, "a.svg", save_kwargs={"dpi": 50})
    run.log_figure(plotly.Figure(), "p.html")
    with pytest.raises(TypeError, match="plotly"):
        run.log_figure(plotly.Figure(), "p.txt")
    with pytest.raises(TypeError, match="no figure"):
        run.log_figure("a picture", "p.png")
    logged = Logged(daemon, run)
    assert logged.content("a.png").startswith(b"\x89PNG")
    assert b"<svg" in logged.content("a.svg")
    assert b"plotly" in logged.content("p.html")


def test_an_image_as_a_file_and_as_a_point_of_a_series(run, daemon):
    from PIL import Image

    run.log_image(np.zeros((300, 600, 3), np.uint8), "black.png")
    run.log_image(Image.new("L", (4, 4)), key="val/sample", step=3, timestamp=5)
    run.log_image(np.full((2, 2), 7.0), "beyond one.png")
    logged = Logged(daemon, run)
    assert logged.content("black.png").startswith(b"\x89PNG")
    series = sorted(path for path in logged.order if path.startswith("images/"))
    small, full = series
    assert full.startswith("images/val~sample+step+3+timestamp+5+")
    assert full.endswith(".png")
    assert small == full.removesuffix(".png") + "+compressed.webp"
    assert logged.tags()["mlflow.loggedImages"] == "True"


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ("text", {"artifact_file": "a.png"}),
        (np.zeros(3), {"artifact_file": "a.png"}),
        (np.zeros((2, 2, 5)), {"artifact_file": "a.png"}),
        (np.full((2, 2), 300), {"artifact_file": "a.png"}),
        (np.zeros((2, 2)), {"artifact_file": "a.nothing"}),
        (np.zeros((2, 2)), {"key": "a,b"}),
        (np.zeros((2, 2)), {}),
        (np.zeros((2, 2)), {"artifact_file": "a.png", "key": "k"}),
        (np.zeros((2, 2)), {"artifact_file": "a.png", "step": 1}),
    ],
)
def test_what_is_no_image_raises(run, image: Any, options: dict[str, Any]):
    with pytest.raises((TypeError, ValueError)):
        run.log_image(image, **options)


def test_a_table_grows_from_call_to_call_and_is_what_mlflow_writes(run, daemon, tmp_path):
    import pandas as pd

    run.log_table({"q": ["a", "b"], "score": [1, np.float64(0.5)]}, "t.json")
    run.log_table(pd.DataFrame({"q": ["c"], "more": [True]}), "t.json")
    run.log_table({"only": "one row"}, "other.json")
    run.log_table(pd.DataFrame({"x": [1.5]}), "t.parquet")
    logged = Logged(daemon, run)
    assert json.loads(logged.content("t.json")) == {
        "columns": ["q", "score", "more"],
        "data": [["a", 1, None], ["b", 0.5, None], ["c", None, True]],
    }
    assert json.loads(logged.content("other.json")) == {"columns": ["only"], "data": [["one row"]]}
    (tmp_path / "t.parquet").write_bytes(logged.content("t.parquet"))
    assert pd.read_parquet(tmp_path / "t.parquet").to_dict("list") == {"x": [1.5]}
    tables = json.loads(logged.tags()["mlflow.loggedArtifacts"])
    assert {"path": "t.json", "type": "table"} in tables
    assert len(tables) == 3


@pytest.mark.parametrize(
    ("data", "file"), [({"a": [1], "b": [1, 2]}, "t.json"), ([1], "t.json"), ({"a": [1]}, "t.csv")]
)
def test_what_is_no_table_raises_and_leaves_the_table_as_it_was(run, daemon, data, file):
    run.log_table({"a": [0]}, "t.json")
    with pytest.raises((TypeError, ValueError)):
        run.log_table(data, file)
    run.log_table({"a": [1]}, "t.json")
    assert json.loads(Logged(daemon, run).content("t.json"))["data"] == [[0], [1]]


def test_the_module_functions_act_on_the_active_run(run, daemon, tmp_path):
    (tmp_path / "f").write_text("f")
    mlflow_relay.log_artifact(tmp_path / "f")
    mlflow_relay.log_artifacts(tmp_path, "all", copy=False)
    mlflow_relay.log_text("t", "t.txt")
    mlflow_relay.log_dict({}, "d.json")
    mlflow_relay.log_table({"a": [1]}, "t.json")
    mlflow_relay.log_image(np.zeros((2, 2)), "i.png")
    from matplotlib.figure import Figure

    mlflow_relay.log_figure(Figure(), "g.png")
    assert {"f", "all/f", "t.txt", "d.json", "t.json", "i.png", "g.png"} <= set(
        Logged(daemon, run).order
    )


def test_a_forked_child_stages_and_logs_in_a_session_of_its_own(run, daemon):
    run.log_text("parent", "p.txt")
    pid = os.fork()
    if pid == 0:
        run.log_text("child", "c.txt")
        run.end()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    run.log_text("parent again", "q.txt")
    logged = Logged(daemon, run)
    assert logged.content("c.txt") == b"child"
    assert {"p.txt", "q.txt"} <= set(logged.order)
