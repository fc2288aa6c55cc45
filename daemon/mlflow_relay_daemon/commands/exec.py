"""`mlflow-relay exec`: a command with this node's daemon beside it, drained when the command ends.

The command runs in the same process group, session and terminal as if it had been started alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence

import click

from mlflow_relay_daemon.commands._options import PLACE, example, with_config
from mlflow_relay_daemon.config import SETTINGS, Config
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.sidecar import Sidecar
from mlflow_relay_daemon.witness import Witness
from mlflow_relay_daemon.words import one_line

#: Slurm's KillWait is 30 s: from the SIGTERM that ends a job to the SIGKILL.
DRAIN_TIMEOUT_S = 25.0
SUPERVISE_EVERY_S = 2.0
POLL_S = 0.1
NOT_FOUND, NOT_EXECUTABLE, BY_SIGNAL = 127, 126, 128  # as shells report them
FORWARDED = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)
ENDING = FORWARDED - {signal.SIGUSR1, signal.SIGUSR2}
FLAGS = (*PLACE, "tracking_uri", "offline", "http_port", "drain_timeout_s")


@click.command(
    name="exec",
    context_settings={"allow_interspersed_args": False},
    epilog="Exit code: that of COMMAND, 128 + N if signal N ended it; 127 there is no such "
    "command, 78 bad configuration.\n\n"
    + example(
        "mlflow-relay exec -- python train.py",
        "srun mlflow-relay exec -- python train.py",
        "torchrun --no-python --nproc-per-node 4 mlflow-relay exec -- python train.py",
    ),
)
@with_config(*FLAGS)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(config: Config, command: tuple[str, ...]) -> None:
    """Run COMMAND with this node's daemon beside it.

    Every rank of a node may do so: they share one daemon, which is started if there is none and
    started again if it dies. Signals go to COMMAND. When the last one of the node ends, it waits
    until all is delivered, for --drain-timeout seconds at most (25 if nothing else is said; counted
    from the SIGTERM, if that ended it), and says what is left and how to deliver it.
    """
    click.get_current_context().exit(_Exec(config, command).run())


def command_environ(config: Config) -> dict[str, str]:
    """Return the environment of the command: it meets the daemon that was meant."""
    return {**os.environ, "MLFLOW_RELAY_SOCKET": str(config.socket)}


def daemon_environ(config: Config, drain_timeout_s: float) -> dict[str, str]:
    """Return the environment of the daemon: the flags go there, not into the list of processes."""
    given = {name for name in FLAGS if config.origin[name].startswith("flag ")}
    values = {SETTINGS[name].variable: _text(getattr(config, name)) for name in given}
    file = click.get_current_context().params.get("config_file")
    if file:
        values["MLFLOW_RELAY_CONFIG"] = os.path.abspath(file)
    values["MLFLOW_RELAY_SOCKET"] = str(config.socket)
    values["MLFLOW_RELAY_SIDECAR"] = "true"
    values["MLFLOW_RELAY_DRAIN_TIMEOUT_S"] = str(drain_timeout_s)
    return {**os.environ, **values}


class _Exec:
    """One command, from start to drain."""

    def __init__(self, config: Config, command: Sequence[str]) -> None:
        self._config, self._command = config, command
        is_given = config.origin["drain_timeout_s"] != "default"
        self._drain_timeout_s = config.drain_timeout_s if is_given else DRAIN_TIMEOUT_S
        self._told_s: float | None = None  # when a signal said that this is the end
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})

    def run(self) -> int:
        """Return the exit code of the command."""
        witness = Witness()
        try:
            environ = daemon_environ(self._config, self._drain_timeout_s)
            sidecar = Sidecar(self._config.socket, environ, self._unblock, _say)
            sidecar.supervise()
            code = self._wait(self._start(), sidecar, witness)
        finally:
            witness.close()
        if sidecar.release():
            self._drain(sidecar)
        return code if code >= 0 else BY_SIGNAL - code

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(  # noqa: S603  # to run what the user says is its purpose
                self._command,
                env=command_environ(self._config),
                preexec_fn=self._unblock,  # noqa: PLW1509  # this process has no threads yet
            )
        except FileNotFoundError:
            raise CommandError(
                f"{self._command[0]}: there is no such command: check its name and PATH", NOT_FOUND
            ) from None
        except OSError as error:
            raise CommandError(
                f"{self._command[0]}: {error.strerror}: make it executable", NOT_EXECUTABLE
            ) from None

    def _wait(self, child: subprocess.Popen[bytes], sidecar: Sidecar, witness: Witness) -> int:
        """Return how the command ended; until then hand signals on and see that a daemon lives."""
        while (code := child.poll()) is None:
            info = signal.sigtimedwait(FORWARDED | {signal.SIGCHLD}, SUPERVISE_EVERY_S)
            if info is None or info.si_signo == signal.SIGCHLD:
                if self._told_s is None:  # later, a daemon that left is not wanted back
                    sidecar.supervise()
                continue
            if info.si_signo in ENDING:
                self._told_s = self._told_s or time.monotonic()
            if not witness.saw(info.si_signo):
                child.send_signal(info.si_signo)
        return code

    def _drain(self, sidecar: Sidecar) -> None:
        """Wait until the daemon has delivered all, or the limit is over; say what is left."""
        from mlflow_relay_daemon.commands._drain import Drain

        drain = Drain(self._config)
        until_s = (self._told_s or time.monotonic()) + self._drain_timeout_s
        while not drain.is_done(sidecar.is_there()) and time.monotonic() < until_s:
            info = signal.sigtimedwait(FORWARDED, POLL_S)
            if info is None:
                continue
            if info.si_signo in (signal.SIGINT, signal.SIGQUIT):
                break  # somebody at a terminal has had enough
            until_s = min(until_s, time.monotonic() + self._drain_timeout_s)
        left = drain.left()
        if left:
            _say(
                f"{left} are not in MLflow yet; nothing is lost, they are kept "
                f"on disk: `mlflow-relay sync {self._config.spool} --tracking-uri URI` delivers "
                "them"
            )

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _say(text: str) -> None:
    click.echo(f"mlflow-relay: {one_line(text)}", err=True)
