"""Files of a run that wait for their upload: listed and read as if MLflow had them already.

Of a run that the server has, a listing is the server's with these in it, or there is none: code
that does not find a file in it writes it anew (`log_table`), over the one that the server has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow_relay.records import Artifact
from mlflow_relay_daemon.api.ids import Ids
from mlflow_relay_daemon.api.run_reads import RunReads
from mlflow_relay_daemon.artifacts.source import NoSuchContent, NotReadable, Source, locate
from mlflow_relay_daemon.hosted import Hosted

Json = dict[str, Any]
_LIST = re.compile(r"/(?:ajax-)?api/2\.0/mlflow/artifacts/list")
#: MLflow's artifact proxy: the same question, asked of a folder of its store.
_LIST_FOLDER = re.compile(r"/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts")
_FOLDER = re.compile(r"[^/]+/([0-9a-f]{32})/artifacts(?:/(.*))?")
_FILE = re.compile(
    r"/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts/[^/]+/([0-9a-f]{32})/artifacts/(.+)"
)
_GET_ARTIFACT = "/get-artifact"  #: as MLflow's UI asks for a file
_NO_QUERY: Mapping[str, str] = {}
#: More wait in no run; a ledger gives them out by parts.
_ALL = 1 << 62


def named(path: str, query: Mapping[str, str] = _NO_QUERY) -> tuple[str, str] | None:
    """Return run id and path in it that a file's address names; None: it is none of a run's."""
    found = _FILE.fullmatch(path)
    if found:
        return found[1], found[2]
    if path.endswith(_GET_ARTIFACT):
        return query.get("run_uuid") or query.get("run_id", ""), query.get("path", "")
    return None


class WaitingFiles:
    """Looks into the runs of one spool.

    Args: staging: the spool's staging folder.
    """

    def __init__(self, ids: Ids, reads: RunReads, staging: Path) -> None:
        self._ids, self._reads, self._staging = ids, reads, staging

    def of(self, hosted: Hosted) -> dict[str, Artifact]:
        """Return by path what MLflow does not have yet, of each name the last."""
        view = self._reads.view(hosted)
        delivered = view.refresh()
        found = {each.path: each for _, each in hosted.run.artifacts.waiting_from(0, _ALL)}
        with view.lock:  # what no lane has read yet is in no ledger
            behind = {path: each for path, (each, at) in view.files.items() if at >= delivered}
        return {**found, **behind}

    def waits(self, path: str) -> bool:
        """Return whether the file of an address waits: another of that name must come behind it."""
        place = named(path)
        hosted = place and self._ids.find(place[0])
        return bool(place and hosted and place[1] in self.of(hosted))

    def open(self, path: str, query: Mapping[str, str]) -> tuple[int, Iterator[bytes]] | None:
        """Return size and content of the file of an address; None: it is not here."""
        place = named(path, query)
        hosted = place and self._ids.find(place[0])
        artifact = self.of(hosted).get(place[1]) if place and hosted else None
        if hosted is None or artifact is None:
            return None
        where = locate(artifact, hosted.run.card.run_id, self._staging)
        try:
            source = Source(artifact, where, lambda _: None, hosted.owner)
        except (NoSuchContent, NotReadable):
            return None  # uploaded just now; or its upload will say why it cannot be
        pieces = _pieces(source)
        next(pieces)  # begun: whatever becomes of the answer, the file is closed
        return artifact.size, pieces

    def listing(self, path: str, query: Mapping[str, str], ask: Callable[[], Json]) -> Json | None:
        """Return the answer to a question for a list of files; None: it is none that concerns a
        file here.

        Args: ask: asks the server.
        """
        is_folder = bool(_LIST_FOLDER.fullmatch(path))
        if is_folder:
            found = _FOLDER.fullmatch(query.get("path", ""))
            run_id, folder = (found[1], found[2] or "") if found else ("", "")
        elif _LIST.fullmatch(path):
            run_id = query.get("run_id") or query.get("run_uuid", "")
            folder = query.get("path", "")
        else:
            return None
        hosted = self._ids.find(run_id)
        if hosted is None:
            return None
        # In this order: as long as the server has no such run, none of its files can be there.
        waiting, card = self.of(hosted), hosted.run.card
        is_there = bool(card.mlflow_run_id or card.itself())
        if is_there and not waiting:
            return None
        answer = ask() if is_there else {}
        files = {each["path"]: each for each in answer.get("files", ())}
        for each in entries(waiting, folder.strip("/")):
            name = each["path"].rpartition("/")[2] if is_folder else each["path"]
            files[name] = {**each, "path": name}
        return {**answer, "files": [files[name] for name in sorted(files)]}


def entries(waiting: Mapping[str, Artifact], folder: str) -> Iterator[Json]:
    """Yield what stands in a folder ("": the root), folders too, as MLflow lists it. Pure."""
    prefix = f"{folder}/" if folder else ""
    for path, artifact in waiting.items():
        if not path.startswith(prefix):
            continue
        name, _, inside = path.removeprefix(prefix).partition("/")
        if inside:
            yield {"path": prefix + name, "is_dir": True}
        else:
            yield {"path": path, "is_dir": False, "file_size": artifact.size}


def _pieces(source: Source) -> Iterator[bytes]:
    with source:
        yield b""
        while data := source.read():
            yield data
