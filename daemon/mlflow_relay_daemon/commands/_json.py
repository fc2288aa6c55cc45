"""Prints the --json contract. Pure but for the printing."""

from __future__ import annotations

import json
import math
from typing import Any

import click

SCHEMA_VERSION = 1


def print_json(body: dict[str, Any], *, on_one_line: bool = False) -> None:
    """Print an object; JSON has no NaN and no infinity, they are the strings MLflow uses."""
    click.echo(json.dumps(_strict(body), indent=None if on_one_line else 2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return value
