"""INTERNALS.md says what the code does: files, fields, states and tests that it names are there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlflow_relay import records
from mlflow_relay.frames import pack_entry, pack_frame, read_frame
from mlflow_relay_daemon import dead_letters
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.config import SETTINGS
from mlflow_relay_daemon.dead_letters import DeadLetter, DeadLetters
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment, watermark
from mlflow_relay_daemon.spool.card import Card, SessionCard
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.segment import Head
from mlflow_relay_daemon.spool.spool import LOCK, QUARANTINE, RUNS, Spool
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import TRANSITIONS
from mlflow_relay_daemon.status import read_spool
from tests.support.relay import Node, finish, wait_until

ROOT = Path(__file__).parents[2]
INTERNALS = (ROOT / "daemon" / "INTERNALS.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "client" / "PROTOCOL.md").read_text(encoding="utf-8")
SESSION = bytes(range(16))
RUN_ID = "ab" * 16
EMPTY = "\N{EN DASH}"


def section(document: str, title: str) -> str:
    """Return the text from a heading to the next heading of any level."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", document)
    assert found, f"no section {title}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(text: str) -> set[str]:
    """Return what stands in `backticks`."""
    return set(re.findall(r"`([^`\n]+)`", text))


# ── files ──


def test_every_file_of_a_spool_is_described(tmp_path):
    disk = Disk()
    spool = Spool(disk, tmp_path / "spool", segment_bytes_max=64 << 10)
    run = spool.open_run(Card(RUN_ID, "key", "experiment", "run", 1, 1, {}))
    frame = pack_frame(SESSION, 0, 1, pack_entry(records.pack_end("FINISHED", "", 1)))
    run.append([(read_frame(frame), frame)])
    run.settle(Watermark(segment=1, offset=1))
    letters = DeadLetters(disk, run.folder)
    letters.add([Objection(Entry("metric", "key", 1.0, 1, 1), "why")], 1)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"?")
    spool.quarantine(damaged, "a test")
    spool.close()

    layout = section(INTERNALS, "3. The spool")
    found = [path.relative_to(spool.folder) for path in spool.folder.rglob("*")]
    assert len(found) == 10, found
    for path in found:
        shown = path.name.replace(RUN_ID, "<relay run id>")
        shown = re.sub(r"^\d+-damaged$", "<ns since 1970>-<name>", shown)
        assert shown in layout, path


def test_every_name_and_suffix_in_the_code_is_described():
    for name in (RUNS, QUARANTINE, LOCK, segment.SUFFIX, watermark.NAME, cards.NAME):
        assert name in INTERNALS
    replaced = [watermark.NAME, cards.NAME, dead_letters.NAME]
    assert {f"{name}.new" for name in replaced} <= names(INTERNALS)


def test_every_setting_of_the_spool_is_described():
    described = {
        name
        for cells in rows(section(INTERNALS, "Settings that act here"))
        for name in names(cells[0])
    }
    assert described <= set(SETTINGS), "a setting that there is not"
    here = ("spool", "segment", "free_", "group_", "batch_", "delivery_", "retry_", "drain_")
    assert {name for name in SETTINGS if name.startswith(here)} <= described


# ── fields ──


def test_every_field_of_watermark_card_and_letters_is_described():
    marks = names(section(INTERNALS, "Watermark"))
    assert {each.name for each in fields(Watermark)} <= marks
    known = names(section(INTERNALS, "Card"))
    assert {each.name for each in (*fields(Card), *fields(SessionCard))} <= known
    letters = names(section(INTERNALS, "Dead letters"))
    assert {each.name for each in fields(DeadLetter)} <= letters


def test_the_watermark_is_packed_in_the_order_of_the_table():
    listed = [
        name
        for cells in rows(section(INTERNALS, "Watermark"))
        for name in re.findall(r"`(\w+)`", cells[0])
    ]
    assert listed == [each.name for each in fields(Watermark)]


