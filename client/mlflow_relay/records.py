"""One log call ⇄ bytes. Pure. See PROTOCOL.md, Records.

A record is a msgpack array: [kind, timestamp in ms, ...]:

    METRICS  [1, t, step or [step, ...], [key, ...], values]   values: big-endian float64s, as bin
    PARAMS   [2, t, {key: value}]
    TAGS     [3, t, {key: value}]
    END      [4, t, status, reason]
    ARTIFACT [5, t, path, id, where, file, size, modified in ns, digest]
    REDUCE   [6, t, step, how, [key, ...], values]          one rank's; the daemon makes a point
    COMBINED [7, t, step, how, suffix, [key, ...], values, missing, born]   the daemon's point
    TERMINAL [8, t, bytes]                                  what a rank has printed
    CALL     [9, t, name, body]                                     body: JSON, as bin

CALL is what MLflow's API has besides these, kept at its place among them by the daemon itself for
those who speak MLflow to it; ranks do not send it.

The hot one, METRICS, is written by `struct` alone: all but time, step and values is the same from
call to call and is kept, and packing a float64 checks and converts every kind of number (Python's,
NumPy's, torch's) in C. It reads back as msgpack like the others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from .errors import FormatError
from .values import (
    INT64_MAX,
    INT64_MIN,
    METRICS_PER_RECORD_MAX,
    TEXTS_PER_RECORD_MAX,
    check_artifact_path,
    check_key,
    short,
    to_float,
    to_step,
)

METRICS, PARAMS, TAGS, END, ARTIFACT, REDUCE, COMBINED, TERMINAL, CALL = range(1, 10)

TERMINAL_BYTES_MAX = 1 << 18  # what was printed within a moment; more becomes several records

#: Where an artifact's bytes lie: in a file of ours that nobody else writes to; in one that is a
#: hard link to the user's; in the user's own file.
COPY, LINK, PLACE = "copy", "link", "place"

#: How values of several ranks become one.
REDUCTIONS = ("mean", "sum", "min", "max")

#: How a run can end, as MLflow spells it.
END_STATUSES = ("FINISHED", "FAILED", "KILLED")
#: In the place of a status: the process has left, and the run goes on without it.
GOES_ON = "RUNNING"

_ID = re.compile(r"[0-9a-f]{32}")
_INT64 = 0xD3
_METRICS_HEAD = bytes((0x95, METRICS, _INT64))
_LAYOUTS_MAX = 1024  # key sets kept; a program that makes up keys at each call must not grow
_KEYS_AT = 20  # in a record of MetricsPacker: behind head, time, and step with its mark
#: Layouts by `_keys_place`, as `unpack_record` has met them.
_known_keys: dict[tuple[int, bytes], tuple[struct.Struct, bytes, Sequence[str]]] = {}


class Metrics(NamedTuple):
    """Values of one call; `steps` has one entry for each key."""

    timestamp_ms: int
    steps: Sequence[int]
    keys: Sequence[str]
    values: Sequence[float]


class Params(NamedTuple):
    timestamp_ms: int
    items: Mapping[str, str]


class Tags(NamedTuple):
    timestamp_ms: int
    items: Mapping[str, str]


class End(NamedTuple):
    """The rank's own word that it is over."""

    timestamp_ms: int
    status: str  #: one of END_STATUSES
    reason: str  #: "" if there is nothing to tell


class Call(NamedTuple):
    """A request of MLflow's REST API that changes the run."""

    timestamp_ms: int
    name: str  #: such as "runs/delete-tag"
    body: bytes  #: its JSON, without the run's id


class Artifact(NamedTuple):
    """A file that is to be a run's artifact, as it was at the call."""

    timestamp_ms: int
    path: str  #: where it goes, from the run's artifact root; checked by `check_artifact_path`
    id: str  #: 32 hex digits, made up for this call
    where: str  #: COPY, LINK or PLACE
    file: bytes  #: absolute path on the rank's node, as the kernel knows it
    size: int
    modified_ns: int
    digest: bytes  #: of samples: see fingerprint.sample_digest


