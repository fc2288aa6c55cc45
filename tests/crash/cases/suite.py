"""The tests that `make test` leaves out because they take minutes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from tests.crash.outcome import Job, Outcome
from tests.crash.planted import ROOT

GRACE_S = 60.0


def run(job: Job) -> Outcome:
    outcome = Outcome("The tests that are marked `torture`", 0, "tests")
    with (job.folder / "output").open("w+") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-m", "torture", "-p", "no:cacheprovider"],
            cwd=ROOT,
            env={**os.environ, "SEED": str(job.seed)},
            stdout=file,
            stderr=file,
        )
        try:
            process.wait(max(0.0, job.left_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # tests end what they have started
            process.wait(GRACE_S)
            outcome.figures["cut off"] = "the time was over before all had run"
        finally:
            process.kill()
            process.wait()
        file.seek(0)
        said = file.read()
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", said)
    counts = {word: int(count) for count, word in found}
    outcome.figures |= {word: f"{count:,}" for word, count in counts.items()}
    outcome.count = sum(counts.values()) - counts.get("skipped", 0)
    for line in said.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            outcome.found(line[:300])
    return outcome
