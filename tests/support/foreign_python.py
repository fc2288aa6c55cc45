"""Interpreters of other environments: what cannot be installed beside our own MLflow, or is too large."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def python_with(variable: str, module: str, install: str) -> str:
    """Return the interpreter that a variable names, else our own; skips the test if it lacks a module.

    Args: install: what would have to be installed.
    """
    python = os.environ.get(variable, sys.executable)
    asked = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", asked], capture_output=True, check=False).returncode:
        pytest.skip(f"no {module}: pip install {install}, and name its Python in {variable}")
    return python
