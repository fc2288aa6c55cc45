"""One run's way to MLflow: create it, deliver batch after batch, tell how it ended.

    NEW ──create──▶ OPEN ──batches──▶ (drained, all ranks gone) ──tell the end──▶ ENDED
                      ▲──────────────── a rank came back ◀────────────────────────┘

Every step may be repeated after a crash: creation searches by tag, batches are idempotent, and the
end can be told again. One lane has one request under way at most: concurrent batches to one run
deadlock on PostgreSQL (mlflow#24923).
"""

from __future__ import annotations

import base64
import logging
import random
import time
from collections.abc import Callable
from functools import partial

from mlflow_relay import records
from mlflow_relay.errors import FormatError
from mlflow_relay_daemon.batch import Batch, Entry, Objection, split
from mlflow_relay_daemon.bisect_refusal import deliver_apart
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.retry import Breaker, backoff_s
from mlflow_relay_daemon.sinks import (
    Permanent,
    Refused,
    RunGone,
    RunInfo,
    Sink,
    SinkError,
    Tag,
    TryAgain,
)
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunEvent, RunState, next_state, verdict

log = logging.getLogger(__name__)

RUN_ID_TAG, RUN_KEY_TAG = "relay.run_id", "relay.run_key"
END_REASON_TAG = "relay.end_reason"
LOST_TAG, DAMAGED_TAG = "relay.lost_records", "relay.damaged_records"

#: How long a run waits that MLflow will not have (deleted there, its experiment deleted): somebody
#: may restore it.
BLOCKED_RETRY_S = 60.0
#: How long a run waits while its dead letters or its card cannot be written.
DISK_RETRY_S = 5.0
#: From so many failures of one request on, while the server answers others, the request itself is
#: under suspicion.
FAILURES_SUSPECT = 8


