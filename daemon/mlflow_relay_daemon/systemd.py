"""Tells systemd how the daemon is: sd_notify(3), if there is somebody to listen."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

#: Added to what is asked for: what else there is to do, on a slow disk.
MARGIN_S = 30.0


def notify(message: str) -> None:
    """Send one message, such as READY=1. Never fails, never waits."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.setblocking(False)
            listener.sendto(message.encode(), address)
    except OSError as error:
        log.debug("systemd does not listen: %s", error)


def extend_timeout(work_s: float = 0.0) -> None:
    """Ask for so much time, and some more, before a start or a stop counts as hung."""
    notify(f"EXTEND_TIMEOUT_USEC={int((work_s + MARGIN_S) * 1e6)}")
