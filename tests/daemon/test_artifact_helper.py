"""The helper process: what it answers, and what becomes of questions when it dies."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from mlflow_relay_daemon.artifacts import helper_client
from mlflow_relay_daemon.artifacts.helper_client import Helper
from mlflow_relay_daemon.sinks import Refused, TryAgain
from tests.support.relay import wait_until

#: Stands in for the helper's own module, whose import of mlflow takes seconds.
DOUBLE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["path"] == "die":
        sys.exit(1)
    if request["path"] == "wait":
        continue
    error = {"bad": "no: hunter2", "away": "not now"}.get(request["path"])
    kind = {"bad": "permanent", "away": "temporary"}.get(request["path"])
    print(json.dumps({"id": request["id"], "error": error, "kind": kind}), flush=True)
"""


@pytest.fixture
def helper(monkeypatch):
    import sys

    real = subprocess.Popen

    def popen(_command, **options):
        return real([sys.executable, "-c", DOUBLE], **options)

    monkeypatch.setattr(helper_client.subprocess, "Popen", popen)
    made = Helper("http://user:hunter2@host", 2)
    yield made
    made.stop()


def test_what_it_answers_is_what_comes_out(helper):
    helper.put("s3://bucket/x", "good", Path("/f"))
    with pytest.raises(TryAgain, match="not now"):
        helper.put("s3://bucket/x", "away", Path("/f"))
    with pytest.raises(Refused, match="upload 'bad' to s3://bucket/x") as refusal:
        helper.put("s3://bucket/x", "bad", Path("/f"))
    assert "hunter2" not in str(refusal.value)


def test_its_death_is_told_to_all_who_wait_and_the_next_question_has_another(helper):
    errors = []

    def ask() -> None:
        try:
            helper.put("u", "wait", Path("/f"))
        except TryAgain as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(helper._waiting) == 3, "all have asked")
    first = helper._process
    with pytest.raises(TryAgain, match="ended in the middle"):
        helper.put("u", "die", Path("/f"))
    helper.put("u", "good", Path("/f"))
    for thread in threads:
        thread.join(30)
    assert len(errors) == 3
    assert helper._process is not first


def test_it_goes_when_there_is_nothing_to_do_and_never_in_the_middle(helper, monkeypatch):
    monkeypatch.setattr(helper_client, "IDLE_S", 0.0)
    helper.put("u", "good", Path("/f"))
    process = helper._process
    helper._waiting[99] = process, None
    helper.rest()
    assert process.poll() is None
    del helper._waiting[99]
    helper.rest()
    assert process.poll() is not None
    assert helper._process is None
    helper.rest()
