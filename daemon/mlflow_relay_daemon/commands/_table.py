"""Lays out a table of one line per row in the width there is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from mlflow_relay_daemon.words import one_line


@dataclass(frozen=True)
class Column:
    """How one column behaves."""

    title: str
    right: bool = False  # numbers
    least: int | None = None  # may shrink to this width, with an ellipsis; None: never


@dataclass(frozen=True)
class Cell:
    """One text, with a colour for terminals."""

    text: str
    style: str = ""


def lay_out(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None
) -> list[Text]:
    """Return a heading and one line per row, none wider than the width.

    Args:    width: columns of the terminal; None: as wide as it takes (a pipe, a file).
    """
    heading = [Cell(column.title, "bold") for column in columns]
    table = [heading, *([Cell(one_line(c.text), c.style) for c in row] for row in rows)]
    widths = [max(cell_len(row[i].text) for row in table) for i in range(len(columns))]
    gap = 2
    if width is not None:
        narrowest = sum(
            w if c.least is None else c.least for c, w in zip(columns, widths, strict=True)
        )
        if narrowest + gap * (len(columns) - 1) > width:
            gap = 1
        widths = _shrink(columns, widths, width - gap * (len(columns) - 1))
    return [_line(columns, row, widths, gap, width) for row in table]


def _shrink(columns: Sequence[Column], widths: Sequence[int], room: int) -> list[int]:
    """Take from the widest column that can give, until it fits or none can."""
    shrunk = list(widths)
    while sum(shrunk) > room:
        able = [i for i, c in enumerate(columns) if c.least is not None and shrunk[i] > c.least]
        if not able:
            break
        widest = max(able, key=lambda i: shrunk[i])
        shrunk[widest] -= 1
    return shrunk


def _line(
    columns: Sequence[Column],
    row: Sequence[Cell],
    widths: Sequence[int],
    gap: int,
    width: int | None,
) -> Text:
    line = Text()
    for i, (column, cell) in enumerate(zip(columns, row, strict=True)):
        text = Text(cell.text, style=cell.style)
        text.truncate(widths[i], overflow="ellipsis")
        padding = " " * (widths[i] - text.cell_len)
        line.append(" " * gap if i else "")
        line.append_text(Text(padding) + text if column.right else text + Text(padding))
    line.rstrip()
    if width is not None:
        line.truncate(width, overflow="ellipsis")  # narrower than any table of ours
    return line
