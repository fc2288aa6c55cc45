"""The run card: all that is known about one run, in a small JSON file, replaced atomically."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints
from zlib import crc32

import orjson

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.states import RunState

NAME = "card.json"
VERSION = 1
_SESSION = re.compile(r"[0-9a-f]{32}")
#: The run key of a run that was made over HTTP begins so.
OWN_KEY = "api/"


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
    node_rank: int | None = None  #: number of its node in the job; None: not told
    local_world_size: int = 0  #: ranks on this node; 0: not told
    next_seq: int = 0  #: how many records it had, known when it was closed
    is_own: bool = False  #: the daemon's, for what comes over HTTP: it has no journal


@dataclass
class Link:
    """A run that this one goes back to."""

    asked: str  #: as the rank named it: a relay run id or an MLflow run id
    mlflow_run_id: str | None = None  #: None: not known yet
    is_told: bool = False  #: MLflow has tags and params of it
    is_waiting: bool = False  #: MLflow has been told that it waits
    is_dropped: bool = False  #: an operator gave it up
    is_by_hand: bool = False  #: an operator named the run, in place of what the rank had named


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
    user: str = ""  #: "": the tag mlflow.user says it
    uid: int | None = None  #: of the user whose run it is; None: the daemon's own
    is_named: bool = False  #: by the user; else it takes its parent's name, or MLflow's
    node_count: int = 0  #: 0: not told
    resume_mode: str = "child"
    parent: Link | None = None  #: the run that is resumed
    fork: Link | None = None  #: the run whose weights this one started from
    is_introduced: bool = False  #: MLflow has the params that say that it is its own origin
    has_artifacts_to_come: bool = False  #: MLflow has been told so
    held: list[list[Any]] = field(default_factory=list)  #: texts that wait for a translation
    state: RunState = RunState.NEW
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    create_attempts: int = 0  #: more than one: a lost answer may have left a second run behind
    is_deleted: bool = False  #: in MLflow, by its own client: its end is told to nobody
    status: str = "RUNNING"  #: as MLflow was told last
    end_ms: int | None = None
    end_reason: str = ""
    told_sessions: int = 0  #: how many sessions that end is of: other nodes may wait for a late one
    #: By hex digits. Grows while lanes look at it without the lock: they look at a list of it.
    sessions: dict[str, SessionCard] = field(default_factory=dict)

    def open_links(self) -> list[Link]:
        """Return the links that MLflow does not have yet."""
        links = [self.resumed_parent(), self.fork]
        return [each for each in links if each and not each.is_told and not each.is_dropped]

    def waiting_links(self) -> list[Link]:
        """Return the links that wait here for a run to be known.

        The owner's node tells the links. Other nodes need them all the same, to know the run that
        goes on, and what texts that name it are to say.
        """
        links = self.open_links() if self.is_owned else []
        if self.itself() is not None and self.state is RunState.NEW and self.parent is not None:
            links.append(self.parent)
        held = {value for _, _, value in self.held}
        links += [each for each in (self.parent, self.fork) if each and each.asked in held]
        return [
            each
            for index, each in enumerate(links)
            if not each.is_dropped
            and each.mlflow_run_id is None
            and not any(each is other for other in links[:index])
        ]

    def itself(self) -> str | None:
        """Return the id of the run that goes on as itself (modes "same" and "guest"), if any."""
        if self.parent is None or self.is_origin or self.resume_mode == "child":
            return None
        return self.parent.asked

    @property
    def is_only_here(self) -> bool:
        """Its id is random and came up in this daemon: nobody else can have made the run."""
        return self.run_key == OWN_KEY + self.run_id

    @property
    def is_guest(self) -> bool:
        """It writes to a run that is others': its end is told only if a rank here took it over."""
        return self.resume_mode == "guest" and not any(
            session.primary for session in list(self.sessions.values())
        )

    def resumed_parent(self) -> Link | None:
        """Return the link to the run under which this one is to hang, if there is one."""
        return None if self.is_origin or self.resume_mode != "child" else self.parent

    @property
    def is_origin(self) -> bool:
        """It resumes no other run."""
        return self.parent is None or self.parent.is_dropped

    @property
    def is_owned(self) -> bool:
        """This daemon is on the node of global rank 0, or on the only one: it makes the run."""
        return self.node_count == 1 or any(
            session.primary and session.rank == 0 for session in list(self.sessions.values())
        )

    @property
    def is_over(self) -> bool:
        """All ranks are gone, and MLflow knows the end."""
        return self.state is RunState.ENDED and all(
            each.closed for each in list(self.sessions.values())
        )

    @property
    def lost_records(self) -> int:
        """Log calls that found a full journal, as far as is known."""
        return sum(session.lost for session in list(self.sessions.values()))


