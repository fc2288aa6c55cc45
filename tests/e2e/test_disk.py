"""A full disk, a full journal, and damage: nothing is acknowledged that is not on the disk, what is
lost is counted to the record, and what can be read arrives as it was logged.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlflow_relay import frames, journal_files
from mlflow_relay_daemon.attachment import read_attachment
from mlflow_relay_daemon.spool import segment
from tests.support import MlflowServer, TcpProxy
from tests.support.relay import Node, finish, last_json, rest_of, wait_until
from tests.support.scenes import (
    Place,
    Stored,
    dead_letters,
    fill,
    fresh_name,
    in_order,
    journal_counters,
    log_lines,
    records_on_disk,
    show,
    small_disk,
    stored,
    wait_for,
)
from tests.support.seeds import new_seed

MIB = 1 << 20

# ── ranks that log much in few points ──

#: Logs as many calls as each line of its stdin says, a tag of 7,900 characters and a metric each.
BULKY = """
    import json, sys, time
    import mlflow_relay

    run = mlflow_relay.start_run(
        sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1, end_timeout_s=float(sys.argv[3])
    )
    print(run.run_id, flush=True)
    calls = 0
    longest_s = 0.0
    for line in sys.stdin:
        for _ in range(int(line)):
            begin_s = time.perf_counter()
            run.set_tag(f"bulk {calls:05d}", (f"{calls:05d} " * 1320)[:7900])
            run.log_metrics({"a": calls, "b": -calls}, step=calls)
            longest_s = max(longest_s, time.perf_counter() - begin_s)
            calls += 1
        print(calls, flush=True)
    begin_s = time.monotonic()
    run.end()
    print(json.dumps({"calls": calls, "end_s": time.monotonic() - begin_s, "longest_s": longest_s}))
"""


class Bulky:
    """A rank that runs BULKY."""

    def __init__(self, node: Node, *, end_timeout_s: float = 5.0, journal_bytes_max: int = 0):
        environ = {}
        if journal_bytes_max:
            environ["MLFLOW_RELAY_JOURNAL_BYTES_MAX"] = str(journal_bytes_max)
        names = fresh_name("bulky"), fresh_name("key")
        self.said: list[str] = []  #: what it logged
        self.process = node.rank(BULKY, *names, end_timeout_s, environ=environ)
        self.run_id = self._word()
        self.calls = 0

    def log(self, calls: int) -> None:
        """Make so many calls; return when they are made."""
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        self.calls = int(self._word())

    def end(self) -> dict[str, Any]:
        output = finish([self.process])[0]
        self.said += output.splitlines()
        told: dict[str, Any] = last_json(output)
        show(f"end() took {told['end_s']:.3f} s, the longest call {told['longest_s'] * 1e3:.1f} ms")
        return told

    def kill(self) -> None:
        self.process.kill()
        self.said += rest_of(self.process).splitlines()

    def _word(self) -> str:
        """Return the next line that is an answer, and not the client's log."""
        while True:
            line: str = self.process.stdout.readline()
            assert line, "the rank has ended"
            self.said.append(line)
            if len(line.split()) == 1:
                return line.strip()


def tag_of(call: int) -> tuple[str, str]:
    return f"bulk {call:05d}", (f"{call:05d} " * 1320)[:7900]


def points_of(calls: Iterator[int] | range) -> list[Place]:
    return in_order([(key, sign * i, i) for i in calls for key, sign in (("a", 1.0), ("b", -1.0))])


def assert_all_arrived(node: Node, server: MlflowServer, rank: Bulky, status: str) -> None:
    run = node.wait_until_ended(rank.run_id)
    found = stored(server, run["mlflow_run_id"])
    assert found.status == run["status"] == status
    assert found.tags == dict(map(tag_of, range(rank.calls)))
    assert found.points == points_of(range(rank.calls))
    assert (run["dead_letters"], run["lost_records"], run["damaged_records"]) == (0, 0, 0)
    assert run["waiting_records"] == run["journal_records"] == 0


def assert_no_ack_without_disk(node: Node, run_id: str) -> None:
    _, acked, _ = journal_counters(node)
    assert acked <= records_on_disk(node.spool, run_id)


# ── the disk is full ──


def test_a_full_disk_stops_acks_and_all_that_was_kept_arrives(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.refuse()
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        Node(tmp_path / "node", mlflow_proxy.uri, spool=disk / "spool") as node,
    ):
        node.start()
        rank = Bulky(node)
        rank.log(1500)  # 12 MB
        wait_until(lambda: node.status()["disk"]["full"], "the disk is full")
        wait_until(lambda: total(node) == 2 * rank.calls, "spool and journal hold all, together")
        assert_no_ack_without_disk(node, rank.run_id)
        assert node.run()["accepted_records"] > 0
        assert node.run()["journal_records"] > 0
        wait_until(lambda: node.status()["disk"]["free_bytes"] < MIB, "the free space is known")
        shown = node.command("status")
        assert shown.returncode == 1
        assert "FULL" in shown.stdout
        mlflow_proxy.heal()
        rank.end()
        assert_all_arrived(node, mlflow_server, rank, "FINISHED")
        wait_until(lambda: not node.status()["disk"]["full"], "there is space again")
        assert_log_is_calm(node)