class Lane:
    """Delivers one run. `work` is called by one thread at a time."""

    def __init__(self, run: RunSpool, sink: Sink, breaker: Breaker, letters: DeadLetters) -> None:
        self.run, self.letters = run, letters
        self.last_error: str | None = None
        self.is_blocked = False
        self._sink, self._breaker = sink, breaker
        self._failures = 0
        self._known_params: dict[str, str] = {}
        self._refused_keys: dict[str, Objection] = {}
        self._rng = random.Random()

    def work(self) -> float | None:
        """Do one step, and return in how many seconds there is another; None: when told.

        Raises: Stopped.
        """
        try:
            delay = self._step()
        except TryAgain as error:
            self._failures += 1
            return self._trouble(error, backoff_s(self._failures, self._rng))
        except Permanent as error:
            self.is_blocked = True
            return self._trouble(error, BLOCKED_RETRY_S)
        except OSError as error:
            return self._trouble(error, DISK_RETRY_S)
        self.last_error, self.is_blocked, self._failures = None, False, 0
        return delay

    def _trouble(self, error: SinkError | OSError, wait_s: float) -> float:
        text = str(error)
        if text != self.last_error:
            log.warning("run %s: %s", self.run.card.run_id, text)
        self.last_error = text
        return wait_s

    def _step(self) -> float | None:
        card = self.run.card
        if card.state is RunState.NEW:
            self._create()
        elif card.state is RunState.ENDED and self._ranks_alive():
            self._reopen()
        batch, mark = self._collect()
        if vars(mark) != vars(self.run.mark):
            self._deliver(batch)
            self._settle(batch, mark)
            return 0.0
        if card.state is not RunState.NEW and self._is_over():
            self._tell_end()
        return None

    # ── creation ──

    def _create(self) -> None:
        """Have an MLflow run, and know its id. Crash: at any line, it is found again by its tag."""
        run_id, experiment_id = self._breaker.call(self._find_or_create)
        with self.run.lock:
            card = self.run.card
            card.mlflow_run_id, card.experiment_id = run_id, experiment_id
            card.state = next_state(card.state, RunEvent.CREATED)
            self.run.save_card()
        log.info("run %s is MLflow run %s", card.run_id, run_id)

    def _find_or_create(self) -> tuple[str, str]:
        card = self.run.card
        experiment_id = self._sink.experiment_id(card.experiment_name)
        found = self._sink.find_runs(experiment_id, RUN_ID_TAG, card.run_id)
        active = [run for run in found if run.lifecycle_stage == "active"]
        if active:
            return active[0].run_id, experiment_id
        if found:
            raise RunGone(f"run {found[0].run_id} was deleted in MLflow: restore it there")
        with self.run.lock:
            card.create_attempts += 1
            self.run.save_card()
        tags: list[Tag] = list(
            {**card.tags, RUN_ID_TAG: card.run_id, RUN_KEY_TAG: card.run_key}.items()
        )
        run_id = self._sink.create_run(
            experiment_id,
            run_name=card.run_name,
            user=card.tags.get("mlflow.user", ""),
            start_time_ms=card.start_ms,
            tags=tags,
        )
        return run_id, experiment_id

    def _reopen(self) -> None:
        """A rank has come back: the run is RUNNING again."""
        self._call(lambda run_id: self._sink.update_run(run_id, status="RUNNING"))
        with self.run.lock:
            self.run.card.state = next_state(self.run.card.state, RunEvent.REOPENED)
            self.run.card.status = "RUNNING"
            self.run.save_card()

    def _call(self, operation: Callable[[str], None]) -> None:
        run_id = self.run.card.mlflow_run_id
        assert run_id is not None  # no state but NEW is without one
        self._breaker.call(lambda: operation(run_id))

    # ── batches ──

    def _collect(self) -> tuple[Batch, Watermark]:
        """Return the oldest records that fit into one request, and the watermark behind them."""
        batch = Batch()
        mark = Watermark(**vars(self.run.mark))
        seen = Sequences(mark.sequences)
        for place, piece, behind in self.run.pieces():
            skip = mark.skip if (mark.segment, mark.offset) == place else 0
            header = piece.header
            is_new = header is not None and (
                not piece.whole or seen.is_new(header.session, header.first_seq, header.next_seq)
            )
            if header is not None and is_new:
                for index, raw in enumerate(piece.records[skip:], skip):
                    if not self._take(batch, header.session, raw):
                        mark.segment, mark.offset = place
                        mark.skip = index
                        mark.sequences = seen.save()
                        return batch, mark
                    mark.settled_records += 1
                seen.add(header.session, header.first_seq, header.next_seq)
            elif header is not None:
                mark.settled_records += header.records - skip
            mark.segment, mark.offset = behind
            mark.skip = 0
        mark.sequences = seen.save()
        return batch, mark

    def _take(self, batch: Batch, session: bytes, raw: bytes | None) -> bool:
        """Put a record into the batch; return False if it has no room for it."""
        if raw is None:
            batch.damaged += 1
            return True
        try:
            record = records.unpack_record(raw)
        except FormatError as error:
            entry = Entry("record", "", base64.b64encode(raw).decode(), 0, None)
            batch.objections.append(Objection(entry, str(error)))
            return True
        if not batch.has_room_for(record):
            return False
        batch.add(session, record, self._known_params)
        batch.records += 1
        return True

    def _deliver(self, batch: Batch) -> None:
        """Bring the batch to MLflow; what it refuses is among the batch's objections then."""
        if self._refused_keys:
            self._set_apart_refused(batch)
        if batch.is_empty:
            return
        params, tags = list(batch.params.items()), list(batch.tags.items())
        try:
            self._call(lambda run_id: self._sink.log_batch(run_id, batch.metrics, params, tags))
        except Refused:
            self._deliver_apart(batch, (Refused,))
        except TryAgain:
            if self._failures < FAILURES_SUSPECT:
                raise
            self._deliver_apart(batch, (Refused, TryAgain))
        self._known_params.update(batch.params)

    def _deliver_apart(self, batch: Batch, refusals: tuple[type[SinkError], ...]) -> None:
        # The witness is a tag that the run has already: if even that fails, it is the server that
        # is in trouble, and no entry is guilty.
        witness = Entry("tag", RUN_ID_TAG, self.run.card.run_id, 0, None)
        guilty = deliver_apart([witness, *batch.entries()], self._send, refusals)
        if any(objection.entry is witness for objection in guilty):
            raise TryAgain(guilty[0].reason, guilty[0].error_code)
        for objection in guilty:
            if objection.entry.kind == "metric":
                self._refused_keys[objection.entry.key] = objection
        batch.refuse(guilty)

    def _send(self, entries: list[Entry]) -> None:
        metrics, params, tags = split(entries)
        self._call(lambda run_id: self._sink.log_batch(run_id, metrics, params, tags))

    def _set_apart_refused(self, batch: Batch) -> None:
        """A metric is refused for its name, so once refused, always refused: do not ask again."""
        good = [metric for metric in batch.metrics if metric[0] not in self._refused_keys]
        if len(good) == len(batch.metrics):
            return
        for key, value, timestamp_ms, step in batch.metrics:
            refused = self._refused_keys.get(key)
            if refused is not None:
                entry = Entry("metric", key, value, timestamp_ms, step)
                batch.objections.append(refused._replace(entry=entry))
        batch.metrics = good

    def _settle(self, batch: Batch, mark: Watermark) -> None:
        """The batch is done with. Crash: before any line, it is delivered again, which MLflow
        ignores; so letters and card come first, and the watermark last."""
        self.letters.add(batch.objections, time.time_ns() // 1_000_000)
        mark.delivered_records += batch.records
        mark.delivered_points += len(batch.metrics)
        mark.last_record_ms = max(mark.last_record_ms, batch.last_record_ms)
        mark.damaged_records += batch.damaged
        if batch.ends:
            with self.run.lock:
                for session, end in batch.ends:
                    known = self.run.card.sessions.get(session.hex())
                    if known is not None:
                        known.end_status, known.end_reason = end.status, end.reason
                        known.end_ms = end.timestamp_ms
                self.run.save_card()
        self.run.settle(mark)

    # ── the end ──

    def _ranks_alive(self) -> bool:
        with self.run.lock:
            return any(each.primary and not each.closed for each in self.run.card.sessions.values())

    def _is_over(self) -> bool:
        with self.run.lock:
            return self.run.is_drained() and all(
                each.closed for each in self.run.card.sessions.values()
            )

    def _tell_end(self) -> None:
        """Tell MLflow how and when the run ended, if that is news."""
        self._count_missing()
        card = self.run.card
        end = verdict(card.sessions.values(), self.run.mark.last_record_ms)
        told = (card.status, card.end_ms, card.end_reason)
        if card.state is RunState.OPEN or told != (end.status, end.end_ms, end.reason):
            self._remove_extras()
            tags = self._end_tags(end.reason)
            if tags:
                self._call(lambda run_id: self._sink.log_batch(run_id, [], [], tags))
            self._call(
                lambda run_id: self._sink.update_run(
                    run_id, status=end.status, end_time_ms=end.end_ms
                )
            )
            with self.run.lock:
                card.status, card.end_ms, card.end_reason = end.status, end.end_ms, end.reason
                card.state = next_state(card.state, RunEvent.STATUS_DELIVERED)
                self.run.save_card()
            log.info("run %s ended %s %s", card.run_id, end.status, end.reason)

    def _end_tags(self, reason: str) -> list[Tag]:
        card = self.run.card
        tags = [(END_REASON_TAG, reason)] if reason or card.end_reason else []
        if card.lost_records:
            tags.append((LOST_TAG, str(card.lost_records)))
        if self.run.mark.damaged_records:
            tags.append((DAMAGED_TAG, str(self.run.mark.damaged_records)))
        return tags

    def _count_missing(self) -> None:
        """What was acknowledged and cannot be found any more is counted, and said."""
        mark = Watermark(**vars(self.run.mark))
        seen = Sequences(mark.sequences)
        missing = 0
        for name, session in self.run.card.sessions.items():
            seen.give_up(bytes.fromhex(name), session.first_seq)
            missing += seen.give_up(bytes.fromhex(name), self.run.next_seq(bytes.fromhex(name)))
        if missing:
            mark.sequences = seen.save()
            mark.damaged_records += missing
            self.run.settle(mark)

    def _remove_extras(self) -> None:
        """A create whose answer was lost may have been carried out late: then there is a second,
        empty run with our tag."""
        card = self.run.card
        if card.create_attempts < 2 or card.experiment_id is None:
            return
        experiment_id = card.experiment_id
        found: list[RunInfo] = self._breaker.call(
            lambda: self._sink.find_runs(experiment_id, RUN_ID_TAG, card.run_id)
        )
        for run in found:
            if run.run_id != card.mlflow_run_id and run.lifecycle_stage == "active":
                log.warning("run %s: removing its double %s", card.run_id, run.run_id)
                self._breaker.call(partial(self._sink.delete_run, run.run_id))

    # ── dead letters ──

    def retry_letters(self, ids: set[int] | None) -> int:
        """Deliver dead letters again; return how many MLflow took.

        Args: ids: None: all of them. Raises: SinkError, Stopped.
        """
        letters = [
            letter
            for letter in self.letters.list()
            if letter.kind != "record" and (ids is None or letter.id in ids)
        ]
        taken = {
            letter.id
            for letter in letters
            if not deliver_apart([letter.entry()], self._send, (Refused,))
        }
        self._refused_keys.clear()
        return self.letters.remove(taken)
