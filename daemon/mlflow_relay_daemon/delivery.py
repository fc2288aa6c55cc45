"""Lanes and the threads that work them: one step of a run at a time, several runs side by side."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time

from mlflow_relay_daemon.lane import Lane
from mlflow_relay_daemon.lane.lane import FULL_BATCH_BYTES
from mlflow_relay_daemon.retry import Breaker, Stopped

log = logging.getLogger(__name__)

#: How long requests that are under way may still take when the daemon stops.
STOP_TIMEOUT_S = 2.0


class Delivery:
    """Works lanes when they are due.

    Args:
        breaker: of the server that all lanes deliver to.
        threads: lanes that are worked side by side.
        batch_age_s: how long a batch that is not full waits for more.
    """

    def __init__(self, breaker: Breaker, *, threads: int, batch_age_s: float) -> None:
        self._breaker = breaker
        self.batch_age_s = batch_age_s
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Lane]] = []
        self._due_s: dict[Lane, float] = {}  # the valid one of several entries in `_due`
        self._busy: dict[Lane, float | None] = {}  # and when it is to be worked again
        self._parked: set[Lane] = set()  # of those that are due: nobody need wait for them
        self._order = itertools.count()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"delivery {index}", daemon=True)
            for index in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def notify(self, lane: Lane) -> None:
        """There is something new for this lane."""
        is_full = lane.run.waiting_bytes() >= FULL_BATCH_BYTES
        self._schedule(lane, 0.0 if is_full else self.batch_age_s)

    def deliver_now(self, lanes: list[Lane]) -> None:
        """Work these lanes at once, and ask the server again if it was away."""
        for lane in lanes:
            self._schedule(lane, 0.0)
        self._breaker.retry_now()

    def is_idle(self) -> bool:
        """Return whether no lane is being worked or waiting for its turn."""
        with self._changed:
            return not self._busy and self._due_s.keys() <= self._parked

    def is_at_rest(self, lane: Lane) -> bool:
        """Return whether nothing is planned for this lane."""
        with self._changed:
            return lane not in self._busy and lane not in self._due_s

    def stop(self) -> None:
        """Let every thread finish its request, if that is soon, and leave.

        One that waits for a server that does not answer ends with the process: its batch is not
        settled, and is delivered again.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._breaker.stop()
        until_s = time.monotonic() + STOP_TIMEOUT_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until_s - time.monotonic()))

    def _schedule(self, lane: Lane, delay_s: float) -> None:
        due_s = time.monotonic() + delay_s
        with self._changed:
            self._parked.discard(lane)
            if lane in self._busy:
                planned_s = self._busy[lane]
                self._busy[lane] = due_s if planned_s is None else min(due_s, planned_s)
            elif lane not in self._due_s or due_s < self._due_s[lane]:
                self._plan(lane, due_s)
                self._changed.notify()

    def _plan(self, lane: Lane, due_s: float) -> None:
        """Work a lane then; under the lock. Somebody has to look who waits for what is due."""
        self._due_s[lane] = due_s
        heapq.heappush(self._due, (due_s, next(self._order), lane))

    def _work(self) -> None:
        while (lane := self._take()) is not None:
            delay_s: float | None = None
            try:
                delay_s = lane.work()
            except Stopped:
                return
            except Exception:  # one run's trouble is not the others'
                log.exception("run %s: tried again in a minute", lane.run.card.run_id)
                lane.last_error = "an error of the relay itself: see the daemon's log"
                delay_s = 60.0
            finally:
                self._give_back(lane, delay_s)

    def _take(self) -> Lane | None:
        """Return the next lane that is due; None when stopping."""
        with self._changed:
            while not self._stopping:
                if not self._due:
                    self._changed.wait()
                    continue
                due_s, _, lane = self._due[0]
                if self._due_s.get(lane) != due_s:
                    heapq.heappop(self._due)  # it was scheduled anew since
                elif due_s > (now_s := time.monotonic()):
                    self._changed.wait(due_s - now_s)
                else:
                    heapq.heappop(self._due)
                    del self._due_s[lane]
                    self._parked.discard(lane)
                    self._busy[lane] = None
                    if self._due:
                        self._changed.notify()  # another thread waits for the rest
                    return lane
            return None

    def _give_back(self, lane: Lane, delay_s: float | None) -> None:
        """In one breath: a lane that is seen neither at work nor due has nothing left to do.

        Nobody is woken: the thread that gives it back is the next to look, and where its data are
        in the cache the next request takes less.
        """
        due_s = None if delay_s is None else time.monotonic() + delay_s
        with self._changed:
            again_s = self._busy.pop(lane)
            known = [each for each in (again_s, due_s) if each is not None]
            if known:
                self._plan(lane, min(known))
                if again_s is None and lane.is_parked:
                    self._parked.add(lane)
