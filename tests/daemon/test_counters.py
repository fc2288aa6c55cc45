"""Counters: each is counted, one a minute is said."""

from __future__ import annotations

import logging

import pytest

from mlflow_relay_daemon import counters as module
from mlflow_relay_daemon.counters import Counters

KINDS = ["bad_messages", "fsync_failures", "resent_frames"]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_counted_and_the_first_is_said_at_once(clock, caplog, kind):
    counters = Counters()
    with caplog.at_level(logging.WARNING, "mlflow_relay_daemon"):
        for number in range(1000):
            counters.count(kind, f"why {number}")

    assert getattr(counters, kind) == 1000
    assert [getattr(counters, other) for other in KINDS if other != kind] == [0, 0]
    (said,) = caplog.messages
    assert "why 0" in said


def test_a_minute_later_it_is_summed_up(clock, caplog):
    counters = Counters()
    with caplog.at_level(logging.WARNING, "mlflow_relay_daemon"):
        counters.count("bad_messages", "first")
        for _ in range(41):
            counters.count("bad_messages", "noise")
        clock.now_s += module.REPORT_EVERY_S
        counters.count("bad_messages", "last")

    assert len(caplog.messages) == 2
    assert "last" in caplog.messages[1]
    assert "42 more, 43 in all" in caplog.messages[1]


def test_kinds_do_not_silence_each_other(clock, caplog):
    counters = Counters()
    with caplog.at_level(logging.WARNING, "mlflow_relay_daemon"):
        for kind in KINDS:
            counters.count(kind, "why")

    assert len(caplog.messages) == 3


def test_a_kind_that_is_none_is_a_mistake():
    with pytest.raises(AttributeError):
        Counters().count("no_such_thing", "why")
