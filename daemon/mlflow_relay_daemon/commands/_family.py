"""Runs and their links → the tree that a run belongs to. Pure.

    resume          a child of the root of the run that it goes on with, as MLflow's pages show it
    same            another relay run that goes on as the same MLflow run
    fork            a root of its own; drawn beneath the run whose weights it started from

A run that is both, a resume of one and a fork of another, is a child of the first, and only
mentioned beneath the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Run = dict[str, Any]


@dataclass(eq=False)
class Member:
    """One run of the tree: of this spool, of another, or only an id that somebody named."""

    name: str  #: the id by which it may be asked for
    run_id: str | None = None  #: relay run id
    mlflow_run_id: str | None = None
    run_name: str = ""
    status: str | None = None  #: as MLflow knows it; None: nobody told
    is_here: bool = False  #: in this spool
    is_known: bool = False  #: here, or the server knows it
    is_deleted: bool = False
    start_ms: int = 0
    url: str | None = None
    resumes: str | None = None  #: as the rank named it
    resume_mode: str = "child"
    forks: str | None = None
    dropped: list[str] = field(default_factory=list)  #: links that were given up
    waits_for: list[str] = field(default_factory=list)
    above: list[tuple[str, str, bool]] = field(default_factory=list)  #: kind, id, is it MLflow's
    link: str | None = None  #: how it hangs in the tree: "resume", "same", "fork"; None: its root
    parent: Member | None = None
    children: list[Member] = field(default_factory=list)
    is_mention: bool = False  #: drawn elsewhere in this tree, or in another


class Family:
    """All members that are known of, and how they hang together.

    Args:
        runs: of the status object.
        relatives: what the server knows of runs around them (see lane.relatives).
    """

    def __init__(self, runs: Sequence[Run], relatives: Sequence[Run] = ()) -> None:
        self._by_id: dict[str, Member] = {}
        self._members: list[Member] = []
        self._continuations: dict[str, Member] = {}
        for run in runs:
            self._take(_from_status(run))
        for run in relatives:
            if not self._is_taken(run):
                self._take(_from_server(run))
        for member in list(self._members):
            self._hang(member)
        for member in list(self._members):
            self._cut_circle(member)
        for member in list(self._members):
            self._settle(member)

    def find(self, identifier: str) -> Member | None:
        """Return the member that an id means."""
        return self._continuations.get(identifier) or self._by_id.get(identifier)

    def at(self, identifier: str) -> Member:
        """Return the member of an id that is known to be there."""
        found = self.find(identifier)
        assert found is not None, identifier
        return found

    def strangers(self) -> list[Member]:
        """Return those that are not of this spool."""
        return [each for each in self._members if not each.is_here]

    # ── gather ──

    def _take(self, member: Member) -> None:
        self._members.append(member)
        if member.resume_mode == "same" and member.resumes and member.run_id:
            self._continuations[member.run_id] = member  # its MLflow run is another's
            return
        for identifier in (member.run_id, member.mlflow_run_id):
            if identifier:
                self._by_id.setdefault(identifier, member)

    def _is_taken(self, run: Run) -> bool:
        return run["mlflow_run_id"] in self._by_id or run["run_id"] in self._by_id

    def _at(self, identifier: str, is_mlflows: bool) -> Member:
        """Return the member of an id, made if nobody knows it."""
        found = self.find(identifier)
        if found is None:
            found = Member(identifier, mlflow_run_id=identifier if is_mlflows else None)
            self._members.append(found)
            self._by_id[identifier] = found
        return found

    # ── hang ──

    def _hang(self, member: Member) -> None:
        for kind, identifier, is_mlflows in member.above:
            above = self._at(identifier, is_mlflows)
            if above is not member and member.parent is None:
                member.parent, member.link = above, kind

    def _cut_circle(self, member: Member) -> None:
        """Links that lead round in a circle, as others' tags may, end where they are met."""
        seen = [member]
        while (above := seen[-1].parent) is not None:
            if above in seen:
                seen[-1].parent = seen[-1].link = None
                return
            seen.append(above)

    def _settle(self, member: Member) -> None:
        """Take the place in the tree: a resume beneath its root, the rest where they belong."""
        above = member.parent
        if above is None:
            return
        if member.link == "resume":
            above = _resumed_root(above)
        above.children.append(member)
        for kind, identifier, is_mlflows in member.above:
            other = self._at(identifier, is_mlflows)
            if kind == "fork" and member.link != "fork" and other not in (member, above):
                other.children.append(_mention(member))


