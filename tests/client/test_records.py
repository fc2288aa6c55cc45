"""Records: what a call says comes back as it was; what is no record never comes back as one."""

from __future__ import annotations

import math
import string
import struct
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from mlflow_relay import records
from mlflow_relay.errors import FormatError
from mlflow_relay.frames import RECORD_BYTES_MAX
from mlflow_relay.records import (
    END_STATUSES,
    METRICS,
    End,
    Metrics,
    MetricsPacker,
    Params,
    Record,
    Tags,
    pack_end,
    pack_params,
    pack_tags,
    unpack_record,
)
from mlflow_relay.values import (
    METRICS_PER_RECORD_MAX,
    check_key,
    chunks,
    to_float,
    to_step,
    to_text,
)

KEYS = st.text(min_size=1, max_size=20)
TEXTS = st.dictionaries(KEYS, st.text(max_size=20), min_size=1, max_size=5)
STEPS = st.integers(-(1 << 63), (1 << 63) - 1)
TIMES_MS = st.integers(0, 1 << 45)
NOW_MS = 1_795_412_345_678


class OnlyItem:
    """A scalar as some array libraries make them: no `__float__`, but `.item()`."""

    def __init__(self, value: float) -> None:
        self._value = value

    def item(self) -> float:
        return self._value


class OnlyIndex:
    """A whole number of somebody else's: no `__float__`, but `__index__`."""

    def __index__(self) -> int:
        return 7

    def __repr__(self) -> str:  # the name of a test must be the same in every process
        return "OnlyIndex()"