def wait_for_vain_tries(node: Node) -> None:
    """Return when the daemon has tried some more times what its disk does not take."""

    def failures() -> int:
        return int(node.status()["counters"]["fsync_failures"])

    before = failures()
    wait_until(lambda: failures() >= before + 2, "the daemon tries in vain")


def total(node: Node) -> int:
    """Return the records that are in the spool and in journals."""
    return sum(run["accepted_records"] + run["journal_records"] for run in node.status()["runs"])


def lost_records(node: Node) -> int:
    return sum(run["lost_records"] for run in node.status()["runs"])


def assert_log_is_calm(node: Node) -> None:
    """A full disk is said, and not a hundred times; nothing went wrong in an unexpected way."""
    assert log_lines(node, "Traceback") == []
    assert log_lines(node, "unexpected") == []
    said = [line for line in log_lines(node, "") if "acknowledged" in line or "full" in line]
    assert 1 <= len(said) <= 4
    assert len(log_lines(node, "")) < 60


def test_a_disk_that_others_fill_to_the_last_byte_and_a_daemon_that_is_killed_on_it(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.refuse()
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        Node(tmp_path / "node", mlflow_proxy.uri, spool=disk / "spool") as node,
    ):
        node.start()
        rank = Bulky(node)
        rank.log(300)
        wait_for(node, "all is in the spool", accepted_records=600)
        fill(disk)
        rank.log(100)
        wait_until(lambda: node.status()["disk"]["full"], "the disk is full")
        node.kill()
        node.start()
        wait_until(lambda: node.status()["disk"]["full"], "the disk is still full")
        wait_until(lambda: total(node) == 800, "spool and journal hold all, together")
        assert_no_ack_without_disk(node, rank.run_id)
        # What is delivered gives its space back: nobody else has to.
        mlflow_proxy.heal()
        rank.end()
        assert_all_arrived(node, mlflow_server, rank, "FINISHED")


def test_a_rank_that_is_killed_on_a_full_disk_is_taken_over_when_there_is_space(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.refuse()
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        Node(tmp_path / "node", mlflow_proxy.uri, spool=disk / "spool") as node,
    ):
        node.start()
        rank = Bulky(node)
        rank.log(100)
        wait_for(node, "all is in the spool", accepted_records=200)
        filler = fill(disk)
        rank.log(100)
        rank.kill()
        wait_for_vain_tries(node)
        assert node.status()["disk"]["full"]
        assert node.run()["ranks_alive"] == 1  # its word is not all here: the run goes on
        filler.unlink()
        mlflow_proxy.heal()
        assert_all_arrived(node, mlflow_server, rank, "FAILED")
        assert "vanished" in stored(
            mlflow_server, node.run()["mlflow_run_id"]
        ).all_tags["relay.end_reason"]  # fmt: skip


def test_a_disk_that_is_full_from_the_start_costs_nothing_but_time(
    tmp_path, mlflow_server, mlflow_proxy
):
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        Node(tmp_path / "node", mlflow_proxy.uri, spool=disk / "spool") as node,
    ):
        filler = fill(disk)
        node.start()
        rank = Bulky(node, end_timeout_s=1.0)
        rank.log(50)
        wait_for_vain_tries(node)
        assert rank.end()["end_s"] < 5.0
        assert all(run["accepted_records"] == 0 for run in node.status()["runs"])
        node.kill()
        node.start()  # also a daemon that starts on a full disk serves
        wait_for_vain_tries(node)
        filler.unlink()
        assert_all_arrived(node, mlflow_server, rank, "FINISHED")
        # A run whose card found no space is nothing damaged.
        assert node.status()["counters"]["quarantined_files"] == 0


