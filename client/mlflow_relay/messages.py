"""Messages between client and daemon: kinds, and bytes ⇄ values. Pure. See PROTOCOL.md, Messages.

Every message is two ZeroMQ parts: one byte that names the kind, and a payload. Payloads are
msgpack maps, but for those of fixed form: DATA is a frame, others a session, or a session and a
number.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from .errors import FormatError, VersionError

#: Raised when rank and daemon could no longer understand each other.
PROTOCOL_VERSION = 1

# client → daemon
ATTACH = b"A"  #: this session lives (map: see run.session_card)
DATA = b"D"  #: one frame
ALIVE = b"H"  #: session (16 bytes): nothing to send, still here
DETACH = b"X"  #: session, lost log calls: all is acked, the session is over
CONTROL = b"C"  #: operator's request (map: v, command, ...)
# daemon → client
ATTACHED = b"a"  #: map: session, next_seq, mlflow_run_id
ACK = b"k"  #: session, next sequence number that the spool wants: all before it is fsynced
NEWS = b"n"  #: map: session, mlflow_run_id
DETACHED = b"x"  #: session (16 bytes)
UNKNOWN = b"u"  #: session (16 bytes): attach first (the daemon has been restarted)
REFUSED = b"e"  #: map: session, error: the daemon will not take this session; the text says why
REPLY = b"r"  #: answer to CONTROL (map: v, ok, ...)

SESSION_BYTES = 16
TEXT_CHARS_MAX = 2000  #: of one field of an ATTACH
MESSAGE_BYTES_MAX = 8 << 20  #: more than any frame
_SESSION_AND_NUMBER = struct.Struct("<16sQ")


def pack_ack(session: bytes, next_seq: int) -> bytes:
    """Return the payload of an ACK."""
    return _SESSION_AND_NUMBER.pack(session, next_seq)


def pack_detach(session: bytes, lost: int) -> bytes:
    """Return the payload of a DETACH. Args: lost: log calls that found the journal full."""
    return _SESSION_AND_NUMBER.pack(session, lost)


def unpack_session(payload: bytes) -> bytes:
    """Return the session of an ALIVE. Raises: FormatError: not 16 bytes."""
    if len(payload) != SESSION_BYTES:
        raise FormatError(f"{len(payload)} bytes for a session")
    return payload


def unpack_ack(payload: bytes) -> tuple[bytes, int]:
    """Return (session, next sequence number). Raises: FormatError: not 24 bytes."""
    if len(payload) != _SESSION_AND_NUMBER.size:
        raise FormatError(f"{len(payload)} bytes for a session and a number")
    session, number = _SESSION_AND_NUMBER.unpack(payload)
    return session, number


#: Of a DETACH: (session, lost log calls).
unpack_detach = unpack_ack


def pack_map(fields: dict[str, Any]) -> bytes:
    """Return a map with the protocol's version in it."""
    packed: bytes = msgpack.packb({"v": PROTOCOL_VERSION, **fields})
    return packed


def unpack_map(payload: bytes, *, any_version: bool = False) -> dict[str, Any]:
    """Return the map of a message.

    Args: any_version: also of a peer that speaks another protocol version.
    Raises: FormatError: no msgpack map with text keys; VersionError: of another protocol version.
    """
    try:
        fields = msgpack.unpackb(payload, strict_map_key=True)
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise FormatError(f"not msgpack: {error}") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise FormatError("not a map")
    if not any_version and fields.get("v") != PROTOCOL_VERSION:
        raise VersionError(
            f"protocol version {fields.get('v')!r}; this release speaks {PROTOCOL_VERSION}: "
            "update the older of client and daemon"
        )
    return fields
