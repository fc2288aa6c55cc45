"""What of another store's run is brought, under which names."""

from __future__ import annotations

from mlflow_relay_daemon.importers.foreign import (
    TEXTS_SEEN,
    make_card,
    make_texts,
    text_chunks,
)
from mlflow_relay_daemon.sync.artifacts import local_folder

OWN, PARENT, FORK = "aa" * 16, "bb" * 16, "cc" * 16


def test_the_old_id_is_the_new_runs_relay_run_id_and_a_relays_own_stays():
    plain = make_card(OWN, name="", experiment="e", user="anna", start_ms=1, tags={})
    assert (plain.run_id, plain.tags) == (
        OWN,
        {"relay.source_run_id": OWN, "mlflow.user": "anna"},
    )
    tags = {"relay.run_id": FORK, "mlflow.runName": "its name", "mlflow.user": "real"}
    relays = make_card(OWN, name="", experiment="e", user="anna", start_ms=1, tags=tags)
    assert (relays.run_id, relays.run_name) == (FORK, "its name")
    assert relays.tags == {"relay.source_run_id": OWN, "mlflow.user": "real"}


def test_tags_about_the_server_that_a_run_was_on_stay_there():
    tags = {
        "relay.owner": "node",
        "relay.node.n1": "{}",
        "relay.synced.n1": "[]",
        "relay.synced.n1.2": "x",
        "relay.waits": "{}",
        "relay.waits_for": PARENT,
        "relay.awaits." + PARENT: "True",
        "relay.last_life": "1 x",
        "relay.run_key": "kept",
        "relay.node_count": "4",
        "team": "kept",
    }
    found = make_texts(OWN, {}, tags, is_server=True).tags
    assert found == {
        "relay.run_key": "kept",
        "relay.node_count": "4",
        "team": "kept",
        "server2server": "True",
    }


def test_a_run_that_is_not_anemois_gets_none_of_its_names():
    texts = make_texts(OWN, {"lr": "1"}, {"mlflow.parentRunId": PARENT}, is_server=False)
    assert texts.params == {"lr": "1"}
    assert texts.tags == {"mlflow.parentRunId": PARENT, "offlineRun": "True"}
    assert (texts.relatives, texts.originals) == ({PARENT}, frozenset())


def test_a_run_resumed_and_forked_keeps_all_ids_that_it_had():
    params = {"metadata.run_id": PARENT, "config.training.fork_run_id": FORK}
    tags = {"mlflow.parentRunId": PARENT, "forkedRunId": FORK, "resumedRun": "True"}
    texts = make_texts(OWN, params, tags, is_server=False)
    assert texts.relatives == {PARENT, FORK}
    assert {key: texts.params[key] for key in texts.originals if key in texts.params} == {
        "metadata.offline_run_id": PARENT,
        "config.training.offline_run_id": PARENT,
        "config.training.offline_fork_run_id": FORK,
        "config.training.offline_self_run_id": OWN,
    }
    assert {key: texts.tags[key] for key in texts.originals if key in texts.tags} == {
        "mlflow.offline.parentRunId": PARENT,
        "offline.forkedRunId": FORK,
    }


def test_texts_are_sent_again_only_if_they_have_changed():
    texts = make_texts(OWN, {f"p{index}": "x" for index in range(250)}, {}, is_server=False)
    (chunk,) = text_chunks(texts, 1, {})
    assert [len(record.items) for record in chunk.records] == [100, 100, 50, 1]
    assert list(text_chunks(texts, 1, chunk.seen)) == []
    assert list(text_chunks(texts, 1, {TEXTS_SEEN: 1})) == [chunk]


def test_an_artifact_uri_is_a_folder_of_the_runs_own_here_or_none(tmp_path):
    folder = tmp_path / OWN / "artifacts"
    folder.mkdir(parents=True)
    assert local_folder(f"file://{folder}", OWN) == folder
    assert local_folder(str(folder), OWN) == folder
    for uri in (
        "",
        str(tmp_path),
        f"file://{folder}/no",
        "s3://bucket/x",
        f"file://host{folder}",
        "mlflow-artifacts:/1",
    ):
        assert local_folder(uri, OWN) is None
