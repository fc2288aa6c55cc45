"""How and when a run ended, told once by all its nodes together.

Each node that is done writes its word on its ranks into a tag of the run, and then reads the words
of all. Of a rank that has lived more than once, wherever, the latest life counts. Who finds that no
rank is unaccounted for tells the end: of two that finish at once at least one sees both words, and
both would say the same. If words are missing, the owner waits for them a while and then tells what
it knows; a node that finishes later corrects it. A node whose ranks came back takes its word back.

A run that goes on as itself (mode "same") has several lives, each a relay run: the last of them has
the say, whichever is delivered last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlflow_relay.records import GOES_ON
from mlflow_relay_daemon.lane.destination import OWNER_TAG, Destination, is_followed
from mlflow_relay_daemon.sinks import NotYet, RunInfo, Tag
from mlflow_relay_daemon.spool.card import SessionCard
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunEvent, RunState, Verdict, next_state, verdict, worst

END_REASON_TAG = "relay.end_reason"
LOST_TAG, DAMAGED_TAG = "relay.lost_records", "relay.damaged_records"
NODE_TAG = "relay.node."  #: followed by the node: its word
#: How long the owner waits for the words of other nodes.
OWNERS_PATIENCE_S = 60.0
ASK_AGAIN_S = 2.0
#: A word must fit into a tag, with hundreds of ranks.
REASONS_MAX, REASON_CHARS_MAX = 3, 200


class RankWord(NamedTuple):
    """How one rank ended, the last time that it was seen on a node."""

    rank: int
    start_ms: int
    end: Verdict


class NodeWord(NamedTuple):
    """What one node says of its ranks."""

    node: str
    alive_since_ms: int | None  #: ranks live there; None: it is done
    ranks: list[RankWord]


class Ending:
    """The end of one run."""

    def __init__(self, destination: Destination) -> None:
        self._to = destination
        self._said = ""  #: this node's word
        self._said_s = 0.0
        self.is_leaving = False  #: the daemon stops: no time to wait for other nodes

    def tell(self) -> None:
        """Tell MLflow how the run ended, if that is news; all of it must be delivered.

        Raises: NotYet: other nodes have a word in it; SinkError, Stopped.
        """
        card, mark = self._to.card, self._count_missing()
        # What the daemon keeps for guests says nothing of the end.
        sessions = [each for each in card.sessions.values() if each.primary or not each.is_own]
        own = verdict(sessions, mark.last_record_ms)
        told = (card.status, card.end_ms, card.end_reason, card.told_sessions)
        if card.state is RunState.ENDED and told == (*own, len(sessions)):
            return
        if card.is_guest or card.is_deleted:
            self._settle(own, len(sessions))
            return
        words = rank_words(sessions, mark.last_record_ms)
        if self._said or not self._is_alone():  # what it has said may be of fewer ranks
            self._say(words)
        info = self._ask()
        if not self._said and self._others_took_part(info.tags):
            self._say(words)
            info = self._ask()
        end: Verdict | None = own
        if is_followed(info.tags, card):
            end = None
        elif self._said:
            end = self._agreed(own, info)
        if end is not None:
            self._to.set_tags(self._tags(end, info.tags))
            if end.status == GOES_ON:
                self._to.update(status=end.status)
            else:
                self._to.update(status=end.status, end_time_ms=end.end_ms)
        self._settle(own, len(sessions))

    def _settle(self, own: Verdict, told_sessions: int) -> None:
        card = self._to.card
        with self._to.run.lock:
            card.status, card.end_ms, card.end_reason = own
            card.told_sessions = told_sessions
            card.state = next_state(card.state, RunEvent.STATUS_DELIVERED)
            self._to.run.save_card()

    def reopen(self) -> None:
        """A rank has come back: the run is RUNNING again, and this node's word is void."""
        card = self._to.card
        if self._said or not self._is_alone():
            self._say_that_ranks_live()
        self._to.update(status="RUNNING")
        with self._to.run.lock:
            card.state = next_state(card.state, RunEvent.REOPENED)
            card.status = "RUNNING"
            self._to.run.save_card()

    def take_back(self) -> None:
        """Ranks live: if this node has said that it is done, before others were, that is void."""
        if self._said:
            self._say_that_ranks_live()

    def join(self, found: RunInfo) -> None:
        """Ranks live here of a run that was there already, and may have ended: on another node, or
        here, so long ago that the spool has forgotten it."""
        sink, tag = self._to.sink, self._alive_tag()
        if found.tags.get(OWNER_TAG, self._to.node) != self._to.node:
            self._to.ask(lambda: sink.log_batch(found.run_id, [], [], [tag]))
        if found.status != "RUNNING":
            self._to.ask(lambda: sink.update_run(found.run_id, status="RUNNING"))

    # ── one node ──

    def _is_alone(self) -> bool:
        """Return whether no other node has ranks of this run."""
        return self._to.card.node_count == 1 or len(self._ranks()) >= self._to.card.world_size

    def _ranks(self) -> list[int]:
        sessions = list(self._to.card.sessions.values())
        return sorted({each.rank for each in sessions if each.primary})

    def _count_missing(self) -> Watermark:
        """What was acknowledged and cannot be found any more is counted; return the watermark."""
        run = self._to.run
        with run.lock:  # what a rank that came back sends meanwhile waits, and is not missing
            mark = Watermark(**vars(run.mark))
            if not run.is_drained():
                return mark
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

    def _tags(self, end: Verdict, before: Mapping[str, str]) -> list[Tag]:
        card, damaged = self._to.card, self._to.run.mark.damaged_records
        has_reason = end.reason or before.get(END_REASON_TAG)
        tags = [(END_REASON_TAG, end.reason)] if has_reason else []
        if card.lost_records:
            tags.append((LOST_TAG, str(card.lost_records)))
        if damaged:
            tags.append((DAMAGED_TAG, str(damaged)))
        return tags

    # ── several nodes ──

    def _ask(self) -> RunInfo:
        return self._to.ask(lambda: self._to.sink.get_run(self._to.mlflow_run_id))

    def _say(self, words: list[RankWord]) -> None:
        word = pack_word(self._to.card.run_id, words)
        if word != self._said:
            self._to.set_tags([(NODE_TAG + self._to.node, word)])
            self._said, self._said_s = word, time.monotonic()

    def _say_that_ranks_live(self) -> None:
        self._to.set_tags([self._alive_tag()])
        self._said = ""

    def _alive_tag(self) -> Tag:
        sessions = list(self._to.card.sessions.values())
        since_ms = max((each.start_ms for each in sessions if each.primary), default=0)
        return NODE_TAG + self._to.node, pack_alive(self._to.card.run_id, since_ms)

    def _others_took_part(self, tags: Mapping[str, str]) -> bool:
        """Return whether the run has been on another node: a requeued job moves."""
        return tags.get(OWNER_TAG, self._to.node) != self._to.node or any(
            word.node != self._to.node for word in read_words(tags, self._to.card.run_id)
        )

    def _agreed(self, own: Verdict, info: RunInfo) -> Verdict | None:
        """Return the end that all nodes agree on; None: another node will tell it.

        Raises: NotYet: this node is the owner, and others are not done.
        """
        card = self._to.card
        said = read_words(info.tags, card.run_id)
        alive_ms = [word.alive_since_ms for word in said if word.alive_since_ms is not None]
        if any(since_ms > own.end_ms for since_ms in alive_ms):
            return None  # the ranks have been started again, there
        latest: dict[int, tuple[RankWord, str]] = {}
        for word in said:
            for rank in word.ranks:
                if rank.rank not in latest or rank.start_ms > latest[rank.rank][0].start_ms:
                    latest[rank.rank] = (rank, word.node)
        end = worst([rank.end for rank, _ in latest.values()] or [own])
        if self._are_all(list(latest.values())) and not alive_ms:
            return end
        if not card.is_owned:
            return None
        if not self.is_leaving and time.monotonic() - self._said_s < OWNERS_PATIENCE_S:
            raise NotYet("waits for the other nodes to end", retry_after_s=ASK_AGAIN_S)
        return end

    def _are_all(self, found: list[tuple[RankWord, str]]) -> bool:
        """Return whether these are all ranks, or some of all nodes: not every rank may log."""
        card = self._to.card
        nodes = {node for _, node in found}
        return len(found) >= card.world_size or 0 < card.node_count <= len(nodes)


