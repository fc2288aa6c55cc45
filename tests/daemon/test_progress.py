"""How far a run has come, in its tags: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import random

import pytest

from mlflow_relay_daemon.lane.progress import PARTS_MAX, TAG_CHARS_MAX, Progress


def many(keys: int) -> Progress:
    rng = random.Random(7)
    seen = {f"train/level_{rng.randrange(1 << 60):x}": rng.randrange(1 << 30) for _ in range(keys)}
    return Progress(seen, 1_795_000_000_000, ["FINISHED", 1_795_000_060_000], is_whole=False)


@pytest.mark.parametrize("keys", [0, 1, 5000])
def test_what_is_written_is_read_back(keys):
    progress = many(keys)
    tags = progress.tags("node7.ab12")
    assert all(len(value) <= TAG_CHARS_MAX for _, value in tags)
    assert all(key.startswith("relay.synced.node7.ab12") for key, _ in tags)
    assert Progress.read(dict(tags), "node7.ab12") == progress
    assert Progress.read(dict(tags), "node7") == Progress()


def test_parts_of_two_writers_are_not_taken_for_one():
    one, two = many(5000), many(5000)
    two.seen = {key: count + 1 for key, count in two.seen.items()}
    mixed = {**dict(one.tags("n")), **dict(two.tags("n")[2:])}
    assert Progress.read(mixed, "n") == Progress()


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "z", "z9999 1", "z1 x", "[2,{},0,null,true]", '{"a": 1}', "[1,[],0]"]
)
def test_what_is_damaged_or_of_a_later_release_counts_as_nothing(text):
    assert Progress.read({"relay.synced.n": text}, "n") == Progress()


def test_what_is_too_much_to_keep_is_not_kept():
    assert many(20_000 * PARTS_MAX // 10).tags("n") == []


def test_only_names_that_can_be_sessions_are_sessions():
    progress = Progress({"00" * 16: 7, "#texts": 1, "loss": 2, "0" * 31 + "g": 3})
    assert progress.sessions() == {bytes(16): 7}
