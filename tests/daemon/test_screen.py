"""Bytes → lines as a terminal shows them."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay_daemon.screen import LINE_CHARS_MAX, OPEN_LINES, Screen
from tests.support.seeds import new_seed

BAR = "\r{:3d}%|{}| {}/1000"

SHOWN = {
    "plain": ("a\nb\n", "a\nb"),
    "carriage returns of a terminal": ("a\r\nb\r\n", "a\nb"),
    "a bar": ("".join(BAR.format(n, "#" * n, n) for n in range(100)), f" 99%|{'#' * 99}| 99/1000"),
    "a shorter text over a longer one": ("long text\rlo-", "lo-g text"),
    "erase to the end of the line": ("long text\rlo\x1b[K", "lo"),
    "erase the whole line": ("long text\x1b[2K\rshort", "short"),
    "backspace": ("abc\b\bX", "aXc"),
    "colours": ("\x1b[1;31mred\x1b[0m and \x1b[38;5;12mblue\x1b[m", "red and blue"),
    "a title": ("\x1b]0;the title\x07text\x1b]2;more\x1b\\ more", "text more"),
    "other escapes": ("\x1b(Ba\x1b=b\x1b>c\x1b[?25ld\x1b[?25h", "abcd"),
    "bells": ("a\x07b\x00c", "abc"),
    "tabs": ("a\tb", "a       b"),
    "two bars": (
        "one 0%\ntwo 0%\x1b[A\rone 50%\x1b[B\rtwo 50%\x1b[1A\rone 100%\n\rtwo 100%\n",
        "one 100%\ntwo 100%",
    ),
    "a display that is drawn anew": (
        "first\na 1\nb 1\n\x1b[2A\x1b[0Ja 2\nb 2\n\x1b[2F\x1b[Ja 3\nb 3\n",
        "first\na 3\nb 3",
    ),
    "columns": ("abcdef\x1b[3GX\x1b[2DY\x1b[CZ", "aYXZef"),
    "up beyond the top": ("a\nb\x1b[99AX", "aX\nb"),
    "a new screen keeps the old one": ("old\n\x1b[2J\x1b[Hnew", "old\nnew"),
    "not UTF-8": (b"a\xffb", "a\ufffdb"),
    "absurd numbers": ("a\x1b[99999999999999999Cb", "a b"),
}


def shown(*parts: bytes) -> str:
    screen = Screen()
    final = [line for part in parts for line in screen.feed(part)]
    return "\n".join([*final, *screen.lines()])


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize(("printed", "expected"), SHOWN.values(), ids=SHOWN)
def test_a_screen_shows_what_a_terminal_shows(printed, expected) -> None:
    assert shown(as_bytes(printed)) == expected


@pytest.mark.parametrize(("printed", "expected"), SHOWN.values(), ids=SHOWN)
def test_it_does_not_matter_how_output_is_cut(printed, expected) -> None:
    data = as_bytes(printed)
    assert shown(*(data[index : index + 1] for index in range(len(data)))) == expected


def test_lines_beyond_the_reach_of_a_progress_display_are_final() -> None:
    screen = Screen()
    lines = [f"line {index}" for index in range(OPEN_LINES * 3)]
    final = screen.feed("\n".join(lines).encode())
    assert final == lines[:-OPEN_LINES]
    assert screen.lines() == lines[-OPEN_LINES:]
    assert screen.feed(f"\x1b[{OPEN_LINES * 9}AX".encode()) == []
    assert screen.lines()[0].startswith("line 200"[:4])


def test_a_line_that_never_ends_is_broken() -> None:
    found = shown(b"x" * (LINE_CHARS_MAX * 2 + 5))
    assert [len(line) for line in found.split("\n")] == [LINE_CHARS_MAX, LINE_CHARS_MAX, 5]


def test_an_escape_sequence_that_never_ends_takes_no_memory() -> None:
    screen = Screen()
    for _ in range(100):
        screen.feed(b"\x1b]" + b"x" * 10_000)
    assert len(json.dumps(screen.save())) < 3 * OPEN_LINES * LINE_CHARS_MAX


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_shown_and_the_rest_goes_on_where_they_were_saved(data, at) -> None:
    screen = Screen()
    final = screen.feed(data[:at])
    again = Screen(json.loads(json.dumps(screen.save())))
    final += again.feed(data[at:])
    assert "\n".join([*final, *again.lines()]) == shown(data)


def test_a_screen_agrees_with_pyte_on_what_both_know() -> None:
    pyte = pytest.importorskip("pyte")
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    moves = ["\r", "\n", "\b", "\t", "\x1b[K", "\x1b[2K", "\x1b[A", "\x1b[B", "\x1b[3C", "\x1b[2D"]
    moves += ["\x1b[1m", "\x1b[31m", "\x1b[2A", "\x1b[5G", "\x1b[E", "\x1b[F", "\x1b[1K"]
    for _ in range(300):
        words = ["word", "a longer word", "x"]
        parts = [rng.choice(moves if rng.random() < 0.6 else words) for _ in range(40)]
        # Lines are there first: below its last line pyte has more, and a log has not.
        text = "\n" * 30 + "\x1b[15A" + "".join(parts)
        theirs = pyte.Screen(600, 99)
        theirs.set_mode(pyte.modes.LNM)
        pyte.Stream(theirs).feed(text)
        ours = Screen()
        assert ours.feed(text.encode()) == []
        lines = [line.rstrip() for line in theirs.display]
        padded = ours.lines() + [""] * 99
        assert padded[:99] == lines, repr(text)