def pack(card: Card) -> bytes:
    """Return the card as the bytes of its file."""
    # orjson knows dataclasses, and indents in C: 80 ms less for a run of 1,000 sessions.
    values = orjson.loads(orjson.dumps(card))
    card_file = {"version": VERSION, "crc": _crc(values), **values}
    return orjson.dumps(card_file, option=orjson.OPT_INDENT_2)


def unpack(data: bytes) -> Card:
    """Return the card. Raises: FormatError: damaged; VersionError: of a later release."""
    try:
        values: dict[str, Any] = json.loads(data)
        version, crc = values.pop("version"), values.pop("crc", None)
        if version > VERSION:
            raise VersionError(f"run card of version {version}; this release reads {VERSION}")
        if version != VERSION:
            raise FormatError(f"the run card is damaged: there was no version {version}")
        if crc not in (None, _crc(values)):  # None: somebody has mended it by hand
            raise FormatError("the run card is damaged: its CRC does not fit")
        card = Card(**_known(Card, values))
        card.state = RunState(card.state)
        card.parent = Link(**_known(Link, values["parent"])) if values.get("parent") else None
        card.fork = Link(**_known(Link, values["fork"])) if values.get("fork") else None
        card.sessions = {
            name: SessionCard(**_known(SessionCard, each))
            for name, each in values["sessions"].items()
        }
        _check(card)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"the run card is damaged: {error}") from error
    return card


def _check(card: Card) -> None:
    """Raises: FormatError, TypeError: somebody mended the card by hand, and not well."""
    links = [each for each in (card.parent, card.fork) if each is not None]
    parts: list[Card | Link | SessionCard] = [card, *links, *card.sessions.values()]
    for each in parts:
        for name, kinds in _KINDS[type(each)].items():
            if type(getattr(each, name)) not in kinds:
                raise FormatError(f"the run card is damaged: {name} is {getattr(each, name)!r}")
    if not all(_SESSION.fullmatch(name) for name in card.sessions):
        raise FormatError("the run card is damaged: a session is not 32 hex digits")
    if not all(len(text) == 3 and set(map(type, text)) == {str} for text in card.held):
        raise FormatError("the run card is damaged: held is not kind, key and value")
    if set(map(type, card.tags.values())) - {str}:
        raise FormatError("the run card is damaged: a tag is no text")
    orjson.dumps(card)  # numbers of 64 bits, whole characters: it can be written again


def _kinds(of: type) -> dict[str, tuple[type, ...]]:
    """Return the types that each field of a dataclass may have."""
    return {
        name: get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        for name, hint in get_type_hints(of).items()
    }


_KINDS = {kind: _kinds(kind) for kind in (Card, Link, SessionCard)}


def _crc(values: dict[str, Any]) -> int:
    return crc32(json.dumps(values).encode())


def _known(kind: type[Card | SessionCard | Link], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that this release knows; a later one may have added others."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def write(disk: Disk, folder: Path, card: Card) -> None:
    """Replace the card's file; it is on the disk when this returns. Raises: OSError."""
    disk.replace(folder / NAME, pack(card), durable=True)


def read(folder: Path) -> Card:
    """Return the card of a run's folder. Raises: FormatError, VersionError, OSError."""
    return unpack((folder / NAME).read_bytes())
