"""What every case is given: sizes, a scratch folder, the relays and the peers' interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support.relay import Node

T = TypeVar("T")

OWN = "mlflow-relay"
CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
#: Nothing listens there: port 1 (tcpmux) is refused at once on any machine.
NOBODY = "http://127.0.0.1:1"


@dataclass
class Bench:
    """One run of the benchmarks.

    Args:
        size: "quick", "normal" or "long".
        folder: scratch, on the kind of disk that a spool lies on.
        peers: interpreter of the environment with the peers; None: they are left out.
        relays: checkouts to measure by turns, by the name that the report gives them.
    """

    size: str
    folder: Path
    peers: Path | None
    relays: dict[str, Path] = field(default_factory=lambda: {OWN: CHECKOUT})

    def pick(self, quick: T, normal: T, long: T | None = None) -> T:
        """Return the one for this run's size; `long` is `normal` if not given."""
        if self.size == "long":
            return normal if long is None else long
        return quick if self.size == "quick" else normal

    @property
    def rounds(self) -> int:
        """How often those that are compared take their turns."""
        return self.pick(2, 3)

    def scratch(self, name: str) -> Path:
        """Return a new folder."""
        return Path(tempfile.mkdtemp(prefix=name + "-", dir=self.folder))

    @contextlib.contextmanager
    def node(
        self, relay: str = OWN, uri: str = NOBODY, start: bool = True, **settings: object
    ) -> Iterator[BenchNode]:
        """Serve a node of one of the relays; its folder is removed at the end."""
        folder = self.scratch("node")
        try:
            with BenchNode(folder, uri, self.relays[relay], settings) as node:
                if start:
                    node.start()
                yield node
        finally:
            shutil.rmtree(folder)

    def script(
        self,
        name: str,
        job: dict[str, Any],
        *,
        python: Path | str = sys.executable,
        environ: dict[str, str] | None = None,
        timeout_s: float = 120.0,
        expected: int = 0,
        linger_s: float = 0.0,
    ) -> dict[str, Any]:
        """Run one of scripts/ with a job; return what it found (the last line, JSON).

        Args:
            expected: its exit status.
            linger_s: how long the helpers that it started may live on.

        Raises: RuntimeError: it failed, with the end of what it said; TimeoutExpired.
        """
        folder = self.scratch("script")
        with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
            process = subprocess.Popen(
                [str(python), str(SCRIPTS / f"{name}.py"), json.dumps(job)],
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout_s)
                time.sleep(linger_s)
            finally:
                # Peers leave helpers behind that would be measured together with the next one.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            out.seek(0)
            err.seek(0)
            lines = out.read().strip().splitlines()
            if status != expected:
                raise RuntimeError(f"{name} {job}: {status}\n{err.read()[-1500:]}")
        shutil.rmtree(folder)
        found: dict[str, Any] = json.loads(lines[-1]) if status == 0 else {}
        return found


class BenchNode(Node):
    """A node whose daemon and ranks run the code of one checkout."""

    def __init__(self, folder: Path, uri: str, checkout: Path, settings: dict[str, object]) -> None:
        super().__init__(folder, uri, settings={"log_level": "error", **settings})
        self.environ["PYTHONPATH"] = self._daemon_environ["PYTHONPATH"] = code_path(checkout)

    def set(self, **settings: object) -> None:
        """Change settings of the daemon that is started next."""
        for name, value in settings.items():
            self._daemon_environ["MLFLOW_RELAY_" + name.upper()] = str(value)

    @property
    def cpu_s(self) -> float:
        """What the daemon has used so far, all threads, to the nanosecond."""
        used_ns = 0
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(FileNotFoundError):
                used_ns += int(path.read_text().split()[0])
        return used_ns / 1e9

    @property
    def resident_mb(self) -> float:
        """The daemon's resident memory in MB (10**6 bytes)."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def pid(self) -> int:
        assert self.daemon is not None
        return self.daemon.pid


def code_path(checkout: Path) -> str:
    """Return the PYTHONPATH with which a process runs the code of a checkout."""
    return os.pathsep.join(str(checkout / each) for each in ("client", "daemon"))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p99, p99.9 and max."""
    ranked = sorted(values)
    last = len(ranked) - 1
    names = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: ranked[round(share * last)] for name, share in names.items()}


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median over the rounds of each figure."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of two things that were measured by turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
