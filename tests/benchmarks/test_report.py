"""The report says what the figures say, and a ratio that falls behind is a failure."""

from __future__ import annotations

import json

from tests.benchmarks import report
from tests.benchmarks.__main__ import CASES, QUICK_CASES, failures
from tests.benchmarks.outcome import Outcome, Plot, Table, Target, from_json, to_json

RATIO = Target("to the bare pipe", 0.55, "", least=0.6, is_ratio=True)
OUTCOME = Outcome(
    [Table("Intake", ["", "points/s"], [["ours", 15_600_000.0], ["theirs", None]], "A note.")],
    [Plot("intake", "Intake", "clients", "points/s", {"ours": [(1, 2.0), (8, 3.0)]})],
    [RATIO, Target("import", 48.2, "ms", most=60, beside="zmq alone 17 ms")],
    ["PostgreSQL: not installed"],
)


def test_an_outcome_comes_back_from_its_json():
    assert from_json(json.loads(json.dumps(to_json(OUTCOME)))) == OUTCOME


def test_a_target_is_met_up_to_its_bound_and_a_short_run_has_some_slack():
    assert not RATIO.is_met()
    assert RATIO.is_met(slack=1.25)
    assert Target("import", 60.0, "ms", most=60).is_met()
    assert not Target("import", 60.1, "ms", most=60).is_met()


def test_only_ratios_that_fall_behind_fail_the_short_form():
    slow_import = Target("import", 500.0, "ms", most=60)
    far_behind = Target("to the bare pipe", 0.3, "", least=0.6, is_ratio=True)

    assert failures([Outcome(targets=[RATIO, slow_import])], slack=1.25) == []
    assert failures([Outcome(targets=[RATIO, far_behind])], slack=1.25) == [far_behind]
    assert failures([Outcome(targets=[RATIO])], slack=1.0) == [RATIO]


def test_whoever_is_ahead_of_us_in_a_race_is_named():
    rows = [
        ["mlflow-relay", "up", 5.0, 9],
        ["theirs", "up", 4.0, 10],
        ["theirs", "down", 1.0, 1],
        ["others", "up", None, "raises"],
    ]
    columns = ["", "server", "start ms", "end ms"]

    assert Table("Start", columns, rows, is_race=True).ahead_of("mlflow-relay") == [
        "theirs in start ms (4, ours 5)"
    ]
    assert Table("Start", columns, rows).ahead_of("mlflow-relay") == []


def test_the_page_has_all_figures_targets_and_plots(tmp_path):
    cases = json.loads(json.dumps({"intake": to_json(OUTCOME)}))
    found = {"machine": {"cores": "2"}, "size": "normal", "took_s": 7, "cases": cases}
    report.write(tmp_path / "benchmarks.md", found)

    page = (tmp_path / "benchmarks.md").read_text()
    assert "| ours | 15,600,000 |" in page
    assert "| theirs | – |" in page
    assert "| to the bare pipe | ≥ 0.6 | 0.55 | **missed** |  |" in page
    assert "| import | ≤ 60 ms | 48.2 ms | met | zmq alone 17 ms |" in page
    assert "Not measured: PostgreSQL: not installed" in page
    assert "benchmarks/intake.svg" in page
    assert (tmp_path / "benchmarks" / "intake.svg").read_text().startswith("<?xml")
    assert json.loads((tmp_path / "benchmarks" / "figures.json").read_text()) == found


def test_the_short_form_is_a_part_of_the_whole():
    assert set(QUICK_CASES) < set(CASES)
