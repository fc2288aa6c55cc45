"""What a run still waits for, in tags of the run itself, so that whoever brings the other can tell.

A daemon keeps its links in the card and looks again by itself. A sync ends, and the parent may come
in another call, from another machine, a month later; that call searches for runs that wait for it.

    relay.awaits.<id> = True     it waits for the run of this id; emptied when that has come
    relay.waits = JSON           what is to be told then: links, and texts that are held

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow_relay_daemon.lane.lineage import PARENT_TAG, WAITS_FOR_TAG
from mlflow_relay_daemon.sinks import RunInfo, Tag
from mlflow_relay_daemon.spool.card import Card, Link
from mlflow_relay_daemon.states import RunState

AWAITS_TAG = "relay.awaits."  #: followed by the id
WAITS_TAG = "relay.waits"


def awaited(card: Card) -> list[str]:
    """Return the ids that the run waits for, each once."""
    ids = [link.asked for link in card.open_links()]
    return list(dict.fromkeys(ids + [value for _, _, value in card.held]))


def tags(card: Card, before: Mapping[str, str], kept: frozenset[str] = frozenset()) -> list[Tag]:
    """Return the tags to set, where they differ from those before.

    Args: kept: keys whose original value is kept already.
    """
    ids = awaited(card)
    wanted = {AWAITS_TAG + each: "True" for each in ids}
    wanted[WAITS_TAG] = _pack(card, kept) if ids else ""
    parents = [value for _, key, value in card.held if key == PARENT_TAG]
    if parents:
        wanted[WAITS_FOR_TAG] = parents[0]
    elif card.resumed_parent() is None and before.get(WAITS_FOR_TAG):
        wanted[WAITS_FOR_TAG] = ""
    for key in before:
        if key.startswith(AWAITS_TAG):
            wanted.setdefault(key, "")
    return [(key, value) for key, value in wanted.items() if before.get(key, "") != value]


def held_texts(found: Mapping[str, str]) -> list[list[Any]]:
    """Return the texts that wait, as a card has them."""
    texts = _unpack(found).get("held", [])
    return [[str(part) for part in text] for text in texts if len(text) == 3]


def kept(found: Mapping[str, str]) -> frozenset[str]:
    """Return the keys whose original value is kept already."""
    return frozenset(map(str, _unpack(found).get("kept", [])))


def fill(card: Card, info: RunInfo) -> None:
    """Make the card that of a run which waits, as its tags tell."""
    told = _unpack(info.tags)
    card.state, card.is_introduced = RunState.OPEN, True
    card.mlflow_run_id, card.experiment_id = info.run_id, info.experiment_id
    card.is_named = bool(told.get("is_named", True))
    for name in ("parent", "fork"):
        if told.get(name):
            setattr(card, name, Link(str(told[name]), is_waiting=name == "parent"))
    card.held = held_texts(info.tags)


def _pack(card: Card, kept: frozenset[str]) -> str:
    links = {link.asked: link for link in card.open_links()}
    parent, fork = card.resumed_parent(), card.fork
    return json.dumps(
        {
            "parent": parent.asked if parent and parent.asked in links else None,
            "fork": fork.asked if fork and fork.asked in links else None,
            "is_named": card.is_named,
            "held": card.held,
            "kept": sorted(kept),
        },
        separators=(",", ":"),
    )


def _unpack(found: Mapping[str, str]) -> dict[str, Any]:
    try:
        told = json.loads(found.get(WAITS_TAG) or "{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
