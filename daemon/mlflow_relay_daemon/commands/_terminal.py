"""Prints lines: cut to the terminal's width there, whole and plain into pipes and files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text


def stdout_width() -> int | None:
    """Return the terminal's width; None: stdout is a pipe or a file."""
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def fold(text: str, width: int | None, indent: str = "") -> list[str]:
    """Return the text in lines of at most `width` cells, the later ones indented. Pure.

    textwrap counts characters; a Chinese or Japanese one takes two cells.
    """
    if width is None:
        return [text]
    from rich.cells import cell_len

    room = max(width - len(indent), 2)
    lines, line = [], ""
    for word in (part for long in text.split(" ") for part in _chop(long, room)):
        if line.strip() and cell_len(f"{line} {word}") > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _chop(word: str, room: int) -> list[str]:
    """Cut a word that is too long for a line."""
    from rich.cells import cell_len

    parts, part = [], ""
    for character in word:
        if cell_len(part + character) > room:
            parts.append(part)
            part = ""
        part += character
    return [*parts, part]


def print_lines(lines: Iterable[Text]) -> None:
    """Print to stdout, with colours if it is a terminal that has them."""
    if stdout_width() is None:
        for line in lines:
            click.echo(line.plain)
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, soft_wrap=True)
