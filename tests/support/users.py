"""Other users of this machine, by number: processes that run as them. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: Numbers that no package and no administrator gives away; names are not needed.
DAEMON_UID, ALICE_UID, BOB_UID, MALLORY_UID = 61_001, 61_002, 61_003, 61_004
GROUP_GID = 61_000


@dataclass(frozen=True)
class User:
    """One user."""

    uid: int
    groups: tuple[int, ...] = ()

    def start(self, *command: object, environ: dict[str, str], **more: Any) -> Any:
        """Start a command as this user; return the process."""
        return subprocess.Popen(
            [str(word) for word in command],
            env={**environ, "HOME": "/nonexistent"},
            stdin=subprocess.PIPE,
            stdout=more.pop("stdout", subprocess.PIPE),
            stderr=more.pop("stderr", subprocess.STDOUT),
            text=True,
            cwd="/",
            user=self.uid,
            group=self.uid,
            extra_groups=self.groups,
            **more,
        )

    def python(self, script: str, *arguments: object, environ: dict[str, str]) -> Any:
        """Start a Python script as this user."""
        executable, path = python_for_all()
        environ = {**environ, "PYTHONPATH": path}
        return self.start(executable, "-c", textwrap.dedent(script), *arguments, environ=environ)

    def relay(self, *arguments: object, environ: dict[str, str], **more: Any) -> Any:
        """Start `mlflow-relay ...` as this user."""
        executable, path = python_for_all()
        environ = {**environ, "PYTHONPATH": path}
        command = (executable, "-m", "mlflow_relay_daemon", *arguments)
        return self.start(*command, environ=environ, **more)


DAEMON = User(DAEMON_UID, (GROUP_GID,))
ALICE, BOB = User(ALICE_UID, (GROUP_GID,)), User(BOB_UID, (GROUP_GID,))
MALLORY = User(MALLORY_UID)  # not in the group


def python_for_all() -> tuple[str, str]:
    """Return a Python that other users may run, and its path; this one may lie in root's home."""
    path = os.pathsep.join(
        [str(ROOT / "client"), str(ROOT / "daemon"), sysconfig.get_path("purelib")]
    )
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for executable in (sys.executable, system):
        if _runs(executable, path):
            return executable, path
    pytest.skip("other users cannot run this Python")


def skip_unless_root() -> None:
    """Skip the test where no process can be started as somebody else."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as other users")


def _runs(executable: str, path: str) -> bool:
    try:
        done = subprocess.run(
            [executable, "-c", "import mlflow_relay, zmq"],
            env={"PYTHONPATH": path}, user=MALLORY_UID, group=MALLORY_UID, extra_groups=(),
            cwd="/", capture_output=True, check=False,
        )  # fmt: skip
    except OSError:
        return False
    return done.returncode == 0
