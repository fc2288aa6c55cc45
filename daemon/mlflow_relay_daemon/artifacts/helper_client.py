"""The daemon's side of the helper: starts it when it is needed, lets it go when it is not."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue

from mlflow_relay_daemon.artifacts.helper import PERMANENT
from mlflow_relay_daemon.sinks import Refused, ServerAway, TryAgain
from mlflow_relay_daemon.sinks.redact import redact_uri, scrub, uri_secrets

log = logging.getLogger(__name__)

#: A helper without work is let go after this time: it holds some 200 MB.
IDLE_S = 30.0
ERROR_CHARS_MAX = 600

Answer = Mapping[str, str | None]


class Helper:
    """One helper process at most. `put` is called by many threads.

    Args:
        tracking_uri: told in its environment, for repositories that ask the server.
        threads: uploads that it does side by side.
    """

    def __init__(self, tracking_uri: str, threads: int) -> None:
        self._tracking_uri, self._threads = tracking_uri, threads
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._waiting: dict[int, tuple[subprocess.Popen[str], SimpleQueue[Answer | None]]] = {}
        self._ids = itertools.count()
        self._used_s = 0.0

    def put(self, uri: str, path: str, file: Path) -> None:
        """Bring a file to the repository of a URI. Raises: SinkError."""
        answer: SimpleQueue[Answer | None] = SimpleQueue()
        number = next(self._ids)
        request = {"id": number, "uri": uri, "path": path, "file": os.fspath(file)}
        with self._lock:
            try:
                process = self._running()
                self._waiting[number] = process, answer
                assert process.stdin is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except OSError as error:
                self._waiting.pop(number, None)
                raise ServerAway(f"the artifact helper cannot be used: {error}") from None
        said = answer.get()
        asked = f"upload {path!r} to {redact_uri(uri)}"
        if said is None:
            raise TryAgain(f"{asked}: the artifact helper ended in the middle of it")
        if said["error"] is not None:
            secrets = (*uri_secrets(uri), *uri_secrets(self._tracking_uri))
            why = f"{asked}: {scrub(said['error'], secrets)[:ERROR_CHARS_MAX]}"
            raise Refused(why) if said["kind"] == PERMANENT else TryAgain(why)

    def rest(self) -> None:
        """Let the helper go if it had nothing to do for a while. Called now and then."""
        with self._lock:
            is_idle = not self._waiting and time.monotonic() - self._used_s > IDLE_S
        if is_idle:
            self.stop()

    def stop(self) -> None:
        """End the helper at once; what it was doing is to be done again."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()

    def _running(self) -> subprocess.Popen[str]:
        """Return the helper, started if there is none. Raises: OSError."""
        self._used_s = time.monotonic()
        if self._process is None:
            environ = {**os.environ, "MLFLOW_TRACKING_URI": self._tracking_uri}
            self._process = subprocess.Popen(  # noqa: S603  # our own module, by this Python
                [sys.executable, "-m", "mlflow_relay_daemon.artifacts.helper", str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # its libraries may print credentials
                env=environ,
                text=True,
                encoding="utf-8",
                errors="surrogateescape",
            )
            log.info("artifact helper started, pid %d", self._process.pid)
            threading.Thread(
                target=self._listen, args=(self._process,), name="artifact helper", daemon=True
            ).start()
        return self._process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Hand answers to those who wait; at the helper's end, tell the rest that it is gone."""
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            with self._lock:
                self._used_s = time.monotonic()
                _, waiting = self._waiting.pop(answer["id"])
            waiting.put(answer)
        with self._lock:  # another helper may be at work by now, with questions of its own
            if self._process is process:
                self._process = None  # it speaks no more, though it may still be there
            left = [number for number, (owner, _) in self._waiting.items() if owner is process]
            unanswered = [self._waiting.pop(number)[1] for number in left]
        for waiting in unanswered:
            waiting.put(None)
        process.kill()
        process.wait()
