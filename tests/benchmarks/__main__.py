"""`python -m tests.benchmarks`: run the cases, print what they find, write the report."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.bench import CHECKOUT, OWN, Bench
from tests.benchmarks.outcome import Outcome, Target, to_json

CASES = (
    *("log_call", "startup", "killed", "intake", "delivery", "footprint", "backlog", "growth"),
    *("sync", "doors"),
)
#: The short form: those with ratios in them.
QUICK_CASES = ("log_call", "intake", "delivery")
#: How far a ratio of the short form may lie behind its bound: it is measured for seconds.
QUICK_SLACK = 1.25
#: The whole is to take 20 minutes at most: no case is begun after this time.
BEGIN_WITHIN_S = 18.5 * 60
REPORT = CHECKOUT / "docs" / "benchmarks.md"


def main() -> int:
    options = _options()
    # Imports are measured as an installed package has them: compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    size = "quick" if options.quick else "long" if options.long else "normal"
    folder = Path(tempfile.mkdtemp(prefix="relay-bench-", dir=options.folder))
    relays = {OWN: CHECKOUT}
    if options.beside:
        relays["before"] = options.beside.resolve()
    bench = Bench(size, folder, options.peers, relays)
    outcomes: dict[str, Outcome] = {}
    failed: list[str] = []
    began_s = time.monotonic()
    try:
        for name in options.only or (QUICK_CASES if options.quick else CASES):
            case_s = time.monotonic()
            if size == "normal" and case_s - began_s > BEGIN_WITHIN_S:
                outcomes[name] = Outcome(skipped=["time was up"])
                continue
            try:
                outcomes[name] = importlib.import_module(f"tests.benchmarks.cases.{name}").run(
                    bench
                )
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            os.sync()  # else the next case shares its cores with the writing of what this one left
            print(report.as_text(outcomes[name]), flush=True)
            print(f"({name}: {time.monotonic() - case_s:.0f} s)\n", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    behind = failures(outcomes.values(), QUICK_SLACK if options.quick else 1.0)
    for target in behind:
        print(f"behind: {target.what}: {target.value:.3g}, must be {target.bound}")
    if options.report:
        found = {
            "machine": _machine(options.folder),
            "size": size,
            "took_s": round(time.monotonic() - began_s),
            "cases": {name: to_json(outcome) for name, outcome in outcomes.items()},
        }
        report.write(REPORT, found)
        print(f"wrote {REPORT}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed or (behind and options.quick) else 0


def failures(outcomes: Iterable[Outcome], slack: float) -> list[Target]:
    """Return the ratios that are behind their bounds: other figures depend on the machine."""
    return [
        target
        for outcome in outcomes
        for target in outcome.targets
        if target.is_ratio and not target.is_met(slack)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under 3 minutes; fails by ratios")
    parser.add_argument("--long", action="store_true", help="also 20 M points and 5 GB: hours")
    parser.add_argument("--only", action="append", choices=CASES, help="this case; repeatable")
    parser.add_argument("--peers", type=Path, help="interpreter of the peers' environment")
    parser.add_argument("--beside", type=Path, help="another checkout, measured by turns: 'before'")
    parser.add_argument("--folder", type=Path, help="scratch, on the disk that a spool would be on")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} and its plots")
    return parser.parse_args()


def _machine(folder: Path | None) -> dict[str, str]:
    """Return what the figures depend on, and nothing that names the machine."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    with open("/proc/mounts", encoding="utf-8") as file:
        mounts = [line.split()[1:3] for line in file]
    scratch = str((folder or Path(tempfile.gettempdir())).resolve())
    inside = [mount for mount in mounts if scratch.startswith(mount[0])]
    return {
        "cores": str(os.cpu_count()),
        "processor": ", ".join(sorted(models)) or platform.machine(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "file system": max(inside, key=lambda mount: len(mount[0]))[1],
        "Linux": platform.release().partition("-")[0],
        "Python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
