"""MLflow's file store: a folder per experiment, a folder per run, a file per param, tag and metric.

<mlruns>/<experiment id>/meta.yaml
<mlruns>/<experiment id>/datasets/<id>/meta.yaml
<mlruns>/<experiment id>/<run id>/meta.yaml, params/, tags/, metrics/, inputs/, artifacts/

A line of a metric is `time value`, `time value step`, or `time value step dataset digest`. Read
here and not by the mlflow package: its own reader refuses to open a folder, and drops the step of
lines with a data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlflow_relay_daemon.batch import METRICS_MAX, Points
from mlflow_relay_daemon.importers.foreign import (
    Texts,
    make_card,
    make_input,
    make_texts,
    text_chunks,
)
from mlflow_relay_daemon.sinks import DatasetInput, Metric
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.sync.artifacts import Wanted, local_folder, wanted_folder
from mlflow_relay_daemon.sync.source import Chunk, ForeignRun, Size, SourceError
from mlflow_relay_daemon.words import plural

META = "meta.yaml"
TRASH = ".trash"  # MLflow's folder for deleted experiments
READ_BYTES = 1 << 20
META_BYTES_MAX = 16 << 20  # with the schema and profile of a data set
#: mlflow.entities.RunStatus
_STATUSES: dict[object, str] = {
    1: "RUNNING",
    2: "SCHEDULED",
    3: "FINISHED",
    4: "FAILED",
    5: "KILLED",
}


@dataclass
class FileRun(ForeignRun):
    """One run's folder."""

    folder: Path = Path()
    artifact_uri: str = ""
    texts: Texts = field(default_factory=lambda: Texts({}, {}, *[frozenset()] * 3))

    def size(self) -> Size:
        """Return lines and bytes of all metrics."""
        size = Size()
        for _, path in _files(self.folder / "metrics"):
            with path.open("rb") as file:
                for block in iter(partial(file.read, READ_BYTES), b""):
                    size.records += block.count(b"\n")
                    size.bytes += len(block)
        return size

    def done(self) -> Size:
        """Return how much of it the server has by now."""
        size = super().done()
        if self.feed is not None:
            size.bytes = sum(
                upto for key, upto in self.feed.seen.items() if not key.startswith("#")
            )
        return size

    def chunks(self, seen: Mapping[str, int]) -> Iterator[Chunk]:
        """Yield params and tags, then each metric from the byte on up to which it was seen."""
        yield from text_chunks(self.texts, self.card.start_ms, seen)
        points: list[Metric] = []
        upto: dict[str, int] = {}
        for key, path in _files(self.folder / "metrics"):
            for metric, end in self._points(key, path, seen.get(key, 0)):
                points.append(metric)
                upto[key] = end
                if len(points) == METRICS_MAX:
                    yield Chunk([_record(points)], upto)
                    points, upto = [], {}
        if points:
            yield Chunk([_record(points)], upto)

    def wanted(self) -> list[Wanted]:
        """Return the files beside the run; where it says that they are is another machine."""
        folder = self.folder / "artifacts"
        if not folder.is_dir() and self.artifact_uri:
            found = local_folder(self.artifact_uri, self.folder.name)
            if found is None:
                self._note(f"its artifacts are not here, but at {redact_uri(self.artifact_uri)}")
                return []
            folder = found
        return list(wanted_folder(folder, self.notes))

    def _points(self, key: str, path: Path, start: int) -> Iterator[tuple[Metric, int]]:
        """Yield the points of one file, each with the place behind it."""
        end, damaged = start, 0
        with path.open("rb") as file:
            if start > os.fstat(file.fileno()).st_size:
                start = end = 0  # another file than the one that was read before
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    self._note(f"metric {key}: its last line is not complete, and was left out")
                    break
                end += len(line)
                metric = _point(key, line)
                if metric is not None:
                    yield metric, end
                else:
                    damaged += bool(line.strip())
        if damaged:
            self._note(f"metric {key}: left out, cannot be read: {plural(damaged, 'line')}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def find_runs(
    folder: Path, *, include_deleted: bool, experiment_name: str | None
) -> Iterator[ForeignRun | SourceError]:
    """Yield the runs of a file store; for one that cannot be read, why.

    Raises: OSError: the folder cannot be read.
    """
    experiments = [each for each in sorted(folder.iterdir()) if each.name != TRASH]
    if include_deleted and (folder / TRASH).is_dir():
        experiments += [each for each in sorted((folder / TRASH).iterdir()) if each.is_dir()]
    for experiment in experiments:
        try:
            if experiment.parent == folder and not _holds(experiment, META):
                continue  # in the trash there is nothing else
            name = experiment_name or str(_meta(experiment).get("name") or experiment.name)
            runs = sorted(experiment.iterdir())
        except (SourceError, OSError) as error:
            yield _why(error, experiment)
            continue
        for run in runs:
            try:
                if not _holds(run, META, "metrics"):
                    continue
                found = _read_run(run, name)
            except (SourceError, OSError) as error:
                yield _why(error, run)
            else:
                if include_deleted or not found.is_deleted:
                    yield found


