"""Options that are settings: made from config.py, so that each is written down once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from mlflow_relay_daemon.config import SETTINGS, Config, load_config
from mlflow_relay_daemon.exits import USAGE
from mlflow_relay_daemon.setting import Setting, size_text

PLACE = ("spool", "socket")  # what a command needs to find its daemon, and the spool without one
_METAVARS = {
    "path": "PATH",
    "uri": "URI",
    "seconds": "SECONDS",
    "bytes": "SIZE",
    "count": "N",
    "group": "NAME",
}

Function = Callable[..., Any]


def with_config(*names: str) -> Callable[[Function], Function]:
    """Give a command --config and the flags of these settings, and its function a `config`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(config_file: str | None, **arguments: Any) -> Any:
            flags = {name: arguments.pop(name) for name in names}
            return function(load_config(flags, config_file=config_file), **arguments)

        wrapped: Function = call
        wrapped = click.option(
            "--config", "config_file", metavar="FILE", help="Settings file (TOML)."
        )(wrapped)
        for name in reversed(names):
            wrapped = _option(SETTINGS[name])(wrapped)
        return wrapped

    return decorate


def flag_names() -> tuple[str, ...]:
    """Return the settings that have a flag."""
    return tuple(name for name, setting in SETTINGS.items() if setting.flag)


def help_without_command(ctx: click.Context) -> None:
    """Show a group's help if that is all that was typed; click 8.1 and 8.2 differ there."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(USAGE)


def example(*lines: str) -> str:
    """Return an epilog with examples, kept as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _option(setting: Setting) -> Callable[[Function], Function]:
    assert setting.flag is not None
    text = setting.help + _default_text(setting.name)
    if setting.kind == "switch":
        declaration = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        return click.option(declaration, setting.name, default=None, help=text)
    metavar = _METAVARS.get(setting.kind) or f"[{'|'.join(setting.choices)}]"
    return click.option(setting.flag, setting.name, metavar=metavar, default=None, help=text)


def _default_text(name: str) -> str:
    field = next(f for f in dataclasses.fields(Config) if f.name == name)
    default = field.default
    if default is dataclasses.MISSING or default is None or isinstance(default, bool):
        return ""
    if SETTINGS[name].kind == "bytes":
        return f"  [{size_text(int(str(default)))}]"
    return f"  [{default:.9g}]" if isinstance(default, float) else f"  [{default}]"
