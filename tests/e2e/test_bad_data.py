"""Bad data from a rank: an error at the call or a dead letter with the reason, and every neighbour
arrives. MLflow's server answers 200 and drops what follows a wrong type, so all is read back.

`play` checks the neighbours: after each attempt a metric, a param and a tag that are good.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
from collections import Counter

import pytest

from tests.support.proxy import hold
from tests.support.relay import Node, finish, last_json
from tests.support.scenes import (
    dead_letters,
    fresh_name,
    in_order,
    play,
    stored,
    wait_for,
)

#: Names that MLflow refuses (mlflow.utils.validation), for metrics, params and tags alike.
BAD_NAMES = [
    *("at@sign", "com,ma", "open[", "close]", "equal=s", "per%cent", "new\nline"),
    *("double//slash", "/first", "last/", "../up", "n" * 300),
]


@pytest.fixture(scope="module")
def nodes():
    """The living node of all tests here; at most one."""
    with contextlib.ExitStack() as stack:
        yield stack, []


@pytest.fixture
def node(nodes, tmp_path_factory, mlflow_server):
    """The node of the test before, unless that one ended its daemon, which nothing may."""
    stack, living = nodes
    if not living:
        living.append(stack.enter_context(Node(tmp_path_factory.mktemp("n"), mlflow_server.uri)))
        living[0].start()
    yield living[0]
    if living[0].daemon.poll() is not None:
        last_words = living.pop().log.read_text()[-2000:]
        pytest.fail(f"no data may end the daemon:\n{last_words}")


def kinds_and_keys(letters):
    return sorted((letter["kind"], letter["key"]) for letter in letters)


# ── names ──


@pytest.mark.parametrize("kind", ["metric", "param", "tag"])
def test_a_name_that_mlflow_refuses_is_a_dead_letter_and_its_neighbours_arrive(
    node, mlflow_server, kind
):
    call = {"metric": "log_metrics", "param": "log_params", "tag": "set_tags"}[kind]
    tried = play(
        node,
        mlflow_server,
        f"""
        for index, name in enumerate({BAD_NAMES!r}):
            attempt(run.{call}, {{f"before {{index}}": 1, name: 2, f"behind {{index}}": 3}})
        """,
    )
    assert tried.results == [[None] * len(BAD_NAMES)]
    assert kinds_and_keys(tried.letters) == sorted((kind, name) for name in BAD_NAMES)
    for letter in tried.letters:
        assert letter["error_code"] == "INVALID_PARAMETER_VALUE"
        too_long = "maximum length of 250" in letter["reason"]
        assert too_long == (len(letter["key"]) == 300)
        assert too_long or json.dumps(letter["key"]) in letter["reason"]
    around = {f"{where} {i}": n for i in range(len(BAD_NAMES)) for where, n in PLACES}
    if kind == "metric":
        assert tried.stored.points == in_order([(key, float(n), 0) for key, n in around.items()])
        assert {letter["value"] for letter in tried.letters} == {2.0}
    else:
        texts = {key: str(n) for key, n in around.items()}
        assert (tried.stored.params if kind == "param" else tried.stored.tags) == texts
        assert {letter["value"] for letter in tried.letters} == {"2"}


PLACES = [("before", 1), ("behind", 3)]


def test_three_thousand_bad_points_among_good_ones_are_dead_letters_and_every_good_one_arrives(
    node, mlflow_server
):
    """Of 500 names: MLflow is asked twice or so for each, half of all requests of this file."""
    tried = play(
        node,
        mlflow_server,
        """
        for call in range(300):
            bad = {f"bad@{call % 50}.{n}": n for n in range(10)}
            attempt(run.log_metrics, {"first": call, **bad, "last": -call}, step=call)
        """,
    )
    assert tried.results == [[None] * 300]
    wanted = Counter(
        (f"bad@{call % 50}.{n}", float(n), call) for call in range(300) for n in range(10)
    )
    assert Counter((each["key"], each["value"], each["step"]) for each in tried.letters) == wanted
    assert all(json.dumps(letter["key"]) in letter["reason"] for letter in tried.letters)
    assert tried.stored.points == in_order(
        [(key, sign * call, call) for call in range(300) for key, sign in SIGNS]
    )


SIGNS = [("first", 1.0), ("last", -1.0)]


def test_ten_thousand_keys_in_one_call_arrive(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        'attempt(run.log_metrics, {f"channel/{n:05d}": n / 8 for n in range(10_000)}, step=3)',
    )
    assert tried.results == [[None]]
    assert tried.stored.points == [(f"channel/{n:05d}", n / 8, 3) for n in range(10_000)]
    assert tried.letters == []


def test_a_key_that_is_none_is_an_error_at_the_call_that_names_it(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        r"""
        for key in ("", 7, None, b"bytes", ("tu", "ple"), "sur\udc80rogate"):
            for call in (run.log_metrics, run.log_params, run.set_tags):
                attempt(call, {"beside": 1, key: 2})
        """,
    )
    (results,) = tried.results
    assert [kind for kind, _ in results] == [
        *["ValueError"] * 3, *["TypeError"] * 12, *["ValueError"] * 3
    ]  # fmt: skip
    named = ["empty", "7", "None", "b'bytes'", "('tu', 'ple')", r"sur\udc80rogate"]
    for index, (_, text) in enumerate(results):
        assert named[index // 3] in text
        assert ("metric", "param", "tag")[index % 3] in text
    # A call that raises has logged nothing.
    assert tried.stored.points == []
    assert tried.stored.params == {}
    assert tried.stored.tags == {}
    assert tried.letters == []


def test_nothing_to_log_is_no_error(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        for call in (run.log_metrics, run.log_params, run.set_tags):
            attempt(call, {})
        """,
    )
    assert tried.results == [[None] * 3]
    assert tried.letters == []


