"""So many bytes a second, shared by all uploads."""

from __future__ import annotations

import threading
import time


class Throttle:
    """Args: bytes_per_s: None: no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0
        self._stopped = threading.Event()

    def take(self, size: int) -> None:
        """Return when so many bytes may go. They are paid for afterwards: by whoever comes next."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(now_s, self._free_at_s)
            self._free_at_s = begin_s + size / self._bytes_per_s
        self._stopped.wait(begin_s - now_s)

    def stop(self) -> None:
        """Let everybody go at once."""
        self._stopped.set()
