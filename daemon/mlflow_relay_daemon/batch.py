"""Records → one request that MLflow takes whole. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mlflow_relay.records import (
    Artifact,
    Call,
    Combined,
    End,
    Metrics,
    Params,
    Record,
    Reduce,
    Tags,
    Terminal,
)
from mlflow_relay_daemon.sinks import Metric, Param, Tag
from mlflow_relay_daemon.spool.transcript import Printed

# mlflow.utils.validation: MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH, MAX_ENTITIES_PER_BATCH
METRICS_MAX, PARAMS_MAX, TAGS_MAX, ENTITIES_MAX = 1000, 100, 100, 1000
ARTIFACT_LETTER = "artifact"  #: kind of a dead letter that is a file
ARTIFACTS_MAX = 1000  # ours: what shares one fsync of the ledger
PRINTED_BYTES_MAX = 4 << 20  # ours: what shares one fsync of a transcript
GIVEN_VALUES_MAX = 50_000  # ours: for reduction, no request; what is read at once
#: MLflow asks for less than 1 MB a request (MAX_BATCH_LOG_REQUEST_SIZE, which nothing checks).
BODY_BYTES_MAX = 1_000_000
#: MLflow cuts longer values in silence (MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH).
PARAM_CHARS_MAX, TAG_CHARS_MAX = 6000, 8000
_METRIC_OVERHEAD_BYTES = 80  # of JSON around a key


class Entry(NamedTuple):
    """One thing that MLflow may refuse on its own account."""

    kind: str  #: "metric", "param", "tag" or "call"
    key: str
    value: float | str
    timestamp_ms: int
    step: int | None


class Objection(NamedTuple):
    """An entry that will not be delivered as it is, and why."""

    entry: Entry
    reason: str
    error_code: str = ""
    is_refusal: bool = True  #: by MLflow's own word; False: its server stumbles over it


class Points(NamedTuple):
    """Metrics that have a time each, as other stores keep them; at most METRICS_MAX."""

    timestamp_ms: int  #: of the newest
    metrics: list[Metric]


@dataclass
class Batch:
    """What goes to MLflow in one request, and what follows from its delivery."""

    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    held: list[list[str]] = field(default_factory=list)  #: kind, key, value: wait for an id
    ends: list[tuple[bytes, End]] = field(default_factory=list)  #: session, its word
    artifacts: list[Artifact] = field(default_factory=list)  #: for the run's ledger
    printed: list[Printed] = field(default_factory=list)  #: for the ranks' transcripts
    printed_bytes: int = 0
    #: For reduction, in order: session, what it says.
    given: list[tuple[bytes, Reduce | Combined]] = field(default_factory=list)
    given_values: int = 0
    objections: list[Objection] = field(default_factory=list)
    call: Call | None = None  #: a request of its own: with it there is nothing else to send
    times_ms: dict[str, int] = field(default_factory=dict)  #: of params and tags, by kind and key
    records: int = 0
    last_record_ms: int = 0
    bytes_estimate: int = 0

    def has_room_for(self, record: Record | Points) -> bool:
        """Return whether the record fits in; an empty batch has room for any."""
        if self.call is not None:
            return False
        match record:
            case Call():
                return not self.records
            case Artifact():
                return len(self.artifacts) < ARTIFACTS_MAX
            case Reduce():
                return self.given_values < GIVEN_VALUES_MAX
            case Terminal():
                return self.printed_bytes < PRINTED_BYTES_MAX
            case Metrics() | Combined():
                return self._has_room(_body_bytes(record), metrics=len(record.keys))
            case Points():
                return self._has_room(_body_bytes(record), metrics=len(record.metrics))
            case Params():
                return self._has_room(_body_bytes(record), params=len(record.items))
            case Tags():
                return self._has_room(_body_bytes(record), tags=len(record.items))
        return self._has_room(0)

    def _has_room(self, size: int, metrics: int = 0, params: int = 0, tags: int = 0) -> bool:
        if self.call is not None:
            return False
        if not (self.metrics or self.params or self.tags):
            return True
        metrics += len(self.metrics)
        params += len(self.params)
        tags += len(self.tags)
        return (
            self.bytes_estimate + size <= BODY_BYTES_MAX
            and metrics <= METRICS_MAX
            and params <= PARAMS_MAX
            and tags <= TAGS_MAX
            and metrics + params + tags <= ENTITIES_MAX
        )

    def take_metrics(self, record: Metrics) -> bool:
        """Take metrics in if there is room; return whether there was.

        In one go, and looked at once: nearly all records are metrics, and a lane's CPU is theirs.
        """
        size = _body_bytes(record)
        if not self._has_room(size, metrics=len(record.keys)):
            return False
        self._add_metrics(record, size)
        return True

    def _add_metrics(self, record: Metrics, size: int) -> None:
        timestamp_ms, steps, keys, values = record
        self.bytes_estimate += size
        self.last_record_ms = max(self.last_record_ms, timestamp_ms)
        self.metrics += zip(keys, values, [timestamp_ms] * len(keys), steps, strict=True)

    def add(self, session: bytes, record: Record | Points, known_params: dict[str, str]) -> None:
        """Take a record in.

        Args:
            known_params: those that the run has already, as far as is known; a different value for
                one of them would make MLflow refuse the whole request.
        """
        if isinstance(record, Metrics):
            self._add_metrics(record, _body_bytes(record))
            return
        self.last_record_ms = max(self.last_record_ms, record.timestamp_ms)
        self.bytes_estimate += _body_bytes(record)
        match record:
            case Points():
                self.metrics += record.metrics
            case Params():
                for key, value in record.items.items():
                    self._add_param(key, value, record.timestamp_ms, known_params)
            case Tags():
                self._add_tags(record)
            case End():
                self.ends.append((session, record))
            case Call():
                self.call = record
            case Artifact():
                self.artifacts.append(record)
            case Reduce() | Combined():
                self._add_given(session, record)

    def _add_given(self, session: bytes, record: Reduce | Combined) -> None:
        self.given.append((session, record))
        self.given_values += len(record.keys)
        if isinstance(record, Combined):
            time_ms, step = record.timestamp_ms, record.step
            self.metrics += [
                (key + record.suffix, value, time_ms, step)
                for key, value in zip(record.keys, record.values, strict=True)
            ]

    def add_printed(self, printed: Printed) -> None:
        """Take in what a rank has printed."""
        self.printed.append(printed)
        self.printed_bytes += len(printed.data)

    def _add_param(
        self, key: str, value: str, timestamp_ms: int, known_params: dict[str, str]
    ) -> None:
        entry = Entry("param", key, value, timestamp_ms, None)
        has = self.params.get(key, known_params.get(key))
        if has is None:
            self.params[key] = self._cut(entry, PARAM_CHARS_MAX)
            self.times_ms["param" + key] = timestamp_ms
        elif has != value[:PARAM_CHARS_MAX]:
            reason = f"the param has the value {has[:200]!r} already; MLflow keeps the first"
            self.objections.append(Objection(entry, reason))

    def _add_tags(self, tags: Tags) -> None:
        for key, value in tags.items.items():
            entry = Entry("tag", key, value, tags.timestamp_ms, None)
            self.tags[key] = self._cut(entry, TAG_CHARS_MAX)
            self.times_ms["tag" + key] = tags.timestamp_ms

    def _cut(self, entry: Entry, chars_max: int) -> str:
        value = str(entry.value)
        if len(value) > chars_max:
            reason = (
                f"MLflow keeps {chars_max} of its {len(value)} characters: "
                "delivered cut, kept whole here"
            )
            self.objections.append(Objection(entry, reason))
        return value[:chars_max]

    def entries(self) -> list[Entry]:
        """Return all that is to be delivered, one by one."""
        found = [_metric_entry(metric) for metric in self.metrics]
        for kind, items in (("param", self.params), ("tag", self.tags)):
            found += [
                Entry(kind, key, value, self.times_ms.get(kind + key, 0), None)
                for key, value in items.items()
            ]
        return found

    def refuse(self, guilty: list[Objection]) -> None:
        """Take out what MLflow refused: it is not delivered, and kept as an objection."""
        entries = {objection.entry for objection in guilty}
        self.metrics = [metric for metric in self.metrics if _metric_entry(metric) not in entries]
        for objection in guilty:
            kind, key = objection.entry.kind, objection.entry.key
            if kind != "metric":
                (self.params if kind == "param" else self.tags).pop(key, None)
        self.objections += guilty

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.metrics or self.params or self.tags or self.call)


def fits_whole(entry: Entry) -> bool:
    """Return whether MLflow would keep all of it: it cuts what is too long, and says nothing."""
    chars_max = {"param": PARAM_CHARS_MAX, "tag": TAG_CHARS_MAX}.get(entry.kind)
    return chars_max is None or len(str(entry.value)) <= chars_max


def _metric_entry(metric: Metric) -> Entry:
    key, value, timestamp_ms, step = metric
    return Entry("metric", key, value, timestamp_ms, step)


def split(entries: list[Entry]) -> tuple[list[Metric], list[Param], list[Tag]]:
    """Return entries as a sink takes them."""
    metrics = [
        (each.key, float(each.value), each.timestamp_ms, each.step or 0)
        for each in entries
        if each.kind == "metric"
    ]
    params = [(each.key, str(each.value)) for each in entries if each.kind == "param"]
    tags = [(each.key, str(each.value)) for each in entries if each.kind == "tag"]
    return metrics, params, tags


def _body_bytes(record: Record | Points) -> int:
    match record:
        case Points():
            keys = sum(len(metric[0].encode()) for metric in record.metrics)
            return keys + _METRIC_OVERHEAD_BYTES * len(record.metrics)
        case Metrics() | Combined():
            keys = len("".join(record.keys).encode())  # of each record: no loop in Python
            return keys + _METRIC_OVERHEAD_BYTES * len(record.keys)
        case Params() | Tags():
            return 4 * sum(len(key) + len(value) for key, value in record.items.items())
    return 0
