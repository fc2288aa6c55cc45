"""The run card: all of it comes back; damage and later releases are told apart."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool.card import Card, SessionCard
from mlflow_relay_daemon.states import RunState
from tests.support.spools import SESSION, FailingDisk, new_card

TIMES = st.integers(0, 1 << 62)
TEXTS = st.text(max_size=20)
SESSION_CARDS = st.builds(
    SessionCard,
    rank=st.integers(0, 5000),
    node=TEXTS,
    pid=TIMES,
    primary=st.booleans(),
    start_ms=TIMES,
    first_seq=TIMES,
    closed=st.booleans(),
    end_status=st.none() | st.sampled_from(["FINISHED", "FAILED", "KILLED"]),
    end_ms=st.none() | TIMES,
    end_reason=TEXTS,
    lost=TIMES,
)
CARDS = st.builds(
    Card,
    run_id=TEXTS,
    run_key=TEXTS,
    experiment_name=TEXTS,
    run_name=TEXTS,
    start_ms=TIMES,
    world_size=TIMES,
    tags=st.dictionaries(TEXTS, TEXTS, max_size=3),
    state=st.sampled_from(RunState),
    experiment_id=st.none() | TEXTS,
    mlflow_run_id=st.none() | TEXTS,
    create_attempts=TIMES,
    status=TEXTS,
    end_ms=st.none() | TIMES,
    end_reason=TEXTS,
    sessions=st.dictionaries(
        st.binary(min_size=16, max_size=16).map(bytes.hex), SESSION_CARDS, max_size=3
    ),
)


@settings(deadline=None)  # a busy machine is no finding
@given(card=CARDS)
def test_a_card_comes_back(card):
    found = cards.unpack(cards.pack(card))

    assert found == card
    assert type(found.state) is RunState
    assert all(type(each) is SessionCard for each in found.sessions.values())


def test_a_card_is_text_that_an_operator_can_read():
    values = json.loads(cards.pack(new_card()))

    assert values["version"] == cards.VERSION
    assert values["experiment_name"] == "aifs"
    assert values["sessions"][SESSION.hex()]["node"] == "node7"


def test_no_flipped_byte_makes_another_card():
    """Half of these are digits and letters within a value, which JSON itself would not notice."""
    card = new_card()
    data = cards.pack(card)
    wrong = []
    for at in range(len(data)):
        for flip in (0x01, 0x02, 0x80):
            damaged = bytearray(data)
            damaged[at] ^= flip
            try:
                found = cards.unpack(bytes(damaged))
            except FormatError:
                continue
            if found != card:
                wrong.append(bytes(damaged[max(0, at - 20) : at + 20]))
    assert wrong == []


def test_every_truncation_is_noticed():
    data = cards.pack(new_card())
    for end in range(len(data)):
        with pytest.raises(FormatError):
            cards.unpack(data[:end])
        with pytest.raises(FormatError):
            cards.unpack(data[:end] + bytes(len(data) - end))


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_random_bytes_are_no_card(data):
    with pytest.raises(FormatError):
        cards.unpack(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(value=JSON, name=st.sampled_from([*json.loads(cards.pack(new_card()))]), version=JSON)
def test_any_json_is_a_card_or_a_format_error(value, name, version):
    values = json.loads(cards.pack(new_card()))
    for tried in (value, {**values, name: value}, {**values, "version": version}):
        try:
            cards.unpack(json.dumps(tried).encode())
        except FormatError:
            continue


def test_brackets_without_end_are_a_format_error():
    with pytest.raises(FormatError):
        cards.unpack(b"[" * 200_000)


@pytest.mark.parametrize(
    "change",
    [
        {"start_ms": "yesterday"},
        {"start_ms": 1 << 64},
        {"run_name": None},
        {"run_name": "\ud800"},
        {"tags": {"team": 1}},
        {"held": [["tag", "from"]]},
        {"held": "none"},
        {"parent": {"asked": 1}},
        {"sessions": {"no hex digits": vars(SessionCard(0, "", 1, True, 0))}},
        {"sessions": {SESSION.hex(): {**vars(SessionCard(0, "", 1, True, 0)), "next_seq": "5"}}},
    ],
)
def test_a_card_that_was_mended_badly_by_hand_is_a_format_error(change):
    values = json.loads(cards.pack(new_card()))
    del values["crc"]
    assert cards.unpack(json.dumps(values).encode()) == new_card()

    with pytest.raises(FormatError):
        cards.unpack(json.dumps({**values, **change}).encode())


def test_a_card_of_a_later_release_is_told_from_damage():
    values = json.loads(cards.pack(new_card()))
    values["version"] = cards.VERSION + 1
    with pytest.raises(VersionError, match=f"version {cards.VERSION + 1}; this release reads"):
        cards.unpack(json.dumps(values).encode())


@pytest.mark.parametrize("version", [0, -3, "1", None])
def test_a_version_that_never_was_is_damage(version):
    values = json.loads(cards.pack(new_card()))
    values["version"] = version
    with pytest.raises(FormatError, match="the run card is damaged"):
        cards.unpack(json.dumps(values).encode())


def test_fields_that_a_later_release_added_are_passed_over():
    """It would have raised the version, had it changed the meaning of the others."""
    values = json.loads(cards.pack(new_card()))
    del values["crc"]
    values["added"] = 1
    values["sessions"][SESSION.hex()]["added"] = 1

    assert cards.unpack(json.dumps(values).encode()) == new_card()


def test_fields_that_an_earlier_release_did_not_have_get_their_defaults():
    values = json.loads(cards.pack(new_card()))
    del values["crc"]
    del values["create_attempts"]
    del values["sessions"][SESSION.hex()]["lost"]

    assert cards.unpack(json.dumps(values).encode()) == new_card()


def test_a_card_is_on_the_disk_when_it_is_written(tmp_path):
    disk = FailingDisk()
    cards.write(disk, tmp_path, new_card())

    operations = [operation for operation, *_ in disk.asked]
    assert operations == ["rename", "write", "sync", "sync_folder"]
    assert cards.read(tmp_path) == new_card()


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "sync_folder"])
def test_a_disk_that_fails_leaves_a_whole_card(tmp_path, operation):
    disk = FailingDisk()
    cards.write(disk, tmp_path, new_card())
    changed = new_card()
    changed.mlflow_run_id = "changed"
    disk.fail(operation, error=errno.ENOSPC, written=100)
    with pytest.raises(OSError, match="No space"):
        cards.write(disk, tmp_path, changed)

    assert cards.read(tmp_path) in (new_card(), changed)
    cards.write(disk, tmp_path, changed)
    assert cards.read(tmp_path) == changed


@pytest.mark.parametrize(
    ("state", "closed", "over"),
    [
        (RunState.NEW, True, False),
        (RunState.OPEN, True, False),
        (RunState.ENDED, False, False),
        (RunState.ENDED, True, True),
    ],
)
def test_a_run_is_over_when_all_ranks_are_gone_and_mlflow_knows(state, closed, over):
    card = new_card()
    card.state = state
    card.sessions[SESSION.hex()].closed = closed

    assert card.is_over is over


def test_losses_of_all_sessions_add_up():
    card = new_card([bytes(16), SESSION])
    for lost, session in enumerate(card.sessions.values(), 3):
        session.lost = lost

    assert card.lost_records == 7
