"""What a session says of itself when it attaches; kept in its journal, too. Pure.

Fields and limits: PROTOCOL.md, ATTACH.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_relay.errors import FormatError
from mlflow_relay.lineage import RESUME_MODES
from mlflow_relay.messages import SESSION_BYTES, TEXT_CHARS_MAX, unpack_map
from mlflow_relay_daemon.spool.card import Card, Link, SessionCard

TAGS_MAX = 100
#: It stands in the run's card, and in the head of each segment.
ATTACHMENT_BYTES_MAX = 1 << 20
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_OPTIONAL: dict[str, Any] = {
    "node_count": 0,
    "local_world_size": 0,
    "resume": "",
    "resume_mode": "child",
    "fork": "",
    "is_plain": False,
}


@dataclass(frozen=True)
class Attachment:
    """One session's word about itself and its run."""

    session: bytes
    run_id: str
    run_key: str
    experiment_name: str
    run_name: str
    rank: int
    world_size: int
    node: str
    pid: int
    primary: bool
    start_ms: int
    tags: dict[str, str]
    first_seq: int  #: of the oldest record that the session still has
    node_count: int = 0  #: 0: not told
    resume: str = ""
    resume_mode: str = "child"
    fork: str = ""
    is_plain: bool = False  #: MLflow's own code speaks: no params of ours
    node_rank: int | None = None  #: None: not told
    local_world_size: int = 0  #: 0: not told

    def new_card(self) -> Card:
        """Return the card of a run that nothing was known of."""
        return Card(
            run_id=self.run_id,
            run_key=self.run_key,
            experiment_name=self.experiment_name,
            run_name=self.run_name,
            start_ms=self.start_ms,
            world_size=self.world_size,
            tags=self.tags,
            is_named=bool(self.run_name),
            node_count=self.node_count,
            resume_mode=self.resume_mode,
            parent=Link(self.resume) if self.resume else None,
            fork=Link(self.fork) if self.fork else None,
            is_introduced=self.is_plain,
        )

    def session_card(self) -> SessionCard:
        """Return what the run's card keeps of the session."""
        return SessionCard(
            rank=self.rank,
            node=self.node,
            pid=self.pid,
            primary=self.primary,
            start_ms=self.start_ms,
            first_seq=self.first_seq,
            node_rank=self.node_rank,
            local_world_size=self.local_world_size,
        )


def read_attachment(payload: bytes) -> Attachment:
    """Return what an ATTACH, or the card of a journal, says.

    Raises: FormatError: a field is missing or cannot be; VersionError: another protocol version.
    """
    session = unpack_session(payload)
    if len(payload) > ATTACHMENT_BYTES_MAX:
        raise FormatError(f"an attachment of {len(payload)} bytes; at most {ATTACHMENT_BYTES_MAX}")
    fields = {**_OPTIONAL, **unpack_map(payload)}
    tags = _of_type(fields, "tags", dict)
    if len(tags) > TAGS_MAX or set(map(type, [*tags, *tags.values()])) - {str}:
        raise FormatError(f"tags are not at most {TAGS_MAX} texts by text")
    mode = _text(fields, "resume_mode")
    if mode not in (*RESUME_MODES, "guest"):
        raise FormatError(f"resume_mode {mode[:20]!r}")
    return Attachment(
        session=session,
        run_id=_run_id(fields, "run_id"),
        run_key=_text(fields, "run_key"),
        experiment_name=_text(fields, "experiment_name"),
        run_name=_text(fields, "run_name"),
        rank=_whole(fields, "rank"),
        world_size=_whole(fields, "world_size"),
        node=_text(fields, "node"),
        pid=_whole(fields, "pid"),
        primary=_of_type(fields, "primary", bool),
        start_ms=_whole(fields, "start_ms"),
        tags=tags,
        node_count=_whole(fields, "node_count"),
        resume=_run_id(fields, "resume", optional=True),
        resume_mode=mode,
        fork=_run_id(fields, "fork", optional=True),
        is_plain=_of_type(fields, "is_plain", bool),
        first_seq=_whole(fields, "first_seq") if "first_seq" in fields else 0,
        node_rank=None if fields.get("node_rank") is None else _whole(fields, "node_rank"),
        local_world_size=_whole(fields, "local_world_size"),
    )


def unpack_session(payload: bytes) -> bytes:
    """Return who sends an ATTACH that may be wrong otherwise. Raises: FormatError."""
    session: bytes = _of_type(unpack_map(payload, any_version=True), "session", bytes)
    if len(session) != SESSION_BYTES:
        raise FormatError(f"a session of {len(session)} bytes")
    return session


def _of_type(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        raise FormatError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    text: str = _of_type(fields, name, str)
    if len(text) > TEXT_CHARS_MAX:
        raise FormatError(f"{name} has {len(text)} characters; at most {TEXT_CHARS_MAX}")
    return text


def _run_id(fields: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    text = _text(fields, name)
    if not (_RUN_ID.fullmatch(text) or (optional and not text)):
        raise FormatError(f"{name} is not 32 hex digits")
    return text


def _whole(fields: Mapping[str, Any], name: str) -> int:
    number: int = _of_type(fields, name, int)
    if not 0 <= number < 1 << 63:
        raise FormatError(f"{name} is {number}")
    return number
