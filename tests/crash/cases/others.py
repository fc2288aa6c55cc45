"""Hardships that are no kills: frozen parties, jumping clocks, descriptors, memory, crowds, sizes."""

from __future__ import annotations

import random
import sys
from collections import Counter

from tests.crash.outcome import Job, Outcome
from tests.crash.trials import TRIALS, Scene
from tests.support import MlflowServer

GOAL = 5 * len(TRIALS)


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "Each is played on a node of its own against a real MLflow server; afterwards every point is "
        "there once, in its order, no other, in one run of a true status",
        GOAL,
        "trials",
    )
    held: Counter[str] = Counter()
    points = longest_call_ns = 0
    with MlflowServer(job.folder / "mlflow") as server:
        while not job.is_over and outcome.count < GOAL:
            for name, trial in TRIALS.items():
                key = f"{name} {outcome.count}"
                rng = random.Random(f"{job.seed}/{outcome.count}")
                scene = Scene(server, job.folder / key, rng, key)
                scene.folder.mkdir()
                outcome.count += 1
                try:
                    trial(scene)
                    held[name] += 1
                except Exception as error:  # any is a finding
                    outcome.found(f"{name} {job.seed}/{outcome.count - 1}: {error!r}")
                    print(outcome.findings[-1], file=sys.stderr)
                points += scene.points
                longest_call_ns = max(longest_call_ns, scene.longest_call_ns)
                if job.is_over:
                    break
    outcome.figures = {
        **{f"{trial.__doc__}": f"held {held[name]} times" for name, trial in TRIALS.items()},
        "points compared": f"{points:,}",
        "longest log call": f"{longest_call_ns / 1e6:.1f} ms",
    }
    return outcome
