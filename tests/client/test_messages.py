"""Messages: what is said is heard, and noise is an error that says what it is."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay import messages
from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.frames import FRAME_BYTES_MAX
from mlflow_relay.messages import (
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    pack_ack,
    pack_detach,
    pack_map,
    unpack_ack,
    unpack_detach,
    unpack_map,
)

SESSIONS = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, (1 << 64) - 1)
VALUES = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary()
)
FIELDS = st.dictionaries(st.text().filter(lambda key: key != "v"), VALUES, max_size=6)


@given(session=SESSIONS, number=NUMBERS)
def test_acks_and_detaches_come_back(session, number):
    assert unpack_ack(pack_ack(session, number)) == (session, number)
    assert unpack_detach(pack_detach(session, number)) == (session, number)


@given(data=st.binary(max_size=40).filter(lambda data: len(data) != 24))
def test_an_ack_of_another_length_is_a_format_error(data):
    with pytest.raises(FormatError):
        unpack_ack(data)
    with pytest.raises(FormatError):
        unpack_detach(data)


@given(fields=FIELDS)
def test_maps_come_back_with_the_version(fields):
    assert unpack_map(pack_map(fields)) == {"v": PROTOCOL_VERSION, **fields}


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 0, None, "1", [1]])
def test_another_version_is_told_from_noise_and_says_what_to_do(version):
    with pytest.raises(VersionError, match="update the older of client and daemon"):
        unpack_map(msgpack.packb({"v": version, "session": b"s"}))
    with pytest.raises(VersionError):
        unpack_map(msgpack.packb({"session": b"s"}))


@given(data=st.binary(max_size=60))
def test_random_bytes_are_a_format_error(data):
    try:
        fields = unpack_map(data)
    except FormatError:
        return
    assert fields["v"] == PROTOCOL_VERSION


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb(5),
        msgpack.packb({1: 2, "v": PROTOCOL_VERSION}),
        msgpack.packb({b"v": PROTOCOL_VERSION}),
        pack_map({"a": 1})[:-1],
        pack_map({"a": 1}) + b"\0",
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1v\xd9\xff",
    ],
    ids=lambda payload: payload[:12].hex(),
)
def test_what_is_no_map_is_a_format_error(payload):
    with pytest.raises(FormatError):
        unpack_map(payload)


@given(fields=FIELDS, data=st.data())
def test_a_damaged_map_is_a_map_or_a_format_error(fields, data):
    packed = bytearray(pack_map(fields))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = unpack_map(bytes(packed))
    except FormatError:
        return
    assert all(type(key) is str for key in found)


def test_every_kind_has_a_byte_of_its_own():
    kinds = [
        value
        for name, value in vars(messages).items()
        if name.isupper() and isinstance(value, bytes) and not name.startswith("_")
    ]
    assert len(kinds) >= 11
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set(kinds)) == len(kinds)


def test_the_largest_frame_is_a_message():
    assert FRAME_BYTES_MAX <= MESSAGE_BYTES_MAX