class Broken:
    """Raises whatever is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("on another device")

    def __repr__(self) -> str:
        raise RuntimeError("on another device")


def same_floats(found: Any, expected: Any) -> bool:
    """Compare bit by bit: NaN equals NaN, and -0.0 is not 0.0."""
    pack = struct.Struct(f">{len(expected)}d").pack
    return len(found) == len(expected) and pack(*found) == pack(*expected)


# ── metrics ──


@pytest.mark.parametrize("prefix", ["", "rank_3/", "rang_ü/"])
def test_msgpack_reads_what_the_handwritten_packing_wrote_for_every_number_of_keys(prefix):
    packer = MetricsPacker(prefix)
    for count in range(1, METRICS_PER_RECORD_MAX + 1):
        metrics = {f"train/loss_{index}": index / 7 for index in range(count)}

        packed = packer.pack(metrics, step=count - 500, timestamp_ms=NOW_MS)

        values = struct.pack(f">{count}d", *metrics.values())
        keys = [prefix + key for key in metrics]
        assert msgpack.unpackb(packed) == [METRICS, NOW_MS, count - 500, keys, values]


@given(
    metrics=st.dictionaries(KEYS, st.floats(), min_size=1, max_size=40),
    step=STEPS,
    time_ms=TIMES_MS,
    prefix=st.text(max_size=5),
)
def test_metrics_come_back_bit_by_bit(metrics, step, time_ms, prefix):
    found = unpack_record(MetricsPacker(prefix).pack(metrics, step, time_ms))

    assert isinstance(found, Metrics)
    assert found.timestamp_ms == time_ms
    assert list(found.keys) == [prefix + key for key in metrics]
    assert list(found.steps) == [step] * len(metrics)
    assert same_floats(found.values, list(metrics.values()))


@given(
    metrics=st.dictionaries(KEYS, st.floats(), min_size=1, max_size=40),
    time_ms=TIMES_MS,
    data=st.data(),
)
def test_steps_of_their_own_come_back_with_their_keys(metrics, time_ms, data):
    steps = data.draw(st.lists(STEPS, min_size=len(metrics), max_size=len(metrics)))

    found = unpack_record(MetricsPacker("p/").pack_steps(metrics, steps, time_ms))

    assert isinstance(found, Metrics)
    assert (found.timestamp_ms, list(found.steps)) == (time_ms, steps)
    assert list(found.keys) == ["p/" + key for key in metrics]
    assert same_floats(found.values, list(metrics.values()))


NUMBERS = {
    "int": (3, 3.0),
    "large int": (10**300, 1e300),
    "bool": (True, 1.0),
    "negative zero": (-0.0, -0.0),
    "nan": (math.nan, math.nan),
    "inf": (-math.inf, -math.inf),
    "numpy float16": (np.float16(1.5), 1.5),
    "numpy float32": (np.float32(0.1), float(np.float32(0.1))),
    "numpy float64": (np.float64(0.1), 0.1),
    "numpy longdouble": (np.longdouble(0.5), 0.5),
    "numpy int8": (np.int8(-3), -3.0),
    "numpy uint64": (np.uint64(2**63), 2.0**63),
    "numpy bool": (np.bool_(1), 1.0),
    "numpy array without dimensions": (np.array(2.5), 2.5),
    "only item": (OnlyItem(2.5), 2.5),
    "only item, numpy inside": (OnlyItem(np.float32(2.5)), 2.5),
    "only index": (OnlyIndex(), 7.0),
    "fraction": (Fraction(1, 4), 0.25),
    "decimal": (Decimal("0.25"), 0.25),
    "decimal nan": (Decimal("nan"), math.nan),
}


@pytest.mark.parametrize(("value", "expected"), NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("with_step", [True, False])
def test_every_kind_of_number_becomes_the_float64_that_float_makes_of_it(
    value, expected, with_step
):
    packer = MetricsPacker()
    metrics = {"before": 1.0, "it": value, "behind": OnlyItem(3.0)}
    packed = (
        packer.pack(metrics, 5, NOW_MS)
        if with_step
        else packer.pack_steps(metrics, [5, 5, 5], NOW_MS)
    )

    found = unpack_record(packed)

    assert isinstance(found, Metrics)
    assert same_floats(found.values, [1.0, expected, 3.0])


NO_NUMBERS = {
    "text": ("0.5", TypeError, "'0.5' (str)"),
    "bytes": (b"0.5", TypeError, "b'0.5' (bytes)"),
    "None": (None, TypeError, "None (NoneType)"),
    "complex": (1j, TypeError, "1j (complex)"),
    "list": ([1.0], TypeError, "[1.0] (list)"),
    "array of two": (np.array([1.0, 2.0]), TypeError, "(ndarray)"),
    "raises": (Broken(), TypeError, "<Broken> (Broken)"),
    "item raises": (OnlyItem(math.nan).item, TypeError, "(method)"),
    "beyond float64": (10**400, ValueError, "100000"),
    "endless repr": ("x" * 1000, TypeError, "xxx... (str)"),
}


@pytest.mark.parametrize(("value", "error", "shown"), NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("with_step", [True, False])
def test_what_is_no_number_is_refused_by_key_and_value(value, error, shown, with_step):
    packer = MetricsPacker("rank_3/")
    metrics = {"fine": 1.0, "guilty": value}
    with pytest.raises(error) as refusal:
        if with_step:
            packer.pack(metrics, 5, NOW_MS)
        else:
            packer.pack_steps(metrics, [5, 5], NOW_MS)

    text = str(refusal.value)
    assert "'guilty'" in text
    assert shown in text
    assert "fine" not in text
    assert len(text) < 200
    assert packer.pack({"fine": 1.0, "guilty": 2.0}, 5, NOW_MS)  # the packer is as good as before


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (7, 7),
        (-(1 << 63), -(1 << 63)),
        ((1 << 63) - 1, (1 << 63) - 1),
        (True, 1),
        (3.0, 3),
        (np.int32(3), 3),
        (np.float64(3.0), 3),
        (np.array(3), 3),
        (np.array(3.0), 3),
        (Fraction(6, 2), 3),
        (Decimal(3), 3),
        (OnlyIndex(), 7),
    ],
    ids=repr,
)
def test_a_step_is_any_whole_number_of_64_bits(step, expected):
    found = unpack_record(MetricsPacker().pack({"a": 1.0}, step, NOW_MS))

    assert isinstance(found, Metrics)
    assert list(found.steps) == [expected]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("3", TypeError),
        (1.5, TypeError),
        (math.nan, TypeError),
        (math.inf, TypeError),
        (1j, TypeError),
        ([3], TypeError),
        (np.array([3, 4]), TypeError),
        (1 << 63, ValueError),
        (-(1 << 63) - 1, ValueError),
        (1e300, ValueError),
    ],
    ids=repr,
)
def test_a_step_that_is_none_is_refused_by_name(step, error):
    with pytest.raises(error, match=r"^step .*(is no whole number|does not fit into 64 bits)$"):
        MetricsPacker().pack({"a": 1.0}, step, NOW_MS)
    with pytest.raises(error, match="^step "):
        to_step(step)


@pytest.mark.parametrize(
    ("key", "error", "shown"),
    [
        ("", ValueError, "metric key is empty"),
        (5, TypeError, "metric key 5 is a int"),
        (None, TypeError, "metric key None"),
        (b"loss", TypeError, "metric key b'loss'"),
        ("lo\ud800ss", ValueError, "lone surrogate at position 2"),
    ],
)
def test_a_key_that_mlflow_could_never_take_is_refused_by_name(key, error, shown):
    packer = MetricsPacker("rank_1/")
    for pack in (packer.pack, packer.pack_steps):
        with pytest.raises(error) as refusal:
            pack({key: 1.0}, 5 if pack == packer.pack else [5], NOW_MS)  # type: ignore[arg-type]
        assert shown in str(refusal.value)


def test_keys_made_up_at_every_call_do_not_fill_the_memory():
    packer = MetricsPacker()
    for index in range(5000):
        packer.pack({f"key_{index}": 1.0}, index, NOW_MS)
        assert len(packer._layouts) <= 1024

    assert unpack_record(packer.pack({"key_0": 1.0}, 1, NOW_MS)).keys == ["key_0"]  # type: ignore[union-attr]


# ── texts and the end ──


@given(items=TEXTS, time_ms=TIMES_MS)
def test_params_and_tags_come_back(items, time_ms):
    assert unpack_record(pack_params(items, time_ms)) == Params(time_ms, items)
    assert unpack_record(pack_tags(items, time_ms)) == Tags(time_ms, items)


@given(status=st.sampled_from(END_STATUSES), reason=st.text(), time_ms=TIMES_MS)
def test_the_end_comes_back(status, reason, time_ms):
    assert unpack_record(pack_end(status, reason, time_ms)) == End(time_ms, status, reason)


def test_texts_are_what_str_says_and_what_can_be_kept():
    assert to_text("param", "lr", 0.1) == "0.1"
    assert to_text("param", "empty", "") == ""
    assert to_text("param", "ü", None) == "None"
    largest = RECORD_BYTES_MAX // 8
    assert to_text("param", "k", "x" * largest) == "x" * largest
    with pytest.raises(ValueError, match=rf"^param 'k': its value has {largest + 1} characters"):
        to_text("param", "k", "x" * (largest + 1))
    with pytest.raises(ValueError, match="^tag 'k': its value .*lone surrogate at position 1"):
        to_text("tag", "k", "a\udfffb")
    with pytest.raises(TypeError, match="^tag key 5 "):
        check_key("tag", 5)


def test_chunks_keep_all_in_order():
    items = {f"k{index}": index for index in range(250)}

    parts = list(chunks(items, 100))

    assert [len(part) for part in parts] == [100, 100, 50]
    assert [pair for part in parts for pair in part.items()] == list(items.items())


def test_a_number_is_told_without_a_packer():
    assert to_float("k", OnlyItem(2.5)) == 2.5
    with pytest.raises(TypeError, match="^metric 'k': 'x'"):
        to_float("k", "x")


# ── bytes that are no record ──


def assert_is_what_it_says(record: Record) -> None:
    """MLflow's server answers 200 and drops the rest of a body in which one type is wrong."""
    assert type(record.timestamp_ms) is int
    assert -(1 << 63) <= record.timestamp_ms < 1 << 63
    match record:
        case Metrics(_, steps, keys, values):
            assert len(steps) == len(keys) == len(values) >= 1
            assert {type(key) for key in keys} == {str}
            assert {type(step) for step in steps} == {int}
            assert {type(value) for value in values} == {float}
            assert all(-(1 << 63) <= step < 1 << 63 for step in steps)
        case Params(_, items) | Tags(_, items):
            assert items
            assert {type(text) for pair in items.items() for text in pair} == {str}
        case End(_, status, reason):
            assert status in END_STATUSES
            assert type(reason) is str


