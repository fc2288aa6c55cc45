"""Records → requests → watermark; what MLflow refuses → dead letters."""

from __future__ import annotations

import base64
from typing import Any

from mlflow_relay import clock, records
from mlflow_relay.errors import FormatError
from mlflow_relay_daemon.batch import (
    ARTIFACT_LETTER,
    Batch,
    Entry,
    Objection,
    Points,
    fits_whole,
    split,
)
from mlflow_relay_daemon.bisect_refusal import deliver_apart
from mlflow_relay_daemon.dead_letters import Letters
from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.translation import Translation
from mlflow_relay_daemon.reduction import LATE, MISSING_TAG, Giver, Reduction
from mlflow_relay_daemon.sinks import Refused, RunGone, SinkError, TryAgain
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.transcript import Printed
from mlflow_relay_daemon.spool.watermark import Watermark

#: From so many failures of one request on, while the server answers others, the request itself is
#: under suspicion.
FAILURES_SUSPECT = 8
#: Keys of one run whose value or refusal is remembered; MLflow judges the rest anew each time.
KEYS_REMEMBERED_MAX = 100_000


class Batches:
    """Delivers what stands in one run's spool."""

    def __init__(
        self, destination: Destination, letters: Letters, translation: Translation
    ) -> None:
        self._to, self._letters, self._translation = destination, letters, translation
        self._known_params: dict[str, str] = {}
        self._refused_keys: dict[str, Objection] = {}
        self._overruled: set[str] = set()  # tags that wait, and that this batch sets anew

    def deliver_next(self, failures: int) -> bool:
        """Deliver the oldest records that fit into one request; return whether there were any.

        Args: failures: tries of this request that ended in TryAgain.
        Raises: SinkError: nothing is settled; OSError: dead letters cannot be kept; Stopped.
        """
        batch, mark = self._collect()
        if vars(mark) == vars(self._to.run.mark):
            return False
        if batch.given:
            self._reduce(batch, mark)
        self._deliver(batch, failures)
        self._settle(batch, mark)
        return True

    def _collect(self) -> tuple[Batch, Watermark]:
        """Return the oldest records that fit into one request, and the watermark behind them."""
        batch = Batch()
        self._overruled.clear()
        mark = Watermark(**vars(self._to.run.mark))
        seen = Sequences(mark.sequences)
        for place, piece, behind in self._to.run.pieces():
            skip = begun = mark.skip if (mark.segment, mark.offset) == place else 0
            header = piece.header
            is_new = header is not None and (
                not piece.whole or seen.is_new(header.session, header.first_seq, header.next_seq)
            )
            if header is not None and is_new:
                if piece.whole:  # what a sync has brought, or an earlier file: not once more
                    skip = max(skip, seen.next_seq(header.session) - header.first_seq)
                    mark.settled_records += max(0, skip - begun)
                for index, raw in enumerate(piece.records[skip:], skip):
                    if not self._take(batch, header.session, header.first_seq + index, raw):
                        mark.segment, mark.offset = place
                        mark.skip = index
                        mark.sequences = seen.save()
                        return batch, mark
                    if raw is not None and not piece.whole:
                        seq = header.first_seq + index
                        seen.add(header.session, seq, seq + 1)
                    mark.settled_records += 1
                if piece.whole:  # else what is damaged stays a gap: it may come once more
                    seen.add(header.session, header.first_seq, header.next_seq)
            elif header is not None:
                mark.settled_records += header.records - skip
            mark.segment, mark.offset = behind
            mark.skip = 0
        mark.sequences = seen.save()
        return batch, mark

    def _take(self, batch: Batch, session: bytes, seq: int, raw: Any) -> bool:
        """Put a record into the batch; return False if it has no room for it."""
        if raw is None:
            return True  # a gap in the numbers, counted when the run ends
        try:
            record: records.Record | Points = (
                records.unpack_record(raw) if isinstance(raw, bytes) else raw
            )
        except FormatError as error:
            entry = Entry("record", "", base64.b64encode(raw).decode(), 0, None)
            batch.objections.append(Objection(entry, str(error)))
            return True
        if isinstance(record, records.Metrics):
            has_room = batch.take_metrics(record)
            batch.records += has_room
            return has_room
        if not batch.has_room_for(record):
            return False
        if isinstance(record, records.Params | records.Tags):
            record = self._translated(batch, record)
        if isinstance(record, records.Terminal):
            batch.add_printed(Printed(self._giver(session).rank, session, seq, record.data))
        else:
            batch.add(session, record, self._known_params)
        batch.records += 1
        return True

    def _translated(
        self, batch: Batch, record: records.Params | records.Tags
    ) -> records.Params | records.Tags:
        """Return the record with MLflow run ids in the place of relay run ids.

        What must wait for an id is held, and left out. So that the last tag and the first param
        stand all the same, a later tag takes the place of one that is held, and a later param of
        another value is refused as if the one that is held were there.
        """
        if not (self._translation.needed(record.items) or batch.held or self._to.card.held):
            return record
        kind = "param" if isinstance(record, records.Params) else "tag"
        items: dict[str, str] = {}
        for key, value in record.items.items():
            has = self._held(batch, kind, key)
            if kind == "param" and has is not None:
                if has != value:
                    entry = Entry(kind, key, value, record.timestamp_ms, None)
                    reason = f"the param waits for run {has} to be known; MLflow keeps the first"
                    batch.objections.append(Objection(entry, reason))
                continue
            batch.held = [each for each in batch.held if each[:2] != ["tag", key]]
            if has is not None:
                self._overruled.add(key)
            translated = self._translation.of(value, key)
            if translated is None:
                batch.held.append([kind, key, value])
                continue
            items[key] = translated
            original = self._translation.original_tag(key)
            if translated != value and original is not None:
                batch.tags[original] = value
        return record._replace(items=items)

    def _reduce(self, batch: Batch, mark: Watermark) -> None:
        """Let the mark know what ranks have given, and what has been made of it."""
        reduction = Reduction(mark.reduction)
        before = reduction.missing
        for session, record in batch.given:
            if isinstance(record, records.Reduce):
                batch.objections += reduction.give(self._giver(session), record)
            else:
                reduction.made(record)
        mark.reduction = reduction.save()
        if reduction.missing > before:
            batch.tags[MISSING_TAG] = str(reduction.missing)

    def _giver(self, session: bytes) -> Giver:
        known = self._to.card.sessions.get(session.hex())
        return Giver(known.rank, known.start_ms) if known else Giver(0, 0)

    def _held(self, batch: Batch, kind: str, key: str) -> str | None:
        """Return the value of this text that waits; None: there is none."""
        waiting = [*self._to.card.held, *batch.held]
        return next((value for *text, value in waiting if text == [kind, key]), None)

    def _deliver(self, batch: Batch, failures: int) -> None:
        """Bring the batch to MLflow; what it refuses is among the batch's objections then."""
        if self._refused_keys:
            self._set_apart_refused(batch)
        if batch.is_empty:
            return
        if batch.call is not None:
            self._call(batch, batch.call)
            return
        params, tags = list(batch.params.items()), list(batch.tags.items())
        is_suspect = failures >= FAILURES_SUSPECT
        try:
            self._to.log(batch.metrics, params, tags)
        except Refused:
            self._deliver_apart(batch, (Refused, TryAgain) if is_suspect else (Refused,))
        except TryAgain:
            if not is_suspect:
                raise
            self._deliver_apart(batch, (Refused, TryAgain))
        if len(self._known_params) < KEYS_REMEMBERED_MAX:
            self._known_params.update(batch.params)

    def _call(self, batch: Batch, call: records.Call) -> None:
        """Carry out a request that stands between records.

        MLflow says "no such thing" of a tag or a model as it does of a run. Of the run it is asked
        again: without it everything waits; without the other thing this request is refused.
        """
        run_id = self._to.mlflow_run_id
        body = self._translation.of_call(call.body)
        try:
            self._to.ask(lambda: self._to.sink.call(call.name, {**body, "run_id": run_id}))
        except (Refused, RunGone) as refusal:
            found = self._to.ask(lambda: self._to.sink.get_run(run_id))
            if isinstance(refusal, RunGone) and found.lifecycle_stage != "active":
                raise
            entry = Entry("call", call.name, call.body.decode(), call.timestamp_ms, None)
            batch.objections.append(Objection(entry, str(refusal), refusal.error_code))
        else:
            self._note_deletion(call.name)

    def _note_deletion(self, name: str) -> None:
        if name in ("runs/delete", "runs/restore"):
            with self._to.run.lock:
                self._to.card.is_deleted = name == "runs/delete"
                self._to.run.save_card()

    def _deliver_apart(self, batch: Batch, refusals: tuple[type[SinkError], ...]) -> None:
        # The witness is a tag that the run has already: if even that fails, it is the server that
        # is in trouble, and no entry is guilty.
        witness = Entry("tag", *self._to.witness, 0, None)
        guilty = deliver_apart(
            [witness, *batch.entries()],
            self._send,
            refusals,
            lambda objection: objection.is_refusal or self._fails(objection.entry, witness),
        )
        if any(objection.entry is witness for objection in guilty):
            raise TryAgain(guilty[0].reason, guilty[0].error_code)
        for objection in guilty:
            entry = objection.entry
            is_name = entry.kind == "metric" and objection.is_refusal and entry.timestamp_ms >= 0
            if is_name and len(self._refused_keys) < KEYS_REMEMBERED_MAX:
                self._refused_keys[entry.key] = objection
        batch.refuse(guilty)

    def _fails(self, entry: Entry, witness: Entry) -> bool:
        """Return whether the server stumbles over this entry each time, and never over the witness.

        A balancer with one sick server behind it stumbles by chance: over anything, now and then.
        Raises: TryAgain: over the witness, too.
        """
        for _ in range(FAILURES_SUSPECT):
            self._send([witness])
            try:
                self._send([entry])
            except (Refused, TryAgain):
                continue
            return False
        return True

    def _send(self, entries: list[Entry]) -> None:
        self._to.log(*split(entries))

    def _set_apart_refused(self, batch: Batch) -> None:
        """A metric is refused for its name (or a time before 1970), so once refused, always
        refused: do not ask again."""
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
        ignores; so card, letters and ledger come first, and the watermark last."""
        mark.delivered_records += batch.records
        mark.delivered_points += len(batch.metrics)
        mark.last_record_ms = max(mark.last_record_ms, batch.last_record_ms)
        if batch.ends or batch.held or self._overruled:
            with self._to.run.lock:
                held = self._to.card.held
                kept = [text for text in held if text[0] != "tag" or text[1] not in self._overruled]
                self._to.card.held = kept + batch.held
                for session, end in batch.ends:
                    known = self._to.card.sessions.get(session.hex())
                    if known is not None:
                        known.end_status, known.end_reason = end.status, end.reason
                        known.end_ms = end.timestamp_ms
                        # Nobody says DETACH for the daemon itself, should it die before it can.
                        known.closed |= known.is_own
                self._to.run.save_card()
        self._letters.add(batch.objections, clock.now_ms())
        self._to.run.artifacts.accept(batch.artifacts)
        self._to.run.terminal.add(batch.printed)
        self._to.run.settle(mark)

    # ── dead letters ──

    def retry_letters(self, ids: set[int] | None) -> int:
        """Deliver dead letters again; return how many MLflow took.

        Args: ids: None: all of them. Raises: SinkError, Stopped.
        """
        letters = [
            letter
            for letter in self._letters.list()
            if letter.kind not in ("record", "call", ARTIFACT_LETTER, LATE)
            and (ids is None or letter.id in ids)
        ]
        taken = {
            letter.id
            for letter in letters
            if fits_whole(letter.entry())
            and not deliver_apart([letter.entry()], self._send, (Refused,))
        }
        self._refused_keys.clear()
        return self._letters.remove(taken)
