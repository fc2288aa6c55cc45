"""`mlflow-relay demo`: a training whose server and daemon are killed, and the count afterwards."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import click

from mlflow_relay_daemon.commands._options import example
from mlflow_relay_daemon.exits import BAD_CONFIG, DEGRADED, DONE, CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from mlflow_relay_daemon.demo.story import Story

INTRODUCTION = (
    "Four processes train one model, and each of them logs its metrics. In the middle of it the "
    "MLflow server is killed, then the relay's own daemon. At the end MLflow is asked for every "
    "single point."
)
POLL_S = 0.1


@click.command(
    epilog="Exit code: 0 every point is in MLflow once, 1 a point is missing, twice or wrong, or "
    "something else went wrong.\n\n"
    + example("mlflow-relay demo", "mlflow-relay demo --keep --port 5000")
)
@click.option("--keep", is_flag=True, help="Leave the MLflow server up until Ctrl+C.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N",
              help="Port of the MLflow server on 127.0.0.1.  [a free one]")  # fmt: skip
def demo(keep: bool, port: int | None) -> None:
    """Show the whole story on one machine.

    Four ranks train a model together and log from every rank. In mid-training the MLflow server is
    killed, then the daemon. At the end MLflow is asked for every point.

    It takes about 40 seconds, 90 at most, needs nothing set up, and leaves nothing behind.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise CommandError(
            "the demo trains on scikit-learn's digits, and scikit-learn is missing: "
            "pip install 'mlflow-relay[demo]'",
            BAD_CONFIG,
        )
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no µ
    with Stop() as stop:
        code = _perform(Console(highlight=False), stop, keep, port)
    click.get_current_context().exit(code)


class Stop:
    """Ctrl+C and the like, as a question: the demo ends its processes itself, in order."""

    def __init__(self) -> None:
        self.signal_number = 0

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_asked(self) -> bool:
        return self.signal_number != 0

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number


def _perform(console: Console, stop: Stop, keep: bool, port: int | None) -> int:
    """Tell the story, tidy up, and return the exit code."""
    from mlflow_relay_daemon.demo.narrator import narrate
    from mlflow_relay_daemon.demo.report import table
    from mlflow_relay_daemon.demo.story import Interrupted, Story

    try:
        with narrate(console) as narrator, Story(narrator, stop.is_asked, port) as story:
            narrator.introduce(INTRODUCTION)
            report = story.tell()
            narrator.close()
            console.print(table(report))
            _point_at_page(console, story, keep)
            while keep and not stop.is_asked():
                story.server.check()
                time.sleep(POLL_S)
    except Interrupted:
        click.echo("mlflow-relay: the demo was interrupted; nothing is left of it", err=True)
        return 128 + stop.signal_number
    return DONE if report.is_good else DEGRADED


def _point_at_page(console: Console, story: Story, keep: bool) -> None:
    console.print("The run in MLflow:", story.page_url, soft_wrap=True)
    if keep:
        console.print("The MLflow server stays up, so that you can look at it. Ctrl+C ends it.")
    else:
        console.print("The server is gone with the demo: `mlflow-relay demo --keep` leaves it up.")
    console.file.flush()
