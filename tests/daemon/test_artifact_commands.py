"""What `status` and `flush` say of artifacts."""

from __future__ import annotations

from typing import Any

from mlflow_relay_daemon.commands import flush
from tests.daemon.test_commands import ID_A, a_run, a_status, plain

NONE: dict[str, Any] = a_run()["artifacts"]


def with_artifacts(**changes: Any) -> dict[str, Any]:
    run = a_run(settled_records=100, artifacts={**NONE, **changes})
    return a_status(run)


def test_status_says_how_many_are_to_come_and_why_they_wait() -> None:
    shown = with_artifacts(
        waiting=3, waiting_bytes=2_100_000_000, sending=1, sent_bytes=5_000_000, last_error="503"
    )
    shown["disk"]["staged_bytes"] = 2_100_000_000
    text = "\n".join(plain(shown, None))
    assert "3 artifacts to come, 2.1 GB, 5.0 MB of those being sent are there: 503" in text
    assert "2.1 GB staged" in text


def test_status_is_silent_where_there_are_none_and_with_a_daemon_that_knows_none() -> None:
    assert "artifact" not in "\n".join(plain(a_status(a_run()), None))
    older = a_status(a_run())
    del older["runs"][0]["artifacts"], older["disk"]["staged_bytes"]
    assert "artifact" not in "\n".join(plain(older, None))


def test_flush_waits_for_the_files_that_were_there_and_for_no_later_ones() -> None:
    targets, files = {ID_A: 100}, {}
    early = with_artifacts(accepted=5, waiting=5)
    early["runs"][0]["settled_records"] = 99
    flush.note_files(files, early, targets)
    assert files == {}  # some may still be in records that are not read
    flush.note_files(files, with_artifacts(accepted=7, waiting=7), targets)
    flush.note_files(files, with_artifacts(accepted=9, waiting=9), targets)
    assert files == {ID_A: 7}

    progress = flush.measure(early, with_artifacts(settled_to=4, waiting=3), targets, files)
    assert progress.files_left == {ID_A: 3}
    assert not progress.is_done
    assert flush.exit_code(progress) == 75
    progress = flush.measure(early, with_artifacts(settled_to=7, waiting=2), targets, files)
    assert progress.is_done
    assert flush.exit_code(progress) == 0


def test_flush_says_which_files_are_left_and_why() -> None:
    shown = with_artifacts(settled_to=1, waiting=2, last_error="the bucket is gone")
    progress = flush.measure(shown, shown, {ID_A: 100}, {ID_A: 3})
    lines = flush.outcome_lines(shown, progress, 1.0)
    assert any("2 artifacts: the bucket is gone" in line for line in lines)
    assert any("nothing is lost" in line for line in lines)


def test_flush_of_a_daemon_that_knows_no_artifacts_waits_for_none() -> None:
    older = a_status(a_run(settled_records=100))
    del older["runs"][0]["artifacts"]
    files: dict[str, int] = {}
    flush.note_files(files, older, {ID_A: 100})
    assert flush.measure(older, older, {ID_A: 100}, files).is_done
