"""The operator's commands: what they print, how they end, and what they say when things are wrong.

The daemon at the other end of the control client is a real ZeroMQ socket with our own answers.
"""

from __future__ import annotations

import copy
import fcntl
import importlib
import inspect
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
import pytest
import zmq
from click.testing import CliRunner, Result
from rich.cells import cell_len

from mlflow_relay._version import __version__
from mlflow_relay.messages import CONTROL, REPLY, pack_map, unpack_map
from mlflow_relay_daemon import exits, settings_file
from mlflow_relay_daemon.cli import COMMANDS, cli
from mlflow_relay_daemon.commands import _select, check, flush, status, url
from mlflow_relay_daemon.config import SETTINGS
from mlflow_relay_daemon.control_client import ControlClient, DaemonRefused, NoDaemon
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.words import age_text, bytes_text, count_text, one_line

NOW_MS = 1_790_000_000_000
ID_A, ID_B, ID_C = "aaaa1111" * 4, "aaaa2222" * 4, "cccc3333" * 4


# --- fixed status objects ---------------------------------------------------------------------


def a_run(run_id: str = ID_A, **changes: Any) -> dict[str, Any]:
    run = {
        "run_id": run_id, "run_key": f"key-{run_id[:4]}", "experiment_name": "aifs",
        "run_name": "o96", "mlflow_run_id": "f" * 24 + run_id[:8], "experiment_id": "1",
        "state": "running", "status": "RUNNING", "ranks_alive": 8, "ranks_seen": 8,
        "world_size": 8, "accepted_records": 1_234_567, "delivered_records": 1_234_000,
        "settled_records": 1_234_000, "delivered_points": 12_340_000, "waiting_records": 567,
        "waiting_bytes": 340_000, "journal_records": 0, "oldest_waiting_ms": NOW_MS - 3000,
        "dead_letters": 0, "lost_records": 0, "damaged_records": 0, "last_error": None,
        "start_ms": NOW_MS - 7_200_000, "end_ms": None, "url": None,
        "artifacts": {"accepted": 0, "settled_to": 0, "waiting": 0, "waiting_bytes": 0,
                      "uploaded": 0, "uploaded_bytes": 0, "replaced": 0, "refused": 0,
                      "sending": 0, "sent_bytes": 0, "last_error": None},
    }  # fmt: skip
    return {**run, **changes}


