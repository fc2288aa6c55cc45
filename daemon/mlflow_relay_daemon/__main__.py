"""The `mlflow-relay` command, also `python -m mlflow_relay_daemon`."""

from __future__ import annotations

import sys

from mlflow_relay_daemon.exits import BAD_CONFIG, INTERRUPTED

# What `pip install 'mlflow-relay[daemon]'` adds to the client; see pyproject.toml.
EXTRA_MODULES = frozenset(
    {"click", "rich", "mlflow", "tenacity", "urllib3", "orjson", "psutil", "tomli", "yaml"}
)


def main() -> None:
    """Run the command and leave with its exit code."""
    try:
        from mlflow_relay_daemon.cli import cli

        cli.main(prog_name="mlflow-relay")
    except ModuleNotFoundError as error:
        sys.exit(say_what_to_install(error))
    except KeyboardInterrupt:  # while Python was still importing
        sys.exit(INTERRUPTED)


def is_extra(error: ModuleNotFoundError) -> bool:
    """Return whether the missing module is one that the client alone does not bring."""
    return (error.name or "").partition(".")[0] in EXTRA_MODULES


def say_what_to_install(error: ModuleNotFoundError) -> int:
    """Explain a missing module of the extra; any other is a defect of ours, and raised."""
    if not is_extra(error):
        raise error
    print(  # noqa: T201  # click may be what is missing
        f"mlflow-relay: this command needs {error.name}, which the client alone does not bring: "
        "pip install 'mlflow-relay[daemon]'",
        file=sys.stderr,
    )
    return BAD_CONFIG


if __name__ == "__main__":
    main()
