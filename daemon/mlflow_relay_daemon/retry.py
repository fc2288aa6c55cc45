"""Waiting for a server that is away: one breaker per server, shared by all lanes.

    unknown ──answer──▶ up ──ServerAway──▶ down ──any answer──▶ up
        └────────ServerAway───────────────────▲ │
                                              └─┘ ServerAway: wait longer

While the server is down, the lanes queue. The first in the queue is the probe: it waits out the
back-off and tries its own operation. Answered, all go on; not answered, it goes to the end of the
queue and the next one probes. So there is one request at a time to a server in trouble, and a
lane whose own request can never succeed (a batch that always times out) does not hold up the rest.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_never

from mlflow_relay import clock
from mlflow_relay_daemon.sinks import ServerAway, SinkError

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
RETRY_AFTER_CAP_S = 300.0  # a server that asks for hours would look like a daemon that hangs

T = TypeVar("T")


class Stopped(Exception):
    """The daemon is leaving: what was to be done stays in the spool."""


@dataclass(frozen=True, slots=True)
class BreakerState:
    """What `status` shows of one server."""

    state: str  #: "up", "down" or "unknown" (nothing was asked yet)
    since_ms: int  #: since when, in ms since 1970
    last_error: str  #: why it is down; "" while it is not
    next_try_ms: int | None  #: when it is asked again; None while up, or while being asked
    failures: int  #: tries without an answer since it went down


def backoff_s(
    failures: int,
    rng: random.Random,
    base_s: float = BACKOFF_BASE_S,
    cap_s: float = BACKOFF_CAP_S,
) -> float:
    """Return how long to wait after so many failures in a row: exponential, full jitter.

    Args: failures: at least 1.
    """
    doublings = min(failures - 1, 32)  # beyond any cap, and far from overflow
    return rng.uniform(0.0, min(cap_s, base_s * 2.0**doublings))


class Breaker:
    """The one place that knows whether a server is up; every call to it goes through `call`.

    Args:
        base_s: the longest first wait.
        cap_s: the longest wait.
        retry_after_cap_s: the longest wait that a server may ask for.
        rng: where the jitter comes from.
    """

    def __init__(
        self,
        *,
        base_s: float = BACKOFF_BASE_S,
        cap_s: float = BACKOFF_CAP_S,
        retry_after_cap_s: float = RETRY_AFTER_CAP_S,
        rng: random.Random | None = None,
    ) -> None:
        self._base_s = base_s
        self.cap_s = cap_s
        self._retry_after_cap_s = retry_after_cap_s
        self._rng = rng or random.Random()
        # Guards everything below; notified at every change, since any change may let a lane go.
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._probe: object | None = None
        self._state = "unknown"
        self._since_ms = clock.now_ms()
        self._failures = 0
        self.failures_total = 0  #: requests without an answer, ever
        self._last_error = ""
        self._next_try_s = 0.0  # on time.monotonic's clock
        self._try_at_once = False
        self._stopped = False

    def call(self, operation: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """Run the operation, and again until the server answers; return its result.

        Args:
            operation: raises ServerAway where the server gave no answer.
            again: run instead from the second time on, for what must not simply be repeated
                (a run that may have been created is searched for first).
        Raises:
            SinkError: the server's answer, never ServerAway.
            Stopped: stop() was called before there was one.
        """
        lane = object()
        attempts = itertools.chain([operation], itertools.repeat(again or operation))

        def attempt() -> T:
            self._wait_for_turn(lane)
            return self._judged(lane, next(attempts))

        # tenacity repeats for ever; the waiting is done in the queue, because it is shared.
        repeating = Retrying(
            retry=retry_if_exception_type(ServerAway), stop=stop_never, sleep=_no_sleep
        )
        return repeating(attempt)

    def retry_now(self) -> None:
        """Cut the wait short: ask the server at once (again, if it is being asked just now)."""
        with self._changed:
            self._next_try_s = time.monotonic()
            self._try_at_once = self._probe is not None
            self._changed.notify_all()

    def stop(self) -> None:
        """Make every call that waits, and every later one, raise Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def snapshot(self) -> BreakerState:
        """Return what is known of the server now."""
        with self._changed:
            next_try_ms = None
            if self._state == "down" and self._probe is None:
                wait_s = max(0.0, self._next_try_s - time.monotonic())
                next_try_ms = clock.now_ms() + round(wait_s * 1000)
            return BreakerState(
                state=self._state,
                since_ms=self._since_ms,
                last_error=self._last_error,
                next_try_ms=next_try_ms,
                failures=self._failures,
            )

    def _wait_for_turn(self, lane: object) -> None:
        """Return when this lane may ask: at once while the server is up, else as the probe.

        Raises: Stopped.
        """
        with self._changed:
            self._queue.append(lane)
            try:
                while not self._stopped and self._state == "down":
                    wait_s = self._wait_s(lane)
                    if wait_s is not None and wait_s <= 0.0:
                        self._probe = lane
                        return
                    self._changed.wait(wait_s)
            finally:
                self._queue.remove(lane)
                # Even one that leaves by an exception must not leave the next one asleep.
                self._changed.notify_all()
            if self._stopped:
                raise Stopped

    def _wait_s(self, lane: object) -> float | None:
        """Return how long this lane must wait to be the probe; None: until something changes."""
        if self._probe is not None or self._queue[0] is not lane:
            return None
        return self._next_try_s - time.monotonic()

    def _judged(self, lane: object, operation: Callable[[], T]) -> T:
        """Run an operation and note what its outcome says of the server."""
        try:
            result = operation()
        except ServerAway as error:
            self._note_silence(lane, error)
            raise
        except SinkError:
            self._note_answer(lane)
            raise
        except BaseException:
            # A mistake of ours says nothing of the server; let the next lane find out.
            self._release_probe(lane)
            raise
        self._note_answer(lane)
        return result

    def _note_silence(self, lane: object, error: ServerAway) -> None:
        with self._changed:
            self.failures_total += 1
            is_news = self._state != "down" or self._probe is lane
            if is_news:
                self._failures += 1
                self._last_error = str(error)
                self._next_try_s = time.monotonic() + self._pause_s(error)
                self._enter("down")
            self._release_probe(lane)

    def _note_answer(self, lane: object) -> None:
        with self._changed:
            # While down, only the probe's word counts: another answer may be an old one, and a
            # server that sent Retry-After to one lane wants its rest.
            if self._state == "down" and self._probe is not lane:
                return
            self._failures = 0
            self._last_error = ""
            self._enter("up")
            self._release_probe(lane)

    def _pause_s(self, error: ServerAway) -> float:
        """Return the wait after a failure: the back-off, on top of what the server asks for.

        On top, so that a thousand nodes that were told the same do not come back together.
        """
        if self._try_at_once:
            return 0.0
        asked_s = min(error.retry_after_s or 0.0, self._retry_after_cap_s)
        return asked_s + backoff_s(self._failures, self._rng, self._base_s, self.cap_s)

    def _enter(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._since_ms = clock.now_ms()
        self._changed.notify_all()

    def _release_probe(self, lane: object) -> None:
        with self._changed:
            if self._probe is lane:
                self._probe = None
                self._try_at_once = False
                self._changed.notify_all()


def _no_sleep(seconds: float) -> None:
    """Stand in for tenacity's sleep."""
