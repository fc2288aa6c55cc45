"""SIGHUP: which settings a living daemon takes over, and what it says of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from mlflow_relay_daemon.config import SETTINGS, Config, ConfigError

log = logging.getLogger(__name__)

#: What counts at once. All else is woven into sockets, files and threads: it needs a restart.
LIVE = frozenset(
    {
        "batch_age_s",
        "drain_timeout_s",
        "exit_when_idle_s",
        "free_bytes_min",
        "group_bytes_max",
        "keep_ended_s",
        "log_format",
        "log_level",
        "retry_wait_s_max",
        "spool_bytes_max",
    }
)


def take_over(
    before: Config, load: Callable[[], Config], apply: Callable[[Config], None]
) -> Config:
    """Return the settings that are in force now, and say what has changed.

    A wrong file changes nothing: the daemon goes on as it was.
    """
    try:
        wanted = load()
    except ConfigError as error:
        log.error("nothing is reloaded: %s", error)
        return before
    changed = [name for name in SETTINGS if getattr(wanted, name) != getattr(before, name)]
    live = [name for name in changed if name in LIVE]
    waiting = [name for name in changed if name not in LIVE]
    now = replace(before, **{name: getattr(wanted, name) for name in live})
    apply(now)
    log.info("settings are reloaded: %s", ", ".join(live) or "none has changed")
    if waiting:
        log.warning("changed, but only a restart takes them over: %s", ", ".join(waiting))
    return now
