"""The report says what was run and nothing else."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict

import pytest

from tests.crash import __main__ as runner
from tests.crash import report
from tests.crash.outcome import Job, Outcome


def row(**changes: object) -> dict[str, object]:
    outcome = asdict(Outcome("Kills of all kinds", 1000, "kills", count=1234))
    more = {"seed": 7, "took_s": 90, "date": "2026-11-23", "command": "python -m tests.crash"}
    return {**outcome, **more, **changes}


def test_a_case_that_was_not_run_says_so(tmp_path):
    page = tmp_path / "reliability.md"

    report.add(page, "kills", row())

    rows = {line.split("|")[1]: line for line in page.read_text().splitlines() if "| " in line}
    assert "1,234 kills" in rows[f" [{report.CASES['kills']}](#kills) "]
    assert "not run yet" in rows[f" {report.CASES['states']} "]


def test_what_broke_a_promise_stays_listed_until_the_case_is_run_again(tmp_path):
    page = tmp_path / "reliability.md"
    report.add(page, "kills", row(bad=1, findings=["a point is there twice"]))
    report.add(page, "states", row(unit="states"))
    assert "a point is there twice" in page.read_text()

    report.add(page, "kills", row(count=99))

    assert "a point is there twice" not in page.read_text()
    assert "99 kills" in page.read_text()
    assert "1,234 states" in page.read_text()


@pytest.mark.parametrize("name", report.CASES)
def test_every_case_of_the_report_is_there(name):
    case = importlib.import_module(f"tests.crash.cases.{name}")

    assert case.__doc__
    assert callable(case.run)


def test_a_case_that_fails_itself_is_no_success(monkeypatch, capsys, tmp_path):
    def run(job: Job) -> Outcome:
        raise ZeroDivisionError("in the case")

    monkeypatch.setattr(importlib.import_module("tests.crash.cases.states"), "run", run)
    monkeypatch.setattr(runner, "REPORT", tmp_path / "reliability.md")

    assert runner.main(["--only", "states", "--hours", "0", "--seed", "7", "--report"]) == 1

    assert "ZeroDivisionError" in (tmp_path / "reliability.md").read_text()


def test_the_page_is_made_from_its_figures_and_from_nothing_else():
    rows = json.loads(runner.REPORT.with_suffix(".json").read_text())

    assert runner.REPORT.read_text() == report.as_page(rows)
