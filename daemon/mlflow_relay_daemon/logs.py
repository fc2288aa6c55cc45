"""The daemon's log on stderr: one line per event, for people, journald or machines.

What is said again within a minute is counted, and the count is said: a server that is away, or a
rank that sends nonsense, must not fill a disk.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time

#: How long an event that was said once is only counted.
REPEATS_S = 60.0
EVENTS_MAX = 1000  # different events that are remembered
#: sd-daemon(3): journald reads the level of a line from its beginning.
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_LINE_BREAK = " ⏎ "


class TextFormatter(logging.Formatter):
    """`2026-11-23T05:40:01Z WARNING run 3f...: ...`, in UTC."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def format(self, record: logging.LogRecord) -> str:
        return _one_line(super().format(record))


class JournalFormatter(logging.Formatter):
    """`<4>run 3f...: ...`: journald has clocks of its own."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelname, 6)
        return f"<{priority}>{_one_line(super().format(record))}"


class JsonFormatter(logging.Formatter):
    """One JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        repeats = getattr(record, "repeats", 0)
        if repeats:
            event["repeats"] = repeats
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


class CountingHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic in typeshed only
    """Says each event once a minute, with the number of times that it was left out."""

    def __init__(self, form: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_formatter(form))
        self._said: dict[tuple[str, str], _Said] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, or count it. Called under the handler's lock."""
        key = (record.levelname, record.getMessage())
        said = self._said.get(key)
        if said is not None and record.created - said.time_s < REPEATS_S:
            said.repeats += 1
            said.last = record
            return
        if said is not None:
            self._say_repeats(said)
        if len(self._said) >= EVENTS_MAX:
            self.say_repeats(record.created, at_once=True)
            self._said.clear()
        self._said[key] = _Said(record.created)
        super().emit(record)

    def say_repeats(self, now_s: float, *, at_once: bool = False) -> None:
        """Say what was counted, of events that are a minute old; forget them."""
        with self.lock or threading.RLock():
            for key, said in list(self._said.items()):
                if at_once or now_s - said.time_s >= REPEATS_S:
                    self._say_repeats(said)
                    del self._said[key]

    def _say_repeats(self, said: _Said) -> None:
        if said.last is None:
            return
        record = logging.makeLogRecord(said.last.__dict__)
        record.exc_info = record.exc_text = None
        record.repeats = said.repeats
        if not isinstance(self.formatter, JsonFormatter):
            record.msg, record.args = f"{record.getMessage()} ({said.repeats} more times)", ()
        super().emit(record)


class _Said:
    """One event that was said."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self.repeats = 0
        self.last: logging.LogRecord | None = None


def set_up_logging(level: str, form: str) -> None:
    """Let the daemon log to stderr.

    Args: level: as in `Config.log_level`; form: "text" or "json".
    """
    logger = logging.getLogger("mlflow_relay_daemon")
    say_repeats(at_once=True)
    logger.handlers[:] = [CountingHandler(form)]
    logger.setLevel(level.upper())
    logger.propagate = False


def say_repeats(*, at_once: bool = False) -> None:
    """Say what was counted: from time to time, and at the end."""
    for handler in logging.getLogger("mlflow_relay_daemon").handlers:
        if isinstance(handler, CountingHandler):
            handler.say_repeats(time.time(), at_once=at_once)


def _formatter(form: str) -> logging.Formatter:
    if form == "json":
        return JsonFormatter()
    return JournalFormatter() if _is_journald() else TextFormatter()


def _is_journald() -> bool:
    """Return whether stderr is journald's stream (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _one_line(text: str) -> str:
    """Return the text without line breaks and other control characters: they would make events of
    their own, or colours on a terminal."""
    joined = _LINE_BREAK.join(line for line in text.splitlines() if line.strip())
    return "".join(each if each.isprintable() else " " for each in joined)
