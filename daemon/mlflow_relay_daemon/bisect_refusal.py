"""A request that MLflow refused → the entries that are guilty. Pure but for what `send` does."""

from __future__ import annotations

from collections.abc import Callable

from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.sinks import Permanent, SinkError


def deliver_apart(
    entries: list[Entry],
    send: Callable[[list[Entry]], None],
    refusals: tuple[type[SinkError], ...],
    is_sure: Callable[[Objection], bool] = lambda objection: True,
) -> list[Objection]:
    """Deliver in halves and quarters, until each entry is delivered or refused on its own.

    Args:
        entries: refused together.
        send: delivers some of them. Errors other than refusals pass through: what was delivered by
            then may be delivered again.
        refusals: what counts as a refusal of the content.
        is_sure: asked of an entry that was refused on its own, before what follows it is sent;
            False: it has been delivered after all.
    Returns: the refused entries, each with MLflow's own reason; all others are delivered.
    """
    guilty: list[Objection] = []
    parts = [entries]
    while parts:
        part = parts.pop()
        try:
            send(part)
        except refusals as refusal:
            if len(part) == 1:
                is_refusal = isinstance(refusal, Permanent)
                objection = Objection(part[0], str(refusal), refusal.error_code, is_refusal)
                if is_sure(objection):
                    guilty.append(objection)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
    return guilty
