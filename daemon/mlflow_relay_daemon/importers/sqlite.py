"""MLflow's SQLite store: the tables themselves, of any version of the schema.

The mlflow package refuses a database that is older than itself, and would migrate it in place.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mlflow_relay_daemon.batch import METRICS_MAX, Points
from mlflow_relay_daemon.importers.foreign import (
    Texts,
    make_card,
    make_texts,
    text_chunks,
)
from mlflow_relay_daemon.sinks import DatasetInput, Metric
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.sync.artifacts import Wanted, is_artifact_root, local_folder, wanted_folder
from mlflow_relay_daemon.sync.source import Chunk, ForeignRun, Size, SourceError

MAGIC = b"SQLite format 3\0"
_WAL = 2  # sqlite.org/fileformat.html: byte 18 of the file
_BUSY_TIMEOUT_S = 30.0
DATABASE = "mlflow.db"
#: Where `mlflow server` and the mlflow package keep artifacts, beside their database.
ARTIFACT_FOLDERS = ("mlartifacts", "mlruns", ".")
#: In a progress: so many rows of the run were read, oldest first. No metric can have such a key.
ROWS_SEEN = "#rows"


@dataclass
class TableRun(ForeignRun):
    """One run in the tables."""

    database: Path = Path()
    run_uuid: str = ""
    artifact_uri: str = ""
    texts: Texts = field(default_factory=lambda: Texts({}, {}, *[frozenset()] * 3))

    def size(self) -> Size:
        """Return how many points there are."""
        with closing(connect(self.database)) as database:
            return Size(_count(database, self.run_uuid))

    def chunks(self, seen: Mapping[str, int]) -> Iterator[Chunk]:
        """Yield params and tags, then the rows of the metrics behind those that were seen.

        In the order of their insertion, which a run that goes on does not change.
        """
        yield from text_chunks(self.texts, self.card.start_ms, seen)
        with closing(connect(self.database)) as database:
            at = seen.get(ROWS_SEEN, 0)
            if at > _count(database, self.run_uuid):
                at = 0  # another database than the one that was read before
            known = _columns(database, "metrics")
            step = "step" if "step" in known else "0"
            is_nan = "is_nan" if "is_nan" in known else "0"
            rows = database.execute(
                f"SELECT key, value, timestamp, {step}, {is_nan} FROM metrics "  # noqa: S608
                "WHERE run_uuid = ? ORDER BY rowid LIMIT -1 OFFSET ?",
                (self.run_uuid, at),
            )
            while found := rows.fetchmany(METRICS_MAX):
                points = [_point(*row) for row in found]
                at += len(points)
                record = Points(max(point[2] for point in points), points)
                yield Chunk([record], {ROWS_SEEN: at})

    def wanted(self) -> list[Wanted]:
        """Return the files of the run: where it says, or in a folder beside the database."""
        if not self.artifact_uri:
            return []  # MLflow of 2018 kept it in the run's tags
        names = Path(unquote(urlsplit(self.artifact_uri).path)).parts[-3:]
        beside = [self.database.parent.joinpath(each, *names) for each in ARTIFACT_FOLDERS]
        here = [each for each in beside if is_artifact_root(each, self.run_uuid)]
        found = local_folder(self.artifact_uri, self.run_uuid) or next(iter(here), None)
        if found is not None:
            return list(wanted_folder(found, self.notes))
        text = f"its artifacts are not here: no {redact_uri(self.artifact_uri)}"
        self.notes.append(f"{text}, nor {'/'.join(names)} in mlartifacts/ beside {DATABASE}")
        return []


def find_runs(
    file: Path, *, include_deleted: bool, experiment_name: str | None
) -> Iterator[ForeignRun | SourceError]:
    """Yield the runs of a database. Raises: SourceError: it is none of MLflow's, or damaged."""
    try:
        with closing(connect(file)) as database:
            database.row_factory = sqlite3.Row
            experiments = {
                row["experiment_id"]: row["name"]
                for row in database.execute("SELECT experiment_id, name FROM experiments")
            }
            for row in database.execute("SELECT * FROM runs ORDER BY start_time, run_uuid"):
                is_deleted = row["lifecycle_stage"] == "deleted"
                if is_deleted and not include_deleted:
                    continue
                name = experiments.get(row["experiment_id"])
                yield _read_run(database, file, row, experiment_name or name or "Default")
    except sqlite3.Error as error:
        raise SourceError(f"{file} cannot be read as MLflow's database: {error}") from None