def is_file_store(folder: Path) -> bool:
    """Return whether the folder has experiments that can be read. Raises: OSError: it cannot."""
    for each in folder.iterdir():
        with suppress(OSError):  # another one may tell
            if each.name != TRASH and _holds(each, META):
                return True
    return False


def _holds(folder: Path, *names: str) -> bool:
    """Return whether it is a folder and has one of these. Raises: OSError: that cannot be told."""
    return any((folder / name).exists() for name in names)


def _why(error: SourceError | OSError, folder: Path) -> SourceError:
    """Return why a run or an experiment cannot be read, with its place."""
    if isinstance(error, OSError):
        return SourceError.of(error, folder)
    return SourceError(f"{folder}: {error}")


def _read_run(folder: Path, experiment: str) -> FileRun:
    meta = _meta(folder)
    run_id = str(meta.get("run_id") or meta.get("run_uuid") or "")
    if run_id != folder.name:
        raise SourceError(f"its {META} is that of run {run_id or '(none)'}: was it copied in part?")
    params, tags = _texts(folder / "params"), _texts(folder / "tags")
    texts = make_texts(run_id, params, tags, is_server=False)
    return FileRun(
        card=make_card(
            run_id,
            name=str(meta.get("run_name") or meta.get("name") or ""),
            experiment=experiment,
            user=str(meta.get("user_id") or ""),
            start_ms=int(meta.get("start_time") or 0),
            tags=tags,
        ),
        kind="mlruns",
        where=str(folder),
        status=_STATUSES.get(meta.get("status"), str(meta.get("status"))),
        end_ms=int(meta["end_time"]) if meta.get("end_time") else None,
        is_deleted=meta.get("lifecycle_stage") == "deleted",
        inputs=list(_inputs(folder)),
        folder=folder,
        artifact_uri=str(meta.get("artifact_uri") or ""),
        texts=texts,
        **texts.fields(),
    )


def _point(key: str, line: bytes) -> Metric | None:
    """Return one line's point; None if it is none."""
    fields = line.split()
    if len(fields) not in (2, 3, 5):
        return None
    try:
        step = int(fields[2]) if len(fields) > 2 else 0
        return key, float(fields[1]), int(fields[0]), step
    except ValueError:
        return None


def _record(points: list[Metric]) -> Points:
    return Points(max(point[2] for point in points), points)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (key, file) of all files below; a key with slashes is a path."""
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            yield path.relative_to(folder).as_posix(), path


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a run without metrics has no such folder
        raise error


def _texts(folder: Path) -> dict[str, str]:
    return {key: path.read_text("utf-8", errors="replace") for key, path in _files(folder)}


def _inputs(folder: Path) -> Iterator[DatasetInput]:
    """Yield the data sets that a run has used."""
    inputs = folder / "inputs"
    for each in sorted(inputs.iterdir()) if inputs.is_dir() else ():
        meta = _meta(each)
        if meta.get("source_type") != "DATASET":
            continue  # a logged model
        dataset = _meta(folder.parent / "datasets" / str(meta["source_id"]))
        yield make_input(dataset, meta.get("tags") or {})


def _meta(folder: Path) -> dict[str, Any]:
    """Return a folder's meta.yaml. Raises: SourceError: there is none, or it is damaged."""
    import yaml

    try:
        with (folder / META).open("rb") as file:
            data = file.read(META_BYTES_MAX)
    except FileNotFoundError:
        raise SourceError(f"no {META} in {folder}: was it copied in part?") from None
    try:
        # The C loader is ten times as fast, and as safe.
        meta = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SourceError(f"{folder / META} is damaged") from None
    if not isinstance(meta, dict):
        raise SourceError(f"{folder / META} is empty: was it copied in part?")
    return meta
