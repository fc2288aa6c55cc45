"""`mlflow-relay install-units`: the systemd units, where systemd looks for them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from mlflow_relay_daemon.commands._options import example
from mlflow_relay_daemon.exits import CommandError

UNIT = "mlflow-relay.service"
PROGRAM_IN_UNIT = "/usr/bin/mlflow-relay"
#: What ProtectHome= and PrivateTmp= hide from the system-wide daemon.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  # none is written to


@dataclass(frozen=True)
class UnitFile:
    """One file, and where it goes."""

    source: str  # below systemd/
    target: str  # below the root, or the user's home


SYSTEM = (
    UnitFile(UNIT, "etc/systemd/system/mlflow-relay.service"),
    UnitFile("mlflow-relay.sysusers", "etc/sysusers.d/mlflow-relay.conf"),
    UnitFile("mlflow-relay.tmpfiles", "etc/tmpfiles.d/mlflow-relay.conf"),
)
USER = (UnitFile(f"user/{UNIT}", "systemd/user/mlflow-relay.service"),)
SYSTEM_NEXT = (
    "systemd-sysusers",
    "systemd-tmpfiles --create mlflow-relay.conf",
    "systemctl daemon-reload",
    "systemctl enable --now mlflow-relay",
    "usermod -aG mlflow-relay USER    # for each who is to log",
)
USER_NEXT = (
    "systemctl --user daemon-reload",
    "systemctl --user enable --now mlflow-relay",
    "loginctl enable-linger    # or it ends when you log out",
)


@click.command(
    epilog="It starts nothing and changes nothing else.\n\n"
    + example("mlflow-relay install-units", "mlflow-relay install-units --user")
)
@click.option("--user", "for_user", is_flag=True, help="A unit for you alone; needs no root.")
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("/"), metavar="DIR",
    help="Another root than /, such as that of an image.",
)  # fmt: skip
def install_units(for_user: bool, root: Path) -> None:
    """Put the systemd units of the daemon in place.

    System-wide, with a user of its own, or with --user for you alone. It says which files it wrote
    and which commands come next.
    """
    program = _program()
    base = _config_home() if for_user else root
    for each in USER if for_user else SYSTEM:
        text = (unit_folder() / each.source).read_text(encoding="utf-8")
        path = base / each.target
        state = _write(path, text.replace(PROGRAM_IN_UNIT, program))
        click.echo(f"{state:<9} {path}")
    hidden = _hidden_by(program) if not for_user else ""
    if hidden:
        click.echo(
            f"mlflow-relay: {program} lies below {hidden}, which the unit hides from the daemon: "
            "install it elsewhere, such as into a venv in /opt, and repeat this from there",
            err=True,
        )
    click.echo("next:")
    for line in USER_NEXT if for_user else SYSTEM_NEXT:
        click.echo(f"  {line}")


def unit_folder() -> Path:
    """Return where the units lie: in the package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "units"
    return installed if installed.is_dir() else package.parents[1] / "systemd"


def _program() -> str:
    """Return the command of this installation, as a unit's ExecStart= wants it."""
    script = Path(sys.executable).with_name("mlflow-relay")
    words = [str(script)] if script.exists() else [sys.executable, "-m", "mlflow_relay_daemon"]
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    """Return a word as systemd.syntax(7) has it."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if any(each in word for each in " \t'") else word


def _hidden_by(program: str) -> str:
    real = os.path.realpath(sys.executable)
    places = (program.strip('"'), real)
    return next((h for h in HIDDEN if any(p.startswith(h + "/") for p in places)), "")


def _config_home() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(home) if os.path.isabs(home) else Path.home() / ".config"


def _write(path: Path, text: str) -> str:
    """Write a file if it is not so already; return what was done, in a word."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return "unchanged"
        state = "replaced" if path.exists() else "written"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"{path}: {error.strerror}: run it as root, or with --user for you alone"
        ) from error
    return state
