"""What a life tells the world while it is lived in a process that may end at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.crash.power import Known


class Teller:
    """Stands where lives have a recorder: says on stdout what the world knows, as it learns it."""

    def __init__(self, root: Path, known: Known | None = None) -> None:
        self.root, self.sync_fails_after = root, -1
        self._known = known or Known()

    @property
    def known(self) -> Known:
        return self._known

    @known.setter
    def known(self, known: Known) -> None:
        self._known = known
        os.write(1, _to_json(known).encode() + b"\n")

    def note(self, what: str) -> None:
        """It is the kernel that ends this life, or makes it fail, and not the model."""


def last_known(said: str, before: Known | None = None) -> Known:
    """Return what was told last, and told whole; if nothing was, what was known before."""
    lines = [line for line in said.splitlines(keepends=True) if line[0] == "[" and line[-1] == "\n"]
    return _from_json(lines[-1]) if lines else before or Known()


def _to_json(known: Known) -> str:
    acked, settled = (
        {k.hex(): v for k, v in each.items()} for each in (known.acked, known.settled)
    )
    return json.dumps([acked, settled, known.letters, known.mlflow_run_id])


def _from_json(line: str) -> Known:
    acked, settled, letters, mlflow_run_id = json.loads(line)
    by_session = ({bytes.fromhex(k): v for k, v in each.items()} for each in (acked, settled))
    return Known(*by_session, letters, mlflow_run_id)
