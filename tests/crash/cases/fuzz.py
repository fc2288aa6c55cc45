"""Coverage-guided fuzzing of all decoders, by atheris."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.crash.fuzz_targets import TARGETS
from tests.crash.outcome import Job, Outcome
from tests.crash.planted import ROOT

GOAL = 10_000_000
INPUT_BYTES_MAX = 4096
#: Fuzzers at work at the same time.
PROCESSES = 2
GRACE_S = 60.0


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "libFuzzer makes up inputs for the decoders and keeps those that reach new branches; the CRCs "
        "of our formats are put right, or it would never get in. A decoder says FormatError, or what "
        "it read can be used: nothing else comes out, nothing hangs. The numbers are libFuzzer's own",
        GOAL,
        "inputs",
    )
    if importlib.util.find_spec("atheris") is None:
        outcome.skipped = "atheris is not installed: pip install '.[torture]'"
        return outcome
    rounds_s = job.left_s * PROCESSES / len(TARGETS)
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = {name: pool.submit(fuzz, name, job.folder / name, job, rounds_s) for name in TARGETS}
    for name, future in done.items():
        count, findings = future.result()
        outcome.count += count
        outcome.figures[name] = f"{count:,}"
        for finding in findings:
            outcome.found(f"{name}: {finding}")
    return outcome


def fuzz(name: str, folder: Path, job: Job, for_s: float) -> tuple[int, list[str]]:
    """Return how many inputs a target was given, and what it did with some that it must not do.

    After a finding it goes on with the next seed: libFuzzer ends at the first.
    """
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    until_s = time.monotonic() + for_s
    count, findings = 0, list[str]()
    while not job.stop.is_set() and (left_s := until_s - time.monotonic()) > 1:
        command = [
            *(sys.executable, "-m", "tests.crash.fuzzer", name),
            *(f"-max_total_time={left_s:.0f}", f"-seed={job.seed % (1 << 31) + len(findings) + 1}"),
            *(f"-max_len={INPUT_BYTES_MAX}", "-timeout=10", "-rss_limit_mb=1000"),
            *("-print_final_stats=1", f"-artifact_prefix={folder}/", str(corpus)),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=left_s + GRACE_S,
            check=False,
        )
        found = re.search(r"^stat::number_of_executed_units: +(\d+)$", done.stderr, re.MULTILINE)
        count += int(found[1]) if found else 0
        if done.returncode == 0 and found:
            break
        findings.append(_finding(folder, done.stderr))
    return count, findings


def _finding(folder: Path, said: str) -> str:
    """Return the input that broke a target, as a literal for `tests/crash/fuzz_findings.py`."""
    lines = [
        line for line in said.splitlines() if line.strip() and not line.startswith(("#", "stat"))
    ]
    inputs = sorted(folder.glob("*-*"), key=lambda path: path.stat().st_mtime)
    literal = inputs[-1].read_bytes()[:600] if inputs else b""
    return f"{' | '.join(lines[-8:])[-900:]}: {literal!r}"
