"""What a fuzzer feeds with bytes: one function for each decoder, and what must hold of its answer.

A target returns or raises FormatError within itself; anything else that comes out is a finding. The
CRCs of our formats would keep a fuzzer out for ever: the first byte of an input says whether a
target puts the right ones in.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import orjson

from mlflow_relay import frames, journal_files, messages, records
from mlflow_relay.errors import FormatError
from mlflow_relay_daemon import attachment, config, setting
from mlflow_relay_daemon.batch import Batch
from mlflow_relay_daemon.sinks.bodies import log_batch_body
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment, sequences
from mlflow_relay_daemon.states import verdict

SESSION, RUN_ID, NOW_MS = bytes(range(16)), "ab" * 16, 1_795_412_345_678


def frame(data: bytes) -> None:
    """A message that should be one frame."""
    data = _with_frame_crc(data[1:]) if data[:1] == b"\1" else data[1:]
    try:
        header = frames.read_frame(data)
    except FormatError:
        header = None
    body = data[frames.HEADER_BYTES :]
    found = list(frames.iter_entries(body))
    assert sum(frames.ENTRY_BYTES + len(each) for each in found if each) <= len(body)
    if header is not None and data[3] == frames.VERSION:
        assert frames.pack_frame(header.session, header.first_seq, header.records, body) == data


def record(data: bytes) -> None:
    """A record: what is one can be sent to MLflow, which drops what it does not like in silence."""
    try:
        found = records.unpack_record(data)
    except FormatError:
        return
    batch = Batch()
    assert batch.has_room_for(found)
    if not isinstance(found, records.Terminal):
        batch.add(SESSION, found, {})
    body = log_batch_body(
        RUN_ID, batch.metrics, list(batch.params.items()), list(batch.tags.items())
    )
    sent = orjson.loads(body)
    for each in sent["metrics"]:
        assert each["value"] in ("NaN", "Infinity", "-Infinity") or type(each["value"]) is float


def message(data: bytes) -> None:
    """The payload of any message."""
    for read in (
        messages.unpack_map,
        messages.unpack_ack,
        messages.unpack_session,
        attachment.unpack_session,
    ):
        with suppress(FormatError):
            read(data)
    try:
        found = attachment.read_attachment(data)
    except FormatError:
        return
    card = found.new_card()
    card.sessions[found.session.hex()] = found.session_card()
    assert cards.unpack(cards.pack(card)) == card


def segment_file(data: bytes) -> None:
    """A segment: all of it is read, piece by piece, and no piece is two."""
    kind, data = data[:1], data[1:]
    if kind == b"\1":
        data = _MAGIC_OF_SEGMENT + len(data).to_bytes(4, "little") + crc32(data).to_bytes(4, "little") + data  # fmt: skip
    elif kind == b"\2":
        data = _SEGMENT_START + _with_frame_crc(data)
    fd = _memory_file("segment")
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    with suppress(FormatError):
        head, _ = segment.read_head(fd)
        sequences.Sequences(head.sequences)
        cards.unpack(head.card)
    try:
        at = segment.first_frame(fd, len(data))
        while at < len(data):
            piece = segment.read_piece(fd, at, len(data))
            assert piece.start == at < piece.end <= len(data)
            at = piece.end
    except FormatError:  # of a later release: read no further
        return


def card(data: bytes) -> None:
    """A run's card: what is one can be used as one, and written again."""
    try:
        found = cards.unpack(_with_card_crc(data[1:]) if data[:1] == b"\1" else data[1:])
    except FormatError:
        return
    for each in (found.open_links, found.waiting_links, found.itself, found.resumed_parent):
        each()
    for name in ("is_only_here", "is_guest", "is_owned", "is_over", "lost_records"):
        getattr(found, name)
    verdict(list(found.sessions.values()), 0)
    for name in found.sessions:
        bytes.fromhex(name)
    assert cards.unpack(cards.pack(found)) == found


def settings_file(data: bytes) -> None:
    """A settings file."""
    file = _memory_path("settings")
    file.write_bytes(data)
    try:
        found = config.load_config(config_file=file, environ={"HOME": "/nonexistent"})
    except setting.ConfigError as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 2000, said
    else:
        config.describe(found)


def journal(data: bytes) -> None:
    """Both files of a journal."""
    kind, data = data[:1], data[1:]
    if kind == b"\1":
        entries = data[32:]
        data = journal_files.pack_entries_head(SESSION, 7) + data[:32] + entries
    elif kind == b"\2":
        data = journal_files.pack_base_head(data[48:]).ljust(16, b"\0") + data
    try:
        base = journal_files.read_base(data)
        assert base.next_seq <= journal_files.COUNTER_MAX
    except FormatError:
        pass
    journal_files.holds_nothing(data)
    try:
        found = journal_files.salvage_entries(data, SESSION, 0)
    except FormatError:
        return
    for each in found.frames:
        frames.read_frame(each)


