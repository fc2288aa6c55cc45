"""Batches: within MLflow's limits, nothing lost, nothing in another order, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_relay.records import End, Metrics, Params, Record, Tags
from mlflow_relay_daemon.batch import (
    BODY_BYTES_MAX,
    ENTITIES_MAX,
    METRICS_MAX,
    PARAM_CHARS_MAX,
    PARAMS_MAX,
    TAG_CHARS_MAX,
    TAGS_MAX,
    Batch,
    Entry,
    split,
)
from tests.support.spools import SESSION, START_MS

KEYS = st.sampled_from([f"k{index}" for index in range(150)])
TEXT_ITEMS = st.dictionaries(KEYS, st.sampled_from(["a", "b", ""]), min_size=1, max_size=100)
METRICS = st.integers(1, 1000).map(
    lambda count: Metrics(
        START_MS, list(range(count)), [f"m{n}" for n in range(count)], [float(count)] * count
    )
)
RECORDS = st.lists(
    st.one_of(
        METRICS,
        TEXT_ITEMS.map(lambda items: Params(START_MS, items)),
        TEXT_ITEMS.map(lambda items: Tags(START_MS, items)),
        st.just(End(START_MS, "FINISHED", "")),
    ),
    max_size=12,
)


def batches_of(records: Iterable[Record]) -> list[Batch]:
    """Fill batches as a lane does."""
    known: dict[str, str] = {}
    batches = [Batch()]
    for record in records:
        if not batches[-1].has_room_for(record):
            known |= batches[-1].params
            batches.append(Batch())
        batches[-1].add(SESSION, record, known)
    return batches


def body_bytes(batch: Batch) -> int:
    """Return the size of the request, as JSON."""
    return len(
        json.dumps(
            {
                "metrics": [
                    dict(zip(("key", "value", "timestamp", "step"), each, strict=True))
                    for each in batch.metrics
                ],
                "params": [{"key": key, "value": value} for key, value in batch.params.items()],
                "tags": [{"key": key, "value": value} for key, value in batch.tags.items()],
            },
            ensure_ascii=False,
        ).encode()
    )


@settings(deadline=None)
@given(records=RECORDS)
def test_every_batch_is_within_the_limits_and_nothing_is_lost_or_reordered(records):
    batches = batches_of(records)

    for batch in batches:
        assert len(batch.metrics) <= METRICS_MAX
        assert len(batch.params) <= PARAMS_MAX
        assert len(batch.tags) <= TAGS_MAX
        assert len(batch.metrics) + len(batch.params) + len(batch.tags) <= ENTITIES_MAX
    assert [metric for batch in batches for metric in batch.metrics] == [
        (key, value, record.timestamp_ms, step)
        for record in records
        if isinstance(record, Metrics)
        for key, value, step in zip(record.keys, record.values, record.steps, strict=True)
    ]
    tags: dict[str, str] = {}
    last_tags: dict[str, str] = {}
    for batch in batches:
        tags.update(batch.tags)
    first_params: dict[str, str] = {}
    refused: list[tuple[str, str]] = []
    for record in records:
        if isinstance(record, Tags):
            last_tags.update(record.items)
        if isinstance(record, Params):
            for key, value in record.items.items():
                if first_params.setdefault(key, value) != value:
                    refused.append((key, value))
    assert tags == last_tags
    delivered = [pair for batch in batches for pair in batch.params.items()]
    assert dict(delivered) == first_params
    assert len(delivered) == len(first_params), "a param went twice"
    objections = [each.entry for batch in batches for each in batch.objections]
    assert [(entry.key, entry.value) for entry in objections] == refused
    ends = [end for batch in batches for _, end in batch.ends]
    assert ends == [record for record in records if isinstance(record, End)]


@pytest.mark.parametrize("letter", ["x", "ü", "\U0001f9ea", '"', "\n"], ids=ascii)
@pytest.mark.parametrize("size", [10, 250, 1000])
def test_no_body_is_larger_than_mlflow_asks_for(letter, size):
    """Unless one record alone is: it cannot be split without changing what the rank has said."""
    records: list[Record] = []
    for number in range(30):
        names = [f"{number}_{index:03}{letter * (size - 8)}" for index in range(40)]
        records.append(Metrics(START_MS, [1 << 60] * 40, names, [-1 / 3e100] * 40))
        records.append(Tags(START_MS, dict.fromkeys(names, letter * 5 * size)))
        records.append(Params(START_MS, dict.fromkeys(names, letter * 5 * size)))
    batches = [Batch()]
    counts = [0]
    for record in records:
        if not batches[-1].has_room_for(record):
            batches.append(Batch())
            counts.append(0)
        batches[-1].add(SESSION, record, {})
        counts[-1] += 1

    sizes = [body_bytes(batch) for batch, count in zip(batches, counts, strict=True) if count > 1]
    assert max(sizes, default=0) <= BODY_BYTES_MAX
    assert size == 1000 or sizes


def test_a_thousand_metrics_fill_a_batch_and_no_more():
    batch = Batch()
    metrics = Metrics(START_MS, [1] * 999, [f"m{n}" for n in range(999)], [1.0] * 999)
    batch.add(SESSION, metrics, {})

    assert batch.has_room_for(Metrics(START_MS, [1], ["m"], [1.0]))
    assert batch.has_room_for(Tags(START_MS, {"t": "v"}))
    assert not batch.has_room_for(Tags(START_MS, {"t": "v", "u": "v"}))
    assert not batch.has_room_for(Metrics(START_MS, [1, 2], ["m", "n"], [1.0, 1.0]))
    assert batch.has_room_for(End(START_MS, "FINISHED", ""))


def test_an_empty_batch_has_room_for_whatever_comes():
    large = Metrics(START_MS, [1] * 1000, [f"{n}" * 200 for n in range(1000)], [1.0] * 1000)

    assert Batch().has_room_for(large)


def test_an_equal_param_goes_once_and_another_value_is_an_objection():
    batch = Batch()
    batch.add(SESSION, Params(START_MS, {"lr": "1"}), {})
    batch.add(SESSION, Params(START_MS + 1, {"lr": "1"}), {})
    batch.add(SESSION, Params(START_MS + 2, {"lr": "2"}), {})

    assert batch.params == {"lr": "1"}
    (objection,) = batch.objections
    assert objection.entry == Entry("param", "lr", "2", START_MS + 2, None)
    assert "'1'" in objection.reason


def test_a_param_that_the_run_has_is_not_sent_again():
    batch = Batch()
    batch.add(SESSION, Params(START_MS, {"lr": "1", "epochs": "5"}), {"lr": "1", "epochs": "6"})

    assert batch.params == {}
    assert batch.is_empty
    assert [each.entry.key for each in batch.objections] == ["epochs"]


@pytest.mark.parametrize("empty", ["", "0"])
def test_an_empty_value_is_a_value(empty):
    batch = Batch()
    batch.add(SESSION, Params(START_MS, {"p": empty}), {})
    batch.add(SESSION, Params(START_MS, {"p": "other"}), {})

    assert batch.params == {"p": empty}
    assert len(batch.objections) == 1


@pytest.mark.parametrize(("kind", "chars_max"), [(Params, PARAM_CHARS_MAX), (Tags, TAG_CHARS_MAX)])
def test_a_text_that_mlflow_would_cut_in_silence_is_cut_and_kept_whole_beside(kind, chars_max):
    batch = Batch()
    whole = "ü" * (chars_max + 1)
    batch.add(SESSION, kind(START_MS, {"k": whole, "fits": "x" * chars_max}), {})

    items = batch.params if kind is Params else batch.tags
    assert items == {"k": "ü" * chars_max, "fits": "x" * chars_max}
    (objection,) = batch.objections
    assert objection.entry.value == whole
    assert str(chars_max) in objection.reason


def test_a_long_param_that_comes_again_is_the_same_param():
    batch = Batch()
    for _ in range(2):
        batch.add(SESSION, Params(START_MS, {"k": "x" * 7000}), {})
    again = Batch()
    again.add(SESSION, Params(START_MS, {"k": "x" * 7000}), batch.params)

    assert len(batch.objections) == 1
    assert again.objections == []


def test_entries_come_apart_and_together_again():
    batch = Batch()
    batch.add(SESSION, Metrics(START_MS, [1, 2], ["a", "b"], [0.5, 1.5]), {})
    batch.add(SESSION, Params(START_MS + 1, {"p": "v"}), {})
    batch.add(SESSION, Tags(START_MS + 2, {"t": "v"}), {})

    entries = batch.entries()

    assert split(entries) == (batch.metrics, [("p", "v")], [("t", "v")])
    assert [entry.timestamp_ms - START_MS for entry in entries] == [0, 0, 1, 2]


def test_what_is_refused_is_taken_out_and_nothing_else():
    batch = Batch()
    nan = float("nan")
    batch.add(SESSION, Metrics(START_MS, [1, 2, 3], ["a", "a", "b"], [nan, 1.0, nan]), {})
    batch.add(SESSION, Params(START_MS, {"p": "v", "q": "v"}), {})
    batch.add(SESSION, Tags(START_MS, {"p": "v"}), {})
    from mlflow_relay_daemon.batch import Objection

    guilty = [
        Objection(entry, "no")
        for entry in batch.entries()
        if (entry.kind, entry.key, entry.step) in {("metric", "a", 1), ("param", "p", None)}
    ]
    batch.refuse(guilty)

    assert [(key, step) for key, _, _, step in batch.metrics] == [("a", 2), ("b", 3)]
    assert batch.params == {"q": "v"}
    assert batch.tags == {"p": "v"}
    assert batch.objections == guilty
