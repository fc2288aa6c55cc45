"""What ranks print: seen as without us, and kept, however the rank ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.jobs import ended_run, hear, last_words, only_run, start_rank, tell
from tests.support.relay import Node, wait_until

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

    from tests.support import MlflowServer

KEPT = {"MLFLOW_RELAY_TERMINAL": "rank0"}


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        yield node


def artifact(server: MlflowServer, run: MlflowRun, folder: Path, last: str, rank: int = 0) -> str:
    """Return what is kept of a rank's output, once its last line is there."""

    def found() -> str | None:
        client = server.client()
        path = f"terminal/rank_{rank}.txt"
        if path not in [each.path for each in client.list_artifacts(run.info.run_id, "terminal")]:
            return None
        text = Path(client.download_artifacts(run.info.run_id, path, str(folder))).read_text()
        return text if text.rstrip().endswith(last) else None

    return wait_until(found, f"the artifact ends with {last!r}")


PRINTS = """
    import ctypes, subprocess, sys
    from tqdm import tqdm
    run = mlflow_relay.start_run("terminal", run_key=sys.argv[1])
    print("from Python", flush=True)
    print("from Python, to stderr", file=sys.stderr)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", "print('from a child process')"], check=True)
    libc = ctypes.CDLL(None)
    libc.printf(b"from C's printf\\n")
    libc.fflush(None)
    for _ in tqdm(range(int(sys.argv[2])), miniters=1, mininterval=0, ascii=True, ncols=60):
        pass
    libc.printf(b"from C's printf, held back until the end\\n")
    libc.fflush(None)
    print("\\x1b[31mthe last\\x1b[0m line")
    run.end()
    print("after the end")
"""


@pytest.mark.parametrize("updates", [10_000, pytest.param(100_000, marks=pytest.mark.torture)])
def test_all_that_is_printed_is_seen_as_ever_and_kept_with_bars_in_their_last_state(
    node, mlflow_server, tmp_path, updates
) -> None:
    key = f"{updates} updates"
    rank = start_rank(node, PRINTS, key, updates, environ=KEPT)
    seen = last_words(rank)
    assert rank.returncode == 0, seen[-2000:]
    assert seen.count("%|") >= updates, "the bar was seen as it ran"
    assert seen.endswith("after the end\n")
    kept = artifact(mlflow_server, ended_run(node, mlflow_server, key), tmp_path, "line")
    lines = kept.splitlines()
    assert lines[:4] == [
        "from Python",
        "from Python, to stderr",
        "from a child process",
        "from C's printf",
    ]
    assert lines[4].startswith("100%|")
    assert f"{updates}/{updates}" in lines[4]
    assert lines[5:] == ["from C's printf, held back until the end", "the last line"]


ENDS = {
    "os._exit": "os._exit(3)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSEGV": "ctypes.string_at(0)",
    "an exception": "raise RuntimeError('the last words')",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
}


@pytest.mark.parametrize("how", ENDS)
def test_the_last_lines_of_a_rank_are_kept_however_it_ends(
    node, mlflow_server, tmp_path, how
) -> None:
    script = f"""
        import ctypes, faulthandler
        faulthandler.enable()
        run = mlflow_relay.start_run("terminal", run_key=sys.argv[1])
        for step in range(1000):
            os.write(1, b"step %d\\n" % step)
        {ENDS[how]}
    """
    rank = start_rank(node, script, f"ends by {how}", environ=KEPT)
    seen = last_words(rank)
    assert rank.returncode != 0
    run = ended_run(node, mlflow_server, f"ends by {how}")
    last = {"SIGSEGV": seen.rstrip().splitlines()[-1], "an exception": "the last words"}
    kept = artifact(mlflow_server, run, tmp_path, last.get(how, "step 999"))
    assert kept == seen, "what was seen, to the last character"
    assert run.info.status == "FAILED"
    if how == "SIGSEGV":
        assert "Fatal Python error: Segmentation fault" in kept


def test_only_ranks_that_are_asked_for_are_kept(node, mlflow_server, tmp_path) -> None:
    script = """
        rank = int(sys.argv[1])
        run = mlflow_relay.start_run(
            "terminal", run_key="two ranks", rank=rank, world_size=2, terminal=sys.argv[2] or None
        )
        print("I am rank", rank, flush=True)
        run.end()
    """
    for process in [start_rank(node, script, rank, "", environ=KEPT) for rank in range(2)]:
        last_words(process)
    run = ended_run(node, mlflow_server, "two ranks")
    assert artifact(mlflow_server, run, tmp_path, "rank 0") == "I am rank 0\n"
    listed = mlflow_server.client().list_artifacts(run.info.run_id, "terminal")
    assert [each.path for each in listed] == ["terminal/rank_0.txt"]
    last_words(start_rank(node, script, 1, "all", environ=KEPT))
    assert artifact(mlflow_server, run, tmp_path, "rank 1", rank=1) == "I am rank 1\n"


