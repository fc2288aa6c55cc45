"""Relay run ids in tags and params → MLflow run ids.

A rank can only know relay run ids. Where the whole value of a tag or param is one, MLflow gets the
MLflow run id, so that its users can follow it; the original stays in the tag relay.original.<key>.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.lineage import Resolver

ORIGINAL_TAG = "relay.original."  #: followed by the key whose value was translated
_ID = re.compile(r"[0-9a-f]{32}")
#: Values that look like an id and that the server is asked about, per run; any further ones are
#: taken as they are.
LOOKUPS_MAX = 100


class Translation:
    """Translates for one run, and remembers what the server said."""

    def __init__(self, destination: Destination, resolver: Resolver) -> None:
        self._to, self._resolver = destination, resolver
        self._known: dict[str, str] = {}

    def needed(self, items: Mapping[str, str]) -> bool:
        """Return whether any value could be an id."""
        return any(len(value) == 32 and _ID.fullmatch(value) for value in items.values())

    def original_tag(self, key: str) -> str | None:
        """Return the tag that keeps the value which was translated; None: it is kept elsewhere."""
        return ORIGINAL_TAG + key

    def of(self, value: str, key: str) -> str | None:
        """Return what MLflow is to get for a value; None: it must wait for a run to be known.

        Args:    key: of the tag or param; here it does not matter.
        Raises: SinkError, Stopped.
        """
        if not _ID.fullmatch(value):
            return value
        if value == self._to.card.run_id:
            return self._to.mlflow_run_id
        known = self._known.get(value)
        if known is not None:
            return known
        if len(self._known) >= LOOKUPS_MAX:
            return value
        found = self._to.ask(lambda: self._resolver.find(value))
        if found is None and self._is_awaited(value):
            return None
        self._known[value] = value if found is None else found.run_id
        return self._known[value]

    def _is_awaited(self, value: str) -> bool:
        """Return whether the id is one that will be known some day."""
        card = self._to.card
        links = [link for link in (card.parent, card.fork) if link and not link.is_dropped]
        return self._resolver.is_ours(value) or any(link.asked == value for link in links)
