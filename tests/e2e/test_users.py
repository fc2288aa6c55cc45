"""A daemon for the members of a group: each has his own runs, and sees and writes no others.

The daemon runs as a user of its own, the ranks as others; the kernel tells who is who.
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

from tests.support import MlflowServer
from tests.support.jobs import only_run, run_id_of
from tests.support.relay import PATIENCE_S, _clean_environ, wait_until
from tests.support.scenes import fresh_name, metric_frame
from tests.support.users import (
    ALICE,
    BOB,
    DAEMON,
    DAEMON_UID,
    GROUP_GID,
    MALLORY,
    User,
    skip_unless_root,
)

SECRET = "token-that-nobody-may-see"

RANK = """
import os, sys, mlflow_relay
run = mlflow_relay.start_run("users", run_key=sys.argv[1], rank=0, world_size=1)
run.log_metric("loss", 0.5, step=1)
print("logged", flush=True)
for line in sys.stdin:
    if line == "die\\n":
        os.abort()
    run.log_metric("loss", 0.25, step=2)
run.end()
"""


class SharedNode:
    """What `mlflow-relay.service` sets up, in a root of its own under /dev/shm: the unit is installed
    there, and its command line run with its environment, as a user of its own."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.runtime = folder / "run/mlflow-relay"  # RuntimeDirectory
        self.state = folder / "var/lib/mlflow-relay"  # StateDirectory
        self.socket = self.runtime / "relay.sock"
        self.log = folder / "daemon.log"
        (folder / "run").mkdir(mode=0o755)
        for path, mode in ((self.runtime, 0o711), (self.state, 0o700)):
            path.mkdir(mode=mode, parents=True)
            os.chmod(path, mode)
            os.chown(path, DAEMON_UID, DAEMON_UID)
        os.chmod(folder, 0o755)
        for path in (folder / "run", folder / "var", folder / "var/lib"):
            os.chmod(path, 0o755)
        self.environ = {**_clean_environ(), "MLFLOW_RELAY_SOCKET": str(self.socket)}
        self.environ["MLFLOW_RELAY_TERMINAL"] = "none"
        self.command_line, environ = unit_in(folder)
        self.daemon_environ = {
            **self.environ,
            **environ,
            "MLFLOW_RELAY_NODE_METRICS": "0",  # tests count what their ranks have logged
            "MLFLOW_RELAY_GROUP": str(GROUP_GID),  # the group of that name is not on this machine
            "MLFLOW_RELAY_TRACKING_URI": uri,
            "MLFLOW_RELAY_FREE_BYTES_MIN": "0",
            "MLFLOW_RELAY_BATCH_AGE_S": "0.05",
            "MLFLOW_TRACKING_TOKEN": SECRET,
        }
        self.processes: list[Any] = []
        self.daemon: Any = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.daemon = DAEMON.relay(
                *self.command_line, environ=self.daemon_environ, stdout=log, stderr=log
            )
        self.processes.append(self.daemon)
        wait_until(lambda: self.status(DAEMON), "the daemon answers")

    def kill(self) -> None:
        self.daemon.kill()
        self.daemon.wait()

    def rank(self, user: User, key: str) -> Any:
        process = user.python(RANK, key, environ=self.environ)
        self.processes.append(process)
        return process

    def command(self, user: User, *arguments: str) -> tuple[int, str]:
        process = user.relay(*arguments, environ=self.environ)
        output, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output

    def status(self, user: User) -> dict[str, Any]:
        code, output = self.command(user, "status", "--json")
        return json.loads(output) if code in (0, 1) and output.startswith("{") else {}

    def runs(self, user: User) -> set[str]:
        return {run["run_id"] for run in self.status(user)["runs"]}

    def run(self, user: User, key: str) -> dict[str, Any]:
        """Return the status of a run, as this user sees it."""
        return next(r for r in self.status(user)["runs"] if r["run_id"] == run_id_of(key))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def unit_in(root: Path) -> tuple[list[str], dict[str, str]]:
    """Install the system unit below a root; return its command's arguments and its environment."""
    command = [sys.executable, "-m", "mlflow_relay_daemon", "install-units", "--root", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    unit = (root / "etc/systemd/system/mlflow-relay.service").read_text()
    unit = unit.replace("%S", str(root / "var/lib")).replace("%t", str(root / "run"))
    environ = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    [line] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert line.split()[-1] == "daemon"
    return ["daemon"], environ


@pytest.fixture(scope="module")
def node(mlflow_server: MlflowServer) -> Iterator[SharedNode]:
    skip_unless_root()
    folder = Path(tempfile.mkdtemp(prefix="relay-users-", dir="/dev/shm"))
    node = SharedNode(folder, mlflow_server.uri)
    try:
        node.start()
        yield node
    finally:
        node.close()
        shutil.rmtree(folder)


def logged(node: SharedNode, user: User, key: str) -> Any:
    """Return a rank of this user that has logged one point."""
    rank = node.rank(user, key)
    assert rank.stdout.readline() == "logged\n"
    return rank


def test_members_of_the_group_log_and_each_sees_his_own_runs_alone(node, mlflow_server):
    keys = {user: fresh_name("key") for user in (ALICE, BOB)}
    ranks = [logged(node, user, key) for user, key in keys.items()]
    for rank in ranks:
        rank.stdin.close()
        assert rank.wait(PATIENCE_S) == 0, rank.stdout.read()
    for user, key in keys.items():
        assert run_id_of(key) in node.runs(user)
        assert run_id_of(key) not in node.runs(BOB if user is ALICE else ALICE)
    assert {run_id_of(key) for key in keys.values()} <= node.runs(DAEMON)
    assert node.command(ALICE, "flush")[0] == 0
    for key in keys.values():
        wait_until(
            lambda key=key: only_run(mlflow_server, key).info.status == "FINISHED",
            "it is delivered",
        )


def test_one_outside_the_group_is_told_so_and_sees_nothing(node):
    logged(node, ALICE, fresh_name("key"))
    outsider = node.rank(MALLORY, fresh_name("key"))
    output, _ = outsider.communicate(timeout=PATIENCE_S)
    assert outsider.returncode != 0
    assert output.splitlines()[-1] == (
        f"mlflow_relay.errors.RelayError: the daemon of uid {DAEMON_UID} at {node.socket} does not "
        f"serve this user (uid {MALLORY.uid}): ask its administrator to take you into its group, "
        "or set MLFLOW_RELAY_SOCKET to a path of your own"
    )
    code, output = node.command(MALLORY, "status")
    assert code == 69
    assert "is closed to this user" in output
    assert len(output.splitlines()) == 1
    look = MALLORY.start(
        "/bin/sh", "-c", 'for d in "$@"; do ls "$d" && echo SEEN; cat "$d"/* && echo READ; done',
        "sh", node.runtime, node.runtime / "journals", node.state, environ=node.environ,
    )  # fmt: skip
    output, _ = look.communicate()
    assert "SEEN" not in output
    assert "READ" not in output


def test_a_run_key_of_another_user_is_refused_and_the_rank_goes_on(node):
    key = fresh_name("key")
    logged(node, ALICE, key)
    thief = node.rank(BOB, key)
    # It stays until it is told so: one that ends looks for a daemon's answer for 0.3 s only.
    said = next(line for line in thief.stdout if "refuses" in line)
    assert "the daemon refuses this session: this run is another user's" in said
    thief.communicate(timeout=PATIENCE_S)
    assert thief.returncode == 0, "training is never stopped"
    assert node.run(ALICE, key)["ranks_seen"] == 1
    assert run_id_of(key) not in node.runs(BOB)
    # What he left is no part of her run either, when he is dead and his journal is taken over.
    wait_until(lambda: list((node.state / "spool/quarantine").iterdir()), "it is put aside")
    assert node.run(ALICE, key)["ranks_seen"] == 1


def test_the_journal_of_a_killed_rank_is_taken_over_though_its_user_is_another(node, mlflow_server):
    key = fresh_name("key")
    rank = logged(node, ALICE, key)
    node.kill()
    rank.stdin.write("on\n")
    rank.stdin.write("die\n")
    rank.stdin.flush()
    rank.wait(PATIENCE_S)
    node.start()
    wait_until(lambda: only_or_none(mlflow_server, key) == "FAILED", "the run has ended")
    run = only_run(mlflow_server, key)
    assert len(mlflow_server.all_points(run.info.run_id)) == 2
    assert node.run(DAEMON, key)["journal_records"] == 0


def only_or_none(server: MlflowServer, key: str) -> str | None:
    from tests.support.jobs import runs_with_key

    runs = runs_with_key(server, key)
    return runs[0].info.status if runs else None


def test_no_member_can_list_the_journals_or_open_those_of_another(node):
    rank = logged(node, ALICE, fresh_name("key"))
    journals = node.runtime / "journals"
    names = [path.name for path in journals.iterdir()]
    assert names
    look = BOB.start("/bin/ls", journals, environ=node.environ)
    assert "Permission denied" in look.communicate()[0]
    remove = BOB.start("/bin/rm", "-f", *[journals / name for name in names], environ=node.environ)
    assert "not permitted" in remove.communicate()[0]
    assert set(names) <= {path.name for path in journals.iterdir()}
    rank.stdin.close()
    assert rank.wait(PATIENCE_S) == 0


SPOOF = """
import sys, zmq
from mlflow_relay import messages
socket, session, data = sys.argv[1], bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])
context = zmq.Context()
dealer = context.socket(zmq.DEALER)
dealer.linger = 0
if len(sys.argv) > 4:
    dealer.routing_id = bytes.fromhex(sys.argv[4])
dealer.connect("ipc://" + socket)
for kind, payload in ((messages.DATA, data), (messages.ALIVE, session),
                      (messages.DETACH, messages.pack_detach(session, 0))):
    dealer.send_multipart((kind, payload))
    print(dealer.poll(10_000) and dealer.recv_multipart()[0].decode(), flush=True)
"""


def test_a_session_cannot_be_spoofed_even_by_who_knows_its_name(node):
    key = fresh_name("key")
    rank = logged(node, ALICE, key)
    name = wait_until(
        lambda: next(iter((node.runtime / "journals").glob("*.journal")), None), "a journal"
    ).stem
    data = metric_frame(bytes.fromhex(name), 1, 1.0, key="forged")
    spoof = BOB.python(SPOOF, node.socket, name, data.hex(), environ=node.environ)
    output, _ = spoof.communicate(timeout=PATIENCE_S)
    assert output.split() == ["u", "u", "u"], output
    run = node.run(ALICE, key)
    assert (run["ranks_alive"], run["accepted_records"]) == (1, 1)
    rank.stdin.close()
    assert rank.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("flush", "{run}"),
        ("dead-letters", "list", "--run", "{run}"),
        ("dead-letters", "drop", "--run", "{run}", "--all", "--yes"),
        ("lineage", "{run}"),
        ("lineage", "drop", "{run}"),
        ("url", "{run}"),
        ("status", "--run", "{run}"),
    ],
)
def test_every_command_knows_nothing_of_another_users_run(node, arguments):
    key = fresh_name("key")
    logged(node, ALICE, key)
    run = run_id_of(key)
    code, output = node.command(BOB, *(word.format(run=run) for word in arguments))
    assert code != 0
    assert key not in output
    assert "Traceback" not in output


