"""How and when a run ended, told once by all its nodes together.

Each node that is done writes its word into a tag of the run, and then reads the words of all. Who
finds that no rank is unaccounted for tells the end: of two that finish at once at least one sees
both words, and both would say the same. If words are missing, the owner waits for them a while and
then gives its own; a node that finishes later corrects it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.sinks import NotYet, Tag
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunEvent, RunState, Verdict, next_state, verdict, worst

END_REASON_TAG = "relay.end_reason"
LOST_TAG, DAMAGED_TAG = "relay.lost_records", "relay.damaged_records"
NODE_TAG = "relay.node."  #: followed by the node: its word
#: How long the owner waits for the words of other nodes.
OWNERS_PATIENCE_S = 60.0
ASK_AGAIN_S = 2.0


class Ending:
    """The end of one run."""

    def __init__(self, destination: Destination) -> None:
        self._to = destination
        self._own_end_s: float | None = None
        self.is_leaving = False  #: the daemon stops: no time to wait for other nodes

    def tell(self) -> None:
        """Tell MLflow how the run ended, if that is news; all of it must be delivered.

        Raises: NotYet: other nodes have a word in it; SinkError, Stopped.
        """
        card, mark = self._to.card, self._count_missing()
        own = verdict(card.sessions.values(), mark.last_record_ms)
        told = (card.status, card.end_ms, card.end_reason)
        if card.state is RunState.ENDED and told == (own.status, own.end_ms, own.reason):
            return
        end = own if self._is_alone() else self._agreed(own)
        if end is not None:
            self._to.set_tags(self._tags(end))
            self._to.update(status=end.status, end_time_ms=end.end_ms)
        with self._to.run.lock:
            card.status, card.end_ms, card.end_reason = own.status, own.end_ms, own.reason
            card.state = next_state(card.state, RunEvent.STATUS_DELIVERED)
            self._to.run.save_card()
        self._own_end_s = None

    def reopen(self) -> None:
        """A rank has come back: the run is RUNNING again, and this node's word is void."""
        card = self._to.card
        if not self._is_alone():
            self._to.set_tags([(NODE_TAG + self._to.node, "")])
        self._to.update(status="RUNNING")
        with self._to.run.lock:
            card.state = next_state(card.state, RunEvent.REOPENED)
            card.status = "RUNNING"
            self._to.run.save_card()

    # ── one node ──

    def _is_alone(self) -> bool:
        """Return whether no other node has ranks of this run."""
        return self._to.card.node_count == 1 or len(self._ranks()) >= self._to.card.world_size

    def _ranks(self) -> list[int]:
        sessions = self._to.card.sessions.values()
        return sorted({each.rank for each in sessions if each.primary})

    def _count_missing(self) -> Watermark:
        """What was acknowledged and cannot be found any more is counted; return the watermark."""
        run = self._to.run
        mark = Watermark(**vars(run.mark))
        seen = Sequences(mark.sequences)
        missing = 0
        for name, session in run.card.sessions.items():
            seen.give_up(bytes.fromhex(name), session.first_seq)
            missing += seen.give_up(bytes.fromhex(name), run.next_seq(bytes.fromhex(name)))
        if missing:
            mark.sequences = seen.save()
            mark.damaged_records += missing
            run.settle(mark)
        return mark

    def _tags(self, end: Verdict) -> list[Tag]:
        card, damaged = self._to.card, self._to.run.mark.damaged_records
        tags = [(END_REASON_TAG, end.reason)] if end.reason or card.end_reason else []
        if card.lost_records:
            tags.append((LOST_TAG, str(card.lost_records)))
        if damaged:
            tags.append((DAMAGED_TAG, str(damaged)))
        return tags

    # ── several nodes ──

    def _agreed(self, own: Verdict) -> Verdict | None:
        """Return the end that all nodes agree on; None: another node will tell it.

        Raises: NotYet: this node is the owner, and others are not done.
        """
        now_s = time.monotonic()
        if self._own_end_s is None:
            self._to.set_tags([(NODE_TAG + self._to.node, pack_word(own, self._ranks()))])
            self._own_end_s = now_s
        words = read_words(self._to.ask(lambda: self._to.sink.get_run(self._to.mlflow_run_id)).tags)
        card = self._to.card
        accounted = set().union(*(ranks for _, ranks in words)) if words else set()
        complete = len(accounted) >= card.world_size or len(words) >= (card.node_count or 1 << 30)
        if not complete and not card.is_owned:
            return None
        if not complete and not self.is_leaving and now_s - self._own_end_s < OWNERS_PATIENCE_S:
            raise NotYet("waits for the other nodes to end", retry_after_s=ASK_AGAIN_S)
        return worst([end for end, _ in words] or [own])


def pack_word(end: Verdict, ranks: list[int]) -> str:
    """Return one node's word on its own ranks."""
    word = {"status": end.status, "end_ms": end.end_ms, "reason": end.reason[:500], "ranks": ranks}
    return json.dumps(word)


def read_words(tags: Mapping[str, str]) -> list[tuple[Verdict, list[int]]]:
    """Return the words of all nodes that are done: how their ranks ended, and which these are."""
    found = []
    for key, text in tags.items():
        if key.startswith(NODE_TAG) and text:
            try:
                word: dict[str, Any] = json.loads(text)
                end = Verdict(str(word["status"]), int(word["end_ms"]), str(word["reason"]))
                found.append((end, [int(rank) for rank in word["ranks"]]))
            except (ValueError, KeyError, TypeError):
                continue  # somebody's own tag: no word of ours
    return found
