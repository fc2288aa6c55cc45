"""The README names what there is, all of it, and nothing that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mlflow_relay_daemon.cli import COMMANDS
from mlflow_relay_daemon.config import SETTINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Of the client and of the command; the daemon's are its settings.
OTHER_VARIABLES = {
    "MLFLOW_RELAY_RUN_KEY",
    "MLFLOW_RELAY_AUTOSTART",
    "MLFLOW_RELAY_JOURNAL_BYTES_MAX",
    "MLFLOW_RELAY_END_TIMEOUT_S",
    "MLFLOW_RELAY_TERMINAL",
    "MLFLOW_RELAY_STAGING",
    "MLFLOW_RELAY_LINK_BYTES_MIN",
    "MLFLOW_RELAY_CONFIG",
    "MLFLOW_RELAY_DEBUG",
}


def test_every_command_is_in_the_table_and_no_other() -> None:
    section = README.partition("## Commands")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `mlflow-relay ([\w-]+)", section, re.MULTILINE) == list(COMMANDS)


def test_every_variable_is_named_and_no_other() -> None:
    named = set(re.findall(r"MLFLOW_RELAY_[A-Z_]*[A-Z]", README))
    assert named == {setting.variable for setting in SETTINGS.values()} | OTHER_VARIABLES


def test_every_flag_is_in_the_row_of_its_variable() -> None:
    for setting in SETTINGS.values():
        cell = f"`{setting.flag}`" if setting.flag else ""
        assert re.search(rf"^\| `{setting.variable}` \| {cell}", README, re.MULTILINE), setting.name


def test_every_variable_in_the_code_is_known_here() -> None:
    found = {
        word
        for folder in ("client", "daemon")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r"MLFLOW_RELAY_[A-Z_]*[A-Z]", node.value)
    }
    assert found <= {setting.variable for setting in SETTINGS.values()} | OTHER_VARIABLES


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<=`)tests/[\w/]+\.py", README))))
def test_a_test_file_that_is_named_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_a_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).is_file()