def test_dead_letters_wait_for_space_and_are_there_once(tmp_path, mlflow_server, mlflow_proxy):
    mlflow_proxy.refuse()
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        Node(tmp_path / "node", mlflow_proxy.uri, spool=disk / "spool") as node,
    ):
        node.start()
        rank = node.rank(
            """
            import sys, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
            for n in range(30):
                run.log_metrics({"good": n, f"bad@{n}" + "x" * 200: n}, step=n)
            run.end()
            """,
            fresh_name("letters"),
            fresh_name("key"),
        )
        finish([rank])
        filler = fill(disk)
        # One page for the card of the run that is created; the letters need more.
        os.truncate(filler, filler.stat().st_size - (8 << 10))
        mlflow_proxy.heal()
        wait_until(
            lambda: "No space" in str(node.run()["last_error"]) or node.run()["dead_letters"],
            "the letters are written, or cannot be",
        )
        assert node.run()["dead_letters"] or node.run()["state"] != "ended"
        assert node.command("status").returncode == 1
        filler.unlink()
        assert node.command("flush").returncode in (0, 1)
        run = node.wait_until_ended()
        letters = dead_letters(node, run["run_id"])
        assert sorted(each["step"] for each in letters) == list(range(30))
        assert len({each["id"] for each in letters}) == 30
        assert run["dead_letters"] == 30
        points = stored(mlflow_server, run["mlflow_run_id"]).points
        assert points == in_order([("good", float(n), n) for n in range(30)])

        # The operator's hand on a full disk: refused in words, and the daemon lives.
        fill(disk)
        dropped = node.command("dead-letters", "drop", "--run", run["run_id"], "--id", "1", "--yes")
        if dropped.returncode != 0:
            assert dropped.returncode == 1
            assert len(dropped.stderr.strip().splitlines()) == 1
            assert len(dead_letters(node, run["run_id"])) == 30
        assert node.daemon is not None
        assert node.daemon.poll() is None


# ── the quota is reached ──


def test_a_quota_stops_acks_and_all_that_was_kept_arrives(tmp_path, mlflow_server, mlflow_proxy):
    mlflow_proxy.refuse()
    settings: dict[str, object] = {"spool_bytes_max": "1MB"}  # the smallest allowed
    with Node(tmp_path / "node", mlflow_proxy.uri, settings=settings) as node:
        node.start()
        rank = Bulky(node)
        rank.log(400)  # 3.2 MB
        wait_until(lambda: node.status()["disk"]["full"], "the quota is reached")
        wait_until(lambda: total(node) == 800, "spool and journal hold all, together")
        # What comes together does not fit; a moment later it is tried one by one.
        wait_until(lambda: node.status()["disk"]["spool_bytes"], "what fits is kept")
        assert_no_ack_without_disk(node, rank.run_id)
        disk = node.status()["disk"]
        assert 0 < disk["spool_bytes"] <= disk["spool_bytes_max"] == 1_000_000
        mlflow_proxy.heal()
        rank.end()
        assert_all_arrived(node, mlflow_server, rank, "FINISHED")
        assert_log_is_calm(node)


# ── the journal is full ──


def test_a_small_journal_that_is_emptied_in_time_loses_nothing(tmp_path, mlflow_server):
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = Bulky(node, journal_bytes_max=MIB)
        for _ in range(8):  # 4 MB in all
            rank.log(60)
            wait_for(node, "all is acknowledged", accepted_records=2 * rank.calls)
        rank.end()
        assert_all_arrived(node, mlflow_server, rank, "FINISHED")


@pytest.mark.parametrize("fate", ["ends", "is killed"])
def test_calls_that_find_the_journal_full_are_counted_to_the_call(
    tmp_path, mlflow_server, mlflow_proxy, fate
):
    mlflow_proxy.refuse()
    settings: dict[str, object] = {"spool_bytes_max": "1MB"}
    with Node(tmp_path / "node", mlflow_proxy.uri, settings=settings) as node:
        node.start()
        rank = Bulky(node, journal_bytes_max=MIB, end_timeout_s=1.0)
        while not node.status()["disk"]["full"]:  # first the spool, then the journal
            rank.log(20)
            wait_until(
                lambda: total(node) == 2 * rank.calls or lost_records(node),
                "they are seen",
            )
        rank.log(300)  # 2.4 MB
        wait_until(lambda: lost_records(node), "the journal is full")
        made = 2 * rank.calls
        accepted, acked, lost = journal_counters(node)
        assert accepted + lost == made
        assert 0 < acked < accepted < made
        wait_until(lambda: lost_records(node) == lost, "status shows the loss")
        wait_until(lambda: total(node) == accepted, "spool and journal hold the rest")
        if fate == "ends":
            assert rank.end()["longest_s"] < 1.0
        else:
            rank.kill()
        said = [line for line in rank.said if "journal is full" in line]
        assert len(said) == 1  # once a minute, not once a call
        assert "log calls lost" in said[0]
        # The daemon looks at the dead rank's journal again and again: the loss is counted once.
        wait_for_vain_tries(node)
        mlflow_proxy.heal()
        run = node.wait_until_ended()
        found = stored(mlflow_server, run["mlflow_run_id"])
        arrived_tags = {int(key.split()[1]) for key in found.tags}
        arrived_steps = {step for _, _, step in found.points}
        assert found.tags == dict(map(tag_of, arrived_tags))
        assert found.points == points_of(sorted(arrived_steps))
        assert len(arrived_tags) + len(arrived_steps) == accepted
        assert run["lost_records"] == lost
        assert found.all_tags["relay.lost_records"] == str(lost)
        assert found.status == ("FINISHED" if fate == "ends" else "FAILED")
        assert run["delivered_points"] == len(found.points)
        status = node.command("status")
        assert status.returncode == 1
        assert f"{lost} records lost" in status.stdout


