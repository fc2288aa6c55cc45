"""Shows the status again and again, with rates and the way of each backlog."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mlflow_relay_daemon.commands._gather import View
from mlflow_relay_daemon.commands._json import print_json
from mlflow_relay_daemon.commands._terminal import fold, print_lines, stdout_width
from mlflow_relay_daemon.commands._trends import Trends

if TYPE_CHECKING:
    from rich.text import Text

    Draw = Callable[[View, int | None, Trends], list[Text]]


def watch(look: Callable[[], View], draw: Draw, period_s: float, *, as_json: bool) -> None:
    """Print again and again; left by Ctrl+C."""
    trends = Trends()
    while as_json or stdout_width() is None:
        view = look()
        trends.add(view.status)
        if as_json:
            print_json(view.status, on_one_line=True)
        else:
            print_lines(draw(view, None, trends))
            click.echo()
        sys.stdout.flush()
        time.sleep(period_s)
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, screen=True) as live:
        while True:
            view = look()
            trends.add(view.status)
            width = live.console.width
            note = [Text(line) for line in fold(view.note or "", width)]
            live.update(Group(*note, *draw(view, width, trends)), refresh=True)
            time.sleep(period_s)
