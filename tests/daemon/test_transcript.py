"""What ranks print, in the run's folder: once, whatever is killed, and never too much of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from mlflow_relay_daemon.spool import transcript as transcripts
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.transcript import Printed, Transcript, Transcripts
from tests.support.spools import FailingDisk

SESSION, OTHER = b"s" * 16, b"o" * 16


def lines(first: int, count: int) -> bytes:
    return "".join(f"line {index}\n" for index in range(first, first + count)).encode()


def printed(seq: int, data: bytes, session: bytes = SESSION) -> Printed:
    return Printed(0, session, seq, data)


def test_what_comes_twice_is_taken_once(tmp_path: Path) -> None:
    transcript = Transcript(Disk(), tmp_path, 0)
    parts = [printed(seq, lines(seq * 50, 50)) for seq in range(8)]
    transcript.add(parts[:5])
    transcript.add(parts[2:])
    again = Transcript(Disk(), tmp_path, 0)
    again.add(parts)
    again.add([printed(0, b"another life\n", OTHER)])
    assert again.text() == lines(0, 400) + b"another life\n"


def test_a_folder_whose_name_could_not_be_synced_is_synced_before_anything_counts(tmp_path) -> None:
    disk = FailingDisk()
    disk.fail("sync_folder", tmp_path.name)
    with pytest.raises(OSError):
        Transcript(disk, tmp_path, 0).add([printed(0, lines(0, 5))])
    assert (tmp_path / transcripts.FOLDER).is_dir()
    Transcript(disk, tmp_path, 0).add([printed(0, lines(0, 5))])

    assert disk.count("make_folder") == 2


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "make_folder"])
def test_what_the_disk_does_not_take_is_not_taken_and_comes_again(tmp_path, operation) -> None:
    disk = FailingDisk()
    transcript = Transcript(disk, tmp_path, 0)
    parts = [printed(seq, lines(seq * 200, 200)) for seq in range(3)]
    disk.fail(operation, error=errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        transcript.add(parts)
    assert transcript.text() == b""
    transcript.add(parts)
    assert transcript.text() == lines(0, 600)


def test_lines_that_a_crash_left_behind_the_state_are_cut_off(tmp_path: Path) -> None:
    transcript = Transcript(Disk(), tmp_path, 0)
    transcript.add([printed(0, lines(0, 300))])
    (text,) = tmp_path.rglob("*.txt")
    with text.open("ab") as file:
        file.write(b"of a life that was killed before it could say so\n")
    again = Transcript(Disk(), tmp_path, 0)
    again.add([printed(1, lines(300, 300))])
    assert again.text() == lines(0, 600)


def test_a_long_output_keeps_its_beginning_and_its_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transcripts, "TEXT_BYTES_MAX", 20_000)
    monkeypatch.setattr(transcripts, "HEAD_BYTES", 1_000)
    monkeypatch.setattr(transcripts, "TAIL_BYTES", 5_000)
    transcript = Transcript(Disk(), tmp_path, 0)
    for seq in range(100):
        transcript.add([printed(seq, lines(seq * 100, 100))])
    found = Transcript(Disk(), tmp_path, 0).text()
    assert len(found) < 30_000
    assert found.startswith(lines(0, 50))
    assert found.endswith(lines(9_900, 100))
    assert b"lines are left out here ...]\n" in found
    assert len(list(tmp_path.rglob("*.txt"))) == 1


def test_a_damaged_state_begins_anew_and_stops_nobody(tmp_path: Path, caplog) -> None:
    transcript = Transcript(Disk(), tmp_path, 3)
    transcript.add([printed(0, lines(0, 300))])
    (state,) = tmp_path.rglob("*.json")
    state.write_bytes(state.read_bytes()[:40])
    every = Transcripts(Disk(), tmp_path)
    assert list(every.by_rank) == [3]
    assert "is damaged" in caplog.text
    every.add([Printed(3, SESSION, 1, b"goes on\n")])
    assert every.by_rank[3].text() == b"goes on\n"


def test_it_is_known_what_has_been_published(tmp_path: Path) -> None:
    transcript = Transcript(Disk(), tmp_path, 0)
    assert transcript.is_published, "nothing is no news"
    transcript.add([printed(0, b"10%\r20%")])
    assert not transcript.is_published
    transcript.mark_published()
    assert Transcript(Disk(), tmp_path, 0).is_published
    transcript.add([printed(1, b"\r30%")])
    assert not transcript.is_published
    assert json.loads(next(tmp_path.rglob("*.json")).read_bytes())["version"] == 1