# ── damage to a spool whose daemon is stopped ──

#: Starts as many runs as it is told. In each: bursts of eight metrics and a long tag. Waits for a
#: line before the second part, and ends all runs.
MANY_RUNS = """
    import sys, time
    import mlflow_relay

    runs = [
        mlflow_relay.start_run(sys.argv[1], f"run {n}", run_key=f"{sys.argv[2]}-{n}",
                               rank=0, world_size=1)
        for n in range(int(sys.argv[3]))
    ]
    wait_for_acks = sys.argv[4] == "acks"

    def burst(number):
        for n, run in enumerate(runs):
            for call in range(8 * number, 8 * number + 8):
                run.log_metrics({"a": n + call / 8, "b": -call}, step=call)
            run.set_tag(f"burst {number:03d}", f"{n} {number} " * 800)
        until_s = time.monotonic() + 60
        while wait_for_acks and any(run._session.journal.unacked for run in runs):
            assert time.monotonic() < until_s
            time.sleep(0.002)

    print(*(run.run_id for run in runs), flush=True)
    for begin, end in ((0, 6), (6, 30)):
        for number in range(begin, end):
            burst(number)
        print(end, flush=True)
        wait_for_acks = wait_for_acks and sys.argv[5] == "acks"
        sys.stdin.readline()
    for run in runs:
        run.end()
"""
BURSTS = 30


class Expected:
    """What MANY_RUNS logged in its run number n, and what of it is missing."""

    def __init__(self, number: int, found: Stored) -> None:
        calls = range(8 * BURSTS)
        points = {call: {("a", number + call / 8), ("b", float(-call))} for call in calls}
        tags = {f"burst {i:03d}": f"{number} {i} " * 800 for i in range(BURSTS)}
        arrived: dict[int, set[tuple[str, float]]] = {}
        for key, value, step in found.points:
            arrived.setdefault(step, set()).add((key, value))
        assert len(found.points) == 2 * len(arrived), "a record arrives whole, and once"
        assert all(points[step] == got for step, got in arrived.items()), "a wrong point"
        assert all(tags[key] == value for key, value in found.tags.items()), "a wrong tag"
        self.missing_calls = set(points) - set(arrived)
        self.missing_tags = set(tags) - set(found.tags)
        self.missing = len(self.missing_calls) + len(self.missing_tags)


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ bits]))


def segments(folder: Path) -> list[Path]:
    return [segment.path_of(folder, number) for number in segment.numbers_in(folder)]


def pieces(path: Path) -> list[segment.Piece]:
    """Return the frames of a segment."""
    fd = os.open(path, os.O_RDONLY)
    try:
        end = path.stat().st_size
        return list(segment.iter_pieces(fd, segment.first_frame(fd, end), end))
    finally:
        os.close(fd)


