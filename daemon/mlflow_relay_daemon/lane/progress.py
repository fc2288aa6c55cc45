"""How far a run has been brought, in tags of the run itself. Pure.

Kept where the data are, it needs no folder of its own, holds for every machine from which a sync
may be called, and for the daemon that owns the spool; and it cannot be ahead of the data: a server
that is restored from a backup has the progress of that day. What is told late or lost costs a
resend, which MLflow ignores.

    relay.synced.<name>     JSON, or zlib and base 64 of it in parts: <name>.1, <name>.2, ...
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_relay_daemon.sinks import Tag

SYNCED_TAG = "relay.synced"
TAG_CHARS_MAX = 4000  # mlflow.entities.RunTag: every backend takes 5000
_SESSION = re.compile(r"[0-9a-f]{32}")
PARTS_MAX = 40  # some 10,000 metric keys; a run with more is read again from its beginning


@dataclass
class Progress:
    """What of one spool, or of a run of another store, the server has."""

    #: By session (hex digits): the first sequence number that it lacks. Of other stores: what
    #: their importer counts.
    seen: dict[str, int] = field(default_factory=dict)
    last_record_ms: int = 0
    #: How the end was told: status, time, reason. None: it was not.
    end: list[Any] | None = None
    is_whole: bool = True  #: the artifacts among it are there, too

    def sessions(self) -> dict[bytes, int]:
        """Return what was seen of each session of a spool."""
        return {
            bytes.fromhex(name): next_seq
            for name, next_seq in self.seen.items()
            if _SESSION.fullmatch(name)
        }

    @staticmethod
    def read(tags: Mapping[str, str], name: str) -> Progress:
        """Return what the tags say; nothing, if they are damaged or of a later release."""
        key = _key(name)
        text = tags.get(key, "")
        if text.startswith("z"):
            text = _joined(tags, key, text)
        try:
            version, seen, last_record_ms, end, is_whole = json.loads(text)
            if version == 1:
                return Progress(
                    {str(each): int(count) for each, count in seen.items()},
                    int(last_record_ms),
                    list(end) if end is not None else None,
                    bool(is_whole),
                )
        except (ValueError, TypeError, AttributeError):
            pass  # as if there were none: all is sent again
        return Progress()

    def tags(self, name: str) -> list[Tag]:
        """Return the tags that keep this; none, if there is too much to keep."""
        key = _key(name)
        fields = [1, self.seen, self.last_record_ms, self.end, self.is_whole]
        text = json.dumps(fields, separators=(",", ":"))
        if len(text) <= TAG_CHARS_MAX:
            return [(key, text)]
        packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        parts = [packed[at : at + TAG_CHARS_MAX] for at in range(0, len(packed), TAG_CHARS_MAX)]
        if len(parts) > PARTS_MAX:
            return []
        # The CRC tells parts of two calls, that wrote at the same time, from those of one.
        head = f"z{len(parts)} {zlib.crc32(packed.encode())}"
        return [(key, head), *((f"{key}.{index}", part) for index, part in enumerate(parts, 1))]


def _key(name: str) -> str:
    return f"{SYNCED_TAG}.{name}"


def _joined(tags: Mapping[str, str], key: str, head: str) -> str:
    """Return the JSON of several parts; "" if they do not belong together."""
    count, _, crc = head[1:].partition(" ")
    if not (count.isdecimal() and int(count) <= PARTS_MAX):
        return ""
    packed = "".join(tags.get(f"{key}.{index}", "") for index in range(1, int(count) + 1))
    if str(zlib.crc32(packed.encode())) != crc:
        return ""
    try:
        return zlib.decompress(base64.b64decode(packed)).decode()
    except (zlib.error, ValueError):  # base64's and UTF-8's errors are ValueErrors
        return ""