def test_the_head_of_a_segment_is_as_the_table_says(tmp_path):
    text = section(INTERNALS, "Segment")
    assert f"`[{', '.join(Head._fields)}]`" in text
    writer = segment.Writer(Disk(), tmp_path, 1, Head(7, {SESSION: (5, [])}, b"card"))
    frame = pack_frame(SESSION, 5, 1, pack_entry(b"record"))
    writer.append([frame])
    writer.close()
    data = segment.path_of(tmp_path, 1).read_bytes()
    places = {cells[2]: cells[0] for cells in rows(text) if len(cells) == 4}
    assert data[int(places["magic"]) :][:3] == b"MRS"
    assert data[int(places["version"])] == 1
    length = int.from_bytes(data[int(places["length"]) :][:4], "little")
    body = data[int(places["body"]) :][:length]
    assert int.from_bytes(data[int(places["CRC"]) :][:4], "little") == segment.crc32(body)
    assert data[12 + length :] == frame
    assert places["frames"] == "12 + length"


# ── life cycle ──


def test_the_life_cycle_is_the_table_of_the_code():
    described = {
        (cells[0], cells[1].partition(":")[0]): cells[2]
        for cells in rows(section(INTERNALS, "10. Life cycle"))
        if cells[0] in {"new", "open", "ended"}
    }
    assert described == {
        (state.value, event.name): after.value for (state, event), after in TRANSITIONS.items()
    }


# ── tests that it names ──


def named_tests() -> list[str]:
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", INTERNALS)))


@pytest.mark.parametrize("test", named_tests())
def test_a_test_that_is_named_exists(test):
    path, _, name = test.partition("::")
    assert (ROOT / path).is_file(), path
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_every_crash_state_names_its_test_or_the_row_that_does():
    states = {
        cells[0]: cells[-1]
        for cells in rows(section(INTERNALS, "5. Crash states"))
        if re.fullmatch(r"[A-Z]\d+", cells[0])
    }
    assert len(states) >= 30
    for state, shown_by in states.items():
        other = re.fullmatch(r"([A-Z]\d+)'s", shown_by)
        if other:
            assert "::test_" in states[other[1]], f"{state} points to {other[1]}"
        else:
            assert shown_by == EMPTY or "::test_" in shown_by, state


# ── the status object ──

RANK = """
    import mlflow_relay
    with mlflow_relay.start_run(run_key="doc") as run:
        run.log_metric("a", 1.0, step=0)
"""


def described_fields() -> set[str]:
    """Return the fields in the tables of the status object, `daemon.pid` written out."""
    found = set()
    top, _, run = section(PROTOCOL, "9. The status object").partition("Per run:")
    for cells in rows(top):
        parent = ""
        for name in re.findall(r"`([\w.]+)`", cells[0]):
            full = parent + name if name.startswith(".") else name
            parent = full.rpartition(".")[0]
            found.add(full)
    found |= {f"runs.{name}" for cells in rows(run) for name in re.findall(r"`(\w+)`", cells[0])}
    return found


def all_fields(status: dict[str, Any]) -> set[str]:
    found = set()
    for name, value in status.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}" for inner in value}
        elif isinstance(value, list):
            found |= {f"{name}.{inner}" for each in value for inner in each}
        else:
            found.add(name)
    return found


def test_every_field_of_the_status_is_described_and_the_same_without_a_daemon(tmp_path):
    with Node(tmp_path, "sqlite://", settings={"offline": "true"}) as node:
        node.start()
        finish([node.rank(RANK)])
        status = node.status()
        layout = section(INTERNALS, "3. The spool")
        assert [path.name for path in node.runtime.iterdir() if path.name not in layout] == []
        assert node.stop() == 0
        # A folder in which nothing can be read is shown with the same fields.
        wait_until(lambda: not node.socket.exists(), "the daemon is gone")
        (node.spool / RUNS / ("cd" * 16)).mkdir()
        unserved = read_spool(node.spool)
    parts = {"daemon", "server", "runs", "disk", "counters"}
    assert all_fields(status) == described_fields() - parts
    assert unserved.keys() == status.keys()
    for part in ("disk", "counters"):
        assert unserved[part].keys() == status[part].keys()
    assert len(unserved["runs"]) == 2
    for run in unserved["runs"]:
        assert run.keys() == status["runs"][0].keys()
