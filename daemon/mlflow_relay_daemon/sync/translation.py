"""Ids in tags and params of other stores' runs: only those that the run names as its relatives.

Other stores are full of texts that look like ids (checksums of data sets, commits): nobody waits
for these. What a run's own lineage names (itself, its parent, its origin) is translated wherever it
stands, and waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_relay_daemon.lane.destination import SOURCE_TAG, Destination
from mlflow_relay_daemon.lane.lineage import Resolver
from mlflow_relay_daemon.lane.translation import Translation


class RelativesOnly(Translation):
    """Translates for one run of another store.

    Args:
        relatives: ids of other runs that are translated, once they are known.
        originals: keys of tags and params that stay as they are.
        kept: keys whose original value stands in one of `originals`.
    """

    def __init__(
        self,
        destination: Destination,
        resolver: Resolver,
        relatives: frozenset[str],
        originals: frozenset[str] = frozenset(),
        kept: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(destination, resolver)
        card = destination.card
        self._itself = {card.run_id, card.tags.get(SOURCE_TAG, card.run_id)}
        self._relatives, self._originals, self._kept = relatives, originals, kept

    def needed(self, items: Mapping[str, str]) -> bool:
        """Return whether any value is one of these ids."""
        return any(value in self._itself or value in self._relatives for value in items.values())

    def original_tag(self, key: str) -> str | None:
        """Return the tag that keeps the value which was translated; None: it is kept elsewhere."""
        return None if key in self._kept else super().original_tag(key)

    def of(self, value: str, key: str) -> str | None:
        """Return what MLflow is to get for a value; None: it must wait for a run to be known."""
        if key in self._originals:
            return value
        if value in self._itself:
            return self._to.mlflow_run_id
        if value not in self._relatives:
            return value
        if value not in self._known:
            found = self._to.ask(lambda: self._resolver.find(value))
            if found is None:
                return None
            self._known[value] = found.run_id
        return self._known[value]
