"""Run: what a rank's calls become, at a daemon's door."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlflow_relay
from mlflow_relay import messages
from mlflow_relay.errors import RelayError
from mlflow_relay.frames import HEADER_BYTES, iter_entries
from mlflow_relay.journal_files import salvage_entries
from mlflow_relay.launch import relay_run_id
from mlflow_relay.records import End, Metrics, Params, Record, Reduce, Tags, unpack_record
from mlflow_relay.run import Run, start_run
from mlflow_relay.sender import State
from tests.support.relay import wait_until

KEYS = itertools.count()


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no settings but a test's own."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_RELAY_TERMINAL", "none")  # this process is pytest's


@pytest.fixture
def start(socket: Path) -> Iterator[Callable[..., Run]]:
    """Start runs; at the end each is ended, also where a test fails."""
    runs: list[Run] = []

    def new(**options: Any) -> Run:
        runs.append(start_run(**{"socket": socket, "end_timeout_s": 30.0, **options}))
        return runs[-1]

    yield new
    for run in runs:
        run._end_timeout_s = 0.1
        run.end()
        session = run._session
        if session is not None and not session.sender.over.is_set():
            session.sender.over.set()
            session.sender.wake()
            session.sender.join(30)
            session.journal.close(unlink=True)


def new_key() -> str:
    return f"key {os.getpid()} {next(KEYS)}"


def metrics_of(records: list[Record]) -> list[tuple[str, int, float]]:
    """Return all points as (key, step, value), in order."""
    return [
        (key, step, value)
        for record in records
        if isinstance(record, Metrics)
        for key, step, value in zip(record.keys, record.steps, record.values, strict=True)
    ]


def texts_of(records: list[Record], kind: type[Params | Tags]) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in records:
        if isinstance(record, kind):
            found.update(record.items)
    return found


def end_of(records: list[Record]) -> End:
    (end,) = [record for record in records if isinstance(record, End)]
    assert records[-1] == end
    return end


# ── the start ──


def test_the_run_id_is_known_at_once_and_is_that_of_the_key(start):
    key = new_key()
    run = start(run_key=key)

    assert run.mlflow_run_id is None
    assert len(run.run_id) == 32
    assert run.run_id in {relay_run_id(key, ordinal) for ordinal in range(1, 10_000)}


def test_all_ranks_of_one_key_have_one_run(socket):
    script = """
        import sys, mlflow_relay
        run = mlflow_relay.start_run(run_key="one key", rank=int(sys.argv[2]), world_size=3,
                                     socket=sys.argv[1], end_timeout_s=0)
        second = mlflow_relay.start_run(run_key="one key", rank=int(sys.argv[2]), world_size=3,
                                        socket=sys.argv[1], end_timeout_s=0)
        print(run.run_id, second.run_id)
    """
    said = {run_python(script, socket, rank).stdout for rank in range(3)}

    assert said == {f"{relay_run_id('one key', 1)} {relay_run_id('one key', 2)}\n"}


def test_the_card_tells_the_daemon_what_it_must_know(daemon, start):
    before_ms = time.time_ns() // 1_000_000
    run = start(experiment_name="aifs", run_name="o96", run_key="job 7", rank=2, world_size=4)
    daemon.wait_for(messages.ATTACH)
    card = daemon.only_card()

    assert card["run_id"] == run.run_id
    assert card["run_key"].startswith("job 7")
    assert (card["experiment_name"], card["run_name"]) == ("aifs", "o96")
    assert (card["rank"], card["world_size"]) == (run.rank, run.world_size) == (2, 4)
    assert card["node"] == os.uname().nodename
    assert card["primary"] is True
    assert before_ms <= card["start_ms"] <= time.time_ns() // 1_000_000
    assert all(type(text) is str for pair in card["tags"].items() for text in pair)


def test_names_come_from_the_argument_then_the_environment_then_a_default(
    daemon, start, monkeypatch
):
    start(run_key=new_key())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from env")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "name from env")
    start(run_key=new_key())
    start(run_key=new_key(), experiment_name="given", run_name="name given")
    wait_until(lambda: len(daemon.cards) == 3, "all attached")

    names = {(card["experiment_name"], card["run_name"]) for card in daemon.cards.values()}
    assert names == {("Default", ""), ("from env", "name from env"), ("given", "name given")}


def test_params_and_tags_of_the_start_are_logged_first(daemon, start):
    run = start(run_key=new_key(), params={"lr": 0.1}, tags={"team": "ens"})
    run.log_metric("loss", 1.0, step=0)
    run.end()

    kinds = [type(record) for record in daemon.records()]
    assert kinds == [Params, Tags, Metrics, End]
    assert texts_of(daemon.records(), Params) == {"lr": "0.1"}
    assert texts_of(daemon.records(), Tags) == {"team": "ens"}


def test_a_wrong_param_at_the_start_raises_and_leaves_no_run_open(daemon, socket):
    with pytest.raises(TypeError, match="param key 5"):
        start_run(run_key=new_key(), params={5: "x"}, socket=socket)  # type: ignore[dict-item]

    assert mlflow_relay.active_run() is None
    end = end_of(daemon.records())
    assert end.status == "FAILED"
    assert "param key 5" in end.reason


WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank_metrics": ({"rank_metrics": "some"}, "prefix, zero, all"),
    "experiment_name": ({"experiment_name": 5}, "experiment_name"),
    "run_name": ({"run_name": 5}, "run_name"),
    "long experiment_name": ({"experiment_name": "x" * 3000}, "experiment_name"),
    "long run_name": ({"run_name": "x" * 3000}, "run_name"),
    "experiment_name with half a character": ({"experiment_name": "a\ud800"}, "experiment_name"),
    "rank": ({"rank": 4, "world_size": 4}, "rank=4"),
    "negative rank": ({"rank": -1, "world_size": 4}, "rank=-1"),
    "journal_bytes_max": ({"journal_bytes_max": -5}, "journal_bytes_max"),
    "journal_bytes_max as text": ({"journal_bytes_max": "1e6"}, "journal_bytes_max"),
    "end_timeout_s": ({"end_timeout_s": -1.0}, "end_timeout_s"),
    "end_timeout_s as text": ({"end_timeout_s": "5"}, "end_timeout_s"),
}


@pytest.mark.parametrize(("options", "named"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_a_wrong_argument_of_the_start_raises_and_is_named(start, options, named):
    """A daemon would refuse the session, and nobody in training would ever hear of it."""
    with pytest.raises((TypeError, ValueError, RelayError)) as refusal:
        start(**{"run_key": new_key(), **options})

    assert named in str(refusal.value)


@pytest.mark.parametrize("mode", ["prefix", "zero", "all"])
def test_a_value_for_reduction_has_its_plain_key_whatever_ranks_log_otherwise(daemon, start, mode):
    run = start(run_key=new_key(), rank=1, world_size=2, rank_metrics=mode)
    run.log_metrics({"loss": np.float32(0.5), "lr": 1}, step=3, reduce="mean")
    daemon.wait_for_records(1)
    (record,) = [each for each in daemon.records() if isinstance(each, Reduce)]
    assert (record.how, record.step, record.keys) == ("mean", 3, ["loss", "lr"])
    assert record.values == (0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step": None, "reduce": "mean"}, "reduce='mean' needs a step"),
        ({"step": 1, "reduce": "median"}, "reduce='median': one of mean, sum, min, max"),
        ({"step": 1.5, "reduce": "sum"}, "step 1.5"),
        ({"step": 1, "reduce": "sum", "metrics": {"loss": "x"}}, "metric 'loss'"),
    ],
)
def test_what_cannot_be_reduced_raises_at_the_call(daemon, start, arguments, named):
    run = start(run_key=new_key())
    with pytest.raises((TypeError, ValueError), match=re.escape(named)):
        run.log_metrics(**{"metrics": {"loss": 1.0}, **arguments})


def test_news_of_the_mlflow_run_id_reach_the_run(daemon, start):
    run = start(run_key=new_key())
    daemon.wait_for(messages.ATTACH)
    (session,) = daemon.cards
    news = {"session": session, "mlflow_run_id": "0123456789abcdef"}
    daemon.say(session, messages.NEWS, messages.pack_map(news))
    wait_until(lambda: run.mlflow_run_id, "told")

    assert run.mlflow_run_id == "0123456789abcdef"


# ── metrics ──


def test_metrics_arrive_with_step_value_and_the_time_of_the_call(daemon, start):
    run = start(run_key=new_key())
    before_ms = time.time_ns() // 1_000_000
    run.log_metrics({"loss": 0.5, "lr": np.float32(0.25)}, step=7)
    after_ms = time.time_ns() // 1_000_000
    run.log_metric("nan", math.nan, step=8)
    run.end()

    records = daemon.records()
    first = records[0]
    assert isinstance(first, Metrics)
    assert before_ms <= first.timestamp_ms <= after_ms
    points = metrics_of(records)
    assert points[:2] == [("loss", 7, 0.5), ("lr", 7, 0.25)]
    assert points[2][:2] == ("nan", 8)
    assert math.isnan(points[2][2])


def test_without_a_step_each_key_counts_for_itself(daemon, start):
    run = start(run_key=new_key())
    run.log_metric("a", 1.0)
    run.log_metrics({"a": 2.0, "b": 3.0})
    run.log_metric("b", 4.0, step=100)  # a step of one's own does not count
    run.log_metrics({"b": 5.0, "a": 6.0})
    run.end()

    assert metrics_of(daemon.records()) == [
        ("a", 0, 1.0),
        ("a", 1, 2.0),
        ("b", 0, 3.0),
        ("b", 100, 4.0),
        ("b", 1, 5.0),
        ("a", 2, 6.0),
    ]


@pytest.mark.parametrize(
    ("mode", "rank", "expected"),
    [
        ("prefix", 0, ["loss", "val/loss"]),
        ("prefix", 1, ["rank_1/loss", "rank_1/val/loss"]),
        ("zero", 0, ["loss", "val/loss"]),
        ("zero", 1, []),
        ("all", 0, ["loss", "val/loss"]),
        ("all", 1, ["loss", "val/loss"]),
    ],
)
def test_ranks_log_under_the_keys_of_their_mode(daemon, start, mode, rank, expected):
    run = start(run_key=new_key(), rank=rank, world_size=2, rank_metrics=mode)
    run.log_metric("loss", 1.0, step=0)
    run.log_metrics({"val/loss": 2.0})
    run.log_param("lr", 1)
    run.set_tag("team", "ens")
    run.end()

    records = daemon.records()
    assert [key for key, _, _ in metrics_of(records)] == expected
    assert texts_of(records, Params) == {"lr": "1"}  # of every rank, in every mode
    assert texts_of(records, Tags) == {"team": "ens"}


@pytest.mark.parametrize("step", [None, 3])
def test_ten_thousand_metrics_in_a_call_arrive_all(daemon, start, step):
    run = start(run_key=new_key())
    metrics = {f"channel_{index}": float(index) for index in range(10_000)}
    run.log_metrics(metrics, step)
    run.end()

    expected = [(key, step or 0, value) for key, value in metrics.items()]
    assert metrics_of(daemon.records()) == expected
    assert all(
        len(record.keys) <= 1000 for record in daemon.records() if isinstance(record, Metrics)
    )


def test_no_metrics_are_no_call(daemon, start):
    run = start(run_key=new_key())
    run.log_metrics({}, step=1)
    run.log_params({})
    run.set_tags({})
    run.end()

    assert [type(record) for record in daemon.records()] == [End]


@pytest.mark.parametrize("step", [None, 3])
def test_a_wrong_metric_raises_at_the_call_and_its_neighbours_in_time_arrive(daemon, start, step):
    run = start(run_key=new_key())
    run.log_metric("before", 1.0, step)
    with pytest.raises(TypeError, match="'guilty'.*'text'"):
        run.log_metrics({"fine": 1.0, "guilty": "text"}, step)
    with pytest.raises(ValueError, match="key is empty"):
        run.log_metric("", 1.0, step)
    run.log_metric("behind", 2.0, step)
    run.end()

    expected = [("before", step or 0, 1.0), ("behind", step or 0, 2.0)]
    assert metrics_of(daemon.records()) == expected


def test_threads_log_side_by_side_and_each_keeps_its_order(daemon, start):
    run = start(run_key=new_key())

    def log(name: str) -> None:
        for step in range(500):
            run.log_metric(name, float(step), step)

    threads = [threading.Thread(target=log, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.end()

    points = metrics_of(daemon.records())
    assert len(points) == 2000
    for name in "abcd":
        assert [step for key, step, _ in points if key == name] == list(range(500))


# ── params and tags ──


def test_texts_are_what_str_says(daemon, start):
    run = start(run_key=new_key())
    run.log_params({"lr": 0.1, "none": None, "list": [1, 2], "empty": "", "ü": "ß"})
    run.log_param("path", Path("/a/b"))
    run.set_tags({"flag": True})
    run.set_tag("flag", False)
    run.end()

    assert texts_of(daemon.records(), Params) == {
        "lr": "0.1",
        "none": "None",
        "list": "[1, 2]",
        "empty": "",
        "ü": "ß",
        "path": "/a/b",
    }
    assert texts_of(daemon.records(), Tags) == {"flag": "False"}


@pytest.mark.parametrize(
    ("items", "error", "text"),
    [
        ({5: "x"}, TypeError, "key 5 is a int"),
        ({"": "x"}, ValueError, "key is empty"),
        ({"k\ud800": "x"}, ValueError, "lone surrogate at position 1"),
        ({"k": "x\udfff"}, ValueError, "'k': its value"),
        ({"k": "x" * 600_000}, ValueError, "write it to a file"),
    ],
)
@pytest.mark.parametrize("what", ["param", "tag"])
def test_a_wrong_text_raises_at_the_call_and_nothing_of_the_call_is_kept(
    daemon, start, what, items, error, text
):
    run = start(run_key=new_key())
    with pytest.raises(error, match=rf"^{what} .*{text}"):
        (run.log_params if what == "param" else run.set_tags)({"fine": "x", **items})
    run.end()

    assert [type(record) for record in daemon.records()] == [End]


def test_many_params_are_cut_into_records_that_mlflow_takes_whole(daemon, start):
    run = start(run_key=new_key())
    params = {f"p{index}": str(index) for index in range(250)}
    run.log_params(params)
    run.end()

    records = [record for record in daemon.records() if isinstance(record, Params)]
    assert [len(record.items) for record in records] == [100, 100, 50]
    assert texts_of(daemon.records(), Params) == params


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.log_params({f"p{index}": "x" * 500_000 for index in range(9)}),
        lambda run: run.log_params({f"p{index}": "x" * 500_000 for index in range(99)}),
        lambda run: run.log_params({f"p{index}": "\U0001f9ea" * 500_000 for index in range(3)}),
        lambda run: run.set_tags({f"{index}" * 60_000: "x" for index in range(99)}),
        lambda run: run.log_metrics({f"{index:05}" * 1200: 1.0 for index in range(999)}, step=1),
        lambda run: run.log_metrics({f"{index:05}" * 1200: 1.0 for index in range(999)}),
        lambda run: run.log_metric("k" * 9_000_000, 1.0, step=1),
        lambda run: run.log_param("k" * 9_000_000, 1.0),
    ],
    ids=[
        "9 long params",
        "99 long params",
        "3 params of 2 MB",
        "long tag keys",
        "6 MB of keys",
        "6 MB of keys without a step",
        "a key of 9 MB",
        "a param key of 9 MB",
    ],
)
def test_a_large_call_raises_or_arrives_and_stops_nobody_behind_it(daemon, start, call):
    """What no daemon takes must not enter the journal: it would stand before all that follows."""
    run = start(run_key=new_key(), end_timeout_s=4.0)
    refused = False
    try:
        call(run)
    except ValueError:
        refused = True
    run.log_metric("behind", 1.0, step=1)
    run.end()

    assert daemon.bad == []
    assert run._session is not None
    assert run._session.sender.over.is_set(), "the daemon has not taken all"
    records = daemon.records()
    assert ("behind", 1, 1.0) in metrics_of(records)
    assert daemon.detached == {run._session.journal.session: 0}, "lost, and not refused"
    assert refused or len(records) > 2


# ── the end ──


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_end_is_told_with_status_reason_and_time(daemon, start, status):
    run = start(run_key=new_key())
    before_ms = time.time_ns() // 1_000_000
    run.end(status, reason="because")

    end = end_of(daemon.records())
    assert (end.status, end.reason) == (status, "because")
    assert before_ms <= end.timestamp_ms <= time.time_ns() // 1_000_000
    assert mlflow_relay.active_run() is None
    assert repr(run).endswith("ended>")


def test_another_status_is_refused_and_the_run_goes_on(daemon, start):
    run = start(run_key=new_key())
    with pytest.raises(ValueError, match="'RUNNING': one of FINISHED, FAILED, KILLED"):
        run.end("RUNNING")
    run.log_metric("loss", 1.0, step=0)
    run.end()

    assert end_of(daemon.records()).status == "FINISHED"


def test_a_second_end_does_nothing(daemon, start):
    run = start(run_key=new_key())
    run.end("FAILED", reason="first")
    run.end("FINISHED")

    end = end_of(daemon.records())
    assert (end.status, end.reason) == ("FAILED", "first")


def test_many_threads_may_end_a_run_and_it_ends_once(daemon, start):
    run = start(run_key=new_key())
    errors: list[BaseException] = []
    together = threading.Barrier(8)

    def end() -> None:
        together.wait(30)
        try:
            run.end()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    end_of(daemon.records())


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.log_metric("a", 1.0, step=1),
        lambda run: run.log_metrics({"a": 1.0}),
        lambda run: run.log_param("a", 1),
        lambda run: run.set_tags({"a": 1}),
    ],
)
def test_logging_after_the_end_is_an_error_that_says_what_to_do(daemon, start, call):
    run = start(run_key=new_key())
    run.end()
    with pytest.raises(RelayError, match=f"run {run.run_id} has ended: start_run makes a new one"):
        call(run)


def test_threads_that_log_while_the_run_ends_get_the_error_of_a_run_that_has_ended(daemon, start):
    """Either a call returned, and its record is at the daemon, or it raised RelayError."""
    for _ in range(5):
        run = start(run_key=new_key())
        returned = [0] * 4
        others: list[BaseException] = []

        def log(index: int, run: Run = run, returned: list[int] = returned) -> None:
            try:
                while True:
                    run.log_metric(f"thread_{index}", 1.0, step=returned[index])
                    returned[index] += 1
            except RelayError:
                return
            except BaseException as error:
                others.append(error)  # noqa: B023  # read within the same turn

        threads = [threading.Thread(target=log, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(returned), "all log")  # noqa: B023
        run.end()
        for thread in threads:
            thread.join()
        assert run._session is not None
        points = metrics_of(daemon.records(run._session.journal.session))

        assert others == []
        for index, count in enumerate(returned):
            steps = [step for key, step, _ in points if key == f"thread_{index}"]
            assert steps == list(range(count))


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("no such file"), "FAILED", "ValueError: no such file"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: "),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
        (SystemExit(0), "FINISHED", ""),
        (SystemExit(None), "FINISHED", ""),
        (ValueError("half a character \ud800"), "FAILED", "ValueError: half a character ?"),
        (ValueError("x" * 5000), "FAILED", "ValueError: " + "x" * 1988),
    ],
    ids=["error", "ctrl-c", "exit 3", "exit 0", "exit", "surrogate", "long"],
)
def test_an_exception_passes_through_and_is_told(daemon, start, error, status, reason):
    with pytest.raises(type(error)) as passed, start(run_key=new_key()):
        raise error

    assert passed.value is error
    end = end_of(daemon.records())
    assert (end.status, end.reason) == (status, reason)


def test_a_run_that_leaves_its_block_in_peace_is_finished(daemon, start):
    with start(run_key=new_key()) as run:
        assert mlflow_relay.active_run() is run
        mlflow_relay.log_metric("loss", 1.0, step=0)

    assert mlflow_relay.active_run() is None
    assert end_of(daemon.records()) == End(end_of(daemon.records()).timestamp_ms, "FINISHED", "")


def test_what_no_daemon_took_is_said_with_the_place_and_the_command(start, socket, caplog):
    run = start(run_key=new_key())
    run.log_metric("loss", 1.0, step=0)
    run.end()

    (said,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert "2 records" in said
    assert str(socket.parent / "journals") in said
    assert f"mlflow-relay daemon --socket {socket}" in said


def test_the_word_of_the_end_is_kept_where_the_journal_is_full(start, socket):
    """Else a rank that ended well would be taken for one that was killed."""
    run = start(run_key=new_key(), journal_bytes_max=256 << 10)
    session = run._session
    assert session is not None
    step = 0
    while not session.journal.lost:
        run.log_metric("loss", 1.0, step=step)
        step += 1
    run.end("FINISHED", reason="all epochs done")

    assert End in [type(record) for record in left_in_journals(socket)]


def left_in_journals(socket: Path) -> list[Record]:
    records = []
    for path in sorted((socket.parent / "journals").glob("*.entries")):
        session = bytes.fromhex(path.name.partition(".")[0])
        for frame in salvage_entries(path.read_bytes(), session, 0).frames:
            records += [unpack_record(each) for each in iter_entries(frame[HEADER_BYTES:]) if each]
    return records


# ── settings ──


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", "much"),
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", "-1"),
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", "10"),
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", "inf"),
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", "nan"),
        ("MLFLOW_RELAY_JOURNAL_BYTES_MAX", ""),
        ("MLFLOW_RELAY_END_TIMEOUT_S", "soon"),
        ("MLFLOW_RELAY_END_TIMEOUT_S", "-1"),
    ],
)
def test_a_bad_setting_is_refused_by_name_value_and_range(start, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(RelayError, match=f"{name}='{value}': .*at least"):
        start(run_key=new_key(), end_timeout_s=None)


def test_settings_come_from_the_environment_and_arguments_win(start, monkeypatch):
    monkeypatch.setenv("MLFLOW_RELAY_JOURNAL_BYTES_MAX", str(1 << 20))
    monkeypatch.setenv("MLFLOW_RELAY_END_TIMEOUT_S", "0.25")
    told = start(run_key=new_key(), end_timeout_s=None)
    given = start(run_key=new_key(), end_timeout_s=0.5, journal_bytes_max=2 << 20)

    assert (told._end_timeout_s, told._journal_bytes_max) == (0.25, 1 << 20)
    assert (given._end_timeout_s, given._journal_bytes_max) == (0.5, 2 << 20)


def test_the_socket_comes_from_the_environment(monkeypatch, daemon, socket):
    monkeypatch.setenv("MLFLOW_RELAY_SOCKET", str(socket))
    run = start_run(run_key=new_key(), end_timeout_s=30.0)
    run.end()

    end_of(daemon.records())


# ── the process: its exit, its children, its daemon ──


def run_python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Python 3.12 warns of each fork of a process that has threads, as every training does.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


START = """
    import os, sys
    import mlflow_relay
    run = mlflow_relay.start_run(run_key="a key", socket=sys.argv[1], end_timeout_s=30.0)
    run.log_metric("loss", 1.0, step=0)
