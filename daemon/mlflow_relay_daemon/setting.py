"""One setting: what is known about it, and how its text becomes a value."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mlflow_relay_daemon.exits import BAD_CONFIG, CommandError
from mlflow_relay_daemon.words import GB, KB, MB, TB, one_line

VARIABLE_PREFIX = "MLFLOW_RELAY_"
VALUE_SHOWN_MAX = 60  # characters of a refused value that are repeated in the error

_UNITS = {"": 1, "b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB}
_UNITS.update({"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40})
_SIZE = re.compile(r"([0-9][0-9_]*)(\.[0-9]+)? *([a-zA-Z]*)")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class ConfigError(CommandError):
    """A setting is wrong. One line: file (or variable, or flag), key, value, allowed range."""

    exit_code = BAD_CONFIG


@dataclass(frozen=True)
class Setting:
    """What is known about one setting besides its value."""

    name: str
    kind: str  # a key of _PARSERS
    help: str
    flag: str | None = None  # None: settable by variable and file only
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    optional: bool = False  # may be "none"
    secret: bool = False  # never repeated in an error

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        words = {
            "path": "a path",
            "uri": "a tracking URI, such as http://host:5000 or sqlite:////path/mlflow.db, and "
            "not relay://, which is this daemon itself",
            "switch": "true or false",
            "seconds": f"a number of seconds from {self.least:.9g} to {self.most:.9g}",
            "bytes": f"a size from {size_text(int(self.least))} to {size_text(int(self.most))}, "
            "such as 512MB, 2GiB or 1_000_000",
            "count": f"a whole number from {self.least:g} to {self.most:g}",
            "choice": " or ".join(self.choices),
            "group": "the name or number of a group of this machine",
            "names": "names with commas between them, such as training.run_id, metadata.run_id",
        }[self.kind]
        return words + (", or none" if self.optional else "")


def parse_value(setting: Setting, raw: object, where: str) -> object:
    """Return the value of a setting, from a flag's or variable's text or a TOML value.

    Raises:  ConfigError: naming where it came from, the key, the value and what is allowed.
    """
    if setting.optional and isinstance(raw, str) and raw.strip().lower() == "none":
        return None
    try:
        return _PARSERS[setting.kind](setting, raw)
    except (ValueError, OverflowError):
        repeated = "(not shown, it may hold a password)" if setting.secret else shown(raw)
        raise ConfigError(
            f"{where}: {setting.name} = {repeated} is refused: allowed is {setting.allowed}"
        ) from None


def _parse_path(setting: Setting, raw: object) -> Path:
    if not isinstance(raw, (str, Path)) or not str(raw).strip() or "\0" in str(raw):
        raise ValueError
    try:
        return Path(os.path.abspath(Path(raw).expanduser()))  # keeps links
    except RuntimeError:  # ~someone, and there is no such user
        raise ValueError from None


def _parse_uri(setting: Setting, raw: object) -> str:
    if not isinstance(raw, str) or not raw.isprintable() or not raw.strip():
        raise ValueError
    if raw.strip().startswith("relay:"):
        raise ValueError
    return raw.strip()


def _parse_switch(setting: Setting, raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.strip().lower() in _TRUE | _FALSE:
        return raw.strip().lower() in _TRUE
    raise ValueError


def _parse_seconds(setting: Setting, raw: object) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError
    return _in_range(setting, float(raw))


def _parse_count(setting: Setting, raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise ValueError
    return int(_in_range(setting, int(raw)))


def _parse_bytes(setting: Setting, raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise ValueError
    return int(_in_range(setting, raw if isinstance(raw, int) else parse_size(raw)))


def _parse_choice(setting: Setting, raw: object) -> str:
    if not isinstance(raw, str) or raw.strip().lower() not in setting.choices:
        raise ValueError
    return raw.strip().lower()


def _parse_group(setting: Setting, raw: object) -> str:
    if isinstance(raw, bool) or not isinstance(raw, (str, int)):
        raise ValueError
    name = str(raw).strip()
    try:
        return name if name.isdecimal() and int(name) < 1 << 32 else grp.getgrnam(name).gr_name
    except KeyError:
        raise ValueError from None


def _parse_names(setting: Setting, raw: object) -> tuple[str, ...]:
    names = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError
    return tuple(name.strip() for name in names if name.strip())


_PARSERS: Mapping[str, Callable[[Setting, object], object]] = MappingProxyType(
    {
        "path": _parse_path,
        "uri": _parse_uri,
        "switch": _parse_switch,
        "seconds": _parse_seconds,
        "count": _parse_count,
        "bytes": _parse_bytes,
        "choice": _parse_choice,
        "group": _parse_group,
        "names": _parse_names,
    }
)


def _in_range(setting: Setting, value: float) -> float:
    if not setting.least <= value <= setting.most:  # false for NaN too
        raise ValueError
    return value


def parse_size(text: str) -> int:
    """Return the bytes of '512MB' (decimal), '2GiB' (binary) or '1_000_000'.

    Raises:  ValueError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3].lower() not in _UNITS:
        raise ValueError(text)
    number, fraction, unit = match[1], match[2] or "", _UNITS[match[3].lower()]
    return int(number) * unit + int(float(fraction or 0) * unit)


def size_text(size: int) -> str:
    """Return an exact size as `parse_size` reads it: 64KB, 1GiB, 1234."""
    for unit, name in ((TB, "TB"), (1 << 30, "GiB"), (GB, "GB"), (1 << 20, "MiB"),
                       (MB, "MB"), (KB, "KB")):  # fmt: skip
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def shown(raw: object) -> str:
    """Return a value as an error repeats it: one line, and not a long one."""
    try:
        text = one_line(repr(raw))
    except ValueError:  # TOML allows 0xfff… of any length, Python prints 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= VALUE_SHOWN_MAX else text[: VALUE_SHOWN_MAX - 1] + "…"


def shown_path(path: Path) -> str:
    """Return a path as an error repeats it."""
    return str(path) if str(path).isprintable() else one_line(repr(str(path)))


def shown_key(key: str) -> str:
    """Return a key of a file as an error repeats it."""
    return key if key.isidentifier() and len(key) <= VALUE_SHOWN_MAX else shown(key)
