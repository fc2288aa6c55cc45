"""The socket that ranks connect to: made, made anew where it is gone, and hidden for a while where
one more connection would be the end."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import threading
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from mlflow_relay import messages
from mlflow_relay.paths import private_dir

log = logging.getLogger(__name__)

#: Descriptors that are left for files and for who connects between two looks: libzmq ends the
#: process (ipc_listener.cpp, EMFILE) when it has none for a connection that comes in.
RESERVE_MAX = 256


def hidden_path(path: Path) -> Path:
    """Return where a daemon's socket is while nobody else is let in: for operators."""
    return path.with_name(path.name + ".hidden")


class Endpoint:
    """A ZeroMQ ROUTER at a path.

    A thread counts who connects: a crowd is quicker than the daemon's next look, which may have to
    wait for the disk.

    Args:
        path: made here, for this user alone.
        gid: of the group whose members may connect, too.
    Attributes:
        is_hidden: who comes now does not find it.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], path: Path, gid: int | None
    ) -> None:
        self._path, self._gid, self._uri = path, gid, f"ipc://{path}"
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 200
        self.socket.rcvhwm = 200  # frames; beyond it ranks wait, in their journals
        # What is too large is counted; what is far too large, ZeroMQ refuses to take in at all.
        self.socket.maxmsgsize = 2 * messages.MESSAGE_BYTES_MAX
        # Those who wait at the door come in after it is hidden.
        self.socket.backlog = max(8, min(100, _reserve(_limit()) // 2))
        self._hidden_path = hidden_path(path)
        self.is_hidden = False
        self._lock = threading.Lock()  # of what the path is named
        self._open()
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_MONITOR_STOPPED
        self._counter = threading.Thread(
            target=self._count_arrivals,
            args=(self.socket.get_monitor_socket(events),),
            name="arrivals",
            daemon=True,
        )
        self._counter.start()

    def look(self) -> None:
        """Be there for those who come, if there are descriptors for them; called now and then."""
        with self._lock:
            if are_descriptors_short():
                self._hide()
            elif self.is_hidden:
                self._show()
            elif not self._path.exists():  # systemd's RemoveIPC, a clean-up
                with contextlib.suppress(zmq.ZMQError):
                    self.socket.unbind(self._uri)
                self._open()
                log.error("the socket %s was gone and is made anew", self._path)

    def close(self) -> None:
        """Nobody is to come any more."""
        self.socket.disable_monitor()
        self._counter.join()
        self.socket.close()
        for path in (self._path, self._hidden_path):
            path.unlink(missing_ok=True)

    def _count_arrivals(self, monitor: zmq.Socket[bytes]) -> None:
        arrivals = 0
        with monitor:
            while True:
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if event == zmq.EVENT_MONITOR_STOPPED:
                    return
                arrivals += 1
                if arrivals % max(1, _reserve(_limit()) // 8):
                    continue
                with self._lock:
                    if are_descriptors_short():
                        self._hide()

    def _open(self) -> None:
        private_dir(self._path.parent)
        self._hidden_path.unlink(missing_ok=True)  # of a daemon that was killed
        before = os.umask(0o177)  # nobody else may connect before the next lines have been run
        try:
            self.socket.bind(self._uri)
        finally:
            os.umask(before)
        if self._gid is not None:
            if self._path.stat().st_gid != self._gid:
                os.chown(self._path, -1, self._gid)
            os.chmod(self._path, 0o660)

    def _hide(self) -> None:
        """Under another name nobody finds it: those who come try again, and keep in their journals
        what they log. Those who are here stay, whom an unbind would cut off."""
        if self.is_hidden or not self._path.exists():
            return
        self._path.rename(self._hidden_path)
        self.is_hidden = True
        log.error(
            "nearly all of %d file descriptors are in use: ranks that come now have to wait, and "
            "keep what they log: raise the limit (LimitNOFILE= of the unit, ulimit -Hn)",
            _limit(),
        )

    def _show(self) -> None:
        self.is_hidden = False
        with contextlib.suppress(FileNotFoundError):  # then it is made anew
            self._hidden_path.rename(self._path)
        log.warning("there are file descriptors again: ranks are let in")


def are_descriptors_short() -> bool:
    """Return whether the process has nearly as many files and connections open as it may."""
    limit = _limit()
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # there is none left to look with
        return True
    return used > limit - _reserve(limit)


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _reserve(limit: int) -> int:
    return RESERVE_MAX if limit == resource.RLIM_INFINITY else min(RESERVE_MAX, limit // 4)