class Reduce(NamedTuple):
    """Values of one rank, of which the daemon makes points together with those of other ranks."""

    timestamp_ms: int
    step: int
    how: str  #: one of REDUCTIONS
    keys: Sequence[str]
    values: Sequence[float]


class Combined(NamedTuple):
    """Points that a daemon has made; only a daemon writes it, into its spool."""

    timestamp_ms: int
    step: int
    how: str
    suffix: str  #: behind each key, in MLflow
    keys: Sequence[str]
    values: Sequence[float]
    missing: int  #: ranks that owe each of these points a value
    born_ms: int  #: when the session of the youngest rank in it began


class Terminal(NamedTuple):
    """What a rank has printed, as it came."""

    timestamp_ms: int
    data: bytes


Record = Metrics | Params | Tags | End | Artifact | Reduce | Combined | Terminal | Call


class MetricsPacker:
    """Packs metrics; keeps the fixed part of each set of keys that it has seen.

    Args:
        prefix: stands before every key, such as "rank_3/".
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._layouts: dict[tuple[str, ...], tuple[struct.Struct, bytes]] = {}

    def pack(self, metrics: Mapping[str, Any], step: int, timestamp_ms: int) -> bytes:
        """Return the record of one call, all keys at one step.

        Args:
            metrics: 1 to METRICS_PER_RECORD_MAX values; anything with `__float__` or `.item()`.
            step: a signed 64-bit integer.

        Raises: TypeError, ValueError: a key, value or step that MLflow could never take, by name.
        """
        layout = self._layouts.get(tuple(metrics))
        if layout is None:
            layout = self._add_layout(tuple(metrics))
        form, fixed = layout
        try:
            return form.pack(_METRICS_HEAD, timestamp_ms, _INT64, step, fixed, *metrics.values())
        except (struct.error, OverflowError, TypeError):
            values = [to_float(key, value) for key, value in metrics.items()]
            return form.pack(_METRICS_HEAD, timestamp_ms, _INT64, to_step(step), fixed, *values)

    def pack_steps(
        self, metrics: Mapping[str, Any], steps: Sequence[int], timestamp_ms: int
    ) -> bytes:
        """Return the record of one call whose keys stand at steps of their own."""
        keys = [self._prefix + check_key("metric", key) for key in metrics]
        values = [to_float(key, value) for key, value in metrics.items()]
        return _packed(
            [METRICS, timestamp_ms, list(steps), keys, struct.pack(f">{len(keys)}d", *values)]
        )

    def _add_layout(self, keys: tuple[str, ...]) -> tuple[struct.Struct, bytes]:
        if len(self._layouts) >= _LAYOUTS_MAX:
            self._layouts.clear()
        names = [self._prefix + check_key("metric", key) for key in keys]
        fixed = msgpack.packb(names) + _bin_head(8 * len(names))
        form = struct.Struct(f">3sqBq{len(fixed)}s{len(names)}d")
        self._layouts[keys] = form, fixed
        return form, fixed


def pack_points(
    keys: Sequence[str], values: Sequence[float], steps: Sequence[int], timestamp_ms: int
) -> bytes:
    """Return the record of points of one time, whose keys may repeat; all must be checked."""
    packed = struct.pack(f">{len(values)}d", *values)
    return _packed([METRICS, timestamp_ms, list(steps), list(keys), packed])


def pack_params(items: Mapping[str, str], timestamp_ms: int) -> bytes:
    """Return the record of params; keys and values must have passed `check_key` and `to_text`."""
    return _packed([PARAMS, timestamp_ms, items])


def pack_tags(items: Mapping[str, str], timestamp_ms: int) -> bytes:
    """Return the record of tags; keys and values must have passed `check_key` and `to_text`."""
    return _packed([TAGS, timestamp_ms, items])


def pack_end(status: str, reason: str, timestamp_ms: int) -> bytes:
    """Return the record that ends a session's part of the run."""
    return _packed([END, timestamp_ms, status, reason])