def middle_piece(folder: Path) -> tuple[Path, segment.Piece]:
    """Return a frame in the middle of the segment before the last."""
    path = segments(folder)[-2]
    found = pieces(path)
    return path, found[len(found) // 2]


def flip_in_frame(offset: int, bits: int = 0xFF) -> Callable[[Path], None]:
    """Return a damage: a byte of a frame's header (0 to 39) or of its first record."""

    def damage(folder: Path) -> None:
        path, piece = middle_piece(folder)
        flip(path, piece.start + offset, bits)

    return damage


def flip_in_tag(folder: Path) -> None:
    path, piece = middle_piece(folder)
    flip(path, piece.end - 100)  # the long tag comes last in its burst


def flip_in_head(index: int) -> Callable[[Path], None]:
    return lambda folder: flip(segments(folder)[index], 30)


def flip_magic_of_segment(folder: Path) -> None:
    flip(segments(folder)[0], 0)


def flip_length_of_head(folder: Path) -> None:
    flip(segments(folder)[-1], 6)


def flip_in_card(folder: Path) -> None:
    flip(folder / "card.json", 0)


def flip_in_watermark(folder: Path) -> None:
    flip(folder / "watermark", (folder / "watermark").stat().st_size // 2)


def cut_in_half(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def empty(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 0)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_last_frame(folder: Path) -> None:
    last = segments(folder)[-1]
    os.truncate(last, pieces(last)[-1].end - 10)


def cut_three_frames(folder: Path) -> None:
    last = segments(folder)[-1]
    os.truncate(last, pieces(last)[-3].start)


def empty_last_segment(folder: Path) -> None:
    os.truncate(segments(folder)[-1], 0)


def remove_middle_segment(folder: Path) -> None:
    segments(folder)[-2].unlink()


def zero_a_page(folder: Path) -> None:
    """What a file system leaves that had no time to write one."""
    path = segments(folder)[-2]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(bytes(4096))


def add_strangers(folder: Path) -> None:
    (folder / "notes.txt").write_text("foreign")
    (folder / "card.json.new").write_bytes(b"half a card")
    (folder / "watermark.new").write_bytes(b"")
    (folder / "0000000001.segment.bak").write_bytes(b"foreign")
    (folder / "folder").mkdir()
    (folder / "folder" / "file").write_text("foreign")


def tear_dead_letters(folder: Path) -> None:
    (folder / "dead_letters.jsonl").write_text('\n{"id": 1, "kind": "metr')


#: The damage, and how many records of 271 (240 calls, 30 tags, the end) it may cost.
DAMAGES: dict[str, tuple[Callable[[Path], None], range]] = {
    "none": (lambda _: None, range(1)),
    "a byte of a tag": (flip_in_tag, range(1, 2)),
    "a byte of a record": (flip_in_frame(60), range(1, 2)),
    "the length of a record": (flip_in_frame(40), range(1, 10)),
    "the magic of a frame": (flip_in_frame(0), range(1, 10)),
    "the session of a frame": (flip_in_frame(8), range(10)),
    "the first number of a frame": (flip_in_frame(20, 1 << 6), range(10)),
    "the high bits of the first number": (flip_in_frame(26), range(10)),
    "the count of a frame": (flip_in_frame(28, 1 << 1), range(10)),
    "the length of a frame": (flip_in_frame(32, 1 << 3), range(1, 10)),
    "the CRC of a frame": (flip_in_frame(36), range(10)),
    "a page of zeros": (zero_a_page, range(1, 30)),
    "the head of the first segment": (flip_in_head(0), range(1)),
    "the head of the last segment": (flip_in_head(-1), range(1)),
    "the magic of a segment": (flip_magic_of_segment, range(1)),
    "the length of a head": (flip_length_of_head, range(1)),
    "a byte of the card": (flip_in_card, range(1)),
    "half a card": (cut_in_half("card.json"), range(1)),
    "no card": (unlink("card.json"), range(1)),
    "an empty card": (empty("card.json"), range(1)),
    "a byte of the watermark": (flip_in_watermark, range(1)),
    "half a watermark": (cut_in_half("watermark"), range(1)),
    "no watermark": (unlink("watermark"), range(1)),
    "the last frame cut": (cut_last_frame, range(1, 10)),
    "the last frames cut": (cut_three_frames, range(1, 30)),
    "an empty last segment": (empty_last_segment, range(1, 200)),
    "a segment is missing": (remove_middle_segment, range(1, 200)),
    "strangers in the folder": (add_strangers, range(1)),
    "a torn dead letter": (tear_dead_letters, range(1)),
}
HEADER_DAMAGES = [name for name in DAMAGES if name.endswith(("of a frame", "first number"))]
#: Flips bits of segments at random; many of it are for torture.
RANDOM = [f"random {number}" for number in range(2)]


def flip_at_random(seed: int) -> Callable[[Path], None]:
    rng = random.Random(seed)

    def damage(folder: Path) -> None:
        for _ in range(rng.randint(1, 3)):
            path = rng.choice(segments(folder))
            flip(path, rng.randrange(path.stat().st_size), 1 << rng.randrange(8))

    return damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, mlflow_server) -> Iterator[Damaged]:
    seed = new_seed()
    damages = {name: damage for name, (damage, _) in DAMAGES.items()}
    damages |= {name: flip_at_random(seed + number) for number, name in enumerate(RANDOM)}
    with damaged_spool(tmp_path_factory.mktemp("damaged"), mlflow_server, damages, seed) as found:
        yield found


class Damaged(NamedTuple):
    node: Node
    run_ids: dict[str, str]  #: by damage, in the order of their numbers
    seed: int


@contextmanager
def damaged_spool(
    folder: Path, server: MlflowServer, damages: dict[str, Callable[[Path], None]], seed: int
) -> Iterator[Damaged]:
    """A spool with a run for each damage, partly delivered, then damaged, then delivered."""
    settings: dict[str, object] = {"segment_bytes_max": "64KB", "drain_timeout_s": 0}
    with TcpProxy(server.uri) as proxy, Node(folder, proxy.uri, settings=settings) as node:
        node.start()
        run_ids = many_runs(node, proxy, len(damages))
        assert node.stop() == 1  # it says that something is left
        for damage, run_id in zip(damages.values(), run_ids, strict=True):
            assert len(segments(node.spool / "runs" / run_id)) >= 3
            damage(node.spool / "runs" / run_id)
        proxy.heal()
        node.start()
        yield Damaged(node, dict(zip(damages, run_ids, strict=True)), seed)
        assert node.daemon is not None
        assert node.daemon.poll() is None


def many_runs(node: Node, proxy: TcpProxy, number: int) -> list[str]:
    """Log the first part with the server up, the second with the server away; return run ids."""
    rank = node.rank(MANY_RUNS, fresh_name("damage"), fresh_name("key"), number, "acks", "acks")
    run_ids: list[str] = rank.stdout.readline().split()
    assert rank.stdout.readline().strip() == "6"
    wait_until(
        lambda: all(run["delivered_records"] == 6 * 9 for run in node.status()["runs"]),
        "the first part is delivered",
    )
    proxy.refuse()
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert rank.stdout.readline().strip() == "30"
    finish([rank])
    wait_until(
        lambda: not any(run["ranks_alive"] for run in node.status()["runs"]), "all have ended"
    )
    return run_ids


def add_strangers_around(node: Node) -> list[Path]:
    """Put foreign files and folders, an hour old, into the daemon's folders; return them."""
    journals = node.runtime / "journals"
    made = []
    for number, folder in enumerate(
        (node.spool, node.spool / "runs", node.spool / "quarantine", journals)
    ):
        session = f"{number:x}" * 32
        for name in (f"notes{number}.txt", f".hidden{number}", f"x{number}.journal",
                     f"{session}.journal"):  # fmt: skip
            made.append(folder / name)
            made[-1].write_text("foreign")
        for name in (f"lost+found{number}", f"a{session[1:]}.journal",
                     f"b{session[1:]}.000001.entries"):  # fmt: skip
            made.append(folder / name)
            made[-1].mkdir()
            (made[-1] / "file").write_text("foreign")
    for path in made:
        os.utime(path, (time.time() - 3600,) * 2)
    return made


@pytest.mark.parametrize("name", [*DAMAGES, *RANDOM])
def test_damage_costs_what_it_hit_and_is_counted_to_the_record(damaged, mlflow_server, name):
    assert_counted_to_the_record(damaged, mlflow_server, name)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_random_damage_to_many_runs_is_counted_to_the_record(tmp_path, mlflow_server):
    seed = new_seed()
    damages = {f"random {number}": flip_at_random(seed + number) for number in range(60)}
    with damaged_spool(tmp_path, mlflow_server, damages, seed) as damaged:
        for name in damages:
            assert_counted_to_the_record(damaged, mlflow_server, name)


def assert_counted_to_the_record(damaged: Damaged, server: MlflowServer, name: str) -> None:
    show(f"{name}, seed {damaged.seed}")
    run = damaged.node.wait_until_ended(damaged.run_ids[name])
    found = stored(server, run["mlflow_run_id"])
    missing = Expected(list(damaged.run_ids).index(name), found).missing
    end_missing = found.status != "FINISHED"
    if end_missing:
        assert found.status == "FAILED"
        assert found.all_tags["relay.end_reason"]
    if name in DAMAGES:
        assert missing + end_missing in DAMAGES[name][1]
    # A frame whose header is damaged may be counted though its records were found and delivered.
    headers = 9 if name in HEADER_DAMAGES else 3 * 9 if name.startswith("random") else 0
    assert 0 <= run["damaged_records"] - (missing + end_missing) <= headers
    assert found.all_tags.get("relay.damaged_records", "0") == str(run["damaged_records"])
    assert run["dead_letters"] == 0
    assert run["waiting_records"] == 0


def test_damage_is_shown(damaged):
    node = damaged.node
    for run_id in damaged.run_ids.values():
        node.wait_until_ended(run_id)
    assert log_lines(node, "Traceback") == []
    status = node.status()
    counted = sum(run["damaged_records"] for run in status["runs"])
    assert status["counters"]["damaged_records"] == counted > 0
    assert status["counters"]["fsync_failures"] == 0
    shown = node.command("status")
    assert shown.returncode == 1
    assert "unreadable" in shown.stdout


# ── strangers' files ──


def test_foreign_files_and_folders_stop_nobody_and_are_not_thrown_away(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.refuse()
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"drain_timeout_s": 0}) as node:
        node.start()
        rank = Bulky(node)
        rank.log(20)
        wait_for(node, "all is in the spool", accepted_records=40)
        assert node.stop() == 1
        rank.log(20)
        rank.kill()  # the second half is in its journal alone
        foreign = add_strangers_around(node)

        # Without a daemon the commands read past them, and touch none of them.
        for command in (("status", "--json"), ("runs", "--json")):
            shown = node.command(*command)
            assert shown.returncode in (0, 1), shown.stderr
            assert rank.run_id in {run["run_id"] for run in json.loads(shown.stdout)["runs"]}
        assert all(path.exists() for path in foreign)

        node.start()
        mlflow_proxy.heal()
        assert_all_arrived(node, mlflow_server, rank, "FAILED")
        assert log_lines(node, "Traceback") == []
        # They are where they were, or in quarantine: nobody may miss them.
        set_aside = [path.name for path in (node.spool / "quarantine").iterdir()]
        for path in foreign:
            assert path.exists() or any(path.name in each for each in set_aside), path


# ── files of a later release ──


def as_later_version(path: Path) -> None:
    if path.name == "card.json":
        card = json.loads(path.read_text())
        path.write_text(json.dumps({**card, "version": 2, "new_field": "of a later release"}))
    else:
        with path.open("r+b") as file:
            file.seek(3)
            file.write(b"\x02")


def test_files_of_a_later_release_are_left_alone_and_delivered_by_that_release(
    tmp_path, mlflow_server, mlflow_proxy
):
    settings: dict[str, object] = {"segment_bytes_max": "64KB", "drain_timeout_s": 0}
    with Node(tmp_path / "node", mlflow_proxy.uri, settings=settings) as node:
        node.start()
        ids = many_runs(node, mlflow_proxy, 4)
        assert node.stop() == 1
        folders = [node.spool / "runs" / run_id for run_id in ids]
        changed = [folders[1] / "card.json", segments(folders[2])[-1], segments(folders[3])[-2]]
        saved = {path: path.read_bytes() for path in changed}
        for path in changed:
            as_later_version(path)
        # The last one's earlier segments may be delivered, but not the one that cannot be read.
        untouched = [*folders[1].iterdir(), *folders[2].iterdir(), *segments(folders[3])[-2:]]
        before = {path: path.read_bytes() for path in untouched}
        mlflow_proxy.heal()
        node.start()
        node.wait_until_ended(ids[0])
        wait_until(
            lambda: all(log_lines(node, f"run {folder.name}") for folder in folders[1:]),
            "each is named in the log",
        )
        status = node.command("status")
        assert status.returncode in (0, 1), status.stderr
        node.stop()
        offline = node.command("status", "--json")
        assert {run["run_id"] for run in json.loads(offline.stdout)["runs"]} >= set(ids)
        for path, content in before.items():
            assert path.read_bytes() == content, f"{path.name} was changed"

        for path, content in saved.items():
            path.write_bytes(content)  # the later release is back
        node.start()
        for number, run_id in enumerate(ids):
            run = node.wait_until_ended(run_id)
            found = stored(mlflow_server, run["mlflow_run_id"])
            assert Expected(number, found).missing == 0
            assert found.status == "FINISHED"


def test_a_rank_that_comes_back_to_a_run_of_a_later_release_overwrites_nothing(
    tmp_path, mlflow_server, mlflow_proxy
):
    mlflow_proxy.refuse()
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"drain_timeout_s": 0}) as node:
        node.start()
        experiment, key = fresh_name("later"), fresh_name("key")
        script = """
            import sys, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1,
                                         end_timeout_s=1.0)
            run.log_metric(sys.argv[3], 1.0, step=1)
            run.end()
            print(f'"{run.run_id}"')
        """
        run_id = last_json(finish([node.rank(script, experiment, key, "first")])[0])
        node.stop()
        card = node.spool / "runs" / run_id / "card.json"
        this_release = card.read_bytes()
        as_later_version(card)
        later_release = card.read_bytes()
        mlflow_proxy.heal()
        node.start()
        finish([node.rank(script, experiment, key, "second")])
        wait_until(
            lambda: log_lines(node, "version 2") and node.status(), "the daemon has seen both"
        )
        assert card.read_bytes() == later_release
        node.stop()
        card.write_bytes(this_release)
        node.start()
        mlflow_run_id = node.wait_until_ended(run_id)["mlflow_run_id"]
        wait_until(
            lambda: len(stored(mlflow_server, mlflow_run_id).points) == 2,
            "the journal of the second rank is taken",
        )
        points = stored(mlflow_server, mlflow_run_id).points
        assert points == [("first", 1.0, 1), ("second", 1.0, 1)]


