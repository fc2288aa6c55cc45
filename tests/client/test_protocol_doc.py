"""PROTOCOL.md says what the code does: examples decode, tables hold, nothing is left out."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_relay import (
    frames,
    journal,
    journal_files,
    messages,
    records,
    sender,
    settings,
    values,
)

DOCUMENT = (Path(__file__).parents[2] / "client" / "PROTOCOL.md").read_text(encoding="utf-8")
SESSION = bytes(range(16))
EMPTY = "\N{EN DASH}"

#: offset, bytes in hex, what they mean
HEX_LINE = re.compile(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} )*[0-9a-f]{2}) {2,}(\S.*)")


def example(name: str) -> str:
    """Return what stands in the fenced block behind the mark of that name."""
    found = re.search(rf"<!-- example: {name} -->\n```\w*\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found, f"no example {name}"
    return found[1]


def dump(name: str) -> bytes:
    """Return the bytes of a hex dump; each line must stand at the offset that it claims."""
    data = b""
    for line in example(name).splitlines():
        parts = HEX_LINE.fullmatch(line)
        assert parts, f"no line of a hex dump: {line!r}"
        assert int(parts[1], 16) == len(data), line
        data += bytes.fromhex(parts[2])
    return data


def section(title: str) -> str:
    """Return the text from a heading to the next heading of any level."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", DOCUMENT)
    assert found, f"no section {title}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def layout(text: str) -> dict[str, tuple[int, int]]:
    """Return offset and size by field name of a byte table, but of fields without a size."""
    return {
        name: (int(offset), int(size))
        for offset, size, name, *_ in rows(text)
        if offset.isdigit() and size.isdigit() and name != EMPTY
    }


def at(data: bytes, place: tuple[int, int]) -> bytes:
    return data[place[0] : place[0] + place[1]]


def little(data: bytes) -> int:
    return int.from_bytes(data, "little")


# ── the worked example ──


def test_the_hex_example_decodes_to_what_is_said_below_it():
    said = json.loads(example("says"))
    data = dump("frame")
    header = frames.read_frame(data)
    assert header.session.hex() == said["session"]
    assert header.first_seq == said["first_seq"]
    entries = list(frames.iter_entries(data[frames.HEADER_BYTES :]))
    assert header.records == len(entries) == len(said["records"])
    for entry, wanted in zip(entries, said["records"], strict=True):
        assert entry is not None
        record = records.unpack_record(entry)
        assert type(record).__name__.upper() == wanted.pop("kind")
        found = json.loads(json.dumps(record._asdict()))
        assert found == wanted


def test_the_client_writes_the_bytes_of_the_example():
    metrics = records.MetricsPacker().pack({"loss": 0.5, "lr": 0.001}, 3, 1700000000000)
    end = records.pack_end("FINISHED", "", 1700000001000)
    body = frames.pack_entry(metrics) + frames.pack_entry(end)
    assert dump("frame") == frames.pack_frame(SESSION, 7, 2, body)


def test_the_ack_of_the_example_acknowledges_its_frame():
    assert messages.unpack_ack(dump("ack")) == (SESSION, frames.read_frame(dump("frame")).next_seq)


# ── nothing is left out ──


def test_every_message_kind_is_described():
    kinds = {
        value.decode(): name
        for name, value in vars(messages).items()
        if name.isupper() and isinstance(value, bytes)
    }
    assert len(kinds) >= 12
    described = {
        cells[0].strip("`"): cells[1] for cells in rows(section("3. Messages") + _both_ways())
    }
    assert {kind: described.get(kind) for kind in kinds} == kinds


def _both_ways() -> str:
    return section("Rank → daemon") + section("Daemon → rank")


def test_every_record_kind_is_described():
    kinds = {
        "METRICS",
        "PARAMS",
        "TAGS",
        "END",
        "ARTIFACT",
        "REDUCE",
        "COMBINED",
        "TERMINAL",
        "CALL",
    }
    assert {kind.__name__.upper() for kind in records.Record.__args__} == kinds
    described = {
        cells[1]: int(cells[0]) for cells in rows(section("6. Records")) if cells[0].isdigit()
    }
    assert described == {kind: getattr(records, kind) for kind in kinds}


