"""The ledger: what was accepted is known for ever, once, and survives whatever tears its file."""

from __future__ import annotations

import errno
import json
import random

import pytest

from mlflow_relay.records import COPY, PLACE, Artifact
from mlflow_relay_daemon.spool import ledger as ledgers
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.ledger import REFUSED, REPLACED, UPLOADED, End, Ledger
from tests.support.seeds import new_seed


def an_artifact(number: int, path: str = "", where: str = COPY) -> Artifact:
    file = b"/staging/\xff" + str(number).encode()
    return Artifact(1, path or f"{number}", f"{number:032x}", where, file, number, 7, b"d" * 16)


def paths(ledger: Ledger) -> list[str]:
    return [artifact.path for _, artifact in ledger.waiting_from(0, 1 << 20)]


class FullDisk(Disk):
    """Fails at the sync, as often as told."""

    failures = 0

    def sync(self, fd: int) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "full")
        super().sync(fd)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_what_was_accepted_and_how_it_ended_is_known_after_a_restart(folder):
    ledger = Ledger(Disk(), folder)
    ledger.accept([an_artifact(index) for index in range(4)])
    ledger.accept([an_artifact(4, where=PLACE)])
    ledger.settle([End(0, UPLOADED, "ab"), End(1, REFUSED), End(2, REPLACED)])
    for each in (ledger, Ledger(Disk(), folder)):
        assert paths(each) == ["3", "4"]
        assert each.status() == {
            "accepted": 5, "settled_to": 3, "waiting": 2, "waiting_bytes": 7, "uploaded": 1,
            "uploaded_bytes": 0, "replaced": 1, "refused": 1, **ledgers.NOT_UPLOADING,
        }  # fmt: skip
        assert each.staged_bytes == 3
        assert each.waiting[3] == an_artifact(3)
        assert each.wanted_ids() == {f"{index:032x}" for index in (1, 3, 4)}


def test_a_record_that_comes_again_is_known_also_after_its_end_and_a_restart(folder):
    ledger = Ledger(Disk(), folder)
    ledger.accept([an_artifact(1), an_artifact(2), an_artifact(1)])
    ledger.settle([End(0, UPLOADED)])
    ledger.accept([an_artifact(1), an_artifact(2)])
    again = Ledger(Disk(), folder)
    again.accept([an_artifact(1), an_artifact(2), an_artifact(3)])
    assert paths(ledger) == ["2"]
    assert paths(again) == ["2", "3"]


def test_the_later_of_one_name_replaces_those_before_it(folder):
    ledger = Ledger(Disk(), folder)
    ledger.accept([an_artifact(index, "same") for index in range(3)])
    assert [ledger.is_replaced(number) for number in range(4)] == [True, True, False, False]
    ledger.settle([End(2, UPLOADED)])
    # The last is there already; those before it, that were held up, must not come over it.
    for each in (ledger, Ledger(Disk(), folder)):
        assert paths(each) == ["same", "same"]
        assert each.is_replaced(0)
        assert each.is_replaced(1)


def test_an_end_is_told_once(folder):
    ledger = Ledger(Disk(), folder)
    ledger.accept([an_artifact(1)])
    assert ledger.settle([End(0, UPLOADED), End(9, UPLOADED)]) == [(UPLOADED, an_artifact(1))]
    assert ledger.settle([End(0, UPLOADED)]) == []
    assert ledger.counts[UPLOADED] == 1


def test_nothing_is_accepted_or_settled_that_is_not_on_the_disk(folder):
    disk = FullDisk()
    ledger = Ledger(disk, folder)
    disk.failures = 1
    with pytest.raises(OSError, match="full"):
        ledger.accept([an_artifact(1)])
    assert paths(ledger) == paths(Ledger(Disk(), folder)) == []
    ledger.accept([an_artifact(1)])
    disk.failures = 1
    with pytest.raises(OSError, match="full"):
        ledger.settle([End(0, UPLOADED)])
    assert paths(ledger) == paths(Ledger(Disk(), folder)) == ["1"]


def test_a_refused_one_can_wait_again_or_be_forgotten(folder):
    ledger = Ledger(Disk(), folder)
    ledger.accept([an_artifact(1), an_artifact(2)])
    ledger.settle([End(0, REFUSED), End(1, REFUSED)])
    assert ledger.try_again([an_artifact(1).id, "unknown"]) == 1
    assert ledger.forget([an_artifact(2).id, "unknown"]) == [an_artifact(2)]
    for each in (ledger, Ledger(Disk(), folder)):
        assert paths(each) == ["1"]
        assert each.refused == {}
        assert each.status()["settled_to"] == 2


def test_a_cut_anywhere_costs_only_the_lines_behind_it_and_they_can_come_again(folder):
    ledger = Ledger(Disk(), folder)
    artifacts = [an_artifact(index) for index in range(5)]
    for index, artifact in enumerate(artifacts):
        ledger.accept([artifact])
        if index % 2:
            ledger.settle([End(index, UPLOADED)])
    whole = (folder / ledgers.NAME).read_bytes()
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    for cut in [0, 1, *rng.sample(range(len(whole)), 40), len(whole)]:
        (folder / ledgers.NAME).write_bytes(whole[:cut])
        found = Ledger(Disk(), folder)
        found.accept(artifacts)  # their records were not settled, or are known
        assert {each.id for each in artifacts} == found._ids
        again = Ledger(Disk(), folder)
        assert paths(again) == paths(found)
        assert set(paths(found)) >= {"0", "2", "4"}


def test_a_ledger_of_a_run_that_is_over_is_one_line(folder):
    ledger = Ledger(Disk(), folder)
    count = ledgers.COMPACT_LINES_MIN
    ledger.accept([an_artifact(index) for index in range(count)])
    ledger.compact()
    assert len(paths(ledger)) == count  # it is not over
    ledger.settle([End(index, UPLOADED, "ab") for index in range(count)])
    before = ledger.status()
    ledger.compact()
    assert len((folder / ledgers.NAME).read_bytes().splitlines()) == 1
    again = Ledger(Disk(), folder)
    assert again.status() == ledger.status() == before
    again.accept([an_artifact(count + 1)])  # a rank came back
    assert again.status()["accepted"] == count + 1
    assert again.status()["settled_to"] == count


def test_lines_of_a_later_release_are_passed_over(folder):
    line = {"n": 0, "end": "dispatched to the moon"}
    (folder / ledgers.NAME).write_text(json.dumps(line) + "\n[]\n7\n" + json.dumps({"x": 1}) + "\n")
    assert paths(Ledger(Disk(), folder)) == []