def is_database(file: Path) -> bool:
    """Return whether the file is an SQLite database. Raises: OSError: it cannot be read."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def connect(file: Path) -> sqlite3.Connection:
    """Open a database and change nothing in its folder. Raises: SourceError, OSError."""
    with file.open("rb") as opened:
        head = opened.read(20)
    # In WAL mode also a reader makes files beside the database. Without a log nobody writes.
    is_quiet_wal = len(head) == 20 and head[18] == _WAL
    is_quiet_wal = is_quiet_wal and not file.with_name(file.name + "-wal").exists()
    uri = f"file:{quote(str(file.absolute()))}?mode=ro" + ("&immutable=1" if is_quiet_wal else "")
    try:
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S)
    except sqlite3.Error as error:
        raise SourceError(f"{file} cannot be opened: {error}") from None


def _read_run(
    database: sqlite3.Connection, file: Path, row: sqlite3.Row, experiment: str
) -> TableRun:
    run_id = row["run_uuid"]
    params, tags = _texts(database, "params", run_id), _texts(database, "tags", run_id)
    texts = make_texts(run_id, params, tags, is_server=False)
    return TableRun(
        card=make_card(
            run_id,
            name=row["name"] or "",
            experiment=experiment,
            user=row["user_id"] or "",
            start_ms=int(row["start_time"] or 0),
            tags=tags,
        ),
        kind="sqlite",
        where=f"{file}:{run_id}",
        status=row["status"] or "FINISHED",
        end_ms=int(row["end_time"]) if row["end_time"] else None,
        is_deleted=row["lifecycle_stage"] == "deleted",
        inputs=list(_inputs(database, run_id)),
        database=file,
        run_uuid=run_id,
        artifact_uri=(row["artifact_uri"] or "") if "artifact_uri" in row.keys() else "",  # noqa: SIM118  # a Row's `in` looks at values
        texts=texts,
        **texts.fields(),
    )


def _point(key: str, value: float | None, timestamp_ms: int, step: int, is_nan: int) -> Metric:
    number = math.nan if is_nan or value is None else float(value)
    return key, number, int(timestamp_ms), int(step or 0)


def _count(database: sqlite3.Connection, run_id: str) -> int:
    row = database.execute("SELECT count(*) FROM metrics WHERE run_uuid = ?", (run_id,)).fetchone()
    return int(row[0])


def _texts(database: sqlite3.Connection, table: str, run_id: str) -> dict[str, str]:
    rows = database.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (run_id,))  # noqa: S608
    return {row["key"]: "" if row["value"] is None else str(row["value"]) for row in rows}


def _inputs(database: sqlite3.Connection, run_id: str) -> Iterator[DatasetInput]:
    """Yield the data sets that a run has used; tables of MLflow 2.4 and newer."""
    if not _columns(database, "inputs"):
        return
    rows = database.execute(
        "SELECT * FROM inputs JOIN datasets ON dataset_uuid = source_id WHERE source_type = "
        "'DATASET' AND destination_type = 'RUN' AND destination_id = ? ORDER BY input_uuid",
        (run_id,),
    )
    for row in rows.fetchall():
        tags = database.execute(
            "SELECT name, value FROM input_tags WHERE input_uuid = ? ORDER BY name",
            (row["input_uuid"],),
        )
        yield DatasetInput(
            row["name"],
            row["digest"],
            row["dataset_source_type"],
            row["dataset_source"],
            row["dataset_schema"] or "",
            row["dataset_profile"] or "",
            tuple((tag["name"], tag["value"]) for tag in tags),
        )


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    """Return the columns of a table; none if there is no such table."""
    rows: list[Any] = database.execute(f"PRAGMA table_info({table})").fetchall()
    return {row[1] for row in rows}
