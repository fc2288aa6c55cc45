"""The life cycle of a run, as a table, and how a run ended. Pure. See INTERNALS.md, Life cycle."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple, Protocol


class RunState(str, Enum):
    """What MLflow has been told of a run."""

    NEW = "new"  #: nothing yet
    OPEN = "open"  #: it is RUNNING
    ENDED = "ended"  #: how and when it ended


class RunEvent(Enum):
    """What can happen to a run."""

    CREATED = "MLflow has given it an id"
    STATUS_DELIVERED = "all ranks are gone, all is delivered, and MLflow knows the end"
    REOPENED = "a rank has come back, and MLflow knows that it is RUNNING again"


TRANSITIONS: dict[tuple[RunState, RunEvent], RunState] = {
    (RunState.NEW, RunEvent.CREATED): RunState.OPEN,
    (RunState.OPEN, RunEvent.STATUS_DELIVERED): RunState.ENDED,
    (RunState.ENDED, RunEvent.REOPENED): RunState.OPEN,
    # Late data of a rank that was long dead: delivered, and the end told again.
    (RunState.ENDED, RunEvent.STATUS_DELIVERED): RunState.ENDED,
}


def next_state(state: RunState, event: RunEvent) -> RunState:
    """Return the state after an event. Raises: KeyError: it cannot happen in this state."""
    return TRANSITIONS[state, event]


class EndedSession(Protocol):
    """What `verdict` needs to know of a session (see spool.card.SessionCard)."""

    rank: int
    node: str
    pid: int
    primary: bool
    start_ms: int
    end_status: str | None
    end_ms: int | None
    end_reason: str


class Verdict(NamedTuple):
    """How a run ended."""

    status: str
    end_ms: int
    reason: str


#: The worst word of any rank is the run's.
_SEVERITY = {"FINISHED": 0, "KILLED": 1, "FAILED": 2}


def verdict(sessions: Iterable[EndedSession], last_record_ms: int) -> Verdict:
    """Return how a run ended whose sessions are all over.

    Only the latest session of each rank speaks: a rank that came back has made good for the one
    that vanished. Forked children have no say.

    Args:
        sessions: at least one primary, else the run is taken as FINISHED.
        last_record_ms: time of the newest record: the best that is known of the end of a rank
            that vanished.
    """
    latest: dict[int, EndedSession] = {}
    for session in sorted(sessions, key=lambda each: each.start_ms):
        if session.primary:
            latest[session.rank] = session
    words = [_word(session, last_record_ms) for session in latest.values()]
    return worst(words) if words else Verdict("FINISHED", last_record_ms, "")


def worst(words: Iterable[Verdict]) -> Verdict:
    """Return the worst of at least one word, at the time of the last."""
    words = list(words)
    found = max(words, key=lambda word: (_SEVERITY.get(word.status, 0), bool(word.reason)))
    return found._replace(end_ms=max(word.end_ms for word in words))


def _word(session: EndedSession, last_record_ms: int) -> Verdict:
    if session.end_status is not None and session.end_ms is not None:
        reason = session.end_reason and f"rank {session.rank}: {session.end_reason}"
        return Verdict(session.end_status, session.end_ms, reason)
    return Verdict(
        "FAILED",
        max(last_record_ms, session.start_ms),
        f"rank {session.rank} on {session.node} (pid {session.pid}) vanished without ending the "
        "run: killed, out of memory, or its node failed",
    )
