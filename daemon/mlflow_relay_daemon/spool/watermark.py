"""The watermark: the first record of a run that MLflow does not have yet.

Kept in one small file that is replaced after deliveries, without fsync: a lost or old watermark
costs a resend, which MLflow ignores, and nothing else. That of a run whose ranks reduce is fsynced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import msgpack

from mlflow_relay.errors import FormatError
from mlflow_relay_daemon.spool.disk import Disk

NAME = "watermark"
_MAGIC = b"MRW\x01"


@dataclass
class Watermark:
    """A place in a run's segments, and what has been counted up to it."""

    segment: int = 0  #: 0: before the first one
    offset: int = 0  #: of a frame; 0: the first of the segment
    skip: int = 0  #: records of that frame that are done
    settled_records: int = 0  #: delivered, dead, or seen before
    delivered_records: int = 0
    delivered_points: int = 0
    damaged_records: int = 0  #: acknowledged, but not to be read any more
    last_record_ms: int = 0  #: time of the newest record up to here
    sequences: dict[bytes, Any] = field(default_factory=dict)  #: as `Sequences.save` gives them
    reduction: list[Any] = field(default_factory=list)  #: as `Reduction.save` gives it


def write(disk: Disk, folder: Path, mark: Watermark) -> None:
    """Replace the file. Raises: OSError."""
    body = msgpack.packb(list(vars(mark).values()))
    data = _MAGIC + crc32(body).to_bytes(4, "little") + body
    disk.replace(folder / NAME, data, durable=must_last(mark))


def must_last(mark: Watermark) -> bool:
    """Return whether the watermark has what stands nowhere else: values that ranks have given, and
    whose segments may go."""
    return bool(mark.reduction)


def read(folder: Path) -> Watermark | None:
    """Return the watermark; None if there is none yet.

    Raises: FormatError: damaged; the caller begins at the oldest segment.
    """
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return None
    body = data[8:]
    if data[:4] != _MAGIC or crc32(body) != int.from_bytes(data[4:8], "little"):
        raise FormatError("the watermark is damaged")
    try:
        return Watermark(*msgpack.unpackb(body, strict_map_key=False))
    except (ValueError, TypeError) as error:
        raise FormatError(f"the watermark is damaged: {error}") from error
