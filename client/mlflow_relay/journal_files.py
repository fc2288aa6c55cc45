"""Bytes of the two files of a journal ⇄ values. Pure; the daemon reads dead ranks' files with it.

    <session>.journal       magic, length and CRC of the card; counters; the card
    <session>.<n>.entries   magic, CRC, session, first sequence number; tail; entries

Counters and tail are 8-byte words in the machine's order: they change by one aligned store, so that
there is no half of them, and they never leave the machine. See PROTOCOL.md, Journal.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

from .errors import FormatError, VersionError
from .frames import ENTRY_BYTES, FRAME_BYTES_TARGET, iter_entries, pack_entry, pack_frame

BASE_SUFFIX, ENTRIES_SUFFIX = ".journal", ".entries"
NEW_SUFFIX = ".new"  # of a base file that is being made
_VERSION = 1
_BASE_MAGIC, _ENTRIES_MAGIC = b"MRJ", b"MRE"

# The base file. Words are counted from the start of the file.
_BASE_HEAD = struct.Struct("<3sBII")  # magic, version, length and CRC of the card
NEXT_SEQ_WORD, ACKED_WORD, LOST_WORD = 2, 3, 4
_COUNTERS = struct.Struct("@3Q")
_COUNTERS_AT = 16
CARD_AT = 64
CARD_BYTES_MAX = 1 << 20

# An entries file.
_ENTRIES_HEAD = struct.Struct("<3sBI16sQ")  # magic, version, CRC, session, first sequence number
TAIL_WORD = 4
_TAIL = struct.Struct("@Q")
_TAIL_AT = 32
ENTRIES_AT = 64


#: More a session cannot have had: a call takes a microsecond, and these take twelve days.
COUNTER_MAX = 1 << 40
#: More no journal holds: a record takes some thirty bytes, and these take 8 GB.
UNACKED_MAX = 1 << 28


class Base(NamedTuple):
    """What the base file says."""

    card: bytes
    next_seq: int  #: records accepted so far; may be one behind
    acked: int  #: records that the spool has
    lost: int  #: records that found the journal full


def pack_base_head(card: bytes) -> bytes:
    """Return what stands at the start of a base file."""
    return _BASE_HEAD.pack(_BASE_MAGIC, _VERSION, len(card), crc32(card))


def read_base(data: bytes) -> Base:
    """Return what a base file says. Raises: FormatError, VersionError.

    Damaged counters are zero: what the entries files hold counts then.
    """
    if len(data) < CARD_AT:
        raise FormatError(f"journal of {len(data)} bytes")
    magic, version, length, crc = _BASE_HEAD.unpack_from(data)
    _check_magic(magic, version, _BASE_MAGIC)
    card = data[CARD_AT : CARD_AT + length]
    if len(card) != length or crc32(card) != crc:
        raise FormatError("the card of the journal is damaged")
    try:
        return Base(card, *read_counters(data))
    except FormatError:
        return Base(card, 0, 0, 0)


def read_counters(data: bytes) -> tuple[int, int, int]:
    """Return (next sequence number, acknowledged, lost) from the first 64 bytes of a base file.

    Raises: FormatError: they are damaged.
    """
    next_seq, acked, lost = _COUNTERS.unpack_from(data, _COUNTERS_AT)
    # An ack may overtake the counter by one: it is moved after the tail.
    if not -1 <= next_seq - acked <= UNACKED_MAX or max(next_seq, lost) > COUNTER_MAX:
        raise FormatError("the counters of the journal are damaged")
    return next_seq, acked, lost


def pack_entries_head(session: bytes, first_seq: int) -> bytes:
    """Return what stands at the start of an entries file, before its tail."""
    crc = crc32(session + first_seq.to_bytes(8, "little"))
    return _ENTRIES_HEAD.pack(_ENTRIES_MAGIC, _VERSION, crc, session, first_seq)


def _read_entries_head(data: bytes) -> tuple[bytes, int]:
    """Return (session, first sequence number). Raises: FormatError, VersionError."""
    if len(data) < ENTRIES_AT:
        raise FormatError(f"entries file of {len(data)} bytes")
    magic, version, crc, session, first_seq = _ENTRIES_HEAD.unpack_from(data)
    _check_magic(magic, version, _ENTRIES_MAGIC)
    if crc32(session + first_seq.to_bytes(8, "little")) != crc:
        raise FormatError("the head of the entries file is damaged")
    return session, first_seq


def first_seq_of(data: bytes) -> int | None:
    """Return the first sequence number of an entries file; None: a spare, or not to be told.

    Args: data: at least its first ENTRIES_AT bytes.
    """
    try:
        return _read_entries_head(data)[1]
    except FormatError:
        return None


def holds_nothing(data: bytes) -> bool:
    """Return whether no record was ever put into an entries file.

    Args: data: at least its first ENTRIES_AT + ENTRY_BYTES bytes, less if the file has less.
    """
    if not any(data):
        return True
    if first_seq_of(data) is None or any(data[ENTRIES_AT : ENTRIES_AT + ENTRY_BYTES]):
        return False
    return _TAIL.unpack_from(data, _TAIL_AT)[0] in (0, ENTRIES_AT)


class Salvage(NamedTuple):
    """What could be read of one entries file."""

    frames: list[bytes]  #: in order; where records are damaged, sequence numbers are missing
    next_seq: int  #: behind the last record that the file held
    damaged: int  #: records whose CRC does not fit


def salvage_entries(data: bytes, session: bytes, from_seq: int) -> Salvage:
    """Return the records of a dead session's entries file from `from_seq` on, as frames.

    A damaged tail is no reason to lose records: each has a CRC of its own, so reading goes on as
    long as they hold.

    Raises: FormatError, VersionError: not an entries file of this session.
    """
    if not any(data[:ENTRIES_AT]):
        return Salvage([], from_seq, 0)  # the spare: nothing was ever put into it
    owner, first_seq = _read_entries_head(data)
    if owner != session:
        raise FormatError("entries of another session")
    (tail,) = _TAIL.unpack_from(data, _TAIL_AT)
    trusted = ENTRIES_AT <= tail <= len(data)
    body = memoryview(data)[ENTRIES_AT : tail if trusted else len(data)]
    frames: list[bytes] = []
    damaged, seq = 0, first_seq
    group: list[bytes] = []
    group_seq = group_bytes = 0
    for record in iter_entries(body):
        if not trusted and (record is None or not record):
            break  # what follows the last entry of an unknown tail is not ours
        usable = record is not None and seq >= from_seq
        damaged += record is None
        if group and (not usable or group_bytes >= FRAME_BYTES_TARGET):
            frames.append(pack_frame(session, group_seq, len(group), b"".join(group)))
            group = []
        if usable and record is not None:
            if not group:
                group_seq, group_bytes = seq, 0
            group.append(pack_entry(record))
            group_bytes += len(group[-1])
        seq += 1
    if group:
        frames.append(pack_frame(session, group_seq, len(group), b"".join(group)))
    return Salvage(frames, seq, damaged)


def _check_magic(magic: bytes, version: int, expected: bytes) -> None:
    if magic != expected or not version:  # a version 0 never was: it is what a disk puts there
        raise FormatError("not a journal file")
    if version != _VERSION:
        raise VersionError(f"journal of version {version}; this release reads {_VERSION}")
