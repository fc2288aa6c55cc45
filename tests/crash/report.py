"""Figures of real runs → docs/reliability.json → docs/reliability.md. Nothing else is in the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.crash.outcome import Outcome

#: The cases, in the order in which they are run and reported, and what is asked of each.
CASES = {
    "planted": "Bugs planted on purpose: each must be caught",
    "states": "Crash states of the spool",
    "corruption": "Damage: every byte flipped, cut, zeroed, doubled",
    "model": "Model test: append, deliver, crash, full, damage, reload",
    "syscalls": "SIGKILL at every system call of the spool",
    "daemon_syscalls": "SIGKILL at every system call by which a real daemon changes its spool",
    "rank_syscalls": "SIGKILL at every system call of a rank",
    "daemon_disk": "EIO, ENOSPC, EDQUOT, short writes at every system call of a real daemon",
    "rank_disk": "EIO, ENOSPC, EDQUOT, short writes at every system call of a rank",
    "disk": "EIO, ENOSPC, EDQUOT, short writes at every system call of the spool",
    "power_loss": "Power loss of a real file system",
    "full_disks": "Real full disks and recovery: tmpfs, ext4 on a loop device",
    "kills": "Random SIGKILLs of daemon, ranks and server under load",
    "network": "A network that fails in every way",
    "partition": "Two nodes of one run, cut off from the server and from each other",
    "fuzz": "A coverage-guided fuzzer for the decoders",
    "others": "Frozen parties, clock jumps, descriptors, memory, crowds, sizes",
    "suite": "The tests that are too long for `make test`",
}
#: What the issue asks for and no case here does yet.
MISSING = (
    "A crowd that takes the last descriptors in milliseconds: libzmq ends the daemon, the next has all",
)
#: What these runs have brought to light so far; each has a test of its own since.
MENDED = (
    "a start whose first fsync failed believed the second one, which returned 0",
    "a write over HTTP, answered with 200, was lost after an fsync and a cut-back that had failed",
    "a run that the disk did not let be read waited for the next start of the daemon",
    "the counters of a damaged journal were believed",
    "dead letters whose file had failed its first fsync under another daemon had no name on the disk",
    "a journal that could not be given its name was no JournalError for its rank",
    "a staged file that could not be removed ended the thread of all uploads",
    "a server that answers 500 by chance made dead letters of good points",
    "a request that takes longer than its time limit each time was sent for ever",
    "a card or a segment's head with a whole CRC and a field of a wrong type ended a start",
    "a daemon whose file descriptors were used up was ended by libzmq, half a second being too late",
    "a stop left in memory what of a dead rank's long journal one look had no time for",
    "a rank that came and failed between two looks had no say in the end of its run",
    "a segment or a card of a version that never was waited for a release that reads it",
)

_HEAD = """# Reliability

Made by `make torture` from [its figures](reliability.json); not written by hand. Each row is of one
real run, with its date, its seed and the command that repeats it. What fails stays here until it is
mended; what was not run says so.

| what | how many | of | bad | took | date | seed |
|---|---|---|---|---|---|---|
"""


def line(name: str, outcome: Outcome, took_s: float) -> str:
    """Return an outcome for a terminal."""
    if outcome.skipped:
        return f"{name}: skipped: {outcome.skipped}"
    figures = ", ".join(f"{value} {key}" for key, value in outcome.figures.items())
    parts = [f"{name}: {outcome.count:,} {outcome.unit}, {outcome.bad} bad, {took_s:.0f} s"]
    parts += [figures] * bool(figures) + [f"  BAD: {each}" for each in outcome.findings]
    return "\n".join(parts)


def add(page: Path, name: str, row: dict[str, Any]) -> None:
    """Put the figures of one case in the place of its former ones, and write the page anew."""
    data = page.with_suffix(".json")
    rows = json.loads(data.read_text()) if data.exists() else {}
    rows[name] = row
    data.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    page.write_text(as_page(rows))


def as_page(rows: dict[str, dict[str, Any]]) -> str:
    """Return the page of these figures."""
    table, parts = "", []
    for name, title in CASES.items():
        row = rows.get(name)
        if row is None or row["skipped"]:
            why = row["skipped"] if row else "not run yet"
            table += f"| {title} | {why} | – | – | – | – | – |\n"
            continue
        table += (
            f"| [{title}](#{name}) | {row['count']:,} {row['unit']} | {row['goal']:,} | "
            f"{row['bad'] or 0} | {_time(row['took_s'])} | {row['date']} | {row['seed']} |\n"
        )
        parts.append(_section(name, row))
    missing = "".join(f"* {each}\n" for each in MISSING)
    mended = "".join(f"* {each}\n" for each in MENDED)
    times_s = [row["took_s"] for row in rows.values()]
    table += f"\nThe longest took {_time(max(times_s, default=0))}, all together {_time(sum(times_s))}.\n"
    return "\n".join(
        [_HEAD + table, *parts, "## Not run\n", missing, "## Found and mended\n", mended]
    )


def _section(name: str, row: dict[str, Any]) -> str:
    figures = "".join(f"* {key}: {value}\n" for key, value in row["figures"].items())
    found = "".join(f"* **bad**: {each}\n" for each in row["findings"])
    return f"## {name}\n\n{row['what']}.\n\n{figures}{found}\n```\n{row['command']}\n```\n"


def _time(took_s: float) -> str:
    return f"{took_s / 3600:.1f} h" if took_s >= 3600 else f"{took_s / 60:.1f} min"
