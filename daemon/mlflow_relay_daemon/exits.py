"""The exit codes of the command, and the errors that carry one. Pure.

CommandError            an expected failure: its text is one line that says what to do
├── ConfigError         a setting is wrong (config.py)
├── NoDaemon            nobody answers at the socket (control_client.py)
│   └── ClosedToUser    there is a daemon, and its socket is not for this user
└── DaemonRefused       the daemon answered, and said no (control_client.py)
"""

from __future__ import annotations

DONE = 0
DEGRADED = 1  # failed, or it works but something needs a person
USAGE = 64  # EX_USAGE of sysexits.h
NO_DAEMON = 69  # EX_UNAVAILABLE
TIME_RAN_OUT = 75  # EX_TEMPFAIL: try again
BAD_CONFIG = 78  # EX_CONFIG; also a missing [daemon] extra
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
READER_GONE = 141  # 128 + SIGPIPE: `mlflow-relay runs | head`


class CommandError(Exception):
    """An expected failure. Its text goes to stderr as one line and says what to do."""

    exit_code = DEGRADED

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code
