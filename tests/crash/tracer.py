"""Runs a function in a process of its own and meets each of its system calls, by ptrace.

The process may be killed there, the call may fail without being made, or a write be cut short: then
the kernel itself writes less and says so. x86_64 only: calls and registers have their names here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.crash.child import Child

TIMEOUT_S = 120.0

#: The system calls that change files: name and which argument says where, "fd" or "path".
CHANGES = {
    1: ("write", "fd", 0),
    18: ("pwrite64", "fd", 0),
    20: ("writev", "fd", 0),
    40: ("sendfile", "fd", 0),
    326: ("copy_file_range", "fd", 2),
    74: ("fsync", "fd", 0),
    75: ("fdatasync", "fd", 0),
    77: ("ftruncate", "fd", 0),
    91: ("fchmod", "fd", 0),
    285: ("fallocate", "fd", 0),
    82: ("rename", "path", 0),
    264: ("renameat", "path", 1),
    83: ("mkdir", "path", 0),
    258: ("mkdirat", "path", 1),
    84: ("rmdir", "path", 0),
    86: ("link", "path", 1),
    265: ("linkat", "path", 3),
    87: ("unlink", "path", 0),
    263: ("unlinkat", "path", 1),
    257: ("openat", "path", 1),
}
_OPEN_FLAGS = 2  # which argument of openat
_CAN_BE_SHORT = ("write", "pwrite64")

# ptrace(2), and struct user_regs_struct of x86_64: 27 words.
_GETREGS, _SETREGS, _SYSCALL, _SEIZE, _INTERRUPT, _LISTEN = 12, 13, 24, 0x4206, 0x4207, 0x4208
_SYSCALL_INFO, _ENTRY, _EXIT = 0x420E, 1, 2
_OPTIONS = 0x1 | 0x8 | 0x100000  # tell system calls from traps; threads too; die with the tracer
_EVENT_STOP = 128
_RAX, _RDX, _ORIG_RAX, _WORDS = 10, 12, 15, 27
_WALL = 0x40000000
_PATH_BYTES_MAX = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info: at an entry number and arguments, at an exit the result."""

    _fields_ = (
        ("op", ctypes.c_uint64),  # its first byte; the machine stands behind it
        ("where", ctypes.c_uint64 * 2),
        ("number_or_result", ctypes.c_int64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class Call(NamedTuple):
    """A system call that is about to be made."""

    number: int
    name: str  #: "": none of those that change files
    path: str  #: of the file that it changes
    arguments: tuple[int, ...]

    @property
    def makes_or_empties(self) -> bool:
        """Whether it is an open that does more than look."""
        flags = self.arguments[_OPEN_FLAGS]
        return self.name == "openat" and bool(flags & (os.O_CREAT | os.O_TRUNC))

    def changes(self, folder: Path) -> bool:
        """Return whether it changes something below a folder."""
        is_there = Path(self.path).is_relative_to(folder)
        return is_there and (self.name != "openat" or self.makes_or_empties)

    @property
    def can_be_short(self) -> bool:
        return self.name in _CAN_BE_SHORT and self.arguments[2] > 1


class Fault(NamedTuple):
    """What is done to a call.

    Args: error: it fails with that and is not made; 0: see KILL and SHORT.
    """

    name: str
    error: int = 0


KILL = Fault("SIGKILL")
SHORT = Fault("short write")


class Witness(Protocol):
    """Who is asked before each call of each thread, and told of the result of those that change
    files."""

    def before(self, call: Call) -> Fault | None: ...

    def after(self, call: Call, result: int) -> None: ...


@dataclass
class Ended:
    """How the process ended: as subprocess says it, and what it had written to stdout."""

    status: int
    said: str


def why_not() -> str:
    """Return why nothing can be traced here; "" if it can."""
    if platform.machine() != "x86_64":
        return "the tracer knows the system calls of x86_64 alone"
    try:
        _Tracer(lambda: None, None).run()
    except OSError as error:
        return f"processes cannot be traced here: {error.strerror}"
    return ""


def run_traced(live: Callable[[], None], witness: Witness) -> Ended:
    """Fork; live in the child; return when it has ended, in whatever way.

    Raises: OSError: it cannot be traced.
    """
    return _Tracer(live, witness).run()


@dataclass
class _Tracer:
    live: Callable[[], None]
    witness: Witness | None
    _met: dict[int, tuple[Call, Fault | None, int]] = field(default_factory=dict)  # by thread

    def run(self) -> Ended:
        with Child(self.live) as child:
            watchdog = threading.Timer(TIMEOUT_S, os.kill, (child.pid, signal.SIGKILL))
            try:
                _ptrace(_SEIZE, child.pid, data=_OPTIONS)
                _ptrace(_INTERRUPT, child.pid)
                watchdog.start()
                child.go()
                child.status = self._follow(child.pid)
            finally:
                watchdog.cancel()
            return Ended(child.status, child.said)

    def _follow(self, pid: int) -> int:
        """Let it run from call to call; return its status when it has ended."""
        while True:
            try:
                tid, status = os.waitpid(-pid, _WALL)
            except ChildProcessError:  # it has not come to its own group yet
                tid, status = os.waitpid(pid, _WALL)
            if not os.WIFSTOPPED(status):
                if tid == pid:
                    return os.waitstatus_to_exitcode(status)
                continue
            try:
                self._meet(pid, tid, status)
            except ProcessLookupError:
                continue  # killed in the middle of it: its end is told next

    def _meet(self, pid: int, tid: int, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP):
            _ptrace(_LISTEN, tid)
            return
        if number == signal.SIGTRAP | 0x80:
            self._at_call(pid, tid)
        is_signal = not event and number != signal.SIGTRAP | 0x80
        _ptrace(_SYSCALL, tid, data=number if is_signal else 0)

    def _at_call(self, pid: int, tid: int) -> None:
        info = _Info()
        _ptrace(_SYSCALL_INFO, tid, ctypes.sizeof(info), ctypes.addressof(info))
        op = info.op & 0xFF
        if self.witness is None:
            return
        if op == _ENTRY:
            call = _call_of(tid, info)
            fault = self.witness.before(call)
            length = call.arguments[2]
            if fault == KILL:
                os.kill(pid, signal.SIGKILL)
            elif fault == SHORT:
                _set(tid, _RDX, length // 2)
            elif fault is not None:
                _set(tid, _ORIG_RAX, (1 << 64) - 1)  # no such call: it is not made
            if call.name:
                self._met[tid] = call, fault, length
        elif op == _EXIT and tid in self._met:
            call, fault, length = self._met.pop(tid)
            result = info.number_or_result
            if fault == SHORT:
                _set(tid, _RDX, length)
            elif fault is not None:
                result = -fault.error
                _set(tid, _RAX, (1 << 64) + result)
            self.witness.after(call, result)


def _call_of(tid: int, info: _Info) -> Call:
    number, arguments = info.number_or_result, tuple(info.arguments)
    name, how, which = CHANGES.get(number, ("", "", 0))
    path = ""
    if how == "fd":
        try:
            path = os.readlink(f"/proc/{tid}/fd/{arguments[which]}")
        except FileNotFoundError:
            path = ""  # of no open file: the call will say so
    elif how == "path":
        path = _text_at(tid, arguments[which])
    return Call(number, name, path, arguments)


def _text_at(tid: int, address: int) -> str:
    """Return the text in the process's memory; it may end where its mapping does."""
    found = b""
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        while b"\0" not in found and len(found) < _PATH_BYTES_MAX:
            found += memory.read(256 - (address + len(found)) % 256)
    return os.fsdecode(found.partition(b"\0")[0])


def _set(tid: int, register: int, value: int) -> None:
    words = (ctypes.c_uint64 * _WORDS)()
    _ptrace(_GETREGS, tid, data=ctypes.addressof(words))
    words[register] = value
    _ptrace(_SETREGS, tid, data=ctypes.addressof(words))


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            raise ProcessLookupError(number, os.strerror(number))
        raise OSError(number, os.strerror(number))
