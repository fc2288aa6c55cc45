"""Log lines, as people and as machines read them; from a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

SCRIPT = """
import logging, sys
from mlflow_relay_daemon.logs import set_up_logging
set_up_logging(*sys.argv[1:3])
set_up_logging(*sys.argv[1:3])  # twice is as good as once
log = logging.getLogger("mlflow_relay_daemon.some.room")
log.debug("details")
log.info("run %s is there", "3f")
log.warning("a line\\nand \\x1b[31mcolours", )
try:
    raise ValueError("no such thing")
except ValueError:
    log.exception("it failed")
logging.getLogger("urllib3").warning("somebody else")
"""


def lines(level: str, form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, level, form],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_text_has_time_in_utc_level_and_message():
    before_s = time.time()
    found = lines("info", "text")

    matched = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) INFO run 3f is there", found[0])
    assert matched is not None
    stamp = time.strptime(matched[1], "%Y-%m-%dT%H:%M:%SZ")
    import calendar

    assert before_s - 2 <= calendar.timegm(stamp) <= time.time() + 1
    assert "ValueError: no such thing" in found


def test_json_is_one_object_in_a_line_whatever_the_message_holds():
    events = [json.loads(line) for line in lines("info", "json") if "somebody else" not in line]

    assert [event["level"] for event in events] == ["info", "warning", "error"]
    assert events[0]["message"] == "run 3f is there"
    assert events[0]["logger"] == "mlflow_relay_daemon.some.room"
    assert abs(events[0]["time_ms"] / 1000 - time.time()) < 60
    assert events[1]["message"] == "a line\nand \x1b[31mcolours"
    assert "ValueError: no such thing" in events[2]["traceback"]


@pytest.mark.parametrize(
    ("level", "first"), [("debug", "details"), ("warning", "a line"), ("error", "it failed")]
)
def test_the_level_is_what_was_asked_for(level, first):
    assert json.loads(lines(level, "json")[0])["message"].startswith(first)


def test_every_line_comes_once():
    found = lines("info", "text")

    assert sum("is there" in line for line in found) == 1