def a_status(*runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {
        "schema_version": 1,
        "time_ms": NOW_MS,
        "daemon": {
            "pid": 4321, "version": __version__, "started_ms": NOW_MS - 10_800_000,
            "spool": "/var/spool/relay", "socket": "/run/relay.sock",
            "tracking_uri": "http://mlflow:5000", "offline": False, "memory_bytes": 62_000_000,
            "cpu_s": 12.5, "sessions_open": 8, "accepts_ranks": True,
        },
        "server": {"state": "up", "since_ms": NOW_MS - 3_600_000, "last_error": None,
                   "next_try_ms": None},
        "disk": {"spool_bytes": 1_200_000_000, "staged_bytes": 0, "spool_bytes_max": None,
                 "free_bytes": 120_000_000_000, "free_bytes_min": 256_000_000, "full": False},
        "counters": {"bad_messages": 0, "fsync_failures": 0, "quarantined_files": 0,
                     "damaged_records": 0, "resent_frames": 0},
        "runs": list(runs),
    }  # fmt: skip
    return {**found, **changes}


DOWN = {
    "state": "down", "since_ms": NOW_MS - 180_000, "last_error": "connection refused",
    "next_try_ms": NOW_MS + 12_000,
}  # fmt: skip


# --- a daemon of our own ----------------------------------------------------------------------


class FakeDaemon:
    """A ROUTER socket that answers control commands from a table, in a thread."""

    def __init__(
        self, socket: Path, set_up: Callable[[FakeDaemon], object] = lambda _: None
    ) -> None:
        self.socket = socket
        self.answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "ping": lambda _: {"pid": 4321, "version": __version__}
        }
        self.asked: list[dict[str, Any]] = []
        self.silent = False
        self.raw_reply: list[bytes] | None = None
        set_up(self)
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"ipc://{socket}")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def shows(self, shown: dict[str, Any]) -> None:
        self.answers["status"] = lambda _: {"status": copy.deepcopy(shown)}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._router.close(linger=0)
        self._context.term()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            identity, kind, payload = self._router.recv_multipart()
            assert kind == CONTROL
            request = unpack_map(payload)
            self.asked.append(request)
            if self.silent:
                continue
            reply = self.raw_reply or [REPLY, pack_map(self._answer(request))]
            self._router.send_multipart([identity, *reply])

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["command"] not in self.answers:
            return {"ok": False, "error": f"no command {request['command']}"}
        return {"ok": True, **self.answers[request["command"]](request)}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="relay-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of these tests find nothing of this machine; returns the socket they use."""
    for variable in [v for v in os.environ if v.startswith("MLFLOW_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(settings_file, "SYSTEM_FILE", folder / "etc.toml")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_RELAY_SPOOL", str(folder / "spool"))
    monkeypatch.setenv("MLFLOW_RELAY_SOCKET", str(folder / "relay.sock"))
    return folder / "relay.sock"


@pytest.fixture
def daemon(place: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(place)
    yield fake
    fake.close()


# Since 8.2 click always keeps stdout and stderr apart.
APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


def relay(*args: str, code: int = 0, stdin: str | None = None) -> Result:
    """Run a command in this process and check its exit code."""
    result = CliRunner(**APART).invoke(cli, args, input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


def spawn(*args: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    command = [sys.executable, "-m", "mlflow_relay_daemon", *args]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{**pipes, **options})


def run(*args: str, **options: Any) -> tuple[int, str, str]:
    process = spawn(*args, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def plain(shown: dict[str, Any], width: int | None) -> list[str]:
    return [line.plain for line in status.status_lines(shown, width)]


# --- status: print ----------------------------------------------------------------------------


def test_status_says_in_words_how_daemon_server_and_disk_are() -> None:
    text = "\n".join(plain(a_status(a_run()), None))
    assert "up for 3 h, 8 ranks attached, 62 MB memory" in text
    assert "http://mlflow:5000 up for 1 h" in text
    assert "1.2 GB in the spool, 120 GB free" in text


def test_status_says_why_the_server_is_down_and_when_the_next_try_is() -> None:
    text = "\n".join(plain(a_status(a_run(), server=DOWN), None))
    assert "down for 3 min: connection refused; next try in 12 s" in text


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({**DOWN, "state": "unknown"}, "not tried yet"),
        ({**DOWN, "state": "offline"}, "`mlflow-relay sync`"),
        ({**DOWN, "last_error": None, "next_try_ms": None}, "down for 3 min: no reason known"),
        (None, "there is no daemon"),
    ],
)
def test_status_knows_every_state_of_the_server(server: Any, words: str) -> None:
    assert words in "\n".join(plain(a_status(server=server), None))


def test_status_has_one_line_per_run_with_all_that_is_asked_for() -> None:
    run = a_run(dead_letters=3, last_error="400 INVALID_PARAMETER_VALUE")
    lines = plain(a_status(run, a_run(ID_B, run_name="n320")), None)
    first = next(line for line in lines if line.startswith("o96"))
    assert first.split() == [
        "o96", "aaaa1111", "running", "8/8", "1.23M", "1.23M", "567", "340", "KB", "3", "s", "3",
        "400", "INVALID_PARAMETER_VALUE",
    ]  # fmt: skip
    assert sum("aaaa2222" in line for line in lines) == 1


def test_an_ended_run_shows_how_it_ended() -> None:
    run = a_run(state="ended", status="FAILED", waiting_records=0, oldest_waiting_ms=None)
    line = next(line for line in plain(a_status(run), None) if line.startswith("o96"))
    assert "failed" in line
    assert line.split()[6:] == ["-", "-", "0"]


def test_records_still_in_the_ranks_journals_count_as_waiting() -> None:
    run = a_run(waiting_records=500, journal_records=67)
    assert any(" 567 " in line for line in plain(a_status(run), None))


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    runs = [
        a_run(run_name="n" * 300, last_error="e" * 500, dead_letters=99_999),
        a_run(ID_B, run_name="訓練" * 50, last_error="word " * 100, state="blocked"),
        a_run(ID_C, run_name=None, ranks_alive=1000, ranks_seen=1024, world_size=1024,
              accepted_records=10**12, waiting_records=10**11, waiting_bytes=10**14),
    ]  # fmt: skip
    shown = a_status(*runs, server={**DOWN, "last_error": "x" * 300})
    for line in plain(shown, width):
        assert cell_len(line) <= width, line
    # The ids are there to be copied: whatever is cut, they are not (but on a very narrow screen).
    if width >= 80:
        assert sum("aaaa1111" in line for line in plain(shown, width)) >= 1


def test_at_80_columns_the_errors_stand_below_the_table() -> None:
    run = a_run(last_error="409: database is locked")
    lines = plain(a_status(run), 80)
    assert "- o96 aaaa1111: 409: database is locked" in lines
    assert not any(line.startswith("- ") for line in plain(a_status(run), 120))


def test_nothing_is_cut_in_a_pipe() -> None:
    run = a_run(run_name="n" * 300, last_error="e" * 500)
    assert any("n" * 300 in line and "e" * 500 in line for line in plain(a_status(run), None))


def test_escape_sequences_of_names_and_errors_do_not_reach_the_terminal() -> None:
    evil = "\x1b]0;owned\x07[red]x\n\x9b31m"
    run = a_run(run_name=evil, last_error=evil, state="blocked")
    shown = a_status(run, server={**DOWN, "last_error": evil})
    for width in (None, 80, 120):
        for line in plain(shown, width):
            assert line.isprintable()


def test_status_without_runs_says_so() -> None:
    assert "no runs" in plain(a_status(), 80)


# --- status: judge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dead_letters": 1}, "`mlflow-relay dead-letters list --run aaaa1111`"),
        ({"state": "blocked", "last_error": "403 forbidden"}, "blocked: 403 forbidden"),
        ({"lost_records": 2}, "2 records lost"),
        ({"damaged_records": 1}, "1 record damaged"),
    ],
)
def test_a_run_that_needs_a_person_degrades_and_says_what_to_do(
    change: dict[str, Any], words: str, daemon: FakeDaemon
) -> None:
    daemon.shows(a_status(a_run(**change)))
    assert words in relay("status", code=1).output
    relay("status", "--json", code=1)