def pack_reduce(how: str, metrics: Mapping[str, Any], step: Any, timestamp_ms: int) -> bytes:
    """Return the record of values that are to be combined with those of other ranks.

    Raises: TypeError, ValueError: a key, value, step or `how` that cannot be, by name.
    """
    if how not in REDUCTIONS:
        raise ValueError(f"reduce={short(how)}: one of {', '.join(REDUCTIONS)}")
    keys = [check_key("metric", key) for key in metrics]
    values = [to_float(key, value) for key, value in metrics.items()]
    packed = struct.pack(f">{len(keys)}d", *values)
    return _packed([REDUCE, timestamp_ms, to_step(step), how, keys, packed])


def pack_combined(points: Combined) -> bytes:
    """Return the record of points that a daemon has made."""
    packed: Any = struct.pack(f">{len(points.values)}d", *points.values)
    return _packed([COMBINED, *points._replace(values=packed)])


def pack_terminal(data: bytes, timestamp_ms: int) -> bytes:
    """Return the record of what was printed, at most TERMINAL_BYTES_MAX."""
    return _packed([TERMINAL, timestamp_ms, data])


def pack_call(name: str, body: bytes, timestamp_ms: int) -> bytes:
    """Return the record of a request of MLflow's API."""
    return _packed([CALL, timestamp_ms, name, body])


def pack_artifact(artifact: Artifact) -> bytes:
    """Return the record of an artifact; its path must have passed `check_artifact_path`."""
    return _packed([ARTIFACT, *artifact])


def unpack_record(record: bytes) -> Record:
    """Return the call that a record holds, every type checked.

    MLflow's server answers 200 and drops the rest of a body in which one field has a wrong type:
    nothing may pass here that is not what it says.

    Raises: FormatError: no record of this release.
    """
    metrics = _metrics_of_known_keys(record)
    if metrics is not None:
        return metrics
    try:
        found = _record_of(msgpack.unpackb(record))
    except FormatError:
        raise
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise FormatError(f"not a record: {error}") from error
    if isinstance(found, Metrics):
        _remember_keys(record, found.keys)
    return found


def _record_of(fields: Any) -> Record:
    match fields:
        case [kind, timestamp_ms, *rest]:
            _check_kind_and_time(kind, timestamp_ms)
        case _:
            raise FormatError("not a record: no kind and time")
    match rest:
        case [steps, [*keys], bytes(packed)] if kind == METRICS:
            values = struct.unpack(f">{len(packed) // 8}d", packed)
            step_list = [steps] * len(keys) if type(steps) is int else steps
            _check_metrics(keys, values, step_list)
            return Metrics(timestamp_ms, step_list, keys, values)
        case [{**items}] if kind in (PARAMS, TAGS):
            return (Params if kind == PARAMS else Tags)(timestamp_ms, _check_texts(items))
        case [str(status), str(reason)] if kind == END:
            if status not in (*END_STATUSES, GOES_ON):
                raise FormatError(f"a run cannot end {status!r}")
            return End(timestamp_ms, status, reason)
        case [_, _, _, _, _, _, _] if kind == ARTIFACT:
            return _checked_artifact(Artifact(timestamp_ms, *rest))
        case _ if kind in (REDUCE, COMBINED):
            return _checked_points((Reduce if kind == REDUCE else Combined)(timestamp_ms, *rest))
        case [bytes(data)] if kind == TERMINAL:
            return Terminal(timestamp_ms, data)
        case [str(name), bytes(body)] if kind == CALL:
            return Call(timestamp_ms, name, body)
    raise FormatError("a record of a kind that this release does not know")


def _metrics_of_known_keys(record: bytes) -> Metrics | None:
    """Return metrics whose keys were read and checked before; None: they were not.

    The packer's trick the other way round: it is the same bytes from call to call that are read
    only once. What is left, two int64 and float64s, cannot be of a wrong type.
    """
    known = _known_keys.get(_keys_place(record))
    if known is None:
        return None
    form, fixed, keys = known
    head, timestamp_ms, mark, step, found, *values = form.unpack(record)
    if (head, mark, found) != (_METRICS_HEAD, _INT64, fixed):
        return None
    return Metrics(timestamp_ms, [step] * len(keys), keys, values)


