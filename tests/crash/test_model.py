"""The spool against its model, for some lives; `make torture` has a hundred thousand."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.crash.model import SpoolMachine


def test_whatever_happens_in_whatever_order_the_promises_hold():
    few = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SpoolMachine, settings=few)
