"""`python -m tests.crash.fuzzer TARGET [libFuzzer's options] CORPUS`: one decoder, guided by coverage.

A process of its own, because libFuzzer ends the one that it runs in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

#: What branches on the input. Their own tests see to the rest.
INSTRUMENTED = (
    "mlflow_relay",
    "mlflow_relay_daemon",
    "tests.crash.fuzz_targets",
    "tomllib",
    "tomli",
    "json",
)


def main() -> None:
    name, *options = sys.argv[1:]
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        from tests.crash.fuzz_targets import PLANTED, TARGETS
    target = (TARGETS | PLANTED)[name]
    for index, seed in enumerate(target.seeds):
        Path(options[-1], f"seed-{index}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