# ── help ──

_MAGIC_OF_SEGMENT = b"MRS\x01"
_SEGMENT_START = segment.pack_head(segment.Head(0, {}, b""))


def _with_frame_crc(data: bytes) -> bytes:
    """Return the bytes as a frame: its length and both kinds of CRC as they must be."""
    if len(data) < frames.HEADER_BYTES:
        return data
    body = bytearray(data[frames.HEADER_BYTES :])
    at = 0
    while at + frames.ENTRY_BYTES < len(body):
        length = int.from_bytes(body[at : at + 4], "little")
        entry = body[at + 8 : at + 8 + length]
        body[at + 4 : at + 8] = crc32(entry).to_bytes(4, "little")
        at += 8 + length
    head = data[:32] + len(body).to_bytes(4, "little")
    return head + crc32(body, crc32(head)).to_bytes(4, "little") + body


def _with_card_crc(data: bytes) -> bytes:
    try:
        values = orjson.loads(data)
        values.pop("crc", None)
        version = values.pop("version", cards.VERSION)
        return orjson.dumps({"version": version, "crc": cards._crc(values), **values})
    except (ValueError, TypeError, AttributeError):
        return data


@functools.cache
def _memory_file(name: str) -> int:
    return os.memfd_create(name)


def _memory_path(name: str) -> Path:
    return Path(f"/proc/self/fd/{_memory_file(name)}")


class Target(NamedTuple):
    """A decoder's function, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


def _some_records() -> list[bytes]:
    packer = records.MetricsPacker()
    return [
        packer.pack({"loss": 0.5, "lr": 1e-3}, 3, NOW_MS),
        packer.pack_steps({"a": 1.0, "b": float("nan")}, [1, 2], NOW_MS),
        records.pack_params({"lr": "0.1", "ü": ""}, NOW_MS),
        records.pack_tags({"team": "ens"}, NOW_MS),
        records.pack_end("FAILED", "ValueError: no", NOW_MS),
        records.pack_reduce("mean", {"loss": 1.0}, 3, NOW_MS),
        records.pack_combined(records.Combined(NOW_MS, "mean", 3, ["loss"], (0.5,), "", 0, NOW_MS)),
        records.pack_terminal(b"epoch 1\r\n", NOW_MS),
        records.pack_call("runs/set-tag", b"{}", NOW_MS),
    ]


def _frame() -> bytes:
    some = _some_records()
    return frames.pack_frame(SESSION, 7, len(some), b"".join(map(frames.pack_entry, some)))


def _attach() -> dict[str, object]:
    return {
        "session": SESSION,
        "run_id": RUN_ID,
        **dict.fromkeys(("run_key", "experiment_name", "run_name", "node"), "x"),
        **dict.fromkeys(("rank", "world_size", "pid", "start_ms", "node_count"), 1),
        "primary": True,
        "tags": {"mlflow.user": "ada"},
        "resume": RUN_ID,
        "resume_mode": "same",
        "fork": "cd" * 16,
    }


def _card() -> bytes:
    found = attachment.read_attachment(messages.pack_map(_attach()))
    card = found.new_card()
    card.sessions[SESSION.hex()] = dataclasses.replace(found.session_card(), closed=True)
    card.held.append(["tag", "from", RUN_ID])
    return cards.pack(card)


def _journal() -> bytes:
    body = b"".join(map(frames.pack_entry, _some_records()))
    tail = (journal_files.ENTRIES_AT + len(body)).to_bytes(8, "little")
    head = journal_files.pack_entries_head(SESSION, 7)
    return (head + tail).ljust(journal_files.ENTRIES_AT, b"\0") + body


def _settings() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            f"{name} = {value!r}".encode()
            for name, value, _ in config.describe(
                config.load_config(environ={"HOME": folder}, flags={"spool": Path(folder)})
            )
        ]
    return [*lines, b"\n".join(lines)]


TARGETS = {
    "frame": Target(frame, [b"\0" + _frame(), b"\1" + _frame()]),
    "record": Target(record, _some_records()),
    "message": Target(
        message,
        [
            messages.pack_map(_attach()),
            messages.pack_map({"command": "status"}),
            SESSION,
            bytes(24),
        ],
    ),
    "segment": Target(
        segment_file,
        [b"\0" + _SEGMENT_START + _frame(), b"\1" + _SEGMENT_START[12:], b"\2" + _frame() * 2],
    ),
    "card": Target(card, [b"\0" + _card(), b"\1" + _card()]),
    "config": Target(settings_file, _settings()),
    "journal": Target(journal, [b"\0" + _journal(), b"\1" + _journal()[32:], b"\2" + bytes(48)]),
}


def _planted(data: bytes) -> None:
    assert data != b"bug"


#: A mistake that the fuzzer must find.
PLANTED = {"planted": Target(_planted, [b"bag"])}