"""


@pytest.mark.parametrize(
    ("ending", "code", "status", "reason"),
    [
        ("", 0, "FINISHED", ""),
        ("sys.exit(0)", 0, "FINISHED", ""),
        ("raise ValueError('no such file')", 1, "FAILED", "ValueError: no such file"),
        ("raise KeyboardInterrupt", -2, "KILLED", "KeyboardInterrupt: "),
        ("run.end('KILLED', reason='enough')", 0, "KILLED", "enough"),
    ],
    ids=["end of script", "exit 0", "exception", "ctrl-c", "explicit"],
)
def test_the_interpreter_leaves_no_run_without_its_end(
    daemon, socket, ending, code, status, reason
):
    done = run_python(START + "    " + ending, socket)

    assert done.returncode == code, done.stderr
    end = end_of(daemon.records())
    assert (end.status, end.reason) == (status, reason)
    assert metrics_of(daemon.records()) == [("loss", 0, 1.0)]


def test_a_forked_child_that_logs_nothing_says_nothing(daemon, socket):
    done = run_python(
        START
        + """
    child = os.fork()
    if child == 0:
        sys.exit(1)
    os.waitpid(child, 0)
    run.log_metric("loss", 2.0, step=1)
    """,
        socket,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert metrics_of(daemon.records()) == [("loss", 0, 1.0), ("loss", 1, 2.0)]
    assert end_of(daemon.records()).status == "FINISHED"


def test_a_forked_child_that_logs_has_a_session_of_its_own_and_no_say_in_the_end(daemon, socket):
    done = run_python(
        START
        + """
    child = os.fork()
    if child == 0:
        run.log_metric("child", 3.0, step=7)
        run.end("FAILED")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    run.log_metric("loss", 2.0, step=1)
    """,
        socket,
    )

    assert (done.returncode, done.stderr) == (0, "")
    (parent,) = [name for name, card in daemon.cards.items() if card["primary"]]
    (child,) = [name for name, card in daemon.cards.items() if not card["primary"]]
    assert metrics_of(daemon.records(parent)) == [("loss", 0, 1.0), ("loss", 1, 2.0)]
    assert metrics_of(daemon.records(child)) == [("child", 7, 3.0)]
    assert daemon.cards[parent]["run_id"] == daemon.cards[child]["run_id"]
    assert daemon.cards[parent]["pid"] != daemon.cards[child]["pid"]
    assert end_of(daemon.records(parent)).status == "FINISHED"
    assert list((socket.parent / "journals").iterdir()) == []


def test_workers_of_multiprocessing_that_log_lose_nothing_at_their_end(daemon, socket):
    done = run_python(
        START
        + """
    import multiprocessing
    def work(index):
        for step in range(200):
            run.log_metric(f"worker_{index}", float(step), step=step)
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    """,
        socket,
    )

    assert (done.returncode, done.stderr) == (0, "")
    points = [
        point
        for name, card in daemon.cards.items()
        if not card["primary"]
        for point in metrics_of(daemon.records(name))
    ]
    assert sorted(points) == sorted(
        (f"worker_{index}", step, float(step)) for index in (0, 1) for step in range(200)
    )
    assert list((socket.parent / "journals").iterdir()) == []


def test_no_daemon_is_started_unless_asked_for(start, socket, monkeypatch):
    monkeypatch.setenv("MLFLOW_RELAY_AUTOSTART", "0")
    run = start(run_key=new_key())
    session = run._session
    assert session is not None
    sender = session.sender
    wait_until(lambda: sender._seeking_since_s, "a daemon is sought")
    wait_until(lambda: sender._look_at > sender._seeking_since_s + 0.7, "a while")

    assert sorted(path.name for path in socket.parent.iterdir()) == ["journals"]


def test_no_daemon_is_started_where_one_answers(daemon, socket, start):
    start(run_key=new_key(), autostart=True)
    daemon.wait_for(messages.ATTACH)
    daemon.wait_for(messages.ALIVE)

    names = sorted(path.name for path in socket.parent.iterdir())
    assert names == ["journals", "relay.sock"]


def test_a_daemon_that_is_asked_for_is_started_and_takes_the_records(
    socket, start, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_RELAY_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("MLFLOW_RELAY_OFFLINE", "1")
    monkeypatch.setenv("MLFLOW_RELAY_AUTOSTART", "1")
    run = start(run_key=new_key(), autostart=None)
    from mlflow_relay_daemon.control_client import ControlClient, NoDaemon

    def ping() -> int | None:
        try:
            with ControlClient(socket) as control:
                return int(control.ping()["pid"])
        except NoDaemon:
            return None

    pid = wait_until(ping, "a daemon answers")
    assert pid is not None
    session = run._session
    assert session is not None
    try:
        wait_until(lambda: session.sender.state is State.SENDING, "attached")
        run.log_metric("loss", 1.0, step=0)
        run.end()
        assert session.sender.over.is_set()
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)  # it is this process's child
