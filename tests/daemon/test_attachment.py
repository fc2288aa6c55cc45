"""ATTACH: what a session says of itself comes back, and nothing that cannot be gets in."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.messages import pack_map
from mlflow_relay_daemon.attachment import TAGS_MAX, TEXT_CHARS_MAX, read_attachment
from tests.support.spools import RUN_ID, SESSION, START_MS

WHOLE = st.integers(0, (1 << 63) - 1)
TEXTS = st.text(max_size=30)
RUN_IDS = st.binary(min_size=16, max_size=16).map(bytes.hex)
#: What an earlier client does not say.
DEFAULTS: dict[str, Any] = {
    "is_plain": False,
    "first_seq": 0,
    "node_count": 0,
    "resume": "",
    "resume_mode": "child",
    "fork": "",
    "node_rank": None,
    "local_world_size": 0,
}
FIELDS: dict[str, Any] = {
    "session": SESSION,
    "run_id": RUN_ID,
    "run_key": "a key",
    "experiment_name": "aifs",
    "run_name": "",
    "rank": 3,
    "world_size": 4,
    "node": "node7",
    "pid": 4711,
    "primary": True,
    "start_ms": START_MS,
    "tags": {"mlflow.user": "ada"},
}


@given(
    fields=st.fixed_dictionaries(
        {
            "session": st.binary(min_size=16, max_size=16),
            "run_id": RUN_IDS,
            **dict.fromkeys(("run_key", "experiment_name", "run_name", "node"), TEXTS),
            **dict.fromkeys(("rank", "world_size", "pid", "start_ms"), WHOLE),
            "primary": st.booleans(),
            "tags": st.dictionaries(TEXTS, TEXTS, max_size=4),
        },
        optional={
            **dict.fromkeys(("first_seq", "node_count", "node_rank", "local_world_size"), WHOLE),
            **dict.fromkeys(("resume", "fork"), RUN_IDS | st.just("")),
            "resume_mode": st.sampled_from(["child", "same", "guest"]),
            "is_plain": st.booleans(),
        },
    )
)
def test_what_a_session_says_comes_back(fields):
    found = read_attachment(pack_map(fields))

    assert vars(found) == {**DEFAULTS, **fields}


def test_fields_that_a_later_client_adds_are_passed_over():
    assert read_attachment(pack_map({**FIELDS, "added": [1]})) == read_attachment(pack_map(FIELDS))


WRONG = {
    "session": [None, b"short", bytes(17), "x" * 16],
    "run_id": [None, RUN_ID[:-1], RUN_ID + "0", RUN_ID.upper(), "../" + RUN_ID[3:], "", 5],
    "run_key": [None, 5, "x" * (TEXT_CHARS_MAX + 1)],
    "experiment_name": [None, b"aifs", "x" * (TEXT_CHARS_MAX + 1)],
    "run_name": [None, 5],
    "node": [None, ["node7"]],
    "rank": [None, -1, 1 << 63, "3", 3.0, True],
    "world_size": [None, -1, 4.0],
    "pid": [None, -1],
    "start_ms": [None, -1, 1 << 63, 1e12],
    "first_seq": [None, -1, 1 << 63, "0"],
    "primary": [None, 1, "yes"],
    "node_count": [None, -1, 1.5],
    "resume": [None, "x", RUN_ID + "0"],
    "resume_mode": [None, "", "other"],
    "fork": [None, 5, RUN_ID.upper()],
    "tags": [None, [], {"a": 5}, {"a": None}, {f"t{n}": "" for n in range(TAGS_MAX + 1)}],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_refused_by_name(name, value):
    """A run id becomes the name of a folder, numbers become MLflow's."""
    with pytest.raises(FormatError) as refusal:
        read_attachment(pack_map({**FIELDS, name: value}))

    assert name in str(refusal.value)


@pytest.mark.parametrize("name", list(FIELDS))
def test_what_is_missing_is_refused_by_name(name):
    with pytest.raises(FormatError, match=name):
        read_attachment(pack_map({key: value for key, value in FIELDS.items() if key != name}))


def test_a_client_of_another_protocol_is_told_so():
    with pytest.raises(VersionError, match="update the older of client and daemon"):
        read_attachment(msgpack.packb({**FIELDS, "v": 99}))


def test_every_flipped_byte_gives_an_attachment_or_a_format_error():
    data = pack_map(FIELDS)
    for at in range(len(data)):
        for value in range(256):
            damaged = data[:at] + bytes((value,)) + data[at + 1 :]
            try:
                found = read_attachment(damaged)
            except FormatError:
                continue
            assert len(found.session) == 16
            assert len(bytes.fromhex(found.run_id)) == 16
            assert type(found.rank) is type(found.start_ms) is int


def test_every_truncation_and_random_bytes_are_a_format_error():
    data = pack_map(FIELDS)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            read_attachment(data[:end])


@given(data=st.binary(max_size=100))
def test_noise_is_a_format_error(data):
    with pytest.raises(FormatError):
        read_attachment(data)


def test_a_new_run_is_what_its_first_session_says():
    card = read_attachment(pack_map(FIELDS)).new_card()

    assert (card.run_id, card.run_key, card.start_ms) == (RUN_ID, "a key", START_MS)
    assert (card.experiment_name, card.world_size) == ("aifs", 4)
    assert card.tags == {"mlflow.user": "ada"}
    assert card.sessions == {}
    assert card.mlflow_run_id is None


def test_a_session_s_card_is_what_the_end_of_the_run_needs():
    card = read_attachment(pack_map({**FIELDS, "first_seq": 17})).session_card()

    assert (card.rank, card.node, card.pid, card.primary) == (3, "node7", 4711, True)
    assert (card.start_ms, card.first_seq) == (START_MS, 17)
    assert not card.closed
    assert card.end_status is None
