"""What was printed → the lines that a terminal would show, progress bars in their last state. Pure.

Only the last OPEN_LINES lines can still change; those above them are final. What moves the cursor
within them is done, what is decoration (colours, titles) is left out, and what begins a new screen
(home, clear) lets the old one stand: nothing that was seen is lost. pyte, which knows all that a
terminal does, takes 4 s for a megabyte, and folds lines at a width that is nobody's.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

#: How far up a progress display can reach.
OPEN_LINES = 100
#: A line that never ends is broken here.
LINE_CHARS_MAX = 10_000
TAB = 8
_HELD_CHARS_MAX = 4096  # of an escape sequence that is not complete yet

_TOKEN = re.compile(
    r"(?P<text>[^\x00-\x1f\x7f]+)"
    r"|\x1b\[(?P<numbers>[0-?]*)[ -/]*(?P<command>[@-~])"
    r"|(?P<ignored>\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-Z\\^-~])"
    r"|(?P<control>[\x00-\x1f\x7f])"
)
_INCOMPLETE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[ -/]*)\Z")


class Screen:
    """The end of what a terminal shows.

    Args: saved: as `save` gave it.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {"lines": [""], "row": 0, "column": 0, "held": "", "bytes": ""}
        self._lines: list[str] = list(saved["lines"])
        self._row, self._column = int(saved["row"]), int(saved["column"])
        self._held = str(saved["held"])  #: the beginning of an escape sequence
        self._final: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((bytes.fromhex(saved["bytes"]), 0))

    def save(self) -> dict[str, Any]:
        """Return what the constructor takes, fit for JSON."""
        return {
            "lines": self._lines,
            "row": self._row,
            "column": self._column,
            "held": self._held,
            "bytes": self._decoder.getstate()[0].hex(),
        }

    def lines(self) -> list[str]:
        """Return the lines that can still change."""
        shown = [line.rstrip() for line in self._lines]
        return shown if shown[-1] else shown[:-1]

    def feed(self, data: bytes) -> list[str]:
        """Show what was printed; return the lines that are final now."""
        text = self._held + self._decoder.decode(data)
        self._held = ""
        incomplete = _INCOMPLETE.search(text, max(0, len(text) - _HELD_CHARS_MAX))
        if incomplete:
            self._held = incomplete[0]
            text = text[: incomplete.start()]
        for token in _TOKEN.finditer(text):
            if token["text"] is not None:
                self._write(token["text"])
            elif token["control"] is not None:
                self._control(token["control"])
            elif token["command"] is not None:
                self._move(token["command"], token["numbers"])
        final, self._final = self._final, []
        return final

    def _write(self, text: str) -> None:
        while text:
            room = LINE_CHARS_MAX - self._column
            part, text = text[:room], text[room:]
            line, end = self._lines[self._row], self._column + len(part)
            if self._column == len(line):
                self._lines[self._row] = line + part
            else:
                before = line[: self._column].ljust(self._column)
                self._lines[self._row] = before + part + line[end:]
            self._column = end
            if text:
                self._new_line()

    def _control(self, control: str) -> None:
        if control == "\n":
            self._new_line()
        elif control == "\r":
            self._column = 0
        elif control == "\b":
            self._column = max(0, self._column - 1)
        elif control == "\t":
            self._column = min(LINE_CHARS_MAX - 1, (self._column // TAB + 1) * TAB)

    def _new_line(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self._lines):
            self._lines.append("")
            if len(self._lines) > OPEN_LINES:
                self._final.append(self._lines.pop(0).rstrip())
                self._row -= 1

    def _move(self, command: str, numbers: str) -> None:
        first = numbers.partition(";")[0]
        number = int(first) if first.isdecimal() and len(first) < 6 else 0
        count = number or 1
        match command:
            case "A":
                self._go(-count, 0)
            case "B":
                self._go(count, 0)
            case "C":
                self._go(0, count)
            case "D":
                self._go(0, -count)
            case "E":
                self._go(count, -self._column)
            case "F":
                self._go(-count, -self._column)
            case "G":
                self._go(0, count - 1 - self._column)
            case "H":
                self._begin_anew()
            case "J" | "K":
                self._erase(command, number)

    def _go(self, rows: int, columns: int) -> None:
        self._row = min(max(0, self._row + rows), len(self._lines) - 1)
        self._column = min(max(0, self._column + columns), LINE_CHARS_MAX - 1)

    def _erase(self, command: str, what: int) -> None:
        line = self._lines[self._row]
        if command == "J" and what >= 2:
            self._begin_anew()
        elif what == 0:
            self._lines[self._row] = line[: self._column]
            if command == "J":
                del self._lines[self._row + 1 :]
        elif what == 1:
            self._lines[self._row] = line[self._column + 1 :].rjust(len(line))
        elif what == 2:
            self._lines[self._row] = ""

    def _begin_anew(self) -> None:
        self._final += self.lines()
        self._lines, self._row, self._column = [""], 0, 0