def _remember_keys(record: bytes, keys: Sequence[str]) -> None:
    """Keep what is between step and values of a record that was checked, if it is the packer's."""
    if record[:3] != _METRICS_HEAD or record[11] != _INT64:
        return
    if len(_known_keys) >= _LAYOUTS_MAX:
        _known_keys.clear()
    fixed = record[_KEYS_AT : len(record) - 8 * len(keys)]
    form = struct.Struct(f">3sqBq{len(fixed)}s{len(keys)}d")
    _known_keys[_keys_place(record)] = form, fixed, keys


def _keys_place(record: bytes) -> tuple[int, bytes]:
    """Return what tells sets of keys apart well enough to find the one that is compared whole."""
    return len(record), record[_KEYS_AT : _KEYS_AT + 40]


def _packed(fields: list[Any]) -> bytes:
    record: bytes = msgpack.packb(fields)
    return record


def _bin_head(size: int) -> bytes:
    """Return msgpack's header of `size` binary bytes."""
    if size < 1 << 8:
        return bytes((0xC4, size))
    if size < 1 << 16:
        return b"\xc5" + size.to_bytes(2, "big")
    return b"\xc6" + size.to_bytes(4, "big")


def _check_kind_and_time(kind: object, timestamp_ms: object) -> None:
    # `type` and not isinstance: True is no number here, as it is none for MLflow.
    if type(kind) is not int or type(timestamp_ms) is not int:
        raise FormatError("a kind or time that is no number")
    if not INT64_MIN <= timestamp_ms <= INT64_MAX:
        raise FormatError("a time beyond 64 bits")


def _check_metrics(keys: Sequence[Any], values: Sequence[float], steps: Any) -> None:
    if not isinstance(steps, list) or not len(keys) == len(values) == len(steps) > 0:
        raise FormatError("keys, steps and values differ in number")
    if len(keys) > METRICS_PER_RECORD_MAX:
        raise FormatError(f"{len(keys)} metrics in one record")
    if set(map(type, keys)) != {str} or set(map(type, steps)) != {int}:
        raise FormatError("a key that is no text, or a step that is no number")
    if not INT64_MIN <= min(steps) <= max(steps) <= INT64_MAX:
        raise FormatError("a step beyond 64 bits")


def _checked_points(points: Any) -> Reduce | Combined:
    """Return a Reduce or Combined with its values unpacked."""
    if points.how not in REDUCTIONS or type(points.values) is not bytes:
        raise FormatError("values that are to be combined nobody knows how")
    values = struct.unpack(f">{len(points.values) // 8}d", points.values)
    if type(points.keys) is not list:
        raise FormatError("keys that are no list")
    _check_metrics(points.keys, values, [points.step] * len(points.keys))
    checked: Reduce | Combined = points._replace(values=values)
    if isinstance(checked, Combined):
        numbers = (checked.missing, checked.born_ms)
        if type(checked.suffix) is not str or set(map(type, numbers)) != {int}:
            raise FormatError("a point with a field of a wrong type")
    return checked


def _checked_artifact(artifact: Artifact) -> Artifact:
    types = (int, str, str, str, bytes, int, int, bytes)
    if tuple(map(type, artifact)) != types or artifact.where not in (COPY, LINK, PLACE):
        raise FormatError("an artifact with a field of a wrong type")
    if not _ID.fullmatch(artifact.id) or artifact.size < 0:
        raise FormatError("an artifact with an id or size that cannot be")
    try:
        check_artifact_path(artifact.path)
    except ValueError as error:
        raise FormatError(str(error)) from None
    return artifact


def _check_texts(items: Mapping[Any, Any]) -> Mapping[str, str]:
    if set(map(type, items)) | set(map(type, items.values())) != {str}:
        raise FormatError("a key or value that is no text")
    if len(items) > TEXTS_PER_RECORD_MAX:
        raise FormatError(f"{len(items)} texts in one record")
    return items
