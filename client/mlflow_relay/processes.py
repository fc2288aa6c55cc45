"""Processes as /proc shows them: names for this one and its launcher that never come back.

A name is boot id, process namespace, pid and start time. Boot id and the clock tick of the start
tell apart pids that come round again; the namespace tells apart containers, in each of which the
first process has pid 1.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

#: A wrapper within a wrapper within a wrapper; a longer chain is a loop that we misread.
_ANCESTORS_MAX = 32


def launcher_process(marks: Mapping[str, str] | None = None) -> str:
    """Return a name for the process that started the ranks of this node: equal in all of them.

    It is the nearest ancestor that does not itself carry this rank's variables. A shell around a
    rank (`torchrun --no-python wrapper.sh`, `mpirun sh -c ...`, `conda run`, `apptainer exec`) was
    given them when it started, so it is passed over; torchrun and mpirun were not.

    Limits, where run_key= is needed: each rank in a container with a process namespace of its own;
    a subshell per rank in a hand-written loop, `(RANK=$i python train.py) &`; one parent that
    starts several trainings one after the other by hand (a loop of mp.spawn, a shell script that
    sets RANK), for they have the same parent. A program that a rank starts counts as that rank.

    Args: marks: variables that only a wrapper of this very rank has with the same values.
    Returns: boot id, process namespace, pid and start time: never the same twice.
    Raises: OSError: the parent is not to be seen.
    """
    wanted = {os.fsencode(f"{name}={value}") for name, value in (marks or {}).items()}
    pid = _stat("self")[1]
    for _ in range(_ANCESTORS_MAX):
        if not wanted or not wanted <= _initial_environment(pid):
            return _process_name(pid)
        pid = _stat(pid)[1]
    raise OSError(f"more than {_ANCESTORS_MAX} wrappers around this process")


def own_process() -> str:
    """Return this process's name in the same form as launcher_process, or a random one."""
    try:
        return _process_name(_stat("self")[0])
    except OSError:
        return uuid.uuid4().hex


def _process_name(pid: int) -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/pid').st_ino}/{pid}/{_stat(pid)[2]}"


def _stat(pid: int | str) -> tuple[int, int, int]:
    """Return pid, parent's pid and start time (clock ticks since boot) of a process.

    Source: proc(5), /proc/pid/stat: fields 1, 4 and 22. The name in field 2 may hold blanks and
        brackets, so counting starts behind its last bracket.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        line = file.read()
    fields = line[line.rindex(b")") + 2 :].split()
    return int(line[: line.index(b" ")]), int(fields[1]), int(fields[19])


def _initial_environment(pid: int) -> set[bytes]:
    """Return the variables that a process was started with; none if it is another user's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return set(file.read().split(b"\0"))
    except PermissionError:  # slurmstepd runs as root, and is a launcher
        return set()