def test_every_field_that_a_rank_says_of_itself_is_described(tmp_path):
    # In a process of its own: without a daemon a rank's sender tries on as long as it lives.
    script = (
        "import mlflow_relay, sys; mlflow_relay.start_run(socket=sys.argv[1], run_key='k',"
        "rank=0, world_size=1, end_timeout_s=0)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "relay.sock")]
    subprocess.run(command, check=True, timeout=60)
    (path,) = tmp_path.rglob("*.journal")
    card = messages.unpack_map(journal_files.read_base(path.read_bytes()).card)
    described = {
        name.strip("` ")
        for cells in rows(section("ATTACH"))
        for name in cells[0].split(",")
        if name.strip().startswith("`")
    }
    assert described == {*card, "first_seq", "is_plain"}  # the last one is the drop-in's


# ── the byte tables ──


def test_the_table_of_a_frame_is_where_its_fields_stand():
    body = frames.pack_entry(b"one") + frames.pack_entry(b"three")
    frame = frames.pack_frame(SESSION, 1 << 40, 2, body)
    header, entry = section("5. Frames").split("An **entry**")
    places = layout(header)
    assert at(frame, places["magic"]) == frames.MAGIC
    assert little(at(frame, places["version"])) == frames.VERSION
    assert at(frame, places["session"]) == SESSION
    assert little(at(frame, places["first_seq"])) == 1 << 40
    assert little(at(frame, places["count"])) == 2
    assert little(at(frame, places["length"])) == len(body)
    assert little(at(frame, places["CRC"])) == frames.read_frame(frame).crc
    places = layout(entry)
    assert little(at(body, places["length"])) == len(b"one")
    assert little(at(body, places["CRC"])) == frames.crc32(b"one")


def test_the_tables_of_the_journal_are_where_its_fields_stand(tmp_path):
    kept = journal.Journal(tmp_path, SESSION, b"the card", bytes_max=64 << 10)
    try:
        # The first record is lost for want of space, the second is kept.
        kept.append(bytes(1 << 20))
        kept.append(b"record")
        base = kept.path.read_bytes()
        entries = next(tmp_path.glob("*.entries")).read_bytes()
    finally:
        kept.close(unlink=True)
    text = section("7. Journal")
    base_table, entries_table = text.split("**Entries file.**")
    places = layout(base_table)
    assert at(base, places["magic"]) == b"MRJ"
    assert little(at(base, places["version"])) == 1
    assert little(at(base, places["length"])) == len(b"the card")
    assert little(at(base, places["CRC"])) == frames.crc32(b"the card")
    (word,) = struct.Struct("@Q").unpack(at(base, places["next_seq"]))
    assert word == 1
    (word,) = struct.Struct("@Q").unpack(at(base, places["acked"]))
    assert word == 0
    (word,) = struct.Struct("@Q").unpack(at(base, places["lost"]))
    assert word == 1
    assert base[64:] == b"the card"
    places = layout(entries_table)
    assert at(entries, places["magic"]) == b"MRE"
    assert little(at(entries, places["version"])) == 1
    assert at(entries, places["session"]) == SESSION
    assert little(at(entries, places["first_seq"])) == 0
    (tail,) = struct.Struct("@Q").unpack(at(entries, places["tail"]))
    assert entries[64:tail] == frames.pack_entry(b"record")


# ── the numbers ──


def size(text: str) -> int:
    """Return 8 MiB, 256 KiB as bytes."""
    number, unit = text.split()
    return int(number) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]


def test_the_limits_are_those_of_the_code():
    limits = {cells[0]: cells[1] for cells in rows(section("10. Limits"))}
    assert size(limits["message"]) == messages.MESSAGE_BYTES_MAX
    assert size(limits["record"]) == values.RECORD_BYTES_MAX
    frame = re.match(r"(\d+ KiB) .*; (\d+ MiB) \+ (\d+) bytes", limits["frame"])
    assert frame
    assert size(frame[1]) == frames.FRAME_BYTES_TARGET
    assert size(frame[2]) + int(frame[3]) == frames.FRAME_BYTES_MAX
    counts = limits["metrics, params, tags per record"]
    texts = values.TEXTS_PER_RECORD_MAX
    assert counts == f"{values.METRICS_PER_RECORD_MAX}, {texts}, {texts}"
    assert size(limits["frames under way per session"]) == sender.WINDOW_BYTES
    smallest = re.fullmatch(r"(\d+ MiB), at least (\d+ KiB)", limits["entries file"])
    assert smallest
    assert size(smallest[1]) == journal.ENTRIES_FILE_BYTES
    assert size(smallest[2]) == journal.ENTRIES_FILE_BYTES_MIN
    assert size(limits["journal"].partition(" (")[0]) == settings.JOURNAL_BYTES_MAX
    again = re.fullmatch(r"([\d.]+) s; (\d+) s after REFUSED", limits["attach again"])
    assert again
    assert float(again[1]) == sender.ATTACH_RETRY_S
    assert float(again[2]) == sender.ATTACH_REFUSED_RETRY_S
    assert limits["ack overdue"] == f"{sender.ACK_TIMEOUT_S:g} s"
    assert limits["ALIVE"].startswith(f"{sender.ALIVE_EVERY_S:g} s;")


def test_the_longest_text_is_what_the_table_says():
    limit = next(cells[1] for cells in rows(section("10. Limits")) if "value of" in cells[0])
    chars = int(limit.removesuffix(" characters").replace(",", ""))
    values.to_text("param", "key", "x" * chars)
    with pytest.raises(ValueError, match="key"):
        values.to_text("param", "key", "x" * (chars + 1))


def test_the_versions_are_those_of_the_code():
    assert '`"v"` is always there and is the protocol version, 1' in DOCUMENT
    assert messages.PROTOCOL_VERSION == 1
    assert (frames.VERSION, frames.VERSIONS) == (2, (1, 2))
