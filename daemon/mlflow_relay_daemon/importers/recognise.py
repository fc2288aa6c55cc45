"""What an argument of `mlflow-relay sync` is: told by what lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_relay_daemon.importers import mlruns, server, spool, sqlite
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.sync.source import Source, SourceError

FILE_STORE = "mlruns"
KINDS = (
    "a spool (runs/ and node in it), a folder of spools, an mlruns folder, an mlflow.db, a folder "
    "with one of these in it, or the http address of an MLflow server"
)


@dataclass
class Stores:
    """All that was named, by kind."""

    spools: list[Path] = field(default_factory=list)
    file_stores: list[Path] = field(default_factory=list)
    databases: list[Path] = field(default_factory=list)
    servers: list[server.SourceServer] = field(default_factory=list)

    def runs(
        self, *, include_deleted: bool, experiment_name: str | None
    ) -> Iterator[Source | SourceError]:
        """Yield the runs of all stores; for a run or store that cannot be read, why."""
        options = {"include_deleted": include_deleted, "experiment_name": experiment_name}
        found: list[Iterator[Source | SourceError]] = [
            spool.find_runs(self.spools, experiment_name=experiment_name),
            *(mlruns.find_runs(each, **options) for each in self.file_stores),  # type: ignore[arg-type]
            *(sqlite.find_runs(each, **options) for each in self.databases),  # type: ignore[arg-type]
            *(server.find_runs(each, **options) for each in self.servers),  # type: ignore[arg-type]
        ]
        for runs in found:
            try:
                yield from runs
            except SourceError as error:
                yield error
            except OSError as error:
                yield SourceError.of(error, "a source")


def recognise(names: tuple[str, ...], *, timeout_s: float) -> tuple[Stores, list[SourceError]]:
    """Return the stores that are meant, and for each name that is none, why."""
    stores, errors = Stores(), []
    for name in names:
        try:
            errors += _add(stores, name, timeout_s)
        except OSError as error:
            errors.append(SourceError.of(error, redact_uri(name)))
        except (SourceError, ValueError) as error:
            errors.append(SourceError(f"{redact_uri(name)}: {error}"))
    return stores, errors


def _add(stores: Stores, name: str, timeout_s: float) -> list[SourceError]:
    """Take what is meant; return what of it cannot be read. Raises: SourceError, OSError."""
    if name.startswith(("http://", "https://")):
        stores.servers.append(server.SourceServer(name, timeout_s=timeout_s))
        return []
    path = Path(name.removeprefix("sqlite:///").removeprefix("file://")).expanduser()
    if path.is_file():
        if not sqlite.is_database(path):
            raise SourceError(f"is a file, and no SQLite database: a source is {KINDS}")
        stores.databases.append(path)
        return []
    os.stat(path)  # says why, where it cannot be read
    denied: list[SourceError] = []
    found = _in_folder(stores, path, denied)
    if (path / FILE_STORE).is_dir():
        found += _in_folder(stores, path / FILE_STORE, denied)
    if not found and not denied:
        what = "is empty" if not any(path.iterdir()) else "holds no runs"
        raise SourceError(f"{what}: a source is {KINDS}")
    return denied


def _in_folder(stores: Stores, folder: Path, denied: list[SourceError]) -> int:
    """Take what lies in a folder; return how many stores that is; add what may be one more."""
    if spool.is_spool(folder):
        stores.spools.append(folder)
        return 1
    count = 0
    if is_file_store := mlruns.is_file_store(folder):
        stores.file_stores.append(folder)
        count += 1
    for each in sorted(folder.iterdir()):
        try:
            if each.name != FILE_STORE and spool.is_spool(each):
                stores.spools.append(each)
                count += 1
        except OSError as error:
            if not is_file_store:  # which says itself what of it cannot be read
                denied.append(SourceError.of(error, each))
    if (folder / sqlite.DATABASE).is_file() and sqlite.is_database(folder / sqlite.DATABASE):
        stores.databases.append(folder / sqlite.DATABASE)
        count += 1
    return count
