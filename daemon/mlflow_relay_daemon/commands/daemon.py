"""`mlflow-relay daemon`: the daemon of this node, in the foreground."""

from __future__ import annotations

import os

import click

from mlflow_relay_daemon.commands._options import example, flag_names, with_config
from mlflow_relay_daemon.config import Config, ConfigError, load_config


@click.command(
    epilog=(
        "Each option is a setting: --drain-timeout 30 is MLFLOW_RELAY_DRAIN_TIMEOUT_S=30, or "
        "drain_timeout_s = 30 in /etc/mlflow-relay.toml. `mlflow-relay check --settings` shows all "
        "of them, with their values and where these come from.\n\n"
        + example("mlflow-relay daemon --tracking-uri http://mlflow.example.org:5000")
    )
)
@with_config(*flag_names())
def daemon(config: Config) -> None:
    """Run this node's daemon in the foreground.

    SIGTERM or Ctrl+C: it delivers for --drain-timeout seconds and leaves the rest in the spool for
    its next start. SIGHUP: it reads its settings anew, and says which of them need a restart.
    """
    _require_target(config)
    from mlflow_relay_daemon.service import run_daemon

    given = click.get_current_context().params
    flags = {name: given[name] for name in flag_names()}

    def load_again() -> Config:
        return load_config(flags, config_file=given["config_file"])

    click.get_current_context().exit(run_daemon(config, load_again))


def _require_target(config: Config) -> None:
    # A daemon that a rank started inherits the rank's relay:// and would fill a local store
    # that nobody looks at.
    inherited = os.environ.get("MLFLOW_TRACKING_URI", "")
    if inherited.startswith("relay:") and config.origin["tracking_uri"] == "default":
        raise ConfigError(
            "MLFLOW_TRACKING_URI: relay:// is this daemon itself: name the MLflow server with "
            "MLFLOW_RELAY_TRACKING_URI or --tracking-uri"
        )
