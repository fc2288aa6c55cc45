"""Which sequence numbers of which session have been seen. Pure.

Normally a session is one number: all before it is here. After a failed fsync and a crash at the
wrong moment frames can stand in a segment out of order; such runs of numbers wait in `ahead` until
what is missing before them turns up or is given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Sequences:
    """Numbers seen, by session (16 bytes)."""

    def __init__(self, saved: Mapping[bytes, Any] | None = None) -> None:
        self._next: dict[bytes, int] = {}
        self._ahead: dict[bytes, list[tuple[int, int]]] = {}
        self.missing = 0  #: records given up
        for session, (next_seq, ahead) in (saved or {}).items():
            self._next[session] = int(next_seq)
            if ahead:
                self._ahead[session] = [(int(a), int(b)) for a, b in ahead]

    def save(self) -> dict[bytes, Any]:
        """Return what the constructor takes."""
        return {
            session: (next_seq, self._ahead.get(session, []))
            for session, next_seq in self._next.items()
        }

    def next_seq(self, session: bytes) -> int:
        """Return the first number of the session that was not seen."""
        return self._next.get(session, 0)

    def is_new(self, session: bytes, first_seq: int, next_seq: int) -> bool:
        """Return whether any number in [first_seq, next_seq) was not seen."""
        at = max(first_seq, self.next_seq(session))
        for low, high in sorted(self._ahead.get(session, ())):
            if low <= at < high:
                at = high
        return at < next_seq

    def add(self, session: bytes, first_seq: int, next_seq: int) -> None:
        """[first_seq, next_seq) have been seen."""
        if first_seq <= self.next_seq(session) and session not in self._ahead:
            self._next[session] = max(self.next_seq(session), next_seq)
            return
        self._ahead.setdefault(session, []).append((first_seq, next_seq))
        self._join(session)

    def give_up(self, session: bytes, before: int | None = None) -> int:
        """Count as missing what is not there before a number (default: before the last one seen).

        Returns: how many records that is.
        """
        ahead = sorted(self._ahead.pop(session, []))
        at = self.next_seq(session)
        end = before if before is not None else max([at, *(high for _, high in ahead)])
        rest, lost = [], 0
        for low, high in ahead:
            if low > max(at, end):
                rest.append((low, high))
                continue
            lost += max(0, low - at)
            at = max(at, high)
        lost += max(0, end - at)
        self._next[session] = max(at, end)
        if rest:
            self._ahead[session] = rest
        self.missing += lost
        return lost

    def forget(self, session: bytes) -> None:
        """The session is over and done with."""
        self._next.pop(session, None)
        self._ahead.pop(session, None)

    def _join(self, session: bytes) -> None:
        rest: list[tuple[int, int]] = []
        at = self.next_seq(session)
        for low, high in sorted(self._ahead.pop(session)):
            if low <= at:
                at = max(at, high)
            elif rest and low <= rest[-1][1]:
                rest[-1] = rest[-1][0], max(high, rest[-1][1])
            else:
                rest.append((low, high))
        self._next[session] = at
        if rest:
            self._ahead[session] = rest
