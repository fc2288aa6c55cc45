"""Shell completion: the scripts are accepted by their shells, and complete what there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from mlflow_relay_daemon.cli import COMMANDS


def relay(*arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_relay_daemon", *arguments],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_good_syntax_of_its_shell(shell):
    script = relay("completion", shell)
    assert "_MLFLOW_RELAY_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_and_options_are_completed():
    def complete(words: str, count: int) -> set[str]:
        out = relay(_MLFLOW_RELAY_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(count))
        return {line.partition(",")[2] for line in out.splitlines()}

    assert complete("mlflow-relay ", 1) == set(COMMANDS)
    assert complete("mlflow-relay stat", 1) == {"status"}
    assert {"--watch", "--json"} <= complete("mlflow-relay status --", 2)