@pytest.mark.parametrize(
    "change",
    [
        {"server": DOWN},
        {"disk": {**a_status()["disk"], "full": True}},
        {"daemon": {**a_status()["daemon"], "accepts_ranks": False}},
        {"counters": {**a_status()["counters"], "fsync_failures": 1}},
        {"counters": {**a_status()["counters"], "quarantined_files": 1}},
    ],
)
def test_a_node_that_needs_a_person_degrades(change: dict[str, Any]) -> None:
    (trouble,) = status.troubles(a_status(a_run(), **change))
    assert ": " in trouble


@pytest.mark.parametrize(
    "shown",
    [
        a_status(),
        a_status(a_run(), a_run(ID_B, state="ended", status="FAILED")),
        a_status(a_run(last_error="503, tried again")),
        a_status(server={**DOWN, "state": "offline"}),
        a_status(server={**DOWN, "state": "unknown"}),
        a_status(daemon=None, server=None),
    ],
)
def test_waiting_failing_training_and_passing_errors_are_no_trouble(shown: dict[str, Any]) -> None:
    assert status.troubles(shown) == []


# --- status: the command ----------------------------------------------------------------------


def test_status_json_is_the_daemons_object_and_nothing_else(daemon: FakeDaemon) -> None:
    shown = a_status(a_run())
    daemon.shows(shown)
    result = relay("status", "--json")
    assert json.loads(result.stdout) == shown
    assert next(iter(json.loads(result.stdout))) == "schema_version"
    assert result.stderr == ""


def test_status_of_one_run_shows_that_run(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run(), a_run(ID_B, run_name="n320"), a_run(ID_C, dead_letters=1)))
    result = relay("status", "--json", "--run", "n320", "--run", "aaaa1")
    assert [r["run_id"] for r in json.loads(result.stdout)["runs"]] == [ID_B, ID_A]


def test_json_has_no_bare_nan(daemon: FakeDaemon) -> None:
    letter = a_letter(value=float("nan"))
    daemon.answers["dead_letters"] = lambda _: {"dead_letters": [letter]}
    output = relay("dead-letters", "list", "--json").stdout
    assert json.loads(output, parse_constant=pytest.fail)["dead_letters"][0]["value"] == "NaN"


def test_status_without_a_daemon_reads_the_spool_and_says_so(folder: Path) -> None:
    result = relay("status")
    assert "no daemon answers" in result.stderr
    assert f"the spool {folder}/spool holds" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "daemon  not running" in result.stdout
    shown = json.loads(relay("status", "--json").stdout)
    assert (shown["schema_version"], shown["daemon"], shown["server"]) == (1, None, None)


def test_watching_repeats_until_it_is_interrupted_and_ends_quietly(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run()))
    with spawn("status", "--watch", "0.1", "--json") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert [json.loads(line)["schema_version"] for line in lines] == [1, 1, 1]
    assert (process.returncode, err) == (130, "")


