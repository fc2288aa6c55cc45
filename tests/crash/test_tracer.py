"""The tracer: calls are met as the kernel makes them, and what is done to them is real."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.crash.tracer import KILL, SHORT, Call, Fault, run_traced, why_not


@pytest.fixture(autouse=True)
def _needs_a_tracer():
    reason = why_not()
    if reason:
        pytest.skip(reason)


class Meddler:
    """Does something to the first call of a name below a folder, and keeps what all came to."""

    def __init__(self, folder: Path, name: str = "", fault: Fault = KILL) -> None:
        self._folder, self._name, self._fault = folder, name, fault
        self.results: list[tuple[str, str, int]] = []

    def before(self, call: Call) -> Fault | None:
        if not call.changes(self._folder) or call.name != self._name:
            return None
        self._name = ""
        return self._fault

    def after(self, call: Call, result: int) -> None:
        if call.changes(self._folder):
            self.results.append((call.name, Path(call.path).name, result))


def live(folder: Path) -> None:
    """Write, sync in another thread, rename."""
    fd = os.open(folder / "a", os.O_WRONLY | os.O_CREAT)
    os.write(1, f"written {os.write(fd, bytes(1000))}\n".encode())

    def sync() -> None:
        with contextlib.suppress(OSError):
            os.fdatasync(fd)

    thread = threading.Thread(target=sync)
    thread.start()
    thread.join()
    os.rename(folder / "a", folder / "b")


def test_calls_of_all_threads_are_met_in_their_order(tmp_path):
    meddler = Meddler(tmp_path)

    ended = run_traced(partial(live, tmp_path), meddler)

    assert (ended.status, ended.said) == (0, "written 1000\n")
    assert [(name, file) for name, file, _ in meddler.results] == [
        ("openat", "a"),
        ("write", "a"),
        ("fdatasync", "a"),
        ("rename", "a"),
    ]


def test_a_killed_call_is_not_made(tmp_path):
    ended = run_traced(partial(live, tmp_path), Meddler(tmp_path, "rename", KILL))

    assert ended.status == -9
    assert (tmp_path / "a").stat().st_size == 1000


def test_a_short_write_is_one_of_the_kernel_s(tmp_path):
    ended = run_traced(partial(live, tmp_path), Meddler(tmp_path, "write", SHORT))

    assert (ended.status, ended.said) == (0, "written 500\n")
    assert (tmp_path / "b").stat().st_size == 500


def test_a_failed_call_is_not_made_and_says_its_error(tmp_path):
    failing = Meddler(tmp_path, "rename", Fault("EDQUOT", errno.EDQUOT))

    ended = run_traced(partial(live, tmp_path), failing)

    assert ended.status == 1
    assert "Disk quota exceeded" in ended.said
    assert failing.results[-1] == ("rename", "a", -errno.EDQUOT)
    assert (tmp_path / "a").exists()


def test_a_failed_call_of_a_thread_leaves_the_others_alone(tmp_path):
    ended = run_traced(partial(live, tmp_path), Meddler(tmp_path, "fdatasync", Fault("EIO", 5)))

    assert ended.status == 0
    assert (tmp_path / "b").exists()
