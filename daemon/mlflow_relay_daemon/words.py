"""Numbers, sizes and ages as people read them, and text made fit for one line. Pure."""

from __future__ import annotations

from datetime import datetime

KB, MB, GB, TB = 1000, 1000**2, 1000**3, 1000**4


def one_line(text: str) -> str:
    """Return the text on one line, without control characters.

    Names and errors come from ranks and servers; an escape sequence in one must not reach the
    operator's terminal.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def count_text(number: int) -> str:
    """Return 9999, 12.3k, 1.23M: at most six characters up to a thousand billions."""
    if number < 10_000:
        return str(number)
    for unit, name in ((GB, "G"), (MB, "M"), (KB, "k")):
        if number >= unit:
            return _three_digits(number / unit) + name
    return str(number)


def bytes_text(size: int) -> str:
    """Return 340 MB, 1.2 GB: decimal, as disks are sold."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "KB")):
        if size >= unit:
            return f"{_two_digits(size / unit)} {name}"
    return f"{size} B"


def age_text(age_ms: int) -> str:
    """Return 12 s, 3 min, 2 h, 5 d."""
    seconds = max(age_ms, 0) // 1000
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"


def date_text(time_ms: int, form: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time as the local clock shows it; "?" for one beyond all calendars."""
    try:
        return datetime.fromtimestamp(time_ms / 1000).strftime(form)
    except (ValueError, OverflowError, OSError):
        return "?"


def plural(number: int, thing: str) -> str:
    """Return 1 record, 2 records."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
