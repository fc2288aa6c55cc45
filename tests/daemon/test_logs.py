"""Log lines, as people and as machines read them; from a process of its own."""

from __future__ import annotations

import json
import os
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
    assert found[1].endswith(" WARNING a line ⏎ and  [31mcolours")
    assert "⏎ Traceback (most recent call last): ⏎" in found[2]
    assert found[2].endswith("ValueError: no such thing")


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


REPEATS = """
import logging, sys, time
from mlflow_relay_daemon import logs
logs.REPEATS_S = 0.2
logs.set_up_logging("info", sys.argv[1])
log = logging.getLogger("mlflow_relay_daemon.some.room")
for _ in range(50):
    log.warning("the server is away")
log.info("something else")
time.sleep(0.25)
logs.say_repeats()
logs.say_repeats()
log.warning("the server is away")
for _ in range(3):
    log.warning("at the end")
logs.say_repeats(at_once=True)
"""


def repeats(form: str, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REPEATS, form], capture_output=True, text=True, check=True,
        env={**os.environ, **environ},
    )  # fmt: skip
    return done.stderr.splitlines()


def test_an_event_that_is_repeated_is_said_once_and_counted():
    said = [line.partition(" ")[2] for line in repeats("text")]
    assert said == [
        "WARNING the server is away",
        "INFO something else",
        "WARNING the server is away (49 more times)",
        "WARNING the server is away",
        "WARNING at the end",
        "WARNING at the end (2 more times)",
    ]


def test_in_json_the_count_is_a_field_of_its_own():
    events = [json.loads(line) for line in repeats("json")]
    assert [event.get("repeats") for event in events] == [None, None, 49, None, None, 2]
    assert {event["message"] for event in events[::2]} == {"the server is away", "at the end"}


def test_under_journald_a_line_begins_with_its_level_and_has_no_clock():
    read, write = os.pipe()
    found = os.fstat(write)
    script = "import os; os.dup2(int(os.environ['FD']), 2)\n" + SCRIPT
    subprocess.run(
        [sys.executable, "-c", script, "info", "text"], check=True, pass_fds=(write,),
        env={**os.environ, "FD": str(write), "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"},
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert lines[0] == "<6>run 3f is there"
    assert lines[1].startswith("<4>a line")
    assert lines[2].startswith("<3>it failed")