def test_watching_in_a_pipe_prints_the_table_again_and_again(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run()))
    with spawn("status", "--watch", "0.1") as process:
        assert process.stdout is not None
        seen = 0
        while seen < 3:
            seen += "aaaa1111" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def on_a_terminal(args: list[str], until: str, columns: int = 80) -> tuple[str, int]:
    """Run a command on a pseudo-terminal until it prints something; then Ctrl+C."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    process = spawn(*args, **streams, env={**environ, "TERM": "xterm"})
    os.close(slave)
    seen = ""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            seen += os.read(master, 65536).decode("utf-8", "replace")
        except OSError:  # the process has ended
            break
        if until in seen and process.poll() is None:
            process.send_signal(signal.SIGINT)
            until = "\0"
    process.wait(timeout=20)
    os.close(master)
    return seen, process.returncode


def test_a_terminal_gets_colours_and_lines_that_fit(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run(run_name="n" * 200)))
    seen, code = on_a_terminal(["status"], until="\0")
    assert code == 0
    assert "\x1b[32mrunning" in seen
    for line in re.sub(r"\x1b\[[0-9;]*m", "", seen).splitlines():
        assert cell_len(line) <= 80, line


def test_watching_on_a_terminal_ends_with_ctrl_c(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run()))
    seen, code = on_a_terminal(["status", "--watch"], until="aaaa1111")
    assert code == 130
    assert "Traceback" not in seen


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9999"), (12_345, "12.3k"), (999_999, "1000k"), (1_234_567, "1.23M"),
     (5 * 10**9, "5.00G"), (10**12, "1000G")],
)  # fmt: skip
def test_counts_are_short(number: int, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (340_000_000, "340 MB"), (1_200_000_000, "1.2 GB")]
)
def test_sizes_are_decimal(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("age_ms", "text"),
    [(-5, "0 s"), (59_999, "59 s"), (60_000, "1 min"), (7_200_000, "2 h"), (10**9, "11 d")],
)
def test_ages_have_one_unit(age_ms: int, text: str) -> None:
    assert age_text(age_ms) == text


def test_text_of_others_is_brought_onto_one_line() -> None:
    assert one_line("a\n b\x1b[31m\tc\r\n") == "a b [31m c"


# --- which run --------------------------------------------------------------------------------

RUNS = [a_run(ID_A), a_run(ID_B, run_name="n320"), a_run(ID_C, run_name="aaaa")]


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        (ID_A, ID_A),
        ("aaaa1", ID_A),
        ("AAAA1111", ID_A),
        ("n320", ID_B),
        ("cccc", ID_C),
        ("f" * 24 + "cccc3", ID_C),
        ("aaaa2222-aaaa-2222-aaaa-2222aaaa2222", ID_B),
    ],
)
def test_a_run_is_found_by_prefix_of_either_id_or_by_name(name: str, run_id: str) -> None:
    assert _select.select_run(RUNS, name)["run_id"] == run_id


def test_an_ambiguous_name_lists_the_candidates() -> None:
    # "aaaa" begins two ids and is the name of a third run.
    with pytest.raises(CommandError) as caught:
        _select.select_run(RUNS, "aaaa")
    for run_id in (ID_A, ID_B, ID_C):
        assert run_id[:12] in str(caught.value)
    assert caught.value.exit_code == exits.USAGE


def test_many_candidates_are_not_all_listed() -> None:
    runs = [a_run(f"{i:032x}") for i in range(50)]
    with pytest.raises(CommandError, match="and 44 more: give more of the id"):
        _select.select_run(runs, "0000")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zzzz", "mlflow-relay runs"),
        ("aaa", "4 characters"),
        ("", "4 characters"),
        ("o9", "4 characters"),
    ],
)
def test_no_such_run_says_where_to_look(name: str, words: str) -> None:
    with pytest.raises(CommandError, match=words) as caught:
        _select.select_run(RUNS, name)
    assert caught.value.exit_code == exits.USAGE


def test_a_run_named_twice_is_taken_once() -> None:
    assert len(_select.select_runs(RUNS, ["aaaa1", ID_A])) == 1


# --- flush ------------------------------------------------------------------------------------


class Delivering:
    """Answers of a daemon that settles more with every status it is asked for."""

    def __init__(self, daemon: FakeDaemon, *steps: dict[str, Any], target: int = 100) -> None:
        self._steps = list(steps)
        daemon.answers["status"] = self._status
        daemon.answers["flush"] = lambda request: {
            "targets": dict.fromkeys(request["runs"] or [ID_A], target)
        }

    def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        return {"status": step}


def settled(count: int, **changes: Any) -> dict[str, Any]:
    return a_status(a_run(settled_records=count, **changes))


def test_flush_waits_until_all_is_settled(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10), settled(10), settled(60), settled(100))
    result = relay("flush")
    assert result.stdout.startswith("90 records settled in ")
    assert [request["command"] for request in daemon.asked] == [
        "status", "flush", "status", "status", "status",
    ]  # fmt: skip


def test_flush_names_the_runs_by_their_full_ids(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(100))
    assert "nothing to flush" in relay("flush", "aaaa1").stdout
    assert next(r for r in daemon.asked if r["command"] == "flush")["runs"] == [ID_A]


def test_flush_does_not_wait_for_what_came_after_it(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10), settled(5000, accepted_records=10_000))
    assert relay("flush").stdout.startswith("90 records settled")


def test_flush_says_per_run_what_is_left_when_time_runs_out(daemon: FakeDaemon) -> None:
    stuck = {**settled(10), "server": DOWN}
    Delivering(daemon, stuck)
    result = relay("flush", "--timeout", "0.3", code=75)
    assert "left: o96 aaaa1111: 90 records: the server is down: connection refused" in result.stdout
    assert "nothing is lost" in result.stdout


def test_flush_with_no_time_at_all_still_tries(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10))
    relay("flush", "--timeout", "0", code=75)
    assert "flush" in [request["command"] for request in daemon.asked]


def test_flush_fails_when_mlflow_refused_something(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10, dead_letters=4), settled(100, dead_letters=6))
    assert "MLflow refused 2 records" in relay("flush", code=1).stdout


def test_dead_letters_of_last_week_do_not_fail_todays_flush(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10, dead_letters=4), settled(100, dead_letters=4))
    relay("flush")


def test_flush_does_not_wait_for_a_blocked_run_but_gives_it_a_try(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10, state="blocked", last_error="403: not yours"))
    started_s = time.monotonic()
    result = relay("flush", "--timeout", "60", code=1)
    assert "90 records: blocked: 403: not yours" in result.stdout
    assert flush.BLOCKED_GRACE_S <= time.monotonic() - started_s < 30


def test_flush_of_an_offline_daemon_says_how_to_deliver(daemon: FakeDaemon) -> None:
    Delivering(daemon, {**settled(10), "server": {**DOWN, "state": "offline"}})
    result = relay("flush", "--timeout", "60", code=75)
    assert "mlflow-relay sync" in result.stdout


def test_flush_without_a_daemon_says_so() -> None:
    result = relay("flush", code=69)
    assert result.stderr.startswith("mlflow-relay: no daemon answers at ")
    assert result.stderr.count("\n") == 1


def test_flush_outlives_a_restart_of_the_daemon(daemon: FakeDaemon, place: Path) -> None:
    Delivering(daemon, settled(10))
    others: list[FakeDaemon] = []

    def restart() -> None:
        time.sleep(0.5)
        daemon.close()
        time.sleep(0.5)
        others.append(FakeDaemon(place, lambda new: Delivering(new, settled(100))))

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        assert relay("flush", "--timeout", "60").stdout.startswith("90 records settled")
    finally:
        thread.join()
        others[0].close()
        daemon._context = zmq.Context()  # the fixture closes it once more


def test_a_run_that_vanishes_is_not_taken_for_delivered() -> None:
    progress = flush.measure(settled(10), a_status(), {ID_A: 100})
    assert progress.left == {ID_A: 90}
    assert flush.exit_code(progress) == 75
    lines = flush.outcome_lines(a_status(), progress, 1.0)
    assert any("does not know this run" in line for line in lines)


def test_flush_shows_a_bar_on_a_terminal(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10), *[settled(10 + i) for i in range(8)], settled(100))
    seen, code = on_a_terminal(["flush"], until="\0")
    assert code == 0
    assert "/90" in seen
    assert "90 records settled" in seen


# --- runs, url --------------------------------------------------------------------------------


def test_runs_lists_the_newest_first(daemon: FakeDaemon) -> None:
    old = a_run(ID_B, run_name="old", start_ms=NOW_MS - 10**8, end_ms=NOW_MS, state="ended")
    daemon.shows(a_status(old, a_run()))
    lines = relay("runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RUN", "aaaa1111", "aaaa2222"]
    full = relay("runs", "--full-ids").stdout
    assert ID_A in full
    body = json.loads(relay("runs", "--json").stdout)
    assert body["schema_version"] == 1
    assert [r["run_id"] for r in body["runs"]] == [ID_A, ID_B]


def test_runs_works_without_a_daemon() -> None:
    result = relay("runs")
    assert result.stdout == "no runs\n"
    assert "no daemon answers" in result.stderr


def test_the_page_of_one_run(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run()))
    expected = f"http://mlflow:5000/#/experiments/1/runs/{'f' * 24}aaaa1111\n"
    assert relay("url", "o96").stdout == expected
    daemon.shows(a_status(a_run(url="https://pages/run")))
    assert relay("url", "o96").stdout == "https://pages/run\n"
    assert relay("url", "o96", "--base", "https://ui").stdout.startswith("https://ui/#/exp")


def test_the_compare_page_of_several_runs_is_what_mlflows_pages_read() -> None:
    runs = [a_run(ID_A), a_run(ID_B, experiment_id="2"), a_run(ID_C)]
    page = url.page_url("https://host/mlflow/", runs)
    assert page.startswith("https://host/mlflow/#/compare-runs?runs=%5B%22")
    query = parse_qs(urlsplit(urlsplit(page).fragment).query)
    assert json.loads(query["runs"][0]) == [r["mlflow_run_id"] for r in runs]
    assert json.loads(query["experiments"][0]) == ["1", "2"]
    assert " " not in page


def test_a_page_never_shows_a_password() -> None:
    assert url.pages_root("https://ann:hunter2@host:5000/x/") == "https://host:5000/x"


@pytest.mark.parametrize("base", ["sqlite:////x/mlflow.db", "databricks", "./mlruns", "http://"])
def test_a_store_without_pages_says_what_to_start(base: str) -> None:
    with pytest.raises(CommandError, match="mlflow server"):
        url.page_url(base, [a_run()])


def test_a_run_that_mlflow_does_not_have_yet_has_no_page() -> None:
    with pytest.raises(CommandError, match="o96 aaaa1111 is not in MLflow yet"):
        url.page_url("http://host", [a_run(mlflow_run_id=None, experiment_id=None)])


# --- dead letters -----------------------------------------------------------------------------


def a_letter(**changes: Any) -> dict[str, Any]:
    letter = {
        "id": 1, "run_id": ID_A, "kind": "param", "key": "lr", "value": "0.1",
        "timestamp_ms": NOW_MS, "step": None, "reason": "changed value\nfor param",
        "error_code": "INVALID_PARAMETER_VALUE", "refused_ms": NOW_MS,
    }  # fmt: skip
    return {**letter, **changes}


@pytest.fixture
def letters(daemon: FakeDaemon) -> list[dict[str, Any]]:
    """Three letters of two runs, and a daemon that counts what it is told to do."""
    all_letters = [a_letter(), a_letter(id=2, key="bs"), a_letter(run_id=ID_B)]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["action"] == "list":
            mine = [x for x in all_letters if request["run"] in (None, x["run_id"])]
            return {"dead_letters": mine}
        return {"count": len(request["ids"])}

    daemon.answers["dead_letters"] = answer
    daemon.shows(a_status(a_run(), a_run(ID_B, run_name="n320")))
    return all_letters


def acted(daemon: FakeDaemon, action: str) -> list[tuple[str, list[int]]]:
    return [(r["run"], r["ids"]) for r in daemon.asked if r.get("action") == action]


def test_dead_letters_are_listed_with_the_reason(letters: list[dict[str, Any]]) -> None:
    lines = relay("dead-letters", "list").stdout.splitlines()
    assert len(lines) == 4
    assert "INVALID_PARAMETER_VALUE changed value for param" in lines[1]
    body = json.loads(relay("dead-letters", "list", "--json", "--run", "o96").stdout)
    assert body == {"schema_version": 1, "dead_letters": letters[:2]}


def test_no_dead_letters_is_said(daemon: FakeDaemon) -> None:
    daemon.answers["dead_letters"] = lambda _: {"dead_letters": []}
    assert relay("dead-letters", "list").stdout == "no dead letters\n"
    assert relay("dead-letters", "drop", "--yes").stdout == "no dead letters\n"


@pytest.mark.usefixtures("letters")
def test_retry_offers_the_chosen_ones_again(daemon: FakeDaemon) -> None:
    assert relay("dead-letters", "retry", "--run", "o96").stdout.startswith(
        "2 records delivered, 0"
    )
    assert acted(daemon, "retry") == [(ID_A, [1, 2])]
    assert (
        json.loads(relay("dead-letters", "retry", "--run", "n320", "--id", "1", "--json").stdout)[
            "count"
        ]
        == 1
    )
    assert acted(daemon, "retry")[1:] == [(ID_B, [1])]


@pytest.mark.usefixtures("letters")
def test_drop_needs_a_yes(daemon: FakeDaemon) -> None:
    assert "--yes" in relay("dead-letters", "drop", code=64).stderr
    assert acted(daemon, "drop") == []
    assert relay("dead-letters", "drop", "--yes").stdout == "3 records dropped\n"
    assert acted(daemon, "drop") == [(ID_A, [1, 2]), (ID_B, [1])]


@pytest.mark.usefixtures("letters")
def test_an_unknown_letter_is_a_usage_error() -> None:
    text = relay("dead-letters", "drop", "--run", "o96", "--id", "99", code=64).stderr
    assert "no dead letter has the id '99'" in text


@pytest.mark.usefixtures("letters")
def test_an_id_alone_could_mean_several_letters_and_drops_none(daemon: FakeDaemon) -> None:
    assert "--run" in relay("dead-letters", "drop", "--id", "1", "--yes", code=64).stderr
    assert acted(daemon, "drop") == []


def test_dead_letters_without_a_daemon_say_so() -> None:
    relay("dead-letters", "list", code=69)


# --- check ------------------------------------------------------------------------------------


def findings(output: str) -> dict[str, str]:
    return {line[6:14].strip(): line for line in output.splitlines()}


def test_check_of_a_fresh_node_is_fine_and_makes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = findings(relay("check").stdout)
    assert list(found) == [
        "config",
        "runtime",
        "spool",
        "disk",
        "lock",
        "daemon",
        "server",
        "secrets",
        "group",
        "http",
        "logout",
    ]
    assert found["daemon"].startswith("warn")
    assert "`mlflow-relay daemon`" in found["daemon"]
    assert "ms per fdatasync" in found["spool"]
    assert sorted(folder.rglob("*")) == before


def test_check_names_the_holder_of_the_spool(folder: Path) -> None:
    file = folder / "spool" / check.LOCK_NAME
    file.parent.mkdir()
    file.touch()
    assert findings(relay("check").stdout)["lock"] == "ok    lock    free"
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        found = findings(relay("check").stdout)["lock"]
        other.kill()
    assert found.endswith(f"held by the daemon with pid {other.pid}")
    assert findings(relay("check").stdout)["lock"] == "ok    lock    free"


def test_check_finds_the_daemon(daemon: FakeDaemon) -> None:
    assert f"pid 4321, version {__version__}" in findings(relay("check").stdout)["daemon"]
    daemon.answers["ping"] = lambda _: {"pid": 1, "version": "0.0.1"}
    assert findings(relay("check").stdout)["daemon"].startswith("warn")


def test_check_fails_on_a_server_that_is_not_there() -> None:
    found = findings(relay("check", "--tracking-uri", "http://127.0.0.1:9", code=1).stdout)
    assert found["server"].startswith("FAIL")
    assert "refused" in found["server"]


def test_check_fails_on_a_runtime_folder_that_everyone_may_write(folder: Path) -> None:
    folder.chmod(0o777)
    found = findings(relay("check", code=1).stdout)
    assert found["runtime"].startswith("FAIL")
    assert f"chmod 700 {folder}" in found["runtime"]


def test_check_fails_below_the_floor_of_free_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RELAY_FREE_BYTES_MIN", "900TB")
    assert findings(relay("check", code=1).stdout)["disk"].startswith("FAIL")


def test_check_warns_of_a_spool_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if check._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm")
    monkeypatch.setenv("MLFLOW_RELAY_SPOOL", "/dev/shm/relay-spool-that-is-not-made")
    assert "gone after a reboot" in findings(relay("check").stdout)["spool"]


def test_check_warns_of_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RELAY_SPOOL_BYTE_MAX", "1GB")
    assert "did you mean MLFLOW_RELAY_SPOOL_BYTES_MAX?" in relay("check").stdout


def test_check_warns_of_exposed_secrets_and_shows_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "http://ann:hunter2@127.0.0.1:9"
    output = relay("check", "--tracking-uri", uri, code=1).output
    assert "list of processes" in output
    assert "hunter2" not in output
    assert "hunter2" not in relay("check", "--settings", "--tracking-uri", uri).output
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    assert findings(relay("check").stdout)["secrets"].endswith("MLFLOW_TRACKING_TOKEN")
    file = folder / ".mlflow" / "credentials"
    file.parent.mkdir()
    file.touch(mode=0o644)
    file.chmod(0o644)
    assert f"chmod 600 {file}" in relay("check").stdout


def test_check_prints_json() -> None:
    body = json.loads(relay("check", "--json").stdout)
    assert body["schema_version"] == 1
    assert {tuple(finding) for finding in body["checks"]} == {("name", "state", "text", "mend")}
    settings = json.loads(relay("check", "--settings", "--json").stdout)["settings"]
    assert set(settings) == set(SETTINGS)


def test_check_with_a_bad_configuration_says_which_line(folder: Path) -> None:
    file = folder / "bad.toml"
    file.write_text("spol = 1\n")
    result = relay("check", "--config", str(file), code=78)
    assert result.stderr == f"mlflow-relay: {file}: spol is no setting: did you mean spool?\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_fails_on_a_spool_that_is_not_ours(folder: Path) -> None:
    (folder / "spool").mkdir(mode=0o500)
    assert findings(relay("check", code=1).stdout)["spool"].startswith("FAIL")


# --- the daemon command -----------------------------------------------------------------------


def test_the_daemon_command_refuses_a_rank_s_relay_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "relay://")
    assert "MLFLOW_RELAY_TRACKING_URI" in relay("daemon", code=78).stderr


def test_the_daemon_command_refuses_a_bad_flag_by_its_name() -> None:
    text = relay("daemon", "--delivery-threads", "0", code=78).stderr
    assert text.startswith("mlflow-relay: flag --delivery-threads: delivery_threads = '0'")


# --- the control client -----------------------------------------------------------------------


def test_the_client_asks_and_understands(daemon: FakeDaemon) -> None:
    with ControlClient(daemon.socket) as client:
        assert client.ping()["pid"] == 4321
        with pytest.raises(DaemonRefused, match="no command nonsense"):
            client.ask("nonsense")
        assert client.ping()["pid"] == 4321


def test_a_missing_socket_is_noticed_at_once(place: Path) -> None:
    started_s = time.monotonic()
    with ControlClient(place) as client, pytest.raises(NoDaemon, match="mlflow-relay daemon"):
        client.ping()
    assert time.monotonic() - started_s < 2


def test_the_socket_of_a_dead_daemon_is_noticed_at_once(daemon: FakeDaemon, place: Path) -> None:
    stale = place.with_name("stale.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    assert stat.S_ISSOCK(stale.stat().st_mode)
    with ControlClient(stale) as client, pytest.raises(NoDaemon, match="no daemon answers"):
        client.ping()


def test_a_daemon_that_does_not_answer_is_told_from_one_that_is_not_there(
    daemon: FakeDaemon,
) -> None:
    daemon.silent = True
    with ControlClient(daemon.socket, timeout_s=0.2) as client:
        with pytest.raises(NoDaemon, match=r"did not answer within 0\.2 s"):
            client.ping()
        daemon.silent = False
        assert client.ping()["pid"] == 4321


def test_a_late_answer_is_not_taken_for_that_to_the_next_question(daemon: FakeDaemon) -> None:
    def answer_late(_: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.7)
        return {"which": "slow"}

    daemon.answers["slow"] = answer_late
    with ControlClient(daemon.socket, timeout_s=0.5) as client:
        with pytest.raises(NoDaemon):
            client.ask("slow")
        assert "which" not in client.ping()


@pytest.mark.parametrize(
    "reply",
    [
        [b"?"],
        [REPLY],
        [REPLY, b"\xc1"],
        [REPLY, b"\x01"],
        [REPLY, b"\x81\xa1v\x63"],
        [b"?", b"", b""],
    ],
)
def test_an_answer_of_another_version_says_what_to_do(
    daemon: FakeDaemon, reply: list[bytes]
) -> None:
    daemon.raw_reply = reply
    with ControlClient(daemon.socket) as client, pytest.raises(DaemonRefused, match="version"):
        client.ping()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect everywhere")
def test_a_socket_of_somebody_else_says_so(daemon: FakeDaemon) -> None:
    daemon.socket.chmod(0)
    with ControlClient(daemon.socket) as client, pytest.raises(NoDaemon, match="closed to this"):
        client.ping()


# --- help, usage, ends ------------------------------------------------------------------------


def load(name: str) -> click.Command:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself_its_options_and_an_example(name: str) -> None:
    command = load(name)
    inner = command.commands.items() if isinstance(command, click.Group) else ()
    for path, each in [((name,), command), *(((name, n), c) for n, c in inner)]:
        output = relay(*path, "--help").output
        assert each.help
        assert f"Example:\n    mlflow-relay {name}" in output
        for option in (p for p in each.params if isinstance(p, click.Option)):
            assert option.help, f"{path} {option.opts}"
            assert option.opts[0] in output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_overview_says_what_the_command_says(name: str) -> None:
    assert COMMANDS[name][1] == (load(name).help or "").partition("\n")[0]
    assert COMMANDS[name][1] in relay("--help").output


def test_every_setting_with_a_flag_is_an_option_of_the_daemon() -> None:
    output = relay("daemon", "--help").output
    for setting in SETTINGS.values():
        if setting.flag:
            assert f"{setting.flag} " in output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["stauts"], "did you mean status?"),
        (["status", "--jsn"], "--json"),
        (["status", "--watch", "often"], "--watch"),
        (["flush", "--timeout", "soon"], "--timeout"),
        (["flush", "--timeout", "-1"], "--timeout"),
        (["url"], "RUN"),
        (["status", "extra"], "extra"),
        (["dead-letters", "burn"], "burn"),
    ],
)
def test_a_usage_error_is_one_line_that_helps_and_64(args: list[str], words: str) -> None:
    result = relay(*args, code=64)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert "--help`" in result.stderr


@pytest.mark.parametrize("args", [[], ["dead-letters"]])
def test_a_group_without_a_command_shows_its_help(args: list[str]) -> None:
    result = relay(*args, code=64)
    assert result.stdout == ""
    assert "Commands:" in result.stderr


def test_a_spool_that_cannot_be_read_is_an_error_of_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_spool(spool: Path) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", str(spool))

    fake = types.ModuleType("mlflow_relay_daemon.status")
    fake.read_spool = read_spool  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow_relay_daemon.status", fake)
    text = relay("status", code=1).stderr
    assert f"the spool {folder}/spool cannot be read: Permission denied" in text
    assert text.count("\n") == 1


def test_the_version_is_the_packages() -> None:
    assert run("--version") == (0, f"mlflow-relay {__version__}\n", "")


def test_status_imports_neither_mlflow_nor_the_daemon(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(a_run()))
    code = (
        "import sys\n"
        "from mlflow_relay_daemon.cli import cli\n"
        "try: cli.main(['status'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'mlflow', 'urllib3', 'orjson', 'tenacity', 'psutil', 'sqlalchemy', 'rich.live',"
        " 'mlflow_relay_daemon.service', 'mlflow_relay_daemon.commands.flush'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def environ_with(modules: Path) -> dict[str, str]:
    """Return an environment in which these modules hide others of the same names."""
    return {**os.environ, "PYTHONPATH": f"{modules}:{os.environ.get('PYTHONPATH', '')}"}


def test_without_the_daemon_extra_it_says_what_to_install(folder: Path) -> None:
    (folder / "click.py").write_text("raise ModuleNotFoundError('no click', name='click')\n")
    code, out, err = run("status", env=environ_with(folder))
    assert (code, out) == (78, "")
    assert err.count("\n") == 1
    assert "pip install 'mlflow-relay[daemon]'" in err


def test_a_part_of_the_extra_that_is_needed_later_is_named_too(folder: Path) -> None:
    (folder / "urllib3.py").write_text("raise ModuleNotFoundError('no urllib3', name='urllib3')\n")
    address = "http://127.0.0.1:9"
    code, _, err = run("check", "--tracking-uri", address, env=environ_with(folder))
    assert code == 78
    assert "needs urllib3" in err


def test_an_unexpected_error_is_one_line_unless_a_traceback_is_wanted(daemon: FakeDaemon) -> None:
    daemon.answers["status"] = lambda _: {"status": {"runs": [{}]}}
    code, out, err = run("status")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "unexpected KeyError" in err
    assert "--debug" in err
    assert "Traceback" in run("--debug", "status")[2]
    assert "Traceback" in run("status", env={**os.environ, "MLFLOW_RELAY_DEBUG": "1"})[2]


def test_a_reader_that_leaves_early_is_no_error(daemon: FakeDaemon) -> None:
    daemon.shows(a_status(*[a_run(f"{i:032x}", run_name="r" * 200) for i in range(2000)]))
    command = f"{sys.executable} -m mlflow_relay_daemon runs | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line_and_a_failure(
    daemon: FakeDaemon, unbuffered: str
) -> None:
    daemon.shows(a_status(a_run()))
    with Path("/dev/full").open("w") as full:
        code, _, err = run("runs", stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert code == 1
    assert err.count("\n") == 1
    assert "No space left" in err


def test_ctrl_c_while_waiting_ends_quietly(daemon: FakeDaemon) -> None:
    Delivering(daemon, settled(10))
    with spawn("flush") as process:
        while not any(request["command"] == "flush" for request in daemon.asked):
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