def unpack_or_refuse(data: bytes) -> None:
    try:
        record = unpack_record(data)
    except FormatError:
        return
    assert_is_what_it_says(record)


SAMPLES = {
    "metrics": MetricsPacker("r/").pack({"a": 1.0, "b": 0.0}, 5, NOW_MS),
    "metrics with steps": MetricsPacker().pack_steps({"a": 1.0, "b": math.nan}, [1, 2], NOW_MS),
    "params": pack_params({"lr": "0.1", "ü": ""}, NOW_MS),
    "tags": pack_tags({"team": "ens"}, NOW_MS),
    "end": pack_end("FAILED", "ValueError: no", NOW_MS),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_a_damaged_record_is_a_record_of_the_right_types_or_a_format_error(sample):
    for at in range(len(sample)):
        for value in range(256):
            unpack_or_refuse(sample[:at] + bytes((value,)) + sample[at + 1 :])


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_what_keys_that_were_met_before_stand_in_is_read_as_if_they_were_new(sample):
    def read(data: bytes) -> tuple[type, Any]:
        try:
            record = unpack_record(data)
        except FormatError as error:
            return FormatError, str(error)
        return type(record), [
            list(field) if isinstance(field, tuple) else field for field in record
        ]

    for at in range(len(sample)):
        for value in (0, 1, 0x7F, 0x80, 0xC4, 0xD3, 0xFF, sample[at] ^ 1):
            data = sample[:at] + bytes((value,)) + sample[at + 1 :]
            records._known_keys.clear()
            expected = read(data)
            unpack_record(sample)

            assert repr(read(data)) == repr(expected)  # repr: NaN is no NaN


def test_keys_made_up_at_every_call_do_not_fill_the_reader_s_memory():
    packer = MetricsPacker()
    for index in range(3 * records._LAYOUTS_MAX):
        assert unpack_record(packer.pack({f"key_{index}": 1.0}, index, NOW_MS)).steps == [index]  # type: ignore[union-attr]
    assert len(records._known_keys) <= records._LAYOUTS_MAX


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_a_truncated_or_longer_record_is_a_format_error(sample):
    for end in range(len(sample)):
        with pytest.raises(FormatError):
            unpack_record(sample[:end])
    with pytest.raises(FormatError):
        unpack_record(sample + b"\0")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=24)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(-9, 9), inner)
    ),
    max_leaves=8,
)


