"""`mlflow-relay completion`: the script by which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from mlflow_relay_daemon.commands._options import example

PROGRAM = "mlflow-relay"
SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog=example(
        "mlflow-relay completion bash > ~/.local/share/bash-completion/completions/mlflow-relay",
    )
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    bash: as in the example. zsh: `mlflow-relay completion zsh > DIR/_mlflow-relay` with DIR in
    $fpath. fish: into ~/.config/fish/completions/mlflow-relay.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root()
    # click's bash class asks bash for its version first; the script itself is the same for all.
    script = kind(root.command, {}, PROGRAM, f"_{PROGRAM}_COMPLETE".replace("-", "_").upper())
    click.echo(script.source_template % script.source_vars())
