"""`python -m tests.crash`: break everything for a long time, and report what held.

Ctrl-C ends it early, with what ran so far. Each case is repeated by its seed. What was found goes into docs/reliability.json, and from there
into docs/reliability.md; a case that is run again takes the place of its former figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.crash import report
from tests.crash.outcome import Job, Outcome

REPORT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = options.only or list(report.CASES)
    for each in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            each.reconfigure(line_buffering=True)
    stop = threading.Event()
    former = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        return _run_all(names, options, stop)
    finally:
        signal.signal(signal.SIGINT, former)


def _run_all(names: Sequence[str], options: argparse.Namespace, stop: threading.Event) -> int:
    """Return the exit status."""
    all_held = True
    for name in names:
        if stop.is_set():
            break
        began_s = time.monotonic()
        budget_s = options.hours * 3600 / len(names)
        print(f"{name}: seed {options.seed}, up to {budget_s:.0f} s")
        outcome = _run(name, options.seed, budget_s, stop)
        took_s = time.monotonic() - began_s
        print(report.line(name, outcome, took_s))
        all_held &= not outcome.bad
        if options.report:
            command = f"python -m tests.crash --only {name} --seed {options.seed}"
            row = {
                **asdict(outcome),
                "seed": options.seed,
                "took_s": round(took_s),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "command": f"{command} --hours {max(took_s / 3600, 0.01):.2f}",
            }
            report.add(REPORT, name, row)
    if options.report:
        print(f"wrote {REPORT.name}")
    return 0 if all_held else 1


def _run(name: str, seed: int, budget_s: float, stop: threading.Event) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix=f"relay-{name}-"))
    module = importlib.import_module(f"tests.crash.cases.{name}")
    try:
        outcome: Outcome = module.run(Job(seed, budget_s, folder, stop))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome((module.__doc__ or name).strip(), 0, "")
        outcome.found(f"the case itself failed: {error!r}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    add = parser.add_argument
    add("--hours", type=float, default=1.0, help="for all cases together (1)")
    add("--seed", type=int, default=random.randrange(1 << 32), help="repeats a run; default: new")
    add("--only", action="append", choices=report.CASES, help="this case; may be given often")
    add("--report", action="store_true", help=f"put the figures into docs/{REPORT.name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
