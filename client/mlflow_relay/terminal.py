"""What a rank prints, kept like all else that it logs.

    rank: fd 1, 2 ──▶ pipe, or pseudo-terminal ──▶ helper ──▶ where fd 1 and 2 went before
                                                     └──▶ a journal of its own ──▶ daemon

The helper is a process and no thread: it outlives a rank that is killed, and has what that left in
the pipe; and a rank that prints while it holds the GIL never waits for itself. The rank only writes
to a descriptor, as before: nothing here is in the way of fork, signal handlers, `__del__` or
faulthandler.

If the helper is killed, a thread of the rank, asleep until then, puts the descriptors back and
copies what is left. So the training goes on, and its output is seen.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

log = logging.getLogger("mlflow_relay")

SYNC = b"s"  #: asks the helper to copy what is there, and to say so
#: How long the end of a run waits until what was printed has been copied.
SYNC_TIMEOUT_S = 1.0
#: What a rank may print while the helper has no turn; /proc/sys/fs/pipe-max-size.
PIPE_BYTES = 1 << 20
_LOW_FD = 10  # shells and launchers use those below
_F_SETPIPE_SZ = 1031  # linux/fcntl.h; fcntl has it since Python 3.10 on newer libcs only
READ_BYTES = 1 << 16

_current: Capture | None = None  # of this process; descriptors are there once


class Channel(NamedTuple):
    """One thing that the rank writes to, and what came before it."""

    fds: tuple[int, ...]  #: 1, 2, or both if they went to the same place
    original: int
    reader: int
    writer: int


def start(card: dict[str, Any], socket_path: Path, journal_bytes_max: int) -> Capture | None:
    """Begin to keep what this process prints; None: it cannot be, which is logged.

    Args: card: of the run's session; the helper opens one of its own.
    """
    global _current  # noqa: PLW0603  # one for the process
    if _current is not None:
        log.info("terminal output goes to the run that was started first")
        return None
    message = msgpack.packb(
        {
            "card": {**card, "primary": False},
            "socket": os.fspath(socket_path),
            "journal_bytes_max": journal_bytes_max,
        }
    )
    try:
        _current = Capture(message)
    except OSError as error:
        log.warning("terminal output is not kept: %s", error)
    return _current


def _forget(capture: Capture) -> None:
    global _current  # noqa: PLW0603  # as above
    if _current is capture:
        _current = None


class Capture:
    """Descriptors 1 and 2 of this process, turned aside. Raises: OSError: nothing is changed."""

    def __init__(self, message: bytes) -> None:
        self._channels: list[Channel] = []
        self._synced = threading.Event()
        #: Who takes it out has the end of all this: `stop`, or the thread. No lock: `stop` may be
        #: called by a signal handler, in the middle of another.
        self._end = [True]
        # The reading end is the helper's. Kept open here, too: to write to a pipe that nobody
        # reads would be a SIGPIPE.
        self._heard_fd, self._say_fd = _open_pipe()
        self._hear_fd, said = _open_pipe()
        try:
            os.set_blocking(self._say_fd, False)
            if os.write(self._say_fd, message) != len(message):
                raise OSError("what the run is called does not fit into a pipe")
            self._channels = list(_open_channels())
            if not self._channels:
                raise OSError("neither stdout nor stderr is open")
            starter = _start_helper((self._heard_fd, said), self._channels)
        except OSError:
            self._close()
            raise
        finally:
            os.close(said)
        _flush_python()
        for channel in self._channels:
            for fd in channel.fds:
                os.dup2(channel.writer, fd)
            os.close(channel.writer)
        threading.Thread(
            target=self._watch, args=(starter,), name="mlflow-relay terminal", daemon=True
        ).start()

    def stop(self) -> None:
        """Put the descriptors back; all that was printed has been copied, if that takes no longer
        than a second. A second call does nothing."""
        if self._end and self._end.pop():
            _forget(self)
            _flush_python()
            _flush_c()
            self._sync()
            self._put_back()
            os.close(self._say_fd)  # the helper hears it and closes its end; then the thread ends
            os.close(self._heard_fd)
            self._close_channels()

    def leave_to_parent(self) -> None:
        """In a forked child: what it prints goes the same way, and all else is the parent's."""
        if self._end and self._end.pop():
            _forget(self)
            self._close()

    def _sync(self) -> None:
        os.write(self._say_fd, SYNC)
        self._synced.wait(SYNC_TIMEOUT_S)  # set for good when the helper has gone

    def _put_back(self) -> None:
        for channel in self._channels:
            for fd in channel.fds:
                os.dup2(channel.original, fd)

    def _close(self) -> None:
        for fd in (self._say_fd, self._heard_fd, self._hear_fd):
            os.close(fd)
        self._close_channels()

    def _close_channels(self) -> None:
        for channel in self._channels:
            os.close(channel.original)
            os.close(channel.reader)

    # ── the thread ──

    def _watch(self, starter: int) -> None:
        """Sleep until the helper says something, or is gone."""
        with suppress(OSError):  # somebody else has waited for all children of this process
            os.waitpid(starter, 0)
        while os.read(self._hear_fd, 1):
            self._synced.set()
        self._synced.set()
        os.close(self._hear_fd)
        if self._end and self._end.pop():
            _forget(self)
            self._put_back()
            log.warning("terminal output is no longer kept: the process that did so was killed")
            self._copy_rest()
            os.close(self._say_fd)
            os.close(self._heard_fd)
            self._close_channels()

    def _copy_rest(self) -> None:
        """Copy what is left in the pipes, and what other processes still write to them."""
        poller, ways = select.poll(), {each.reader: each.original for each in self._channels}
        for reader in ways:
            poller.register(reader, select.POLLIN)
        while ways:
            for reader, _ in poller.poll():
                data = read_some(reader)
                if data == b"":
                    poller.unregister(reader)
                    del ways[reader]
                elif data:
                    write_all(ways[reader], data)


