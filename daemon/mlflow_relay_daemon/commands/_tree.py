"""The tree of a run in words, for people. Pure but for the printing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlflow_relay_daemon.commands._family import Family, Member, everyone, in_order
from mlflow_relay_daemon.commands._terminal import stdout_width
from mlflow_relay_daemon.words import one_line

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

SHORT_ID = 8
#: Wide enough that rich folds nothing in pipes and files.
ENDLESS_WIDTH = 10_000


class Words:
    """The tree of a run in words. Pure."""

    def __init__(self, family: Family, chosen: Member, *, server_was_asked: bool) -> None:
        self._family, self._chosen = family, chosen
        self._server_was_asked = server_was_asked

    def tree(self, root: Member) -> Tree:
        """Return what rich draws."""
        from rich.tree import Tree

        tree = Tree(self._line(root), guide_style="dim")
        branches = [(tree, root)]
        while branches:
            branch, member = branches.pop()
            children = in_order(member.children)
            branches += [(branch.add(self._line(child)), child) for child in children]
        return tree

    def notes(self, root: Member) -> list[str]:
        """Return what a person can do about links that wait."""
        return [
            f"if that never turns up: `mlflow-relay lineage link {each.name[:SHORT_ID]} PARENT` "
            f"names another run, `mlflow-relay lineage drop {each.name[:SHORT_ID]}` gives it up"
            for each in everyone(root)
            if each.is_here and any(not self._is_here(other) for other in each.waits_for)
        ]

    def _is_here(self, identifier: str) -> bool:
        found = self._family.find(identifier)
        return found is not None and found.is_here

    def _line(self, member: Member) -> Text:
        from rich.text import Text

        line = Text()
        mark = {"fork": "fork: ", "same": "goes on as it: "}.get(member.link or "", "")
        line.append(mark, "magenta" if mark else "")
        chosen = member is self._chosen
        ids = [("", member.run_id), ("MLflow ", member.mlflow_run_id)]
        texts = [f"{what}{one_line(each)[:SHORT_ID]}" for what, each in ids if each]
        texts = texts or [f"{one_line(member.name)[:SHORT_ID]}…"]
        if member.is_known:
            line.append(one_line(member.run_name or "-") + "  ", "bold" if chosen else "")
        line.append("  ".join(texts), "cyan")
        for words, style in self._remarks(member):
            line.append(f"  {words}", style)
        if chosen:
            line.append("  ◀", "bold")
        return line

    def _remarks(self, member: Member) -> list[tuple[str, str]]:
        remarks = []
        if member.is_here and member.mlflow_run_id is None:
            remarks.append(("not in MLflow yet", ""))
        elif member.status is not None:
            remarks.append((member.status.lower(), "green" if member.status == "RUNNING" else ""))
        if member.is_deleted:
            remarks.append(("deleted in MLflow", "red"))
        if not member.is_here:
            remarks.append(("not of this spool", "dim"))
        if member.is_mention:
            remarks.append(("drawn where it resumes", "dim"))
        if member.resumes is not None and not self._is_drawn_above(member, member.resumes):
            remarks.append((f"resumes {self._short(member.resumes)}", ""))
        if member.forks is not None and not self._is_drawn_above(member, member.forks):
            remarks.append((f"fork of {self._short(member.forks)}", "magenta"))
        remarks += [(f"link to {each[:SHORT_ID]}… given up", "dim") for each in member.dropped]
        remarks += [(self._wait(each), "yellow") for each in member.waits_for]
        return remarks

    def _is_drawn_above(self, member: Member, identifier: str) -> bool:
        """Return whether the run stands right above this one: then the tree says it."""
        return self._family.find(identifier) is member.parent and _stands_above(member)

    def _short(self, identifier: str) -> str:
        found = self._family.find(identifier)
        name = f"{one_line(found.run_name)} " if found is not None and found.run_name else ""
        return f"{name}{identifier[:SHORT_ID]}…"

    def _wait(self, identifier: str) -> str:
        found = self._family.find(identifier)
        what = f"waits for {self._short(identifier)}, which"
        if found is None or not found.is_known:
            if self._server_was_asked:
                return f"{what} nobody knows yet"
            return f"{what} this spool does not know; the server is not asked now"
        if found.waits_for:
            return f"{what} itself waits"
        if found.mlflow_run_id is None:
            return f"{what} is not in MLflow yet"
        when = "in a moment" if self._server_was_asked else "when the server is asked"
        return f"{what} is known: linked {when}"


def _stands_above(member: Member) -> bool:
    return member.parent is not None and member in member.parent.children


def print_tree(tree: Tree) -> None:
    """Print to stdout, with colours if it is a terminal that has them."""
    from rich.console import Console

    if stdout_width() is not None:
        Console(highlight=False).print(tree)
        return
    console = Console(width=ENDLESS_WIDTH, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(tree)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())