def test_control_requests_by_hand_are_judged_by_the_kernels_word_too(node):
    key = fresh_name("key")
    logged(node, ALICE, key)
    ask = """
    import sys, zmq
    from mlflow_relay.messages import CONTROL, pack_map, unpack_map
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect("ipc://" + sys.argv[1])
    for fields in ({"command": "flush", "runs": [sys.argv[2]]},
                   {"command": "dead_letters", "action": "list", "run": sys.argv[2]},
                   {"command": "lineage", "action": "link", "run": sys.argv[2], "to": "0" * 32},
                   {"command": "lineage", "action": "relatives", "ids": [sys.argv[2]]},
                   {"command": "status", "uid": 0}):
        dealer.send_multipart((CONTROL, pack_map(fields)))
        answer = unpack_map(dealer.recv_multipart()[1])
        print(answer["ok"], sys.argv[2] in str(answer))
    """
    process = BOB.python(ask, node.socket, run_id_of(key), environ=node.environ)
    output, _ = process.communicate(timeout=PATIENCE_S)
    answers = [line.split() for line in output.splitlines()]
    assert [ok for ok, _ in answers] == ["False"] * 4 + ["True"]
    assert answers[-1] == ["True", "False"], "his status has no word of it"


def test_the_token_is_seen_by_nobody(node):
    logged(node, ALICE, fresh_name("key"))
    seen = node.log.read_text() + json.dumps(node.status(DAEMON))
    for path in node.state.rglob("*"):
        seen += path.read_bytes().decode("latin-1") if path.is_file() else ""
    seen += Path(f"/proc/{node.daemon.pid}/cmdline").read_bytes().decode()
    assert SECRET not in seen
    peek = ALICE.start("/bin/cat", f"/proc/{node.daemon.pid}/environ", environ=node.environ)
    assert "Permission denied" in peek.communicate()[0]


def test_a_folder_that_anybody_could_have_made_is_trusted_by_nobody():
    """As if somebody had been quicker to make /dev/shm/mlflow-relay-<uid>, open to a group."""
    skip_unless_root()
    folder = Path(tempfile.mkdtemp(prefix="relay-trap-", dir="/dev/shm"))
    try:
        os.chown(folder, BOB.uid, GROUP_GID)
        os.chmod(folder, 0o711)
        (folder / "journals").mkdir()
        os.chmod(folder / "journals", 0o3777)
        environ = {**_clean_environ(), "MLFLOW_RELAY_SOCKET": str(folder / "relay.sock")}
        victim = ALICE.python(RANK, "key", environ=environ)
        output, _ = victim.communicate(timeout=PATIENCE_S)
        assert victim.returncode != 0
        assert f"belongs to uid {BOB.uid}: choose another socket path" in output
        assert list((folder / "journals").iterdir()) == []
    finally:
        shutil.rmtree(folder)
