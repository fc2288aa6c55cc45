"""A run of another MLflow store → what a sync needs of it. Pure.

The new run's tag relay.run_id is the id by which the run was known before, so that whoever names
that id (a child, a fork, a `start_run(resume=...)` of a year later) is led to the new run. Params
and tags that keep old ids are those of `anemoi-training mlflow sync`, whose users search for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from mlflow_relay.records import Params, Tags
from mlflow_relay.values import chunks
from mlflow_relay_daemon.batch import PARAMS_MAX
from mlflow_relay_daemon.lane.artifacts import WAITING_TAG
from mlflow_relay_daemon.lane.destination import (
    LAST_LIFE_TAG,
    OWNER_TAG,
    RUN_ID_TAG,
    SOURCE_TAG,
)
from mlflow_relay_daemon.lane.ending import NODE_TAG
from mlflow_relay_daemon.lane.lineage import FORKED_FROM_TAG, PARENT_TAG, RESUMED_TAG, WAITS_FOR_TAG
from mlflow_relay_daemon.lane.progress import SYNCED_TAG
from mlflow_relay_daemon.lane.waits import AWAITS_TAG, WAITS_TAG
from mlflow_relay_daemon.sinks import DatasetInput
from mlflow_relay_daemon.sync.source import Chunk, SyncCard

#: In a progress: which params and tags were sent. No metric can have such a key.
TEXTS_SEEN = "#texts"
NAME_TAG = "mlflow.runName"
_ID = re.compile(r"[0-9a-f]{32}")
_RUN_PARAMS = ("metadata.run_id", "config.training.run_id", "training.run_id")
_FORK_PARAM = "config.training.fork_run_id"
#: Of a relay, or of an earlier sync: about the server that the run is on, not about the run.
_LOCAL_TAGS = (
    *(OWNER_TAG, NODE_TAG, LAST_LIFE_TAG, WAITS_FOR_TAG, WAITS_TAG, AWAITS_TAG, SYNCED_TAG),
    WAITING_TAG,
    *(RUN_ID_TAG, SOURCE_TAG, NAME_TAG),
)


@dataclass(frozen=True)
class Texts:
    """Params and tags, and which of them name runs."""

    params: dict[str, str]
    tags: dict[str, str]
    relatives: frozenset[str]
    originals: frozenset[str]
    kept: frozenset[str]

    def fields(self) -> dict[str, Any]:
        """Return what `ForeignRun` takes of it."""
        names = ("relatives", "originals", "kept")
        return {name: getattr(self, name) for name in names}


def make_card(
    run_id: str,
    *,
    name: str,
    experiment: str,
    user: str,
    start_ms: int,
    tags: Mapping[str, str],
) -> SyncCard:
    """Return the card of a run.

    Args:    user: as the store has it; the tag mlflow.user wins.
    """
    who = tags.get("mlflow.user") or user
    return SyncCard(
        run_id=tags.get(RUN_ID_TAG) or run_id,
        run_key="",
        experiment_name=experiment,
        run_name=name or tags.get(NAME_TAG, ""),
        start_ms=start_ms,
        world_size=1,
        tags={SOURCE_TAG: run_id, **({"mlflow.user": who} if who else {})},
        is_named=True,
        is_introduced=True,
    )


def make_texts(
    run_id: str, params: Mapping[str, str], tags: Mapping[str, str], *, is_server: bool
) -> Texts:
    """Return the params and tags that the new run is to have, ids still those of the store."""
    how = "server2server" if is_server else "offline"
    new_params, new_tags = dict(params), _own(tags)
    named = [params.get(key, "") for key in (*_RUN_PARAMS, _FORK_PARAM)]
    named += [tags.get(key, "") for key in (PARENT_TAG, FORKED_FROM_TAG)]
    itself = {run_id, tags.get(RUN_ID_TAG, run_id)}
    relatives = frozenset(each for each in named if _ID.fullmatch(each)) - itself
    originals: dict[str, str] = {}
    if "metadata.run_id" in params:
        originals = _anemoi_originals(run_id, params, tags, how)
        origin = params["metadata.run_id"]
        if not _ID.fullmatch(params.get("config.training.run_id", "")):
            new_params["config.training.run_id"] = origin  # "None", of a run that resumes none
        for key, value in originals.items():
            (new_tags if _is_tag(key) else new_params)[key] = value
    new_tags["server2server" if is_server else "offlineRun"] = "True"
    return Texts(
        new_params,
        new_tags,
        relatives,
        frozenset(originals),
        frozenset(_kept_keys()) if originals else frozenset(),
    )


def make_input(dataset: Mapping[str, Any], tags: Mapping[str, Any]) -> DatasetInput:
    """Return a data set that a run has used, from the names that MLflow gives its parts."""
    names = ("name", "digest", "source_type", "source", "schema", "profile")
    texts = {name: str(dataset.get(name) or "") for name in names}
    return DatasetInput(**texts, tags=tuple((str(key), str(tags[key])) for key in tags))


def text_chunks(texts: Texts, start_ms: int, seen: Mapping[str, int]) -> Iterator[Chunk]:
    """Yield params and tags, unless they are those that were sent before."""
    content = sorted(texts.params.items()) + sorted(texts.tags.items())
    mark = crc32(repr(content).encode())
    if seen.get(TEXTS_SEEN) == mark:
        return
    found: list[Any] = [Params(start_ms, part) for part in chunks(texts.params, PARAMS_MAX)]
    found += [Tags(start_ms, part) for part in chunks(texts.tags, PARAMS_MAX)]
    yield Chunk(found, {TEXTS_SEEN: mark})


def _own(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in tags.items()
        if not any(key == local or key.startswith(local.rstrip(".") + ".") for local in _LOCAL_TAGS)
    }


def _anemoi_originals(
    run_id: str, params: Mapping[str, str], tags: Mapping[str, str], how: str
) -> dict[str, str]:
    """Return params and tags that keep the ids as they were, under the names of Anemoi's sync."""
    origin = params["metadata.run_id"]
    found = {f"metadata.{how}_run_id": origin, f"config.training.{how}_run_id": origin}
    fork = params.get(_FORK_PARAM, "")
    if _ID.fullmatch(fork):
        found[f"config.training.{how}_fork_run_id"] = fork
    if RESUMED_TAG in tags:
        found[f"config.training.{how}_self_run_id"] = run_id
    if PARENT_TAG in tags:
        found[f"mlflow.{how}.parentRunId"] = tags[PARENT_TAG]
    if FORKED_FROM_TAG in tags:
        found[f"{how}.forkedRunId"] = tags[FORKED_FROM_TAG]
    return found


def _kept_keys() -> tuple[str, ...]:
    """Return the keys whose value before stands in one of Anemoi's."""
    return ("metadata.run_id", "config.training.run_id", _FORK_PARAM, PARENT_TAG, FORKED_FROM_TAG)


def _is_tag(key: str) -> bool:
    return key.endswith(("parentRunId", "forkedRunId"))