def top_of(member: Member) -> Member:
    """Return the root of the tree that a member belongs to."""
    while member.parent is not None:
        member = _resumed_root(member.parent) if member.link == "resume" else member.parent
    return member


def everyone(member: Member) -> Iterator[Member]:
    """Yield a member and all beneath it, in the order in which they are drawn."""
    yield member
    for child in in_order(member.children):
        yield from everyone(child)


def in_order(members: Iterable[Member]) -> list[Member]:
    """Return members oldest first."""
    return sorted(members, key=lambda each: (each.start_ms, each.name))


def _resumed_root(member: Member) -> Member:
    while member.parent is not None and member.link in ("resume", "same"):
        member = member.parent
    return member


def _mention(member: Member) -> Member:
    return Member(
        member.name,
        run_id=member.run_id,
        mlflow_run_id=member.mlflow_run_id,
        run_name=member.run_name,
        status=member.status,
        is_here=member.is_here,
        is_known=member.is_known,
        start_ms=member.start_ms,
        url=member.url,
        link="fork",
        is_mention=True,
    )


# ── what is known of a run ──


def _from_status(run: Run) -> Member:
    lineage = run.get("lineage") or {}  # a daemon of an earlier release does not tell
    resumes, forks = lineage.get("resumes"), lineage.get("forks")
    mode = lineage.get("resume_mode", "child")
    kinds = (("same" if mode == "same" else "resume", resumes), ("fork", forks))
    links = [(kind, link) for kind, link in kinds if link is not None]
    # Mode "same": the run that goes on is the MLflow run itself, once it is known.
    itself = run["mlflow_run_id"] if mode == "same" else None
    standing = [(kind, link) for kind, link in links if not link["dropped"]]
    return Member(
        run["run_id"],
        run_id=run["run_id"],
        mlflow_run_id=run["mlflow_run_id"],
        run_name=run["run_name"],
        status=run["status"],
        is_here=True,
        is_known=True,
        start_ms=run["start_ms"],
        url=run["url"],
        resumes=resumes["asked"] if resumes and not resumes["dropped"] else None,
        resume_mode=mode,
        forks=forks["asked"] if forks and not forks["dropped"] else None,
        dropped=[link["asked"] for _, link in links if link["dropped"]],
        waits_for=list(run.get("waits_for", [])),
        above=[
            _above(kind, itself if kind == "same" else link["mlflow_run_id"], link["asked"])
            for kind, link in standing
        ],
    )


def _above(kind: str, mlflow_run_id: str | None, asked: str) -> tuple[str, str, bool]:
    return kind, mlflow_run_id or asked, mlflow_run_id is not None


def _from_server(run: Run) -> Member:
    kinds = (("resume", run["resumes"]), ("fork", run["forks"]))
    return Member(
        run["run_id"] or run["mlflow_run_id"],
        run_id=run["run_id"],
        mlflow_run_id=run["mlflow_run_id"],
        run_name=run["run_name"],
        status=run["status"],
        is_known=True,
        is_deleted=run["deleted"],
        start_ms=run["start_ms"],
        url=run["url"],
        resumes=run["resumes"],
        forks=run["forks"],
        waits_for=[run["waits_for"]] if run["waits_for"] else [],
        above=[(kind, identifier, True) for kind, identifier in kinds if identifier],
    )