def rank_words(sessions: Iterable[SessionCard], last_record_ms: int) -> list[RankWord]:
    """Return how each rank of this node ended."""
    by_rank: dict[int, list[SessionCard]] = {}
    for session in sessions:
        if session.primary:
            by_rank.setdefault(session.rank, []).append(session)
    return [
        RankWord(rank, max(each.start_ms for each in lives), verdict(lives, last_record_ms))
        for rank, lives in sorted(by_rank.items())
    ]


def pack_word(run_id: str, words: list[RankWord]) -> str:
    """Return one node's word: all its ranks are gone."""
    since_ms = min((word.start_ms for word in words), default=0)
    ranks = [
        [word.rank, word.start_ms - since_ms, word.end.status, word.end.end_ms - since_ms]
        for word in words
    ]
    reasons = [(word.rank, word.end.reason[:REASON_CHARS_MAX]) for word in words if word.end.reason]
    word = {
        "run": run_id,
        "since_ms": since_ms,
        "ranks": ranks,
        "reasons": dict(reasons[:REASONS_MAX]),
    }
    return json.dumps(word, separators=(",", ":"))


def pack_alive(run_id: str, since_ms: int) -> str:
    """Return one node's word while ranks live there."""
    return json.dumps({"run": run_id, "alive_since_ms": since_ms}, separators=(",", ":"))


def read_words(tags: Mapping[str, str], run_id: str) -> list[NodeWord]:
    """Return what all nodes have said of a relay run; other lives' words are not of it."""
    found = []
    for key, text in tags.items():
        if not (key.startswith(NODE_TAG) and text):
            continue
        try:
            word: dict[str, Any] = json.loads(text)
            if word["run"] != run_id:
                continue
            node = key.removeprefix(NODE_TAG)
            if "alive_since_ms" in word:
                found.append(NodeWord(node, int(word["alive_since_ms"]), []))
                continue
            since_ms, reasons = int(word["since_ms"]), dict(word["reasons"])
            ranks = [
                RankWord(
                    int(rank),
                    since_ms + int(start),
                    Verdict(str(status), since_ms + int(end), str(reasons.get(str(rank), ""))),
                )
                for rank, start, status, end in word["ranks"]
            ]
            found.append(NodeWord(node, None, ranks))
        except (ValueError, KeyError, TypeError):
            continue  # somebody's own tag: no word of ours
    return found
