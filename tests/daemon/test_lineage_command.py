"""The tree of a run, links by hand in the run's card, and what status says of links that wait."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay.messages import pack_map, unpack_map
from mlflow_relay_daemon import settings_file
from mlflow_relay_daemon.cli import cli
from mlflow_relay_daemon.commands._family import Family, everyone, top_of
from mlflow_relay_daemon.commands._tree import Words
from mlflow_relay_daemon.commands.status import waiting_links
from mlflow_relay_daemon.control import Control
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.lane import by_hand
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool.card import Card, Link, SessionCard
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.states import RunState
from mlflow_relay_daemon.status import read_spool, run_status

A, B, C, D = (letter * 32 for letter in "abcd")


# ── runs in a spool ──


class FullDisk(Disk):
    """A disk that can be full."""

    is_full = False

    def replace(self, *arguments: Any, **options: Any) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().replace(*arguments, **options)


@pytest.fixture
def disk() -> FullDisk:
    return FullDisk()


@pytest.fixture
def spool(tmp_path: Path, disk: FullDisk) -> Iterator[Spool]:
    spool = Spool(disk, tmp_path / "spool", segment_bytes_max=1 << 20)
    yield spool
    spool.close()


def a_card(run_id: str = A, **changes: Any) -> Card:
    """Return the card of a run on one node that has been delivered."""
    plain = {
        "run_id": run_id, "run_key": "key", "experiment_name": "aifs", "run_name": "o96",
        "start_ms": 0, "world_size": 1, "tags": {}, "node_count": 1, "state": RunState.OPEN,
        "mlflow_run_id": "1" * 24 + run_id[:8], "experiment_id": "1",
    }  # fmt: skip
    return Card(**{**plain, **changes})


def a_run(spool: Spool, run_id: str = A, **changes: Any) -> RunSpool:
    return spool.open_run(a_card(run_id, **changes))


def on_disk(run: RunSpool) -> Card:
    return cards.read(run.folder)


# ── which links wait ──


@pytest.mark.parametrize(
    ("changes", "waiting"),
    [
        ({}, []),
        ({"parent": Link(B)}, [B]),
        ({"parent": Link(B), "fork": Link(C)}, [B, C]),
        ({"parent": Link(B), "fork": Link(B)}, [B, B]),
        ({"parent": Link(B, D, is_told=True), "fork": Link(C)}, [C]),
        ({"parent": Link(B, D)}, []),  # known; being told
        ({"parent": Link(B, is_dropped=True), "fork": Link(C, is_dropped=True)}, []),
        ({"parent": Link(B), "resume_mode": "same", "state": RunState.NEW}, [B]),
        ({"parent": Link(B), "resume_mode": "same"}, []),
        # Not the node of rank 0: another one tells the links.
        ({"parent": Link(B), "fork": Link(C), "node_count": 2}, []),
        ({"parent": Link(B), "node_count": 2, "held": [["tag", "of", B]]}, [B]),
        ({"parent": Link(B), "held": [["tag", "of", B], ["tag", "other", C]]}, [B]),
        ({"held": [["tag", "of", C]]}, []),
        (
            {
                "parent": Link(B),
                "node_count": 2,
                "resume_mode": "same",
                "state": RunState.NEW,
            },
            [B],
        ),
    ],
)
def test_a_link_waits_until_its_run_is_known(changes: dict[str, Any], waiting: list[str]) -> None:
    assert [link.asked for link in a_card(**changes).waiting_links()] == waiting


def test_the_node_of_rank_0_tells_the_links() -> None:
    card = a_card(parent=Link(B), node_count=2)
    assert card.waiting_links() == []
    card.sessions["00"] = SessionCard(rank=0, node="n", pid=1, primary=True, start_ms=0)
    assert [link.asked for link in card.waiting_links()] == [B]


def test_status_names_what_a_run_waits_for(spool: Spool, tmp_path: Path) -> None:
    run = a_run(spool, parent=Link(B), fork=Link(C, D, is_told=True))
    shown = run_status(run, 0)
    assert shown["waits_for"] == [B]
    assert shown["lineage"] == {
        "resume_mode": "child",
        "resumes": {
            "asked": B, "mlflow_run_id": None, "told": False, "dropped": False, "by_hand": False,
        },
        "forks": {
            "asked": C, "mlflow_run_id": D, "told": True, "dropped": False, "by_hand": False,
        },
    }  # fmt: skip
    run.save_card()
    [from_spool] = read_spool(tmp_path / "spool")["runs"]
    assert (from_spool["waits_for"], from_spool["lineage"]) == ([B], shown["lineage"])


def test_a_run_whose_card_cannot_be_read_has_all_fields_of_the_others(
    spool: Spool, tmp_path: Path
) -> None:
    run = a_run(spool)
    run.save_card()
    other = tmp_path / "spool" / "runs" / B
    other.mkdir()
    (other / cards.NAME).write_text("{")
    shown = read_spool(tmp_path / "spool")["runs"]
    assert len(shown) == 2
    assert set(shown[0]) == set(shown[1])
    assert set(shown[0]["lineage"]) == set(shown[1]["lineage"])


# ── links by hand ──


def test_a_link_by_hand_is_on_the_disk_at_once(spool: Spool) -> None:
    run = a_run(spool, parent=Link(B, is_waiting=True))
    assert by_hand.link(run, C) == ("resume", B, C)
    assert on_disk(run).parent == Link(C, is_by_hand=True)


def test_of_two_links_the_parent_is_meant_unless_the_fork_is_named(spool: Spool) -> None:
    run = a_run(spool, parent=Link(B), fork=Link(B))
    assert by_hand.link(run, C, "fork") == ("fork", B, C)
    assert by_hand.link(run, D) == ("resume", B, D)
    only_fork = a_run(spool, B, parent=Link(C, D, is_told=True), fork=Link(C))
    assert by_hand.link(only_fork, A) == ("fork", C, A)


def test_one_that_waits_is_meant_before_one_that_was_given_up(spool: Spool) -> None:
    run = a_run(spool, parent=Link(B, is_dropped=True), fork=Link(C))
    assert by_hand.link(run, D) == ("fork", C, D)
    assert by_hand.link(run, D, "resume") == ("resume", B, D)
    assert not on_disk(run).is_origin


def test_dropping_gives_up_all_that_waits_and_nothing_else(spool: Spool) -> None:
    run = a_run(spool, parent=Link(B), fork=Link(C, D, is_told=True), is_introduced=False)
    assert by_hand.drop(run) == [("resume", B, "")]
    card = on_disk(run)
    assert card.is_origin
    assert card.fork == Link(C, D, is_told=True)
    with pytest.raises(ValueError, match="was given up"):
        by_hand.drop(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "it resumes no run and is no fork"),
        ({"parent": Link(B, D, is_told=True)}, f"it resumes {D}"),
        ({"fork": Link(B, D, is_told=True)}, f"it is a fork of {D}"),
        ({"parent": Link(B), "node_count": 2}, "node of rank 0"),
        ({"parent": Link(B, is_dropped=True), "resume_mode": "same"}, "was given up"),
    ],
)
def test_where_nothing_waits_it_says_why(spool: Spool, changes: dict[str, Any], words: str) -> None:
    run = a_run(spool, **changes)
    for decide in (lambda: by_hand.link(run, C), lambda: by_hand.drop(run)):
        with pytest.raises(ValueError, match=words):
            decide()


@pytest.mark.parametrize("to", ["", "0123", "g" * 32, 7, None])
def test_a_link_goes_to_an_id(spool: Spool, to: object) -> None:
    run = a_run(spool, parent=Link(B))
    with pytest.raises((ValueError, TypeError), match="run id"):
        by_hand.link(run, to)
    assert run.card.parent == Link(B)


def test_a_card_that_cannot_be_written_stays_as_it_was(spool: Spool, disk: FullDisk) -> None:
    run = a_run(spool, parent=Link(B, is_waiting=True), fork=Link(C), is_introduced=True)
    before = cards.pack(run.card)
    disk.is_full = True
    for decide in (lambda: by_hand.link(run, D), lambda: by_hand.drop(run)):
        with pytest.raises(OSError, match="No space"):
            decide()
        assert cards.pack(run.card) == before


def test_a_card_of_an_earlier_release_has_no_link_by_hand() -> None:
    fields = json.loads(cards.pack(a_card(parent=Link(B))))
    del fields["parent"]["is_by_hand"], fields["crc"]
    assert cards.unpack(json.dumps(fields).encode()).parent == Link(B)


# ── the daemon's answers ──


def an_offline_daemon(spool: Spool) -> Control:
    runs = Runs(spool, None, None, None, LineageParams())
    return Control(runs, dict, lambda: None, lambda _: 0)


def ask(control: Control, **request: Any) -> dict[str, Any]:
    payload = control.answer(b"peer", pack_map({"command": "lineage", **request}))
    assert payload is not None, "answered at once"
    return {key: value for key, value in unpack_map(payload).items() if key != "v"}


def test_the_daemon_links_and_drops(spool: Spool) -> None:
    run = a_run(spool, parent=Link(B))
    control = an_offline_daemon(spool)
    answer = ask(control, action="link", run=A, to=C, kind=None)
    assert answer == {"ok": True, "links": [{"kind": "resume", "asked": B, "to": C}]}
    answer = ask(control, action="drop", run=A)
    assert answer == {"ok": True, "links": [{"kind": "resume", "asked": C, "to": ""}]}
    assert on_disk(run).is_origin


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"action": "link", "run": A, "to": A}, "its own parent"),
        ({"action": "link", "run": A, "to": C, "kind": "cousin"}, "resume, fork"),
        ({"action": "link", "run": A}, "to"),
        ({"action": "link", "run": D, "to": C}, D),
        ({"action": "burn", "run": A}, "link, drop or relatives"),
        ({"action": "drop"}, "run"),
        ({"action": "relatives", "ids": [A]}, "cannot be asked now"),
        ({"action": "relatives"}, "ids"),
    ],
)
def test_the_daemon_refuses_what_cannot_be(
    spool: Spool, request_: dict[str, Any], words: str
) -> None:
    a_run(spool, parent=Link(B))
    answer = ask(an_offline_daemon(spool), **request_)
    assert answer["ok"] is False
    assert words in answer["error"]


def test_a_full_disk_is_an_answer_and_no_end_of_the_daemon(spool: Spool, disk: FullDisk) -> None:
    a_run(spool, parent=Link(B))
    control = an_offline_daemon(spool)
    disk.is_full = True
    answer = ask(control, action="drop", run=A)
    assert answer["ok"] is False
    assert "No space left" in answer["error"]


# ── the tree ──


def shown(
    run_id: str,
    resumes: str | None = None,
    fork: str | None = None,
    mode: str = "child",
    **changes: Any,
) -> dict[str, Any]:
    """Return a run of the status object; its links wait."""
    links = {
        name: None
        if asked is None
        else {
            "asked": asked,
            "mlflow_run_id": None,
            "told": False,
            "dropped": False,
            "by_hand": False,
        }
        for name, asked in (("resumes", resumes), ("forks", fork))
    }
    return {
        "run_id": run_id, "mlflow_run_id": None, "run_name": "o96", "status": "RUNNING",
        "start_ms": 0, "url": None, "waits_for": [each for each in (resumes, fork) if each],
        "lineage": {"resume_mode": mode, **links}, "state": "running", **changes,
    }  # fmt: skip


def drawn(family: Family, identifier: str) -> list[str]:
    """Return the lines of the tree of a run."""
    from rich.console import Console

    chosen = family.at(identifier)
    console = Console(width=1000, color_system=None)
    with console.capture() as capture:
        console.print(Words(family, chosen, server_was_asked=False).tree(top_of(chosen)))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_run_without_kin_is_a_tree_of_one() -> None:
    assert drawn(Family([shown(A, mlflow_run_id=B)]), A) == [
        f"o96  {A[:8]}  MLflow {B[:8]}  running  ◀"
    ]


def test_a_run_of_a_daemon_that_tells_no_lineage_is_drawn() -> None:
    run = shown(A)
    del run["lineage"], run["waits_for"]
    assert drawn(Family([run]), A) == [f"o96  {A[:8]}  not in MLflow yet  ◀"]


def test_escape_sequences_of_names_do_not_reach_the_terminal() -> None:
    [line] = drawn(Family([shown(A, run_name="\x1b[31mred\n[bold]x")]), A)
    assert line.startswith("[31mred [bold]x")


IDS = [f"{number:032x}" for number in range(7)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*IDS, None]),
            st.sampled_from([*IDS, None]),
            st.sampled_from(["child", "same"]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_resumes_whatever_every_run_is_drawn_once(
    links: list[tuple[str | None, str | None, str]],
) -> None:
    runs = [
        shown(IDS[number], resumes, fork, mode)
        for number, (resumes, fork, mode) in enumerate(links)
    ]
    family = Family(runs)
    for run in runs:
        chosen = family.at(run["run_id"])
        members = list(everyone(top_of(chosen)))
        places = [each.run_id for each in members if not each.is_mention]
        assert places.count(chosen.run_id) == 1, "it stands in its own tree"
        names = [each.name for each in members if not each.is_mention]
        assert len(names) == len(set(names)), "and nobody stands there twice"


def test_the_server_adds_what_the_spool_does_not_know() -> None:
    def of_server(mlflow_run_id: str, **changes: Any) -> dict[str, Any]:
        plain = {
            "run_id": None, "mlflow_run_id": mlflow_run_id, "run_name": "other", "deleted": False,
            "status": "FINISHED", "start_ms": 0, "resumes": None, "forks": None, "waits_for": None,
            "url": None,
        }  # fmt: skip
        return {**plain, **changes}

    here = shown(A, B, mlflow_run_id="1" * 32)
    known = of_server("1" * 32, run_id=A, run_name="the same run again")
    family = Family([here], [of_server(C, run_id=B), of_server(D, resumes=C), known])
    assert drawn(family, A) == [
        f"other  {B[:8]}  MLflow {C[:8]}  finished  not of this spool",
        (
            f"├── o96  {A[:8]}  MLflow 11111111  running  "
            f"waits for other {B[:8]}…, which is known: linked when the server is asked  ◀"
        ),
        f"└── other  MLflow {D[:8]}  finished  not of this spool",
    ]


# ── what status says ──


@pytest.mark.parametrize(
    ("run", "server", "words"),
    [
        (shown(A, B, mlflow_run_id=C), "up", "is to be linked to bbbbbbbb…"),
        (shown(A, B, mlflow_run_id=C), "down", "is to be linked to bbbbbbbb…"),
        (shown(A, B, C, mlflow_run_id=C), "up", "bbbbbbbb… and cccccccc…"),
        (shown(A, B, mode="same"), "up", "goes on with bbbbbbbb…"),
        (shown(A, B, mode="same"), "down", None),  # nobody has been asked
        (shown(A, B), "offline", None),
        (shown(A, mlflow_run_id=C), "up", None),
    ],
)
def test_status_notes_a_link_that_waits_and_what_to_do(
    run: dict[str, Any], server: str, words: str | None
) -> None:
    notes = waiting_links({"server": {"state": server}, "runs": [run]})
    if words is None:
        assert notes == []
        return
    [note] = notes
    assert words in note
    assert f"mlflow-relay lineage link {A[:8]} PARENT" in note
    assert f"mlflow-relay lineage drop {A[:8]}" in note


# ── the command line ──


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["o96"], "o96"),
        (["--json", "o96"], "o96"),
        (["o96", "--json"], "o96"),
        (["show", "o96"], "o96"),
        (["show", "link"], "link"),
        (["show", "show"], "show"),
    ],
)
def test_the_first_word_is_a_run_or_a_command(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str
) -> None:
    a_run(spool, run_name=name).save_card()
    a_run(spool, B, run_name="another").save_card()
    monkeypatch.setenv("MLFLOW_RELAY_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("MLFLOW_RELAY_SOCKET", str(tmp_path / "no.sock"))
    monkeypatch.setattr(settings_file, "SYSTEM_FILE", tmp_path / "etc.toml")
    result = CliRunner().invoke(cli, ["lineage", *arguments])
    assert result.exit_code == 0, result.output
    shown_json = "--json" in arguments
    assert (f'"id": "{A}"' if shown_json else f"{name}  {A[:8]}") in result.output
    assert "another" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lineage", "link", "o96"], "PARENT"),
        (["lineage", "drop"], "CHILD"),
        (["lineage", "one", "two"], "two"),
        (["lineage", "o96", "--jsn"], "--json"),
    ],
)
def test_a_usage_error_is_one_line_and_64(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 64
    assert words in result.output
    assert result.output.count("\n") == 1