@given(data=st.binary(max_size=64))
def test_random_bytes_are_no_record(data):
    unpack_or_refuse(data)


@given(
    kind=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, True, 1.0]),
    time=SCALARS,
    rest=st.lists(VALUES, max_size=4),
)
def test_a_message_that_only_looks_like_a_record_is_a_format_error(kind, time, rest):
    try:
        packed = msgpack.packb([kind, time, *rest])
    except OverflowError:  # a number that msgpack has no bytes for
        reject()
    unpack_or_refuse(packed)


@pytest.mark.parametrize(
    "fields",
    [
        [True, NOW_MS, 1, ["a"], bytes(8)],
        [1, True, 1, ["a"], bytes(8)],
        [1, 1 << 63, 1, ["a"], bytes(8)],
        [1, NOW_MS, 1 << 63, ["a"], bytes(8)],
        [1, NOW_MS, True, ["a"], bytes(8)],
        [1, NOW_MS, 1.0, ["a"], bytes(8)],
        [1, NOW_MS, [1, True], ["a", "b"], bytes(16)],
        [1, NOW_MS, [1], ["a", "b"], bytes(16)],
        [1, NOW_MS, 1, ["a", b"b"], bytes(16)],
        [1, NOW_MS, 1, ["a", "b"], bytes(8)],
        [1, NOW_MS, 1, ["a"], bytes(9)],
        [1, NOW_MS, 1, [], b""],
        [1, NOW_MS, 1, ["k"] * 1001, bytes(8 * 1001)],
        [2, NOW_MS, {}],
        [2, NOW_MS, {"k": 5}],
        [2, NOW_MS, {"k": None}],
        [2, True, {"k": "v"}],
        [2, NOW_MS, {f"k{index}": "v" for index in range(101)}],
        [3, NOW_MS, {"k": b"v"}],
        [3, 1 << 63, {"k": "v"}],
        [4, NOW_MS, "SCHEDULED", ""],
        [4, NOW_MS, "FINISHED", None],
        [4, True, "FINISHED", ""],
        [5, NOW_MS, {}],
        [6, NOW_MS, 1, "median", ["a"], bytes(8)],
        [8, NOW_MS, "text"],
        [8, True, b"bytes"],
        [6, NOW_MS, 1.0, "mean", ["a"], bytes(8)],
        [6, NOW_MS, 1, "mean", "a", bytes(8)],
        [6, NOW_MS, 1, "mean", ["a"], [1.0]],
        [6, NOW_MS, 1, "mean", ["a", "b"], bytes(8)],
        [7, NOW_MS, 1, "mean", None, ["a"], bytes(8), 0, 0],
        [7, NOW_MS, 1, "mean", "", ["a"], bytes(8), True, 0],
        [7, NOW_MS, 1, "mean", "", ["a"], bytes(8)],
        [1],
        [],
        {},
        None,
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_nothing_passes_that_mlflow_would_take_for_something_else(fields):
    with pytest.raises(FormatError):
        unpack_record(msgpack.packb(fields))


def test_deep_nesting_is_a_format_error():
    with pytest.raises(FormatError):
        unpack_record(b"\x91" * 100_000)


def test_long_names_are_no_trouble_for_the_packer():
    keys = [letter * 1000 for letter in string.ascii_letters]

    found = unpack_record(MetricsPacker().pack(dict.fromkeys(keys, 1.0), 1, NOW_MS))

    assert isinstance(found, Metrics)
    assert list(found.keys) == keys
