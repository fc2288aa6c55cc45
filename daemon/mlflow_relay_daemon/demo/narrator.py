"""Tells what goes on: lines with the time, and on a terminal two bars below them."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console  # noqa: TC002
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

WIDTH_MAX = 100
INDENT = " " * 9
#: Where no bar can be drawn, a line says so often how far things are.
REPORT_EVERY_S = 5.0


class View(NamedTuple):
    """How far things are."""

    step: int
    accuracy: float
    logged: int  #: points, about
    delivered: int  #: points

    @property
    def kept(self) -> int:
        """Points that are not in MLflow yet, about."""
        return max(0, self.logged - self.delivered)

    @property
    def training(self) -> str:
        return f"step {self.step:,}, accuracy {self.accuracy:.1%}"

    @property
    def delivery(self) -> str:
        return f"{self.delivered:,} points, {self.kept:,} kept on this node"


class Narrator:
    """Plain lines, for pipes and files."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = self._spoke_s = time.monotonic()

    def introduce(self, text: str) -> None:
        """Tell what will be told."""
        for line in textwrap.wrap(text, self._width):
            self._print(Text(line, "bold"))
        self._print(Text())

    def say(self, text: str, style: str = "") -> None:
        """Tell one event."""
        self._spoke_s = time.monotonic()
        lines = textwrap.wrap(text, self._width - len(INDENT))
        elapsed = f"{self._spoke_s - self._started_s:5.1f} s"
        for margin, line in zip([elapsed, *[""] * len(lines)], lines, strict=False):
            self._print(Text.assemble((f"{margin:<{len(INDENT)}}", "dim"), (line, style)))

    def show(self, view: View) -> None:
        """Show how far things are; to be called some times a second."""
        if time.monotonic() - self._spoke_s > REPORT_EVERY_S:
            self.say(f"{view.training}; in MLflow: {view.delivery}")

    def close(self) -> None:
        """The story is over."""

    @property
    def _width(self) -> int:
        return min(self._console.width, WIDTH_MAX)

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)
        self._console.file.flush()


class LiveNarrator(Narrator):
    """The lines, and below them two bars; for terminals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            expand=True,
            transient=True,
        )
        self._training = self._bars.add_task("training", total=None, figures="", visible=False)
        self._delivery = self._bars.add_task("in MLflow", figures="", visible=False)
        self._bars.start()

    def show(self, view: View) -> None:
        self._bars.update(self._training, figures=view.training, visible=True)
        self._bars.update(
            self._delivery,
            total=view.logged,
            completed=view.delivered,
            figures=view.delivery,
            visible=True,
        )

    def close(self) -> None:
        self._bars.stop()


@contextmanager
def narrate(console: Console) -> Iterator[Narrator]:
    """Yield the narrator that this console can show."""
    is_live = console.is_terminal and not console.is_dumb_terminal
    narrator = LiveNarrator(console) if is_live else Narrator(console)
    try:
        yield narrator
    finally:
        narrator.close()