# ── values ──


def test_numbers_of_every_kind_arrive_and_what_is_none_is_an_error_that_names_key_and_value(
    node, mlflow_server
):
    tried = play(
        node,
        mlflow_server,
        """
        import decimal, fractions
        import numpy

        good = [
            float("nan"), float("inf"), float("-inf"), True, False, 7, 10**300,
            numpy.float32(0.1), numpy.array(2.5), numpy.array([3.5]), numpy.int64(-4),
            numpy.bool_(True), decimal.Decimal("0.25"), fractions.Fraction(1, 8), -0.0,
            5e-324, 1.7976931348623157e308,
        ]
        for index, value in enumerate(good):
            attempt(run.log_metrics, {f"value {index:02d}": value}, step=0)
            attempt(run.log_metrics, {f"count {index:02d}": value})
        for value in (10**400, None, "0.5", b"1", [1.0], {}, 1j, object, numpy.array([1.0, 2.0])):
            attempt(run.log_metrics, {"beside": 1.0, "wrong": value}, step=0)
            attempt(run.log_metrics, {"beside": 1.0, "wrong": value})
        """,
    )
    (results,) = tried.results
    assert results[:34] == [None] * 34
    values = {key: value for key, value, _ in tried.stored.points}
    assert len(tried.stored.points) == len(values) == 34  # nothing of a call that raised
    huge = 1.7976931348623157e308  # what MLflow makes of infinity
    wanted = [
        *(math.nan, huge, -huge, 1.0, 0.0, 7.0, 1e300, 0.10000000149011612, 2.5, 3.5, -4.0),
        *(1.0, 0.25, 0.125, 0.0, 5e-324, huge),
    ]
    for index, value in enumerate(wanted):
        for name in ("value", "count"):
            got = values[f"{name} {index:02d}"]
            assert got == value or (math.isnan(got) and math.isnan(value))
    shown = ["1000", "None", "'0.5'", "b'1'", "[1.0]", "{}", "1j", "object", "array([1., 2.])"]
    for index, (kind, text) in enumerate(results[34:]):
        assert kind == ("ValueError" if index < 2 else "TypeError")
        assert "'wrong'" in text
        assert shown[index // 2] in text
    assert tried.letters == []


def test_steps_of_64_bits_arrive_and_others_are_an_error_that_names_them(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        import numpy

        for step in (0, -1, 2**63 - 1, numpy.int32(7), numpy.uint8(8), 9.0, True):
            attempt(run.log_metrics, {"loss": 0.5}, step=step)
        for step in (2**63, -2**63 - 1, 1.5, float("nan"), float("inf"), "3", [4]):
            attempt(run.log_metrics, {"loss": 0.5}, step=step)
        """,
    )
    (results,) = tried.results
    assert results[:7] == [None] * 7
    assert tried.stored.points == in_order(
        [("loss", 0.5, step) for step in (0, -1, 2**63 - 1, 7, 8, 9, 1)]
    )
    shown = ["9223372036854775808", "-9223372036854775809", "1.5", "nan", "inf", "'3'", "[4]"]
    for text, (kind, said) in zip(shown, results[7:], strict=True):
        assert kind in ("ValueError", "TypeError")
        assert text in said
    assert tried.letters == []


def test_a_step_that_mlflow_cannot_keep_takes_no_other_step_of_its_key_with_it(
    tmp_path, mlflow_server
):
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = node.rank(
            """
            import sys, json, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
            told = []
            for step in (1, -(2**63), 2):
                try:
                    run.log_metrics({"loss": 0.5}, step=step)
                except (TypeError, ValueError) as error:
                    told.append(str(error))
                print(len(told), flush=True)
                sys.stdin.readline()
            run.end()
            """,
            fresh_name("steps"),
            fresh_name("key"),
        )
        errors = 0
        for call in (1, 2, 3):
            errors = int(rank.stdout.readline())
            wait_for(node, f"call {call} is dealt with", settled_records=call - errors)
            rank.stdin.write("\n")
            rank.stdin.flush()
        finish([rank])
        run = node.wait_until_ended()
        letters = [each["step"] for each in dead_letters(node, run["run_id"])]
        kept = [1, -(2**63), 2] if not errors and not letters else [1, 2]
        points = stored(mlflow_server, run["mlflow_run_id"]).points
        assert points == in_order([("loss", 0.5, step) for step in kept])
        assert letters in ([], [-(2**63)])


def test_texts_of_every_kind_arrive_and_what_is_none_is_an_error_that_names_its_key(
    node, mlflow_server
):
    tried = play(
        node,
        mlflow_server,
        r"""
        good = [7, 2.5, True, None, ["a", 1], {"b": 2}, float("nan"), "", "line\nbreak", "\x00"[:0],
                "naïve ☃ 😀", '"quoted" \\ back', "x" * 6000]
        for index, value in enumerate(good):
            attempt(run.log_param, f"param {index:02d}", value)
            attempt(run.set_tag, f"tag {index:02d}", value)

        class Bad:
            def __str__(self):
                raise RuntimeError("no text for this")

        for value in ("lone \udc80 surrogate", Bad(), "m" * 1_000_000):
            attempt(run.log_params, {"beside": 1, "wrong": value})
            attempt(run.set_tags, {"beside": 1, "wrong": value})
        """,
    )
    (results,) = tried.results
    assert results[:26] == [None] * 26
    texts = [
        *("7", "2.5", "True", "None", "['a', 1]", "{'b': 2}", "nan", "", "line\nbreak", ""),
        *("naïve ☃ 😀", '"quoted" \\ back', "x" * 6000),
    ]
    assert tried.stored.params == {f"param {i:02d}": text for i, text in enumerate(texts)}
    assert tried.stored.tags == {f"tag {i:02d}": text for i, text in enumerate(texts)}
    for kind, text in results[26:]:
        assert kind in ("ValueError", "TypeError", "RuntimeError")
        if kind != "RuntimeError":  # the user's own error is the better one
            assert "'wrong'" in text
    assert "surrogate" in results[26][1]
    assert "1000000" in results[30][1]
    assert tried.letters == []


def test_a_value_that_mlflow_would_cut_in_silence_is_kept_whole(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        attempt(run.log_param, "long", "p" * 6500 + "é" * 500)
        attempt(run.set_tag, "long", "t" * 9000)
        attempt(run.log_param, "huge", "h" * 500_000)
        attempt(run.log_param, "wide", "\\U0001F600" * 7000)
        """,
    )
    assert tried.results == [[None] * 4]
    assert tried.stored.params == {
        "long": "p" * 6000, "huge": "h" * 6000, "wide": "\U0001f600" * 6000
    }  # fmt: skip
    assert tried.stored.tags == {"long": "t" * 8000}
    letters = {(each["kind"], each["key"]): each for each in tried.letters}
    assert len(letters) == len(tried.letters) == 4
    assert letters["param", "long"]["value"] == "p" * 6500 + "é" * 500
    assert letters["tag", "long"]["value"] == "t" * 9000
    assert letters["param", "huge"]["value"] == "h" * 500_000
    assert letters["param", "wide"]["value"] == "\U0001f600" * 7000
    assert "6000 of its 7000" in letters["param", "long"]["reason"]
    assert "8000 of its 9000" in letters["tag", "long"]["reason"]
    # Offered again, MLflow would cut them again and say 200: the whole value must not go.
    run_id = tried.run["run_id"]
    retried = node.command("dead-letters", "retry", "--run", run_id)
    assert retried.returncode in (0, 1), retried.stderr
    still = {(each["kind"], each["key"]): each["value"] for each in dead_letters(node, run_id)}
    assert still == {place: letter["value"] for place, letter in letters.items()}


@pytest.mark.parametrize(
    "script",
    [
        'attempt(run.log_metrics, {"k" * 5_000_000: 1.0}, step=0)',
        'attempt(run.log_metrics, {"k" * 9_000_000: 1.0}, step=0)',
        'attempt(run.log_metrics, {"k" * 7000 + str(n): 1.0 for n in range(1000)}, step=0)',
        'attempt(run.log_params, {f"p{n}": "x" * 100_000 for n in range(50)})',
        'attempt(run.set_tags, {f"t{n}": "x" * 100_000 for n in range(100)})',
    ],
    ids=["key of 5 MB", "key of 9 MB", "keys of 7 MB", "params of 5 MB", "tags of 10 MB"],
)
def test_a_call_larger_than_a_record_is_an_error_or_arrives_and_holds_up_nothing(
    node, mlflow_server, script
):
    tried = play(node, mlflow_server, script)
    ((result,),) = tried.results
    everything = {"k", "p", "t"}
    if result is not None:
        assert result[0] == "ValueError"
        assert tried.stored.points == []
        assert tried.stored.params == tried.stored.tags == {}
        assert tried.letters == []
    else:
        arrived = [*tried.stored.points, *tried.stored.params, *tried.stored.tags]
        assert arrived or tried.letters
        assert {letter["key"][0] for letter in tried.letters} <= everything
        calls = {"log_metrics": 1, "log_params": 50, "set_tags": 100}
        entries = 1000 if "range(1000)" in script else next(
            n for name, n in calls.items() if name in script
        )  # fmt: skip
        found = {point[0] for point in tried.stored.points}
        found |= tried.stored.params.keys() | tried.stored.tags.keys()
        assert len(found | {letter["key"] for letter in tried.letters}) == entries


def test_250_params_in_one_call_and_a_tag_set_five_times(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        attempt(run.log_params, {f"option {n}": n for n in range(250)})
        attempt(run.set_tags, {f"mark {n}": n for n in range(250)})
        for value in "abcde":
            attempt(run.set_tag, "stage", value)
        """,
    )
    assert tried.results == [[None] * 7]
    assert tried.stored.params == {f"option {n}": str(n) for n in range(250)}
    assert tried.stored.tags == {**{f"mark {n}": str(n) for n in range(250)}, "stage": "e"}
    assert tried.letters == []


# ── params that change ──


def test_a_param_keeps_its_first_value_and_another_one_is_a_dead_letter(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        attempt(run.log_param, "lr", 0.1)
        attempt(run.log_param, "lr", 0.1)
        attempt(run.log_params, {"before": 1, "lr": 0.2, "behind": 3})
        """,
    )
    assert tried.results == [[None] * 3]
    assert tried.stored.params == {"lr": "0.1", "before": "1", "behind": "3"}
    (letter,) = tried.letters
    assert (letter["kind"], letter["key"], letter["value"]) == ("param", "lr", "0.2")
    assert "0.1" in letter["reason"]


def test_a_param_that_the_daemon_delivered_in_an_earlier_life_keeps_its_value(
    tmp_path, mlflow_server
):
    """The daemon that is started anew knows no params: it is MLflow that refuses then."""
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = node.rank(
            """
            import sys, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
            run.log_params({"lr": 0.1, "same": "s"})
            print(run.run_id, flush=True)
            sys.stdin.readline()
            run.log_params({"before": 1, "lr": 0.2, "same": "s", "behind": 3})
            run.log_metric("loss", 0.5, step=1)
            run.end()
            """,
            fresh_name("changed"),
            fresh_name("key"),
        )
        run_id = rank.stdout.readline().strip()
        wait_for(node, "the first params are delivered", delivered_records=1)
        node.kill()
        node.start()
        rank.stdin.write("go on\n")
        rank.stdin.flush()
        finish([rank])
        run = node.wait_until_ended(run_id)
        found = stored(mlflow_server, run["mlflow_run_id"])
        assert found.params == {"lr": "0.1", "same": "s", "before": "1", "behind": "3"}
        assert found.points == [("loss", 0.5, 1)]
        (letter,) = dead_letters(node, run_id)
        assert (letter["key"], letter["value"]) == ("lr", "0.2")
        assert letter["error_code"] == "INVALID_PARAMETER_VALUE"
        assert "Changing param values is not allowed" in letter["reason"]


def test_equal_params_of_four_ranks_are_one_and_different_ones_are_dead_letters(
    node, mlflow_server
):
    script = """
        attempt(run.log_params, {"layers": 12, "seed": rank, f"own {rank}": rank})
        attempt(run.log_param, "layers", 12)
        attempt(run.set_tag, "host", rank)
    """
    tried = play(node, mlflow_server, *[script] * 4)
    assert tried.results == [[None] * 3] * 4
    seed = tried.stored.params.pop("seed")
    assert tried.stored.params == {
        "layers": "12",
        **{f"own {rank}": str(rank) for rank in range(4)},
    }
    assert kinds_and_keys(tried.letters) == [("param", "seed")] * 3
    assert sorted([seed, *(letter["value"] for letter in tried.letters)]) == ["0", "1", "2", "3"]
    assert tried.stored.tags["host"] in ("0", "1", "2", "3")
    assert tried.run["ranks_seen"] == 4


# ── the dead letters' commands ──


def test_dead_letters_are_listed_tried_again_and_dropped(node, mlflow_server):
    tried = play(
        node,
        mlflow_server,
        """
        attempt(run.log_param, "lr", 0.1)
        attempt(run.log_param, "lr", 0.2)
        attempt(run.log_metrics, {"bad@key": float("nan")}, step=7)
        attempt(run.set_tag, "bad=tag", "value")
        """,
    )
    run_id, mlflow_run_id = tried.run["run_id"], tried.run["mlflow_run_id"]
    letters = {each["key"]: each for each in tried.letters}
    assert letters.keys() == {"lr", "bad@key", "bad=tag"}
    assert letters["bad@key"]["value"] == "nan"
    assert letters["bad@key"]["step"] == 7
    assert all(each["run_id"] == run_id for each in tried.letters)

    table = node.command("dead-letters", "list", "--run", run_id)
    assert table.returncode == 0
    assert len(table.stdout.strip().splitlines()) == 1 + 3
    for key, letter in letters.items():
        (line,) = [each for each in table.stdout.splitlines() if f" {key} " in each]
        assert letter["reason"][:40] in line

    # Nothing is mended: MLflow refuses them again, they stay, and the command does not claim else.
    retried = node.command("dead-letters", "retry", "--run", run_id)
    assert "no dead letters" not in retried.stdout
    assert sorted(each["id"] for each in dead_letters(node, run_id)) == sorted(
        each["id"] for each in tried.letters
    )

    # The param is taken out of MLflow's database, so that the other value fits.
    with contextlib.closing(sqlite3.connect(mlflow_server.database, timeout=30.0)) as database:
        database.execute("DELETE FROM params WHERE run_uuid = ? AND key = 'lr'", (mlflow_run_id,))
        database.commit()
    one = node.command(
        "dead-letters", "retry", "--run", run_id, "--id", str(letters["lr"]["id"]), "--json"
    )
    assert (one.returncode, json.loads(one.stdout)["count"]) == (0, 1)
    assert stored(mlflow_server, mlflow_run_id).params["lr"] == "0.2"
    assert {each["key"] for each in dead_letters(node, run_id)} == {"bad@key", "bad=tag"}

    unanswered = node.command("dead-letters", "drop", "--run", run_id)
    assert unanswered.returncode == 64  # nobody is there to be asked
    assert len(unanswered.stderr.strip().splitlines()) == 1
    dropped = node.command("dead-letters", "drop", "--run", run_id, "--yes", "--json")
    assert (dropped.returncode, json.loads(dropped.stdout)["count"]) == (0, 2)
    assert dead_letters(node, run_id) == []
    assert node.run(run_id)["dead_letters"] == 0
    assert node.command("dead-letters", "list", "--run", run_id).stdout == "no dead letters\n"


def test_dead_letters_can_be_tried_again_at_a_server_that_takes_its_time(
    tmp_path, mlflow_server, mlflow_proxy
):
    """A thousand of them take as long at a quick server: longer than a daemon may be silent."""
    with Node(tmp_path / "node", mlflow_proxy.uri) as node:
        node.start()
        tried = play(node, mlflow_server, 'attempt(run.log_metrics, {"bad@key": 1.0}, step=0)')
        until = threading.Event()
        timer = threading.Timer(6.0, until.set)
        mlflow_proxy.fail(hold(until), on=b"log-batch")
        timer.start()
        try:
            retried = node.command("dead-letters", "retry")
            assert retried.returncode in (0, 1), retried.stderr
            assert retried.stderr == ""
        finally:
            until.set()
            timer.cancel()
        mlflow_proxy.heal()
        assert [each["key"] for each in dead_letters(node, tried.run["run_id"])] == ["bad@key"]


def test_dead_letters_outlive_the_daemon(tmp_path, mlflow_server):
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        rank = node.rank(
            """
            import sys, json, mlflow_relay
            run = mlflow_relay.start_run(sys.argv[1], run_key=sys.argv[2], rank=0, world_size=1)
            run.log_metrics({"bad@key": float("-inf"), "good": 1.0}, step=1)
            run.end()
            print(json.dumps(run.run_id))
            """,
            fresh_name("letters"),
            fresh_name("key"),
        )
        run_id = last_json(finish([rank])[0])
        node.wait_until_ended(run_id)
        before = dead_letters(node, run_id)
        node.kill()
        node.start()
        assert dead_letters(node, run_id) == before
        assert [each["value"] for each in before] == ["-inf"]
        assert node.run(run_id)["dead_letters"] == 1
