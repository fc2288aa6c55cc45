"""The sender against a daemon that answers late, twice, wrongly or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest

from mlflow_relay import messages, sender
from mlflow_relay.journal import Journal
from mlflow_relay.sender import Sender, State
from tests.support.fake_daemon import FakeDaemon
from tests.support.relay import wait_until

SESSION = bytes(range(16))
OTHER = bytes(16)
FILE_BYTES = 64 << 10


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of patience become tenths."""
    monkeypatch.setattr(sender, "ACK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(sender, "ATTACH_RETRY_S", 0.05)
    monkeypatch.setattr(sender, "ATTACH_REFUSED_RETRY_S", 0.2)


class Rank:
    """A journal and its sender."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.journal = Journal(
            folder, SESSION, b"card", bytes_max=1024 * FILE_BYTES, file_bytes=FILE_BYTES
        )
        self.told: list[str] = []
        card = {"session": SESSION, "rank": 0}
        self.sender = Sender(self.journal, folder / "relay.sock", card, self.told.append, **options)
        self.logged: list[bytes] = []

    def log(self, times: int = 1, size: int = 100) -> None:
        for _ in range(times):
            record = len(self.logged).to_bytes(4, "big") + bytes(size)
            assert self.journal.append(record)
            self.logged.append(record)

    def end(self) -> None:
        self.sender.end()
        assert self.sender.over.wait(30), "the daemon did not take all"
        self.sender.join(30)
        assert not self.sender.is_alive()

    def stop(self) -> None:
        """Whatever state it is in: let the thread leave, as the end of the process does."""
        was_over = self.sender.over.is_set()
        self.sender.over.set()
        if self.sender.is_alive():
            self.sender.wake()
            self.sender.join(30)
        if not was_over:
            self.journal.close(unlink=True)


@pytest.fixture
def new_rank(folder: Path) -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def new(**options: Any) -> Rank:
        ranks.append(Rank(folder, **options))
        ranks[-1].sender.start()
        return ranks[-1]

    yield new
    for each in ranks:
        each.stop()


def wait_until_acked(rank: Rank) -> None:
    wait_until(lambda: rank.journal.acked == len(rank.logged), "all is acknowledged")


# ── the good way ──


def test_what_is_logged_arrives_in_order_and_its_space_is_given_back(folder, daemon, new_rank):
    rank = new_rank()
    rank.log(3000)
    wait_until_acked(rank)
    rank.log(10)
    rank.end()

    assert daemon.kept == {SESSION: rank.logged}
    assert daemon.detached == {SESSION: 0}
    assert [path.name for path in folder.iterdir()] == ["relay.sock"]


def test_a_daemon_that_comes_later_gets_all(socket, new_rank):
    rank = new_rank()
    rank.log(500)
    with FakeDaemon(socket) as daemon:
        rank.log(500)
        rank.end()
        assert daemon.kept == {SESSION: rank.logged}


def test_the_daemon_that_was_not_there_yet_is_asked_at_the_next_look(socket, new_rank, monkeypatch):
    monkeypatch.setattr(sender, "ATTACH_RETRY_S", 3600)
    rank = new_rank()
    rank.log(5)
    wait_until(lambda: rank.sender._seeking_since_s, "the first attempt found nobody")
    with FakeDaemon(socket) as daemon:
        rank.end()
        assert daemon.kept == {SESSION: rank.logged}


def test_the_journals_next_file_is_made_behind_what_the_daemon_waits_for(
    daemon, new_rank, monkeypatch
):
    """It takes milliseconds, and a rank that ends at once has tenths of a second to attach."""
    may_be_made = Event()
    monkeypatch.setattr(Journal, "prepare", lambda journal: may_be_made.wait(60))
    rank = new_rank()
    try:
        daemon.wait_for(messages.ATTACH)
    finally:
        may_be_made.set()
    rank.end()


def test_a_session_that_ends_makes_no_file_for_what_comes_next(folder, daemon, quick, monkeypatch):
    made: list[Journal] = []
    monkeypatch.setattr(Journal, "prepare", lambda journal: bool(made.append(journal)))
    rank = Rank(folder)
    rank.log(5)
    rank.sender.end()
    rank.sender.start()
    rank.end()

    assert made == []
    assert daemon.kept == {SESSION: rank.logged}


def test_losses_are_told_when_the_session_ends(daemon, new_rank):
    rank = new_rank()
    assert not rank.journal.append(bytes(2 * FILE_BYTES))
    rank.log(5)
    rank.end()

    assert daemon.detached == {SESSION: 1}


def test_the_mlflow_run_id_is_told_at_the_attachment_or_as_news(daemon, new_rank):
    rank = new_rank()
    wait_until(lambda: rank.sender.state is State.SENDING, "attached")
    assert rank.told == []

    news = messages.pack_map({"session": SESSION, "mlflow_run_id": "abc"})
    daemon.say(SESSION, messages.NEWS, news)
    wait_until(lambda: rank.told, "told")
    daemon.mlflow_run_id = "def"
    daemon.say(SESSION, messages.UNKNOWN, SESSION)
    wait_until(lambda: len(rank.told) >= 2, "told again")

    assert rank.told == ["abc", "def"]


def test_a_rank_with_nothing_to_say_says_that_it_lives(daemon, new_rank, monkeypatch):
    monkeypatch.setattr(sender, "ALIVE_EVERY_S", 0.05)
    new_rank()
    daemon.wait_for(messages.ALIVE, times=3)

    assert all(payload == SESSION for kind, payload in daemon.seen if kind == messages.ALIVE)


# ── acks that do not come ──


def test_what_is_not_acknowledged_is_sent_again_after_a_while(daemon, new_rank, quick):
    daemon.acks = False
    rank = new_rank()
    rank.log(10)
    daemon.wait_for_records(10)
    daemon.kept.clear()  # it was never synced, and the daemon has forgotten it
    daemon.acks = True
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


def test_a_lost_ack_costs_no_second_sending(daemon, new_rank, quick):
    daemon.acks = False
    rank = new_rank()
    rank.log(10)
    daemon.wait_for_records(10)
    wait_until_acked(rank)  # by the answer to the next attachment

    assert daemon.count(messages.DATA) == 1
    assert daemon.count(messages.ATTACH) >= 2


def test_no_more_is_under_way_than_the_window_allows(daemon, new_rank):
    daemon.acks = False
    rank = new_rank()
    rank.log(900, size=7000)
    wait_until(lambda: rank.journal.in_flight_bytes >= sender.WINDOW_BYTES, "the window is full")

    assert rank.journal.in_flight_bytes < sender.WINDOW_BYTES + (150 << 10)
    assert rank.journal.unacked == 900
    daemon.acks = True
    rank.end()
    assert daemon.kept[SESSION] == rank.logged


def test_an_ack_makes_the_sender_send_only_where_a_frame_is_full(daemon, new_rank, monkeypatch):
    """A frame for each ack, and an ack for each frame: such a game takes a core from the training."""
    rank = new_rank()
    rank.log()
    wait_until_acked(rank)
    monkeypatch.setattr(sender, "LOOK_EVERY_S", 3600)
    wait_until(lambda: rank.sender._look_at > monotonic() + 60, "no look is due in this test")

    rank.log(5)
    daemon.say(SESSION, messages.ACK, messages.pack_ack(SESSION, 1))
    news = messages.pack_map({"session": SESSION, "mlflow_run_id": "abc"})
    daemon.say(SESSION, messages.NEWS, news)
    wait_until(lambda: rank.told, "the ack is read, and what came behind it")
    assert rank.journal.unacked == 5

    rank.log(2000, size=1000)
    daemon.say(SESSION, messages.ACK, messages.pack_ack(SESSION, 1))
    wait_until(lambda: rank.journal.acked > 1500, "full frames are sent")
    rank.log()
    rank.sender.wake()
    wait_until_acked(rank)


def test_every_third_ack_lost_and_nothing_is_lost_or_doubled(daemon, new_rank, quick):
    rank = new_rank()
    for number in range(60):
        daemon.acks = number % 3 != 0
        rank.log(20)
        daemon.wait_for_records(len(rank.logged))
    daemon.acks = True
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


# ── daemons that come and go ──


def test_a_daemon_that_does_not_know_the_session_is_told_again(daemon, new_rank):
    rank = new_rank()
    rank.log(10)
    wait_until_acked(rank)
    daemon.say(SESSION, messages.UNKNOWN, SESSION)
    daemon.wait_for(messages.ATTACH, times=2)
    rank.log(10)
    rank.end()

    assert daemon.kept[SESSION] == rank.logged
    assert daemon.cards[SESSION]["first_seq"] == 10


@pytest.mark.parametrize("remembered", [0, 3, 5, 10])
def test_a_daemon_that_is_killed_and_comes_back_with_what_it_had_synced(
    socket, new_rank, monkeypatch, remembered
):
    """It may have synced a frame whose ack was lost; or have lost one that it had received."""
    monkeypatch.setattr(sender, "ACK_TIMEOUT_S", 60.0)  # the first one must not be asked again
    monkeypatch.setattr(sender, "ALIVE_EVERY_S", 0.2)  # the second one may get nothing else
    with FakeDaemon(socket) as first:
        first.acks = False
        rank = new_rank()
        for number in range(10):
            rank.log(1)
            first.wait_for_records(number + 1)  # frames of one record each
    with FakeDaemon(socket, kept={SESSION: rank.logged[:remembered]}) as second:
        rank.log(10)
        rank.end()

        assert second.kept[SESSION] == rank.logged


def test_twenty_restarts_under_load_lose_and_double_nothing(socket, new_rank, quick):
    rank = new_rank()
    kept: dict[bytes, list[bytes]] = {}
    for number in range(20):
        with FakeDaemon(socket, kept) as daemon:
            rank.log(50)
            daemon.wait_for_records(number * 50 + 10)
            rank.log(1)
        kept = dict(daemon.kept)
        assert daemon.bad == []
    with FakeDaemon(socket, kept) as daemon:
        rank.end()

        assert daemon.kept[SESSION] == rank.logged


def test_an_attachment_that_is_answered_twice_does_not_stop_the_delivery(daemon, new_rank, quick):
    """A daemon that was busy answers every attachment that was asked for meanwhile; the second
    answer comes when frames are under way already, and these are then cut anew."""
    daemon.acks = False
    rank = new_rank()
    daemon.wait_for(messages.ATTACH)
    late = daemon.attached(SESSION, next_seq=0)
    for number in range(5):
        rank.log(3)
        daemon.wait_for_records(3 * number + 3)
        daemon.say(SESSION, messages.ATTACHED, late)
    daemon.acks = True
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


def test_a_daemon_that_has_half_of_what_is_now_one_frame_gets_the_other_half(
    daemon, new_rank, quick
):
    daemon.attaches = False
    rank = new_rank()
    rank.log(10)
    daemon.wait_for(messages.ATTACH)
    daemon.acks = False
    daemon.say(SESSION, messages.ATTACHED, daemon.attached(SESSION, next_seq=0))
    daemon.wait_for_records(10)  # one frame of ten is under way
    daemon.kept[SESSION] = daemon.kept[SESSION][:4]  # cut by an earlier life
    daemon.attaches = daemon.acks = True
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


def test_a_refusal_is_said_once_and_asked_about_again(daemon, new_rank, quick, caplog):
    daemon.refuses = "the run is of another cluster"
    rank = new_rank()
    rank.log(5)
    daemon.wait_for(messages.ATTACH, times=3)
    said = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert [each.getMessage() for each in said] == [
        "the daemon refuses this session: the run is of another cluster"
    ]
    assert rank.sender.state is State.REFUSED
    assert daemon.count(messages.DATA) == 0

    daemon.refuses = ""
    rank.end()
    assert daemon.kept[SESSION] == rank.logged


def test_a_lost_answer_to_the_end_is_asked_for_again(daemon, new_rank, quick):
    daemon.detaches = False
    rank = new_rank()
    rank.log(5)
    rank.sender.end()
    daemon.wait_for(messages.DETACH, times=3)
    assert not rank.sender.over.is_set()

    daemon.detaches = True
    rank.end()
    assert daemon.detached == {SESSION: 0}


def test_a_session_that_the_daemon_closed_by_itself_attaches_again(daemon, new_rank, quick):
    rank = new_rank()
    rank.log(5)
    wait_until_acked(rank)
    daemon.say(SESSION, messages.DETACHED, SESSION)
    daemon.wait_for(messages.ATTACH, times=2)
    rank.log(5)
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


# ── noise ──

NOISE = {
    "no kind": (b"?", b"noise"),
    "empty": (b"", b""),
    "short ack": (messages.ACK, b"short"),
    "ack of another": (messages.ACK, messages.pack_ack(OTHER, 99)),
    "ack of nothing": (messages.ACK, messages.pack_ack(SESSION, 0)),
    "unknown other": (messages.UNKNOWN, OTHER),
    "detached other": (messages.DETACHED, OTHER),
    "no map": (messages.ATTACHED, b"\xff\xff"),
    "no session": (messages.ATTACHED, messages.pack_map({"next_seq": 5})),
    "of another": (
        messages.ATTACHED,
        messages.pack_map({"session": OTHER, "next_seq": 99, "mlflow_run_id": "x"}),
    ),
    "no number": (
        messages.ATTACHED,
        messages.pack_map({"session": SESSION, "next_seq": "x", "mlflow_run_id": None}),
    ),
    "nil for a number": (
        messages.ATTACHED,
        messages.pack_map({"session": SESSION, "next_seq": None, "mlflow_run_id": None}),
    ),
    "infinite number": (
        messages.ATTACHED,
        messages.pack_map({"session": SESSION, "next_seq": float("inf"), "mlflow_run_id": None}),
    ),
    "negative number": (
        messages.ATTACHED,
        messages.pack_map({"session": SESSION, "next_seq": -5, "mlflow_run_id": None}),
    ),
    "no id": (messages.NEWS, messages.pack_map({"session": SESSION})),
    "later version": (messages.NEWS, b"\x81\xa1v\x63"),
    "refusal without a reason": (messages.REFUSED, messages.pack_map({"session": SESSION})),
}


@pytest.mark.parametrize(("kind", "payload"), NOISE.values(), ids=NOISE)
def test_noise_from_the_daemon_disturbs_nothing(daemon, new_rank, quick, kind, payload):
    rank = new_rank()
    rank.log(5)
    wait_until_acked(rank)
    daemon.say(SESSION, kind, payload)
    rank.log(5)
    wait_until(lambda: not daemon._answers, "it is said")
    rank.end()

    assert daemon.kept[SESSION] == rank.logged
    assert rank.told == []


def test_an_ack_of_more_than_was_sent_frees_nothing_that_was_not_sent(daemon, new_rank, quick):
    daemon.acks = False
    rank = new_rank()
    rank.log(5)
    daemon.wait_for_records(5)
    daemon.say(SESSION, messages.ACK, messages.pack_ack(SESSION, 1 << 40))
    daemon.acks = True
    rank.log(5)
    rank.end()

    assert daemon.kept[SESSION] == rank.logged


# ── help, and losses ──


def test_help_is_asked_for_once_where_no_daemon_answers(new_rank):
    asked: list[int] = []
    rank = new_rank(on_no_daemon=lambda: asked.append(1))
    wait_until(lambda: asked, "help is asked for")
    rank.log(5)
    before = rank.sender._look_at
    wait_until(lambda: rank.sender._look_at > before + 1, "some more attempts")

    assert asked == [1]


def test_no_help_is_asked_for_where_a_daemon_answers(daemon, new_rank, monkeypatch):
    monkeypatch.setattr(sender, "ALIVE_EVERY_S", 0.1)
    asked: list[int] = []
    rank = new_rank(on_no_daemon=lambda: asked.append(1))
    daemon.wait_for(messages.ALIVE, times=8)  # far longer than the patience with no daemon
    rank.end()

    assert asked == []


def test_losses_are_logged_once_a_minute_and_counted_in_full(new_rank, caplog):
    rank = new_rank()
    for _ in range(3):
        assert not rank.journal.append(bytes(2 * FILE_BYTES))
    wait_until(lambda: caplog.records, "said")
    for _ in range(4):
        assert not rank.journal.append(bytes(2 * FILE_BYTES))
    before = rank.sender._look_at
    wait_until(lambda: rank.sender._look_at > before + 0.1, "some more turns")

    (said,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "the journal is full" in said.getMessage()
    assert "MLFLOW_RELAY_JOURNAL_BYTES_MAX" in said.getMessage()
    assert rank.journal.lost == 7


def test_the_sender_gives_back_what_it_opened(daemon, new_rank):
    rank = new_rank()
    rank.end()
    before = len(os.listdir("/proc/self/fd"))

    again = Rank(daemon.socket.parent)
    again.sender.start()
    again.end()
    again.sender.join()
    again.sender.let_go()

    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "all is closed again")
