"""One client's life, from attach to detach: a journal and the thread that empties it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from .errors import RelayError
from .journal import Journal
from .messages import SESSION_BYTES, pack_map
from .paths import SOCKET_PATH_BYTES_MAX, is_shared, journal_dir, private_dir
from .sender import Sender, State

log = logging.getLogger("mlflow_relay")

#: How long `end` looks for a daemon that does not answer. The journal keeps the records, so there
#: is nothing to wait for but a daemon that is just being restarted.
NO_DAEMON_GRACE_S = 0.3
#: The same where this session starts a daemon: that takes a second before it answers.
STARTING_GRACE_S = 3.0


class Session:
    """Opens at once: needs no daemon.

    Args:
        card: what is told to the daemon at attach, and kept in the journal for the case that
            nobody is left to tell it. `session` and `journal` are added here.
        socket: the daemon's; the journal lies beside it.
        journal_bytes_max: see `journal.Journal`.
        on_mlflow_run_id, on_no_daemon: called from the sender's thread.

    Raises: JournalError, RelayError: the journal cannot be made.
    """

    def __init__(
        self,
        card: dict[str, Any],
        *,
        socket: Path,
        journal_bytes_max: int,
        on_mlflow_run_id: Callable[[str], None],
        on_no_daemon: Callable[[], None] | None = None,
    ) -> None:
        length = len(os.fsencode(socket))
        if length > SOCKET_PATH_BYTES_MAX:
            raise RelayError(
                f"the socket path {socket} has {length} bytes, a unix socket's may have "
                f"{SOCKET_PATH_BYTES_MAX}: set MLFLOW_RELAY_SOCKET to a shorter one"
            )
        shared = is_shared(socket)
        folder = journal_dir(socket)
        if not shared:
            private_dir(socket.parent)
            private_dir(folder)
        name = os.urandom(SESSION_BYTES)
        card = {**card, "session": name, "pid": os.getpid()}
        self.journal = Journal(
            folder, name, pack_map(card), bytes_max=journal_bytes_max, shared=shared
        )
        self._grace_s = NO_DAEMON_GRACE_S if on_no_daemon is None else STARTING_GRACE_S
        self.sender = Sender(self.journal, socket, card, on_mlflow_run_id, on_no_daemon)
        self.sender.start()

    def end(self, timeout_s: float) -> bool:
        """Wait until all is acked and the daemon knows that the session is over.

        Returns: False if that did not happen in time: the journal stays, the sender tries on as
            long as the process lives, and the daemon takes the journal afterwards.
        """
        self.sender.end()
        begin_s = monotonic()
        answered_s = begin_s
        while (now_s := monotonic()) - begin_s < timeout_s:
            if self.sender.over.wait(0.02):
                self.sender.join()
                self.sender.let_go()
                return True
            if self.sender.state is State.SENDING:
                answered_s = now_s
            elif now_s - answered_s > self._grace_s or not self.sender.is_alive():
                break
        return False

    def leave_to_parent(self) -> None:
        """In a forked child: let go of what is the parent's, and touch nothing of it."""
        self.journal.close(unlink=False)
        self.sender.let_go()
