"""The run card: all that is known about one run, in a small JSON file, replaced atomically."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from zlib import crc32

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.states import RunState

NAME = "card.json"
VERSION = 1


@dataclass
class SessionCard:
    """One client's life, as far as the run's end needs to know it."""

    rank: int
    node: str
    pid: int
    primary: bool  #: a rank, not a forked child of one
    start_ms: int
    first_seq: int = 0  #: where it began here; before that it spoke to another spool
    closed: bool = False  #: it will send nothing more
    end_status: str | None = None  #: the rank's own word; None: it never gave one
    end_ms: int | None = None
    end_reason: str = ""
    lost: int = 0  #: log calls that found its journal full


@dataclass
class Card:
    """What is known about one run."""

    run_id: str  #: the relay run id
    run_key: str
    experiment_name: str
    run_name: str  #: "": MLflow makes one up
    start_ms: int
    world_size: int
    tags: dict[str, str]  #: of the rank that came first: user, command, commit, ...
    state: RunState = RunState.NEW
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    create_attempts: int = 0  #: more than one: a lost answer may have left a second run behind
    status: str = "RUNNING"  #: as MLflow was told last
    end_ms: int | None = None
    end_reason: str = ""
    sessions: dict[str, SessionCard] = field(default_factory=dict)  #: by hex digits

    @property
    def is_over(self) -> bool:
        """All ranks are gone, and MLflow knows the end."""
        return self.state is RunState.ENDED and all(each.closed for each in self.sessions.values())

    @property
    def lost_records(self) -> int:
        """Log calls that found a full journal, as far as is known."""
        return sum(session.lost for session in self.sessions.values())


def pack(card: Card) -> bytes:
    """Return the card as the bytes of its file."""
    values = asdict(card)
    return json.dumps({"version": VERSION, "crc": _crc(values), **values}, indent=1).encode()


def unpack(data: bytes) -> Card:
    """Return the card. Raises: FormatError: damaged; VersionError: of a later release."""
    try:
        values: dict[str, Any] = json.loads(data)
        version, crc = values.pop("version"), values.pop("crc")
        if version != VERSION:
            raise VersionError(f"run card of version {version}; this release reads {VERSION}")
        if crc != _crc(values):
            raise FormatError("the run card is damaged: its CRC does not fit")
        card = Card(**_known(Card, values))
        card.state = RunState(card.state)
        card.sessions = {
            name: SessionCard(**_known(SessionCard, each))
            for name, each in values["sessions"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"the run card is damaged: {error}") from error
    return card


def _crc(values: dict[str, Any]) -> int:
    return crc32(json.dumps(values).encode())


def _known(kind: type[Card | SessionCard], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that this release knows; a later one may have added others."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def write(disk: Disk, folder: Path, card: Card) -> None:
    """Replace the card's file; it is on the disk when this returns. Raises: OSError."""
    disk.replace(folder / NAME, pack(card), durable=True)


def read(folder: Path) -> Card:
    """Return the card of a run's folder. Raises: FormatError, VersionError, OSError."""
    return unpack((folder / NAME).read_bytes())
