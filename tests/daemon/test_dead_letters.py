"""Dead letters: kept with their reason, on the disk at once, until somebody decides."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.dead_letters import NAME, DeadLetters
from tests.support.spools import START_MS, FailingDisk

NOW_MS = START_MS + 5
TIMES = st.integers(0, 1 << 62)
ENTRIES = st.one_of(
    st.builds(Entry, st.just("metric"), st.text(), st.floats(), TIMES, st.integers()),
    st.builds(Entry, st.sampled_from(["param", "tag"]), st.text(), st.text(), TIMES, st.none()),
)
OBJECTIONS = st.builds(Objection, ENTRIES, st.text(), st.text(max_size=30))


def objection(key: str, step: int = 0) -> Objection:
    return Objection(Entry("metric", key, 0.5, START_MS, step), f"{key} is no name", "INVALID")


def same(found: Entry, expected: Entry) -> bool:
    if isinstance(expected.value, float) and math.isnan(expected.value):
        return math.isnan(float(found.value)) and found._replace(value=0) == expected._replace(
            value=0
        )
    return found == expected


def test_a_file_whose_first_fsync_failed_has_a_name_before_the_next_daemon_says_so(tmp_path):
    disk = FailingDisk()
    disk.fail("sync", NAME)
    with pytest.raises(OSError):
        DeadLetters(disk, tmp_path).add([objection("a@b")], NOW_MS)
    DeadLetters(disk, tmp_path).add([objection("a@b")], NOW_MS)

    assert disk.count("sync_folder", tmp_path.name) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(objections=st.lists(OBJECTIONS, min_size=1, max_size=5))
def test_what_was_refused_comes_back_with_its_reason(tmp_path, objections):
    (tmp_path / NAME).unlink(missing_ok=True)
    DeadLetters(FailingDisk(), tmp_path).add(objections, NOW_MS)
    letters = DeadLetters(FailingDisk(), tmp_path)

    found = letters.list()
    assert letters.count == len(objections)
    assert [letter.id for letter in found] == list(range(1, len(objections) + 1))
    for letter, expected in zip(found, objections, strict=True):
        assert same(letter.entry(), expected.entry)
        assert (letter.reason, letter.error_code) == (expected.reason, expected.error_code)
        assert letter.refused_ms == NOW_MS


def test_every_line_is_json_that_other_tools_can_read(tmp_path):
    letters = DeadLetters(FailingDisk(), tmp_path)
    letters.add([Objection(Entry("metric", "a\nb", math.nan, START_MS, 1), "two\nlines")], NOW_MS)

    lines = [line for line in (tmp_path / NAME).read_text().splitlines() if line]
    assert len(lines) == 1

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(lines[0], parse_constant=no_constant)["value"] == "nan"


def test_nothing_refused_makes_no_file(tmp_path):
    disk = FailingDisk()
    DeadLetters(disk, tmp_path).add([], NOW_MS)

    assert list(tmp_path.iterdir()) == []
    assert disk.asked == []


def test_letters_are_on_the_disk_when_they_are_added(tmp_path):
    disk = FailingDisk()
    letters = DeadLetters(disk, tmp_path)
    letters.add([objection("a")], NOW_MS)
    assert [each for each, *_ in disk.asked] == ["create", "write", "sync", "sync_folder"]
    disk.asked.clear()

    letters.add([objection("b")], NOW_MS)
    assert [each for each, *_ in disk.asked] == ["open", "write", "sync"]


@pytest.mark.parametrize("operation", ["create", "open", "write", "sync", "sync_folder"])
@pytest.mark.parametrize("written", [None, 1, 40])
def test_what_could_not_be_kept_is_said_and_kept_the_next_time_once(tmp_path, operation, written):
    disk = FailingDisk()
    letters = DeadLetters(disk, tmp_path)
    if operation == "open":
        letters.add([objection("before")], NOW_MS)
    disk.fail(operation, written=written)
    with pytest.raises(OSError, match="Input/output"):
        letters.add([objection("a")], NOW_MS)
    disk.mend()
    letters.add([objection("a")], NOW_MS)
    letters.add([objection("b")], NOW_MS)

    for each in (letters, DeadLetters(disk, tmp_path)):
        keys = [letter.key for letter in each.list() if letter.key != "before"]
        assert keys == ["a", "b"]
        assert each.count == len(each.list())
        assert len({letter.id for letter in each.list()}) == each.count


def test_a_file_whose_name_could_not_be_synced_is_synced_the_next_time(tmp_path):
    """Else a power failure would take letters whose records are settled."""
    disk = FailingDisk()
    letters = DeadLetters(disk, tmp_path)
    disk.fail("sync_folder")
    with pytest.raises(OSError, match="Input/output"):
        letters.add([objection("a")], NOW_MS)
    disk.asked.clear()
    letters.add([objection("a")], NOW_MS)

    assert disk.count("sync_folder") == 1


def test_some_are_removed_and_numbers_never_come_again(tmp_path):
    letters = DeadLetters(FailingDisk(), tmp_path)
    letters.add([objection("abcd"[number], number) for number in range(4)], NOW_MS)

    assert letters.remove({2, 4, 99}) == 2
    letters.add([objection("e")], NOW_MS)

    assert [(letter.id, letter.key) for letter in letters.list()] == [(1, "a"), (3, "c"), (5, "e")]
    assert letters.count == 3


@pytest.mark.parametrize("operation", ["write", "sync", "rename"])
def test_a_removal_that_fails_removes_nothing(tmp_path, operation):
    disk = FailingDisk()
    letters = DeadLetters(disk, tmp_path)
    letters.add([objection("a"), objection("b")], NOW_MS)
    disk.fail(operation)
    with pytest.raises(OSError, match="Input/output"):
        letters.remove({1})

    assert [letter.key for letter in letters.list()] == ["a", "b"]
    assert letters.count == 2


def damaged_files(path: Path) -> list[bytes]:
    data = path.read_bytes()
    found = [data[:end] for end in range(0, len(data), 3)]
    for at in range(len(data)):
        for flip in (0x02, 0xFF):
            flipped = bytearray(data)
            flipped[at] ^= flip
            found.append(bytes(flipped))
    return found


def test_damage_stops_nobody_and_costs_the_lines_that_it_hit(tmp_path):
    letters = DeadLetters(FailingDisk(), tmp_path)
    letters.add([objection("a"), objection("b"), objection("c")], NOW_MS)
    path = tmp_path / NAME
    size = len(path.read_bytes())
    for data in damaged_files(path):
        path.write_bytes(data)

        found = DeadLetters(FailingDisk(), tmp_path)

        assert found.count == len(found.list())
        if len(data) == size:
            assert found.count >= 1
        found.add([objection("d")], NOW_MS)
        assert found.list()[-1].key == "d"


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "x"}',
        b"[" * 100_000,
        b"null",
        b'{"id": 1, "kind": "metric"}',
        (
            b'{"id": null, "kind": "metric", "key": "a", "value": 1, "timestamp_ms": 1, "step": 1, '
            b'"reason": "r", "error_code": "", "refused_ms": 1}'
        ),
        b"\xff\xfe\x00",
    ],
    ids=lambda line: str(line[:20]),
)
def test_a_line_that_is_no_letter_is_passed_over(tmp_path, line):
    letters = DeadLetters(FailingDisk(), tmp_path)
    letters.add([objection("a")], NOW_MS)
    path = tmp_path / NAME
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")

    found = DeadLetters(FailingDisk(), tmp_path)
    assert [letter.key for letter in found.list()] == ["a"]
    found.add([objection("b")], NOW_MS)
    assert [letter.key for letter in found.list()] == ["a", "b"]


def test_threads_that_add_and_remove_lose_nothing(tmp_path):
    letters = DeadLetters(FailingDisk(), tmp_path)

    def add(name: str) -> None:
        for step in range(50):
            letters.add([objection(name, step)], NOW_MS)

    def remove() -> None:
        for _ in range(50):
            letters.remove({letter.id for letter in letters.list() if letter.key == "a"})

    threads = [
        threading.Thread(target=add, args=("a",)),
        threading.Thread(target=add, args=("b",)),
        threading.Thread(target=remove),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    letters.remove({letter.id for letter in letters.list() if letter.key == "a"})

    assert [letter.step for letter in letters.list()] == list(range(50))
    assert letters.count == 50