def test_a_terminal_stays_a_terminal_of_the_same_size(node, mlflow_server, tmp_path) -> None:
    script = """
        import mlflow_relay, os, sys, time
        before = os.isatty(1), os.isatty(2), os.get_terminal_size(1)
        run = mlflow_relay.start_run("terminal", run_key="a terminal")
        assert (os.isatty(1), os.isatty(2), os.get_terminal_size(1)) == before
        print(before[2].columns, "columns")
        sys.stdin.readline()
        while os.get_terminal_size(1).columns != 99:
            time.sleep(0.02)
        print("99 columns", file=sys.stderr)
        run.end()
        print("done")
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 77)) if hasattr(termios, "tcsetwinsize") else _resize(
        theirs, 77
    )
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**node.environ, **KEPT},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    )
    try:
        seen = b""
        while b"77 columns" not in seen:
            seen += os.read(ours, 1000)
        _resize(theirs, 99)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        while b"done" not in seen:
            seen += os.read(ours, 1000)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert seen == b"77 columns\r\n99 columns\r\ndone\r\n"
    run = ended_run(node, mlflow_server, "a terminal")
    assert artifact(mlflow_server, run, tmp_path, "99 columns") == "77 columns\n99 columns\n"


def _resize(terminal: int, columns: int) -> None:
    import fcntl
    import struct

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def test_a_training_goes_on_when_its_helper_is_killed(node) -> None:
    script = """
        run = mlflow_relay.start_run("terminal", run_key="helper killed")
        say("begins")
        hear()
        for step in range(100_000):
            os.write(1, b"step %d of many, and some more to fill the pipe\\n" % step)
        run.end()
        say("ends")
    """
    rank = start_rank(node, script, environ=KEPT)
    hear(rank, "begins")
    (helper,) = helpers_of(node)
    os.kill(helper, signal.SIGKILL)
    tell(rank)
    seen = last_words(rank)
    assert rank.returncode == 0
    # What is left in the pipe may be copied into the middle of a line: but all of it is there.
    assert seen.count("\n") == 100_000 + 2
    assert "terminal output is no longer kept" in seen
    assert seen.rstrip().endswith("ends")


def transcript_of(node: Node) -> str:
    """Return what the daemon keeps of the lines that can still change."""
    return "".join(path.read_text() for path in node.spool.rglob("terminal/rank_0.json"))


def helpers_of(node: Node) -> list[int]:
    """Return the helpers of this node's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"terminal_helper" in command and str(node.socket).encode() in environ:
            found.append(int(entry.name))
    return found


def test_no_helper_is_left_behind(node) -> None:
    wait_until(lambda: not helpers_of(node), "all helpers have gone")


def test_what_was_printed_is_seen_while_the_training_runs_and_after_a_kill_of_the_daemon(
    tmp_path, mlflow_server
) -> None:
    script = """
        run = mlflow_relay.start_run("terminal", run_key="daemon killed")
        for step in range(20):
            print("step", step, flush=True)
            time.sleep(0.05)
        say("printed")
        hear()
        print("the end")
        run.end()
    """
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = start_rank(node, script, environ=KEPT)
        for _ in range(3):
            time.sleep(0.2)
            node.kill()
            node.start()
        hear(rank, "printed")
        wait_until(lambda: "printed" in transcript_of(node), "all is read")
        assert node.stop() == 0
        run = only_run(mlflow_server, "daemon killed")
        wanted = "".join(f"step {step}\n" for step in range(20)) + "printed\n"
        assert artifact(mlflow_server, run, tmp_path, "printed") == wanted, "while it runs"
        node.start()
        tell(rank)
        last_words(rank)
        run = ended_run(node, mlflow_server, "daemon killed")
        assert artifact(mlflow_server, run, tmp_path, "the end") == wanted + "the end\n"


FORKS = """
    import multiprocessing, random, threading, faulthandler
    faulthandler.dump_traceback_later(60, exit=True)
    run = mlflow_relay.start_run("terminal", run_key=sys.argv[1])
    stop = threading.Event()

    def chatter():
        while not stop.is_set():
            print("a thread prints" * 10)

    class Loud:
        def __del__(self):
            print("deleted")

    def on_alarm(*_):
        os.write(2, b"a signal handler prints\\n")

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    threads = [threading.Thread(target=chatter, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(int(sys.argv[2])):
        child = os.fork()
        if not child:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(1, b"a child prints %d\\n" % index)
            run.log_metrics({"child": index}, step=index)
            os._exit(0)
        Loud()
        assert os.waitpid(child, 0)[1] == 0
    signal.setitimer(signal.ITIMER_REAL, 0)
    stop.set()
    for thread in threads:
        thread.join()
    run.end()
    say("all forks came back")
"""


@pytest.mark.parametrize("forks", [20, pytest.param(200, marks=pytest.mark.torture)])
def test_forks_signal_handlers_and_destructors_that_print_never_lock_up(
    node, mlflow_server, tmp_path, forks
) -> None:
    key = f"{forks} forks"
    # Unbuffered: in Python before 3.12.4, threads that print at once spoil the buffer of sys.stdout
    # (github.com/python/cpython/issues/119506).
    rank = start_rank(node, FORKS, key, forks, environ={**KEPT, "PYTHONUNBUFFERED": "1"})
    seen = last_words(rank)
    assert rank.returncode == 0, seen[-3000:]
    assert seen.rstrip().endswith("all forks came back")
    for index in range(forks):
        assert f"a child prints {index}\n" in seen
