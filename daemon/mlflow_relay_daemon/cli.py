"""The command line: which commands there are, and how every one of them ends.

A command's module is imported when it is called, so that `mlflow-relay status` in a shell prompt
or a job script pays for neither mlflow nor the daemon.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from mlflow_relay._version import __version__
from mlflow_relay_daemon import exits
from mlflow_relay_daemon.__main__ import is_extra
from mlflow_relay_daemon.commands._options import help_without_command
from mlflow_relay_daemon.words import one_line

PROGRAM = "mlflow-relay"
_HERE = "mlflow_relay_daemon.commands"

# name: where it is, and its first help line, repeated here so that --help imports none of them
COMMANDS: Mapping[str, tuple[str, str]] = {
    "daemon": (f"{_HERE}.daemon:daemon", "Run this node's daemon in the foreground."),
    "exec": (f"{_HERE}.exec:exec_", "Run COMMAND with this node's daemon beside it."),
    "status": (f"{_HERE}.status:status", "Show what is accepted, delivered and waiting."),
    "flush": (f"{_HERE}.flush:flush", "Deliver now what was accepted before this call."),
    "runs": (f"{_HERE}.runs:runs", "List the runs that the spool knows."),
    "lineage": (f"{_HERE}.lineage:lineage", "Draw the tree of resumes and forks of a run."),
    "url": (f"{_HERE}.url:url", "Print the MLflow page of a run, or of several compared."),
    "sync": (f"{_HERE}.sync:sync", "Bring spools and other stores' runs to a server."),
    "dead-letters": (f"{_HERE}.dead_letters:dead_letters", "List, retry or drop refused records."),
    "install-units": (
        f"{_HERE}.install_units:install_units",
        "Put the systemd units of the daemon in place.",
    ),
    "completion": (
        f"{_HERE}.completion:completion",
        "Print the completion script of a shell.",
    ),
    "check": (f"{_HERE}.check:check", "Check this node's setup, and say how to mend it."),
    "demo": (f"{_HERE}.demo:demo", "Show the whole story on one machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, and whose errors are one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f": did you mean {close[0]}?" if close else f": there are {', '.join(COMMANDS)}."
            ctx.fail(f"No command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        sys.exit(self._run(arguments, prog_name or PROGRAM, complete_var, extra))

    def _run(
        self,
        args: list[str],
        program: str,
        complete_var: str | None,
        extra: MutableMapping[str, Any],
    ) -> int:
        """Run one command and return its exit code; say every error on one line."""
        wants_traceback = debugging(args)
        try:
            self._main_shell_completion(extra, program, complete_var)
            code = self._invoke(args, program, extra)
            sys.stdout.flush()  # here, where a reader that has gone can still be handled
        except click.UsageError as error:
            return say(_usage_text(error, program), exits.USAGE)
        except click.ClickException as error:
            return say(error.format_message(), exits.DEGRADED)
        except exits.CommandError as error:
            return say(str(error), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            return exits.INTERRUPTED
        except BrokenPipeError:
            _forget_stdout()
            return exits.READER_GONE
        except Exception as error:  # noqa: BLE001  # one line for people, whatever it is
            _flush_or_forget_stdout()
            return self._unexpected(error, wants_traceback)
        return code

    def _invoke(self, args: list[str], program: str, extra: MutableMapping[str, Any]) -> int:
        try:
            with self.make_context(program, args, **extra) as ctx:
                result = self.invoke(ctx)
        except click.exceptions.Exit as leave:
            return leave.exit_code
        return result if isinstance(result, int) else exits.DONE

    def _unexpected(self, error: Exception, wants_traceback: bool) -> int:
        if isinstance(error, ModuleNotFoundError) and is_extra(error):
            raise error  # __main__ says what to install
        if wants_traceback:
            traceback.print_exception(error)
            return exits.DEGRADED
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return say(
            f"unexpected {type(error).__name__}{place}: {error}: for the traceback, repeat it as "
            f"`{PROGRAM} --debug ...` or with MLFLOW_RELAY_DEBUG=1",
            exits.DEGRADED,
        )


def say(text: str, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    click.echo(f"{PROGRAM}: {one_line(text)}", err=True)
    return code


def debugging(args: Sequence[str]) -> bool:
    """Return whether tracebacks are wanted."""
    before_command = itertools.takewhile(lambda argument: argument.startswith("-"), args)
    return "--debug" in before_command or os.environ.get("MLFLOW_RELAY_DEBUG", "0") not in ("", "0")


def _usage_text(error: click.UsageError, program: str) -> str:
    path = error.ctx.command_path if error.ctx is not None else program
    text = error.format_message().rstrip(".")
    return f"{text}{'' if text.endswith('?') else '.'} See `{path} --help`."


def _flush_or_forget_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _forget_stdout()


def _forget_stdout() -> None:
    # Python flushes stdout once more at its end, and would complain there and leave with 120.
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError):
        pass  # a test's stdout has no file descriptor


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Every command tells its options and an example with --help. Exit codes: 0 done, 1 failed "
        "or degraded, 64 usage, 69 no daemon, 75 time ran out, 78 bad configuration.\n\n"
        "\b\nExample:\n  mlflow-relay status --watch"
    ),
)
@click.option("--debug", is_flag=True, help="Show a traceback for an unexpected error.")
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """One daemon per node between training and MLflow: nothing waits, nothing is lost."""
    help_without_command(ctx)
