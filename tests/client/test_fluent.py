"""The active run's functions, with a run that only remembers what it was told."""

from __future__ import annotations

import pytest

from mlflow_relay import fluent
from mlflow_relay.errors import RelayError


class FakeRun:
    """What fluent needs of a Run."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        fluent.set_active(self)

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, *arguments, options))

    def end(self, status="FINISHED"):
        self.calls.append(("end", status))
        fluent.clear_active(self)


@pytest.fixture(autouse=True)
def no_active_run(monkeypatch):
    monkeypatch.setattr(fluent, "_active", [])


CALLS = [
    ("log_metric", ("loss", 0.5, 3)),
    ("log_metrics", ({"loss": 0.5}, 3)),
    ("log_param", ("lr", 1e-3)),
    ("log_params", ({"lr": 1e-3},)),
    ("set_tag", ("team", "ens")),
    ("set_tags", ({"team": "ens"},)),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_functions_act_on_the_active_run(name, arguments):
    run = FakeRun()
    getattr(fluent, name)(*arguments)
    assert run.calls == [(name, *arguments, {})]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_without_an_active_run_a_function_says_to_start_one(name, arguments):
    with pytest.raises(RelayError, match=f"{name}.*start_run"):
        getattr(fluent, name)(*arguments)


def test_steps_and_options_are_passed_on():
    run = FakeRun()
    fluent.log_metric("loss", 1)
    fluent.log_metrics({"loss": 1}, reduce="mean")
    assert run.calls == [
        ("log_metric", "loss", 1, None, {}),
        ("log_metrics", {"loss": 1}, None, {"reduce": "mean"}),
    ]


def test_no_run_is_active_at_first():
    assert fluent.active_run() is None


def test_the_outer_run_is_active_again_when_the_inner_one_has_ended():
    outer, inner = FakeRun(), FakeRun()
    assert fluent.active_run() is inner
    fluent.end_run("FAILED")
    assert inner.calls == [("end", "FAILED")]
    assert fluent.active_run() is outer
    fluent.end_run()
    assert outer.calls == [("end", "FINISHED")]
    assert fluent.active_run() is None


def test_an_outer_run_that_ends_first_leaves_the_inner_one_active():
    outer, inner = FakeRun(), FakeRun()
    outer.end()
    assert fluent.active_run() is inner


def test_a_run_set_active_twice_is_gone_when_it_has_ended():
    first, second = FakeRun(), FakeRun()
    fluent.set_active(first)
    assert fluent.active_run() is first
    fluent.end_run()
    assert fluent.active_run() is second


def test_end_run_without_a_run_does_nothing():
    fluent.end_run()
