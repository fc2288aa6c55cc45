"""Many runs side by side: one at a time to each MLflow run, and one bad run stops no other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlflow_relay_daemon.lane import waits
from mlflow_relay_daemon.lane.destination import SOURCE_TAG
from mlflow_relay_daemon.retry import Stopped
from mlflow_relay_daemon.sinks import NotYet, SinkError
from mlflow_relay_daemon.sync.late_links import tell_waiting
from mlflow_relay_daemon.sync.one_run import OneRun, Server, Skipped
from mlflow_relay_daemon.sync.source import Size, Source, SourceError

log = logging.getLogger(__name__)

POLL_S = 0.1


@dataclass
class Outcome:
    """What became of one run."""

    source: Source
    state: str = "waiting"  #: then "syncing", and "done", "skipped" or "failed"
    size: Size = field(default_factory=Size)
    one: OneRun | None = None
    error: str = ""
    seconds: float = 0.0

    @property
    def refused(self) -> int:
        """How many entries MLflow refused, or cut."""
        return self.one.refusals.count if self.one is not None else 0

    @property
    def waits_for(self) -> list[str]:
        """The ids of runs that its links wait for."""
        return waits.awaited(self.source.card) if self.state == "done" else []


class Engine:
    """Brings runs with several threads.

    Args:
        jobs: runs that are brought side by side.
        patience_s: give up when the server has not answered for so long.
    """

    def __init__(
        self, server: Server, outcomes: Sequence[Outcome], *, jobs: int, patience_s: float
    ) -> None:
        self.outcomes = outcomes
        self._server, self._patience_s = server, patience_s
        self._jobs = jobs
        self._queue: queue.SimpleQueue[list[Outcome]] = queue.SimpleQueue()
        self.gave_up = ""  #: why, if the server was away for too long

    def run(self, report: Callable[[], None]) -> None:
        """Bring all runs; `report` is called now and then, in this thread.

        Raises: KeyboardInterrupt; what is under way ends with the process.
        """
        self._bring(list(self.outcomes), report)
        # A run that goes on as itself (mode "same") may have come before the run that it goes on.
        late = [each for each in self.outcomes if each.state == "late"]
        while late and not self.gave_up:
            self._bring(late, report)
            again = [each for each in late if each.state == "late"]
            late = [] if len(again) == len(late) else again
        for each in self.outcomes:
            if each.state in ("late", "waiting", "syncing"):
                each.state = "failed"
                each.error = each.error or self.gave_up or "stopped"
        if not self.gave_up:
            self._bring_links(report)

    def look(self, outcome: Outcome) -> str:
        """Return whether the server has the run: "new" or "there". Changes nothing.

        Raises: SinkError, Stopped.
        """
        found = OneRun(outcome.source, self._server).find()
        if found is None:
            return "new"
        outcome.source.card.mlflow_run_id = found.run_id
        return "there"

    def _bring(self, outcomes: list[Outcome], report: Callable[[], None]) -> None:
        """Bring these, runs of one id one after the other, those that began first first."""
        groups: dict[str, list[Outcome]] = {}
        for each in sorted(outcomes, key=lambda each: each.source.card.start_ms):
            groups.setdefault(each.source.card.run_id, []).append(each)
        for group in groups.values():
            self._queue.put(group)
        self._work_off(self._work, report)

    def _work_off(self, work: Callable[[], None], report: Callable[[], None]) -> None:
        threads = [
            threading.Thread(target=work, name=f"sync {index}", daemon=True)
            for index in range(self._jobs)
        ]
        for thread in threads:
            thread.start()
        try:
            while threads := [thread for thread in threads if thread.is_alive()]:
                threads[0].join(POLL_S)
                report()
                self._look_at_server()
        except BaseException:
            self._stop()
            raise

    def _look_at_server(self) -> None:
        """Give up if it is away for too long: a command must not wait for ever."""
        seen = self._server.breaker.snapshot()
        if seen.state == "down" and time.time() - seen.since_ms / 1000 > self._patience_s:
            self.gave_up = seen.last_error
            self._stop()

    def _stop(self) -> None:
        self._server.stop.set()
        self._server.breaker.stop()

    def _work(self) -> None:
        while True:
            try:
                group = self._queue.get_nowait()
            except queue.Empty:
                return
            for outcome in group:
                self._bring_one(outcome)

    def _bring_one(self, outcome: Outcome) -> None:
        outcome.state, outcome.error = "syncing", ""
        outcome.one = OneRun(outcome.source, self._server)
        begun_s = time.monotonic()
        try:
            outcome.one.bring()
            outcome.state = "done"
        except Skipped as why:
            outcome.state, outcome.error = "skipped", str(why)
        except NotYet as error:
            outcome.state, outcome.error = "late", str(error)
        except Stopped:
            outcome.state, outcome.error = "failed", self.gave_up
        except (SinkError, SourceError) as error:
            outcome.state, outcome.error = "failed", str(error)
        except OSError as error:
            outcome.state = "failed"
            outcome.error = str(SourceError.of(error, outcome.source.where))
        except Exception as error:  # one run's trouble is not the others'
            log.exception("run %s", outcome.source.card.run_id)
            outcome.state, outcome.error = "failed", f"unexpected {type(error).__name__}: {error}"
        finally:
            outcome.source.close()
            outcome.seconds += time.monotonic() - begun_s

    # ── links between runs ──

    def _bring_links(self, report: Callable[[], None]) -> None:
        """All runs have come: tell what waits for one of them, brought now or ever."""
        for each in self.outcomes:
            if each.state == "done":
                self._queue.put([each])
        self._work_off(self._work_links, report)

    def _work_links(self) -> None:
        while True:
            try:
                (outcome,) = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                self._tell_links(outcome)
            except (SinkError, Stopped) as error:
                outcome.state = "failed"
                outcome.error = f"its links could not be told: {error}"

    def _tell_links(self, outcome: Outcome) -> None:
        one, card = outcome.one, outcome.source.card
        assert one is not None
        if outcome.waits_for:
            one.tell_links()
            self._server.patiently(lambda _: one.tell_what_waits())
        ids = dict.fromkeys((card.run_id, card.tags.get(SOURCE_TAG, card.run_id)))
        server = self._server
        server.patiently(
            lambda _: tell_waiting(server.sink, server.breaker, server.names, one.refusals, ids)
        )
