"""Nonsense in settings files and on the socket: one clear line or one clear answer, never a crash, a
hang or a word of somebody else's."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import psutil
import pytest
import zmq
from click.testing import CliRunner

from mlflow_relay.messages import CONTROL, REPLY, pack_map, unpack_map
from mlflow_relay_daemon.cli import cli
from mlflow_relay_daemon.config import SETTINGS
from tests.daemon.test_commands import APART
from tests.support.relay import Node, finish
from tests.support.seeds import new_seed

CONFIGS, MESSAGES = 100, 10_000
RANK = """
import mlflow_relay
with mlflow_relay.start_run("fuzz", run_key="fuzz", rank=0, world_size=1) as run:
    run.log_metric("loss", 1.0)
"""


@pytest.fixture
def rng() -> random.Random:
    seed = new_seed()
    print(f"seed {seed}")
    return random.Random(seed)


# ── settings ──


def some_text(rng: random.Random) -> str:
    alphabet = "abc019_.-\"'\\ \t\n=[]{}#,é漢\u202e\x00\x1b%"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(20)))


def some_toml(rng: random.Random) -> str:
    values = ["1", "-1", "0.5", "nan", "inf", "1e400", "true", "[]", "{}", '""', "'x'", '"5MB"',
              "9" * 5000, "1979-05-27", '"none"', "0x" + "f" * 3000, f'"{"y" * 5000}"',
              "[[[[[[]]]]]]", "'''\n'''", some_text(rng)]  # fmt: skip
    return rng.choice(values)


def some_config(rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(3000))
    if kind == 1:
        return b"[" * rng.randrange(100_000)
    names = [*SETTINGS, some_text(rng), "spol", f'"{some_text(rng)}"', "[table]", "a.b"]
    lines = [f"{rng.choice(names)} = {some_toml(rng)}" for _ in range(rng.randrange(1, 4))]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == 2 and data:  # a flipped byte
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def test_a_hundred_fuzzed_settings_files_are_read_or_refused_in_one_line(
    rng, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = 0
    for index in range(CONFIGS):
        file = tmp_path / "fuzz.toml"
        file.write_bytes(some_config(rng))
        begin_s = time.monotonic()
        done = CliRunner(**APART).invoke(cli, ["check", "--settings", "--config", str(file)])
        assert time.monotonic() - begin_s < 10, f"file {index} takes for ever"
        assert done.exit_code in (0, 78), (file.read_bytes(), done.stderr)
        if done.exit_code == 78:
            refused += 1
            assert len(done.stderr.splitlines()) == 1, (file.read_bytes(), done.stderr)
            assert done.stderr.startswith(f"mlflow-relay: {file}: ")
            assert done.stderr.rstrip("\n").isprintable()
            assert len(done.stderr) < 2000
    print(f"{refused} of {CONFIGS} refused")
    assert refused > CONFIGS / 2, "they are fuzzed enough"


# ── control ──


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[Node]:
    settings = {"offline": True, "drain_timeout_s": 0}
    with Node(tmp_path_factory.mktemp("fuzz"), "x", settings=settings) as node:
        node.start()
        finish([node.rank(RANK)])
        yield node


def some_value(rng: random.Random, depth: int = 0) -> Any:
    choices = [None, True, 0, -1, 1 << 63, 0.5, float("nan"), "", "list", "retry", "drop", "link",
               "relatives", "f" * 32, "x" * 3000, b"\x00\xff", rng.randbytes(16), some_text(rng)]  # fmt: skip
    if depth < 3 and rng.random() < 0.3:
        inner = [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {str(i): value for i, value in enumerate(inner)}
    return rng.choice(choices)


def some_request(rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return b"\x91" * rng.randrange(5000)  # arrays in arrays
    commands = ["ping", "status", "flush", "dead_letters", "lineage", "nonsense", some_value(rng)]
    fields = {"command": rng.choice(commands)}
    for name in rng.sample(["action", "run", "runs", "ids", "to", "kind", "parent", "fork"], 4):
        fields[name] = some_value(rng)
    if kind == 2:
        return bytes(msgpack.packb({**fields, "v": some_value(rng)}))
    data = pack_map(fields)
    if kind == 3:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def test_ten_thousand_fuzzed_control_messages_are_answered_or_counted(rng, node):
    process = psutil.Process(node.daemon.pid)
    node.status()
    before_bytes, before_threads = process.memory_info().rss, process.num_threads()
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(f"ipc://{node.socket}")
    refusals = answers = 0
    for sent in range(0, MESSAGES, 100):
        for _ in range(100):
            dealer.send_multipart((CONTROL, some_request(rng)))
        # Behind them one that is known by its answer; but for those that wait for the server, all
        # others have been answered then.
        dealer.send_multipart((CONTROL, pack_map({"command": f"marker {sent}"})))
        while True:
            assert dealer.poll(60_000), f"no answer after {sent} messages"
            kind, payload = dealer.recv_multipart()
            assert kind == REPLY
            answer = unpack_map(payload)
            if f"marker {sent}" in answer.get("error", ""):
                break
            answers += 1
            if not answer["ok"]:
                refusals += 1
                assert answer["error"]
                assert len(answer["error"]) < 4000
    context.destroy(linger=0)
    status = node.status()
    grown_mb = (process.memory_info().rss - before_bytes) / 1e6
    print(f"{answers} answers, {refusals} of them refusals, {status['counters']['bad_messages']} "
          f"bad messages, {grown_mb:.1f} MB more")  # fmt: skip
    assert node.daemon.poll() is None
    assert refusals > MESSAGES / 10
    assert status["counters"]["bad_messages"] > MESSAGES / 20
    assert grown_mb < 50
    assert process.num_threads() <= before_threads + 8
    assert "Traceback" not in node.log.read_text()
    [run] = status["runs"]
    assert run["accepted_records"] == 2, "what was accepted is untouched"
    log_lines = len(node.log.read_text().splitlines())
    assert log_lines < 100, f"{log_lines} lines: repeated ones are counted"
    finish([node.rank(RANK.replace('"fuzz")', '"after")'))])
