"""Frames: runs of records, the same bytes in journal, on the wire and in a segment. Pure.

    entry   length u32 | CRC-32 of the record u32 | record            (one per record)
    frame   magic | session | first sequence number | count | length | CRC-32 | entries

The CRC of an entry travels with its record from the rank's memory to MLflow's door, so that damage
costs the records that it hit and no more; the CRC of a frame is what intake checks without looking
at records. All integers are little-endian. See PROTOCOL.md, Frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import crc32

from .errors import FormatError, VersionError

MAGIC = b"MRF"
#: 2 has records of kinds ARTIFACT, REDUCE, COMBINED and TERMINAL; what is written is 2, what is
#: read is both.
VERSION, VERSIONS = 2, (1, 2)
ENTRY = struct.Struct("<II")
ENTRY_BYTES = ENTRY.size
_HEADER = struct.Struct("<3sB16sQIII")
HEADER_BYTES = _HEADER.size  # 40
_CRC_AT = HEADER_BYTES - 4

#: One call is split into records of at most this; larger ones are refused at the call.
RECORD_BYTES_MAX = 4 << 20
#: What the sender puts into one frame; a single larger record gets a frame of its own.
FRAME_BYTES_TARGET = 128 << 10
FRAME_BYTES_MAX = RECORD_BYTES_MAX + ENTRY_BYTES + HEADER_BYTES


class Header(NamedTuple):
    """What stands before the entries of a frame."""

    session: bytes  #: 16 bytes
    first_seq: int  #: sequence number of the first record, counted from 0 in its session
    records: int  #: how many
    body_bytes: int
    crc: int

    @property
    def next_seq(self) -> int:
        return self.first_seq + self.records


def pack_entry(record: bytes) -> bytes:
    """Return the record with its length and CRC before it."""
    return ENTRY.pack(len(record), crc32(record)) + record


def pack_frame(session: bytes, first_seq: int, count: int, body: bytes | memoryview) -> bytes:
    """Return header and body; the body is `count` entries, one behind the other."""
    head = _HEADER.pack(MAGIC, VERSION, session, first_seq, count, len(body), 0)[:_CRC_AT]
    crc = crc32(body, crc32(head))
    return b"".join((head, crc.to_bytes(4, "little"), body))


def read_header(data: bytes | memoryview, offset: int = 0) -> Header:
    """Return the header at `offset`; says nothing of the body.

    Raises:
        FormatError: no frame begins here, or its numbers cannot be.
        VersionError: a frame of a later release.
    """
    if len(data) - offset < HEADER_BYTES:
        raise FormatError(f"{len(data) - offset} bytes are too few for a frame")
    magic, version, session, first_seq, count, body_bytes, crc = _HEADER.unpack_from(data, offset)
    if magic != MAGIC:
        raise FormatError("no frame begins here")
    if version not in VERSIONS:
        raise VersionError(f"frame of version {version}; this release reads up to {VERSION}")
    if body_bytes > FRAME_BYTES_MAX or count < 1 or body_bytes < count * ENTRY_BYTES:
        raise FormatError(f"frame of {count} records in {body_bytes} bytes")
    return Header(session, first_seq, count, body_bytes, crc)


def check_frame(data: bytes | memoryview, offset: int = 0) -> Header:
    """Return the header of the frame at `offset` once its CRC holds.

    Raises: FormatError: truncated or damaged; VersionError: of a later release.
    """
    header = read_header(data, offset)
    end = offset + HEADER_BYTES + header.body_bytes
    if end > len(data):
        raise FormatError(f"frame cut off: {end - len(data)} bytes are missing")
    view = memoryview(data)
    crc = crc32(view[offset + HEADER_BYTES : end], crc32(view[offset : offset + _CRC_AT]))
    if crc != header.crc:
        raise FormatError("frame damaged: its CRC does not fit")
    return header


def check_other_version(data: bytes | bytearray) -> None:
    """Raises: VersionError: the data begin with a whole frame of another version.

    Its CRC, which holds over the version too, tells it from a damaged frame of this one.
    """
    version = data[len(MAGIC)]
    body_bytes, crc = int.from_bytes(data[32:36], "little"), int.from_bytes(data[36:40], "little")
    whole = HEADER_BYTES + body_bytes
    if version in VERSIONS or whole > len(data):
        return
    if crc32(data[HEADER_BYTES:whole], crc32(data[:_CRC_AT])) == crc:
        raise VersionError(f"frame of version {version}; this release reads up to {VERSION}")


def read_frame(data: bytes | memoryview) -> Header:
    """Return the header of a message that must be one whole frame and nothing else.

    Raises: FormatError, VersionError: as `check_frame`, or bytes follow the frame.
    """
    header = check_frame(data)
    if HEADER_BYTES + header.body_bytes != len(data):
        raise FormatError("bytes follow the frame")
    return header


def iter_entries(body: bytes | memoryview) -> Iterator[bytes | None]:
    """Yield the records of a body in order; None for one whose CRC does not fit.

    Ends early, without an error, where a length cannot be: the caller knows the count.
    """
    view = memoryview(body)
    at, end = 0, len(view)
    while at + ENTRY_BYTES <= end:
        length, crc = ENTRY.unpack_from(view, at)
        at += ENTRY_BYTES
        if not 0 < length <= end - at:
            return
        record = bytes(view[at : at + length])
        yield record if crc32(record) == crc else None
        at += length


def cut_entries(entries: Any, start: int, end: int, bytes_max: int) -> tuple[int, int]:
    """Return (count, end) of the entries from `start` that fit into `bytes_max`, at least one.

    Args:
        entries: bytes, or what has slices that are bytes: whole entries from `start` to `end`,
            written by this process and trusted.
    """
    limit = min(end, start + bytes_max)
    count, at = 0, start
    while at < end:
        length = int.from_bytes(entries[at : at + 4], "little") + ENTRY_BYTES
        if at + length > limit and count:
            break
        at += length
        count += 1
    return count, at