# ── damage to journals ──


def words_at(path: Path, at: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("@Q", value))


class JournalOf:
    """The journal of one run of a killed process."""

    def __init__(self, base: Path) -> None:
        self.base = base
        (self.entries,) = [
            path
            for path in base.parent.glob(f"{base.stem}.*{journal_files.ENTRIES_SUFFIX}")
            if path.read_bytes()[:3] == b"MRE"
        ]
        card = journal_files.read_base(base.read_bytes()).card
        self.run_id = read_attachment(card).run_id

    def places(self) -> list[int]:
        """Return where the entries begin."""
        data = self.entries.read_bytes()
        (tail,) = struct.unpack_from("@Q", data, 32)
        found, at = [], journal_files.ENTRIES_AT
        while at < tail:
            found.append(at)
            at += frames.ENTRY_BYTES + struct.unpack_from("<I", data, at)[0]
        assert at == tail
        return found

    def middle(self) -> int:
        return self.places()[len(self.places()) // 2]


#: The damage, and whether the run is known to the daemon from an earlier life.
JOURNAL_DAMAGES: dict[str, Callable[[JournalOf], None]] = {
    "none": lambda _: None,
    "a byte of a record": lambda j: flip(j.entries, j.middle() + 20),
    "the CRC of a record": lambda j: flip(j.entries, j.middle() + 5),
    "the length of a record": lambda j: flip(j.entries, j.middle() + 2),
    "a length within the file": lambda j: flip(j.entries, j.middle(), 1 << 3),
    "the magic of the entries": lambda j: flip(j.entries, 0),
    "the session of the entries": lambda j: flip(j.entries, 10),
    "a tail far off": lambda j: words_at(j.entries, 32, 1 << 60),
    "a tail too short": lambda j: words_at(j.entries, 32, j.middle()),
    "a tail within a record": lambda j: words_at(j.entries, 32, j.middle() + 11),
    "a tail of zero": lambda j: words_at(j.entries, 32, 0),
    "entries cut": lambda j: os.truncate(j.entries, j.middle() + 30),
    "no entries": lambda j: j.entries.unlink(),
    "empty entries": lambda j: os.truncate(j.entries, 0),
    "a byte of the base's card": lambda j: flip(j.base, journal_files.CARD_AT + 30),
    "the magic of the base": lambda j: flip(j.base, 0),
    "the counters of the base": lambda j: flip(j.base, 16 + 6),
    "half a base": lambda j: os.truncate(j.base, 40),
    "an empty base": lambda j: os.truncate(j.base, 0),
    "no base": lambda j: j.base.unlink(),
    "entries of a later release": lambda j: flip(j.entries, 3, 3),
    "a base of a later release": lambda j: flip(j.base, 3, 3),
}


def test_damage_to_journals_costs_what_it_hit_and_is_counted_or_set_aside(tmp_path, mlflow_server):
    """Each damage once to a run that the daemon knows, and once to one that it has never seen."""
    environ = {"MLFLOW_RELAY_JOURNAL_BYTES_MAX": str(MIB)}
    number = len(JOURNAL_DAMAGES)
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        arguments = fresh_name("journals"), fresh_name("key"), number, "acks", "none"
        known = node.rank(MANY_RUNS, *arguments, environ=environ)
        known_ids = known.stdout.readline().split()
        assert known.stdout.readline().strip() == "6"
        node.kill()
        arguments = fresh_name("journals"), fresh_name("key"), number, "none", "none"
        unknown = node.rank(MANY_RUNS, *arguments, environ=environ)
        unknown_ids = unknown.stdout.readline().split()
        assert unknown.stdout.readline().strip() == "6"
        for rank in (known, unknown):
            rank.stdin.write("\n")
            rank.stdin.flush()
            assert rank.stdout.readline().strip() == "30"
            rank.kill()
            rank.wait()
        journals = {
            journal.run_id: journal
            for journal in map(JournalOf, (node.runtime / "journals").glob("*.journal"))
        }
        assert len(journals) == 2 * number
        for ids in (known_ids, unknown_ids):
            for run_id, damage in zip(ids, JOURNAL_DAMAGES.values(), strict=True):
                damage(journals[run_id])
        for path in (node.runtime / "journals").iterdir():
            os.utime(path, (time.time() - 3600,) * 2)  # their ranks died an hour ago
        node.start()
        problems = []
        for ids in (known_ids, unknown_ids):
            for index, (run_id, name) in enumerate(zip(ids, JOURNAL_DAMAGES, strict=True)):
                which = f"{name} ({'known' if ids is known_ids else 'unknown'})"
                problem = journal_problem(node, mlflow_server, index, journals[run_id], name)
                problems += [f"{which}: {problem}"] if problem else []
        assert problems == [], "\n".join(["", *problems])
        assert log_lines(node, "Traceback") == []


def journal_problem(
    node: Node, server: MlflowServer, index: int, journal: JournalOf, name: str
) -> str:
    """Return what is wrong with what became of a damaged journal; "" if nothing is."""
    set_aside = [
        path.name
        for path in (node.spool / "quarantine").iterdir()
        if journal.base.stem in path.name
    ]
    left_alone = [path for path in (journal.base, journal.entries) if path.exists()]
    later = "later release" in name
    if later:
        return "" if left_alone and not set_aside else "a later release's file was not left alone"
    runs = [run for run in node.status()["runs"] if run["run_id"] == journal.run_id]
    if not runs:
        return "" if set_aside else "gone without a trace"
    run = node.wait_until_ended(journal.run_id)
    found = stored(server, run["mlflow_run_id"])
    missing = Expected(index, found).missing
    if found.status != "FAILED":
        return f"the rank was killed, and the run ended {found.status}"
    if run["damaged_records"] != missing and not (missing and set_aside):
        return f"{missing} records are missing, {run['damaged_records']} counted"
    if name == "none" and missing:
        return f"{missing} records are missing"
    if run["lost_records"]:
        return f"{run['lost_records']} calls are said to be lost"
    return ""
