"""The breaker: many lanes, one probe, nobody left asleep."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlflow_relay_daemon.retry import Breaker, Stopped, backoff_s
from mlflow_relay_daemon.sinks import Refused, ServerAway, SinkError, TryAgain
from mlflow_relay_daemon.sinks.rest import RestSink
from tests.support import MlflowServer

NEVER_S = 100_000.0  # a wait that only retry_now or stop can end
WAIT_S = 20.0  # for what happens at once on an idle machine


class Server:
    """Stands for a server: answers or does not, and counts who asks at the same time."""

    def __init__(self) -> None:
        self.is_up = threading.Event()
        self.asked = 0
        self.asking = 0
        self.asking_at_once = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def ask(self) -> str:
        with self._changed:
            self.asked += 1
            self.asking += 1
            self.asking_at_once = max(self.asking_at_once, self.asking)
            self._changed.notify_all()
        try:
            if not self.is_up.is_set():
                raise ServerAway("connection refused")
            return "stored"
        finally:
            with self._changed:
                self.asking -= 1

    def wait_until_asked(self, times: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.asked >= times, WAIT_S)


class Longest(random.Random):
    """No jitter: always the longest wait."""

    def uniform(self, a: float, b: float) -> float:
        return b


@pytest.fixture
def new_breaker() -> Iterator[Callable[..., Breaker]]:
    """Make breakers; at the end each lets go of its lanes, also where a test fails.

    The process could not end otherwise: Python waits for the pool's threads.
    """
    made: list[Breaker] = []

    def make(**settings: Any) -> Breaker:
        made.append(Breaker(**settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def breaker(new_breaker: Callable[..., Breaker]) -> Breaker:
    """A breaker whose waits do not end by themselves."""
    return new_breaker(base_s=NEVER_S, cap_s=NEVER_S, rng=Longest())


@pytest.fixture
def lanes() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(32)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.001)


def is_waiting(breaker: Breaker, lanes: int) -> Callable[[], bool]:
    return lambda: len(breaker._queue) == lanes


def raising(error: BaseException) -> Callable[[], str]:
    def operation() -> str:
        raise error

    return operation


def in_turn(*operations: Callable[[], str]) -> Callable[[], str]:
    """Return an operation that does the first at its first call, and so on."""
    left = iter(operations)

    def operation() -> str:
        return next(left)()

    return operation


# -- one lane -------------------------------------------------------------------------------


def test_an_answer_comes_back_and_the_server_is_up(breaker: Breaker) -> None:
    assert breaker.snapshot().state == "unknown"
    assert breaker.call(lambda: 7) == 7
    state = breaker.snapshot()
    assert (state.state, state.failures, state.last_error, state.next_try_ms) == ("up", 0, "", None)


@pytest.mark.parametrize("error", [Refused("no"), TryAgain("deadlock")])
def test_an_error_that_the_server_answers_comes_back_at_once(
    breaker: Breaker, error: SinkError
) -> None:
    with pytest.raises(type(error)) as caught:
        breaker.call(raising(error))
    assert caught.value is error
    assert breaker.snapshot().state == "up"


def test_a_mistake_in_the_operation_says_nothing_of_the_server(breaker: Breaker) -> None:
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 // 0)
    assert breaker.snapshot().state == "unknown"


def test_a_server_that_is_away_is_asked_until_it_answers() -> None:
    operation = in_turn(*[raising(ServerAway("away"))] * 3, lambda: "stored")
    assert Breaker(base_s=0.001, cap_s=0.002).call(operation) == "stored"


def test_from_the_second_time_on_the_other_operation_runs() -> None:
    calls: list[str] = []

    def create() -> str:
        calls.append("create")
        raise ServerAway("response lost")

    def search_first() -> str:
        calls.append("search")
        if len(calls) < 4:
            raise ServerAway("still away")
        return "found"

    assert Breaker(base_s=0.001, cap_s=0.002).call(create, again=search_first) == "found"
    assert calls == ["create", "search", "search", "search"]


def test_a_lane_that_waited_for_another_ones_probe_still_begins_with_its_first_operation(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    server = Server()
    probe = lanes.submit(breaker.call, server.ask)
    server.wait_until_asked(1)
    waiting = lanes.submit(breaker.call, lambda: "created", lambda: "searched")
    wait_until(is_waiting(breaker, 2))
    server.is_up.set()
    breaker.retry_now()
    assert probe.result(WAIT_S) == "stored"
    assert waiting.result(WAIT_S) == "created"


# -- many lanes -----------------------------------------------------------------------------


def test_only_one_lane_asks_while_the_server_is_down_and_all_go_on_when_it_answers(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    server = Server()
    first = lanes.submit(breaker.call, server.ask)
    server.wait_until_asked(1)
    wait_until(lambda: breaker.snapshot().state == "down")
    others = [lanes.submit(breaker.call, server.ask) for _ in range(20)]
    wait_until(is_waiting(breaker, 21))
    assert server.asked == 1

    for tries in (2, 3, 4):
        breaker.retry_now()
        server.wait_until_asked(tries)
        wait_until(is_waiting(breaker, 21))
    assert server.asked == 4
    assert server.asking_at_once == 1

    server.is_up.set()
    breaker.retry_now()
    assert [lane.result(WAIT_S) for lane in [first, *others]] == ["stored"] * 21
    assert breaker.snapshot().state == "up"


def test_nobody_else_asks_while_the_probe_waits_for_its_answer(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    asked, answer_now = threading.Event(), threading.Event()

    def slow() -> str:
        asked.set()
        assert answer_now.wait(WAIT_S)
        return "stored"

    probe = lanes.submit(breaker.call, in_turn(raising(ServerAway("away")), slow))
    wait_until(is_waiting(breaker, 1))
    server = Server()
    server.is_up.set()
    others = [lanes.submit(breaker.call, server.ask) for _ in range(5)]
    wait_until(is_waiting(breaker, 6))
    breaker.retry_now()
    assert asked.wait(WAIT_S)
    breaker.retry_now()
    wait_until(is_waiting(breaker, 5))
    time.sleep(0.05)  # time enough for a second probe, if there could be one
    assert server.asked == 0
    answer_now.set()
    assert probe.result(WAIT_S) == "stored"
    assert [lane.result(WAIT_S) for lane in others] == ["stored"] * 5


def test_lanes_that_fail_together_count_as_one_failure(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    together = threading.Barrier(8)

    def operation() -> str:
        together.wait(WAIT_S)
        raise ServerAway("connection pool full")

    waiting = [lanes.submit(breaker.call, operation) for _ in range(8)]
    wait_until(is_waiting(breaker, 8))
    assert breaker.snapshot().failures == 1
    breaker.stop()
    for lane in waiting:
        with pytest.raises(Stopped):
            lane.result(WAIT_S)


def test_a_lane_whose_own_request_always_fails_does_not_hold_up_the_others(
    new_breaker: Callable[..., Breaker], lanes: ThreadPoolExecutor
) -> None:
    breaker = new_breaker(base_s=0.001, cap_s=0.002)
    sick = lanes.submit(breaker.call, raising(ServerAway("no answer within 30 s")))
    healthy = [lanes.submit(breaker.call, lambda: "stored") for _ in range(50)]
    assert [lane.result(WAIT_S) for lane in healthy] == ["stored"] * 50
    assert not sick.done()
    breaker.stop()
    with pytest.raises(Stopped):
        sick.result(WAIT_S)


@pytest.mark.parametrize("error", [Refused("no"), TryAgain("deadlock")])
def test_a_refusal_to_the_probe_frees_the_others_too(
    breaker: Breaker, lanes: ThreadPoolExecutor, error: SinkError
) -> None:
    operation = in_turn(raising(ServerAway("away")), raising(error))
    probe = lanes.submit(breaker.call, operation)
    wait_until(lambda: breaker.snapshot().state == "down")
    other = lanes.submit(breaker.call, lambda: "stored")
    wait_until(is_waiting(breaker, 2))
    breaker.retry_now()
    with pytest.raises(type(error)):
        probe.result(WAIT_S)
    assert other.result(WAIT_S) == "stored"


def test_a_probe_that_breaks_by_a_mistake_of_its_own_hands_the_probe_on(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    operation = in_turn(raising(ServerAway("away")), raising(ZeroDivisionError()))
    probe = lanes.submit(breaker.call, operation)
    wait_until(lambda: breaker.snapshot().state == "down")
    other = lanes.submit(breaker.call, lambda: "stored")
    wait_until(is_waiting(breaker, 2))
    breaker.retry_now()
    with pytest.raises(ZeroDivisionError):
        probe.result(WAIT_S)
    assert other.result(WAIT_S) == "stored"


def test_nobody_is_left_asleep_in_a_storm_of_outages(
    new_breaker: Callable[..., Breaker], lanes: ThreadPoolExecutor
) -> None:
    breaker = new_breaker(base_s=0.0005, cap_s=0.001)
    dice = random.Random(3)
    lock = threading.Lock()

    def operation() -> int:
        with lock:
            number = dice.random()
        if number < 0.5:
            raise ServerAway("away")
        return 1

    def lane() -> int:
        return sum(breaker.call(operation) for _ in range(100))

    running = [lanes.submit(lane) for _ in range(16)]
    assert sum(one.result(60.0) for one in running) == 1600
    assert len(breaker._queue) == 0


def test_batches_outlive_a_server_that_is_killed_and_comes_back(
    new_breaker: Callable[..., Breaker], tmp_path: Path, lanes: ThreadPoolExecutor
) -> None:
    breaker = new_breaker(base_s=0.05, cap_s=0.2)
    with MlflowServer(tmp_path / "mlflow") as server:
        sink = RestSink(server.uri)
        experiment_id = sink.experiment_id("killed")
        run_ids = [
            sink.create_run(experiment_id, run_name="", user="", start_time_ms=1, tags=[])
            for _ in range(3)
        ]
        enough = threading.Event()

        def lane(run_id: str) -> int:
            step = 0
            while not enough.is_set() or step < 5:
                batch = [("m", float(step), step, step)]
                breaker.call(partial(sink.log_batch, run_id, batch, [], []))
                step += 1
            return step

        running = [lanes.submit(lane, run_id) for run_id in run_ids]
        server.kill()
        wait_until(lambda: breaker.snapshot().failures >= 2)
        assert "Connection refused" in breaker.snapshot().last_error
        server.start()
        wait_until(lambda: breaker.snapshot().state == "up")
        enough.set()
        sent = [one.result(60.0) for one in running]
        for run_id, steps in zip(run_ids, sent, strict=True):
            expected = [("m", float(step), step, step) for step in range(steps)]
            assert server.all_points(run_id) == expected
            assert server.all_points_by_api(run_id) == expected


# -- retry_now and stop ---------------------------------------------------------------------


def test_retry_now_during_a_try_makes_the_next_one_follow_at_once(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    asked, answer_now = threading.Event(), threading.Event()

    def hang() -> str:
        asked.set()
        assert answer_now.wait(WAIT_S)
        raise ServerAway("timed out")

    lane = lanes.submit(breaker.call, in_turn(raising(ServerAway("away")), hang, lambda: "stored"))
    wait_until(lambda: breaker.snapshot().state == "down")
    breaker.retry_now()
    assert asked.wait(WAIT_S)
    assert breaker.snapshot().next_try_ms is None  # it is being asked just now
    breaker.retry_now()
    answer_now.set()
    assert lane.result(WAIT_S) == "stored"


def test_retry_now_on_a_healthy_server_changes_nothing_later(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    breaker.call(lambda: "stored")
    breaker.retry_now()
    server = Server()
    lane: Future[str] = lanes.submit(breaker.call, server.ask)
    wait_until(lambda: breaker.snapshot().state == "down")
    wait_until(is_waiting(breaker, 1))
    assert server.asked == 1
    breaker.stop()
    with pytest.raises(Stopped):
        lane.result(WAIT_S)


def test_stop_ends_every_wait_and_every_later_call(
    breaker: Breaker, lanes: ThreadPoolExecutor
) -> None:
    server = Server()
    waiting = [lanes.submit(breaker.call, server.ask) for _ in range(5)]
    wait_until(is_waiting(breaker, 5))
    breaker.stop()
    for lane in waiting:
        with pytest.raises(Stopped):
            lane.result(WAIT_S)
    with pytest.raises(Stopped):
        breaker.call(lambda: "stored")


# -- waits ----------------------------------------------------------------------------------


def test_the_snapshot_tells_why_and_when(breaker: Breaker, lanes: ThreadPoolExecutor) -> None:
    server = Server()
    lane = lanes.submit(breaker.call, server.ask)
    wait_until(is_waiting(breaker, 1))
    state = breaker.snapshot()
    assert (state.state, state.last_error, state.failures) == ("down", "connection refused", 1)
    assert state.next_try_ms is not None
    in_s = (state.next_try_ms - state.since_ms) / 1000
    assert in_s == pytest.approx(NEVER_S, abs=WAIT_S)
    breaker.stop()
    assert isinstance(lane.exception(WAIT_S), Stopped)


@pytest.mark.parametrize(("asked_s", "waited_s"), [(60.0, 60.5), (None, 0.5), (1e9, 300.5)])
def test_retry_after_is_the_least_wait_up_to_its_cap(
    new_breaker: Callable[..., Breaker],
    lanes: ThreadPoolExecutor,
    asked_s: float | None,
    waited_s: float,
) -> None:
    breaker = new_breaker(rng=Longest())
    error = ServerAway("busy", retry_after_s=asked_s)
    begun_ms = time.time() * 1000
    lane = lanes.submit(breaker.call, in_turn(raising(error), lambda: "stored"))
    wait_until(lambda: breaker.snapshot().failures == 1 or lane.done())
    next_try_ms = breaker.snapshot().next_try_ms
    if asked_s is not None:
        assert next_try_ms is not None
        assert (next_try_ms - begun_ms) / 1000 == pytest.approx(waited_s, abs=WAIT_S / 2)
        assert not lane.done()
    breaker.retry_now()
    assert lane.result(WAIT_S) == "stored"


def test_the_backoff_doubles_to_its_cap_with_full_jitter() -> None:
    longest = [backoff_s(failures, Longest()) for failures in range(1, 10)]
    assert longest == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert backoff_s(10_000, Longest()) == 30.0
    dice = random.Random(1)
    waits = [backoff_s(4, dice) for _ in range(1000)]
    assert 0.0 <= min(waits) < 0.1
    assert 3.9 < max(waits) <= 4.0
