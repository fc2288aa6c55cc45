"""Bisection: the guilty are found, the innocent delivered, whoever is guilty."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay_daemon.batch import Entry
from mlflow_relay_daemon.bisect_refusal import deliver_apart
from mlflow_relay_daemon.sinks import Refused, ServerAway, TryAgain


class Server:
    """Refuses a request for each guilty entry in it."""

    def __init__(self, guilty: set[str], error: type[Refused | TryAgain] = Refused) -> None:
        self.guilty, self.error = guilty, error
        self.has: list[str] = []
        self.asked = 0

    def send(self, entries: list[Entry]) -> None:
        assert entries
        self.asked += 1
        wrong = [entry.key for entry in entries if entry.key in self.guilty]
        if wrong:
            raise self.error(f"{wrong[0]} is no name", "INVALID_PARAMETER_VALUE")
        self.has += [entry.key for entry in entries]


def entries(count: int) -> list[Entry]:
    return [Entry("metric", f"m{index}", 1.0, 0, index) for index in range(count)]


@given(count=st.integers(1, 200), guilty=st.sets(st.integers(0, 199), max_size=20))
def test_each_entry_is_delivered_once_in_order_or_refused_with_its_own_reason(count, guilty):
    names = {f"m{index}" for index in guilty if index < count}
    server = Server(names)

    found = deliver_apart(entries(count), server.send, (Refused,))

    assert {objection.entry.key for objection in found} == names
    assert all(each.reason == f"{each.entry.key} is no name" for each in found)
    assert all(each.error_code == "INVALID_PARAMETER_VALUE" for each in found)
    assert server.has == [f"m{n}" for n in range(count) if f"m{n}" not in names]
    if names:
        assert server.asked <= 2 * len(names) * (math.ceil(math.log2(count)) + 1) + 1


def test_one_guilty_of_a_thousand_costs_about_twenty_requests():
    server = Server({"m617"})
    deliver_apart(entries(1000), server.send, (Refused,))

    assert len(server.has) == 999
    assert server.asked <= 21


def test_what_is_no_refusal_passes_through():
    server = Server({"m3"}, TryAgain)
    with pytest.raises(TryAgain):
        deliver_apart(entries(8), server.send, (Refused,))

    assert [each.entry.key for each in deliver_apart(entries(8), server.send, (TryAgain,))] == [
        "m3"
    ]


def test_a_server_that_goes_away_in_the_midst_is_no_refusal():
    asked = []

    def send(part: list[Entry]) -> None:
        asked.append(part)
        if len(asked) == 3:
            raise ServerAway("connection refused")
        raise Refused("no")

    with pytest.raises(ServerAway):
        deliver_apart(entries(8), send, (Refused, TryAgain))