# ── descriptors ──


def _open_channels() -> Iterator[Channel]:
    """Yield a channel for each place that stdout and stderr go to."""
    fds: dict[tuple[int, int], list[int]] = {}
    for fd in (1, 2):
        with suppress(OSError):  # closed, by a service that has no use for it
            found = os.fstat(fd)
            # What goes to one place keeps its order only in one pipe.
            fds.setdefault((found.st_dev, found.st_ino), []).append(fd)
    for alike in fds.values():
        reader, writer = _open_pty(alike[0]) if os.isatty(alike[0]) else _open_pipe()
        os.set_blocking(reader, False)
        original = fcntl.fcntl(alike[0], fcntl.F_DUPFD_CLOEXEC, _LOW_FD)
        yield Channel(tuple(alike), original, reader, writer)


def _open_pipe() -> tuple[int, int]:
    reader, writer = map(_high, os.pipe())
    with suppress(OSError):  # over the user's limit: a smaller one does
        fcntl.fcntl(writer, _F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def _open_pty(terminal: int) -> tuple[int, int]:
    """Return a pseudo-terminal that looks like the real one, and changes nothing on the way."""
    reader, writer = map(_high, os.openpty())
    with suppress(termios.error):
        attributes = termios.tcgetattr(terminal)
        attributes[1] &= ~termios.OPOST  # the real one adds its carriage returns itself
        termios.tcsetattr(writer, termios.TCSANOW, attributes)
    copy_window_size(terminal, reader)
    return reader, writer


def copy_window_size(source: int, target: int) -> None:
    """Let a pseudo-terminal have the size of the real one."""
    with suppress(OSError):
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, bytes(8))
        if size != fcntl.ioctl(target, termios.TIOCGWINSZ, bytes(8)):
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)


def _high(fd: int) -> int:
    """Return the descriptor under a number that nobody expects anything of."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOW_FD)
    os.close(fd)
    return high


def read_some(reader: int) -> bytes | None:
    """Return what is there; None: nothing now; b"": nobody can write any more."""
    try:
        return os.read(reader, READ_BYTES)
    except BlockingIOError:
        return None
    except OSError:  # EIO: a pseudo-terminal whose other end nobody has
        return b""


def write_all(fd: int, data: bytes) -> None:
    """Write it, waiting if need be; where nobody reads it any more it is left."""
    view = memoryview(data)
    with suppress(OSError):
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # the rank was started with a non-blocking stdout
                select.select([], [fd], [])


def _flush_python() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # whatever a user has put there
            stream.flush()


def _flush_c() -> None:
    """What C's printf holds back would come too late."""
    with suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


# ── the helper ──

_SCRIPT = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(0x1f)); "
    "from mlflow_relay.terminal_helper import main; main(sys.argv[2:])"
)


def _start_helper(control: tuple[int, int], channels: list[Channel]) -> int:
    """Start the process that starts the helper, and is to be waited for; return its id.

    Args: control: where the helper hears the rank, and where it answers. Raises: OSError.
    """
    python = sys.executable or ""
    if getattr(sys, "frozen", False) or "py" not in os.path.basename(python):
        raise OSError(f"{python or 'this program'} is no Python interpreter to start a helper with")
    fds = [*control, *(fd for each in channels for fd in (each.reader, each.original))]
    # All of them are above those that they get: none is overwritten before its turn.
    targets = range(3, 3 + len(fds))
    actions: list[Any] = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    actions += [(os.POSIX_SPAWN_DUP2, *each) for each in zip(fds, targets, strict=True)]
    paths = "\x1f".join(sys.path)
    command = [python, "-S", "-E", "-c", _SCRIPT, paths, *map(str, targets)]
    return os.posix_spawn(python, command, os.environ, file_actions=actions, setsigmask=())
