"""Run: what a rank calls."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from time import time_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import clock, endings, fluent, records, settings, values
from .artifacts import ArtifactCalls
from .autostart import start_daemon
from .errors import RelayError
from .launch import Launch, detect, launcher_process, random_key, relay_run_id
from .lineage import checked_lineage
from .messages import TEXT_CHARS_MAX
from .paths import default_socket
from .provenance import launch_tags, provenance
from .session import Session

if TYPE_CHECKING:
    from .terminal import Capture

log = logging.getLogger("mlflow_relay")

RANK_METRICS = ("prefix", "zero", "all")

_started = 0  # start_run calls of this process that came to something


def start_run(
    experiment_name: str | None = None,
    run_name: str | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    run_key: str | None = None,
    resume: str | None = None,
    resume_mode: str = "child",
    fork: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    rank_metrics: str = "prefix",
    terminal: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    autostart: bool | None = None,
    journal_bytes_max: int | None = None,
    end_timeout_s: float | None = None,
) -> Run:
    """Start this rank's part of a run. Every rank calls it the same way and gets the same run.

    Needs neither daemon nor server, waits for neither.

    Args:
        experiment_name: made on the server if there is none; default MLFLOW_EXPERIMENT_NAME, else
            "Default".
        run_name: default MLFLOW_RUN_NAME, else MLflow makes one up.
        params, tags: logged at once.
        run_key: what all ranks of this job agree on; told by Slurm, torchrun, MPI or, on one node,
            by the launcher process if not given.
        resume: the run that this one goes on with, by relay run id or MLflow run id, known to
            anybody yet or not: its links are filled in as soon as they can be.
        resume_mode: "child": a run of its own, a child of the one resumed (of its root, if that is
            a resumed run itself), with its name; "same": that run itself, RUNNING again.
        fork: the run from whose weights this one starts; goes together with `resume`, too.
        rank, world_size: told by the launcher if not given.
        rank_metrics: rank 0 logs under the plain key; the others under "rank_<n>/<key>"
            ("prefix"), not at all ("zero"), or under the plain key as well ("all").
        terminal: whose output on stdout and stderr is kept, that of child processes too: of rank 0
            ("rank0"), of each rank ("all"), of no one ("none"); MLFLOW_RELAY_TERMINAL.
        socket: of the daemon (MLFLOW_RELAY_SOCKET).
        autostart: start a daemon if none answers (MLFLOW_RELAY_AUTOSTART=1).
        journal_bytes_max: of this rank, for the time that no daemon answers
            (MLFLOW_RELAY_JOURNAL_BYTES_MAX; 256 MiB).
        end_timeout_s: the longest that `end` may take (MLFLOW_RELAY_END_TIMEOUT_S; 5 s).

    Raises:
        LaunchError: it cannot be told who this process is; says what to pass.
        JournalError: there is no space for a journal.
        TypeError, ValueError: a wrong argument, by name.
    """
    if rank_metrics not in RANK_METRICS:
        raise ValueError(f"rank_metrics={rank_metrics!r}: one of {', '.join(RANK_METRICS)}")
    lineage = checked_lineage(resume, resume_mode, fork)
    env = os.environ
    mode = settings.terminal(env, terminal)
    who = detect(
        env,
        rank=rank,
        world_size=world_size,
        run_key=run_key,
        launcher_process=launcher_process,
        random_key=random_key,
    )
    run = Run(
        who,
        _name("experiment_name", experiment_name or env.get("MLFLOW_EXPERIMENT_NAME") or "Default"),
        _name("run_name", run_name or env.get("MLFLOW_RUN_NAME") or ""),
        lineage=lineage,
        rank_metrics=rank_metrics,
        terminal=mode,
        socket=Path(socket) if socket is not None else default_socket(),
        autostart=settings.autostart(env) if autostart is None else autostart,
        journal_bytes_max=settings.journal_bytes_max(env, journal_bytes_max),
        end_timeout_s=settings.end_timeout_s(env, end_timeout_s),
    )
    try:
        run.log_params(params or {})
        run.set_tags(tags or {})
    except (TypeError, ValueError) as error:
        run.end("FAILED", reason=endings.describe(error))
        raise
    fluent.set_active(run)
    return run


class Run(ArtifactCalls):
    """One rank's part of a run; made by `start_run`. Safe to use from several threads.

    A log call copies into memory that survives this process, and returns. It raises for a wrong
    argument (TypeError, ValueError) and on a run that has ended (RelayError), for nothing else.

    Attributes:
        run_id: the relay run id, 32 hex digits, known at once and offline.
        mlflow_run_id: the server's; None until it is known.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        who: Launch,
        experiment_name: str,
        run_name: str,
        *,
        lineage: dict[str, str],
        rank_metrics: str,
        terminal: str,
        socket: Path,
        autostart: bool,
        journal_bytes_max: int,
        end_timeout_s: float,
    ) -> None:
        global _started  # noqa: PLW0603  # one count for the process, however it starts runs
        super().__init__()
        ordinal = _started + 1
        self.run_id = relay_run_id(who.run_key, ordinal)
        if self.run_id in (lineage["resume"], lineage["fork"]):
            raise ValueError(
                f"run {self.run_id} cannot resume or fork itself: processes with an equal run_key "
                "are one run already"
            )
        self.mlflow_run_id: str | None = None
        self.rank, self.world_size = who.rank, who.world_size
        self._socket = socket
        self._journal_bytes_max = journal_bytes_max
        self._end_timeout_s = end_timeout_s
        self._autostart = autostart
        self._silent = rank_metrics == "zero" and who.rank > 0
        prefix = f"rank_{who.rank}/" if rank_metrics == "prefix" and who.rank > 0 else ""
        self._packer = records.MetricsPacker(prefix)
        self._next_step: defaultdict[str, count[int]] = defaultdict(count)
        tags = provenance()
        self._card = {
            "run_id": self.run_id,
            "run_key": who.run_key if ordinal == 1 else f"{who.run_key}#{ordinal}",
            "experiment_name": experiment_name,
            "run_name": run_name,
            "rank": who.rank,
            "world_size": who.world_size,
            "node": os.uname().nodename,
            "start_ms": clock.now_ms(),
            "tags": {**tags, **launch_tags(who)},
            "primary": True,
            "node_count": _node_count(who),
            "local_world_size": who.local_world_size or 0,
            **_node_rank(who),
            **lineage,
        }
        # First of all: no other thread of ours is there yet that would take the GIL meanwhile.
        is_kept = terminal == "all" or (terminal == "rank0" and who.rank == 0)
        self._terminal = self._keep_terminal() if is_kept else None
        try:
            self._session: Session | None = self._open_session()
        except BaseException:
            if self._terminal is not None:
                self._terminal.stop()
            raise
        self._ended = self._is_cut_off = False
        _started = ordinal
        endings.open_runs.add(self)

    # ── logging ──

    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, *, reduce: str | None = None
    ) -> None:
        """Log values of one step.

        Args:
            metrics: numbers by key: Python's, NumPy's, torch's, JAX's; NaN and infinities are kept.
            step: default a count of its own for each key, so that curves are curves.
            reduce: "mean", "sum", "min" or "max": of the values that all ranks of this node log for
                this step the daemon makes one point, under the plain key; needs a step.

        Raises: TypeError, ValueError: a key or value that is none, by name; RelayError: ended.
        """
        if reduce is not None:
            self._log_reduced(metrics, step, reduce)
            return
        if self._silent or not metrics:
            return
        if len(metrics) > values.METRICS_PER_RECORD_MAX:
            for part in values.chunks(metrics, values.METRICS_PER_RECORD_MAX):
                self.log_metrics(part, step)
        elif step is None:
            checked = {key: values.to_float(key, value) for key, value in metrics.items()}
            steps = [next(self._next_step[key]) for key in checked]
            self._keep(self._packer.pack_steps(checked, steps, clock.now_ms()))
        else:
            self._keep(self._packer.pack(metrics, step, time_ns() // 1_000_000))

    def _log_reduced(self, metrics: Mapping[str, Any], step: int | None, how: str) -> None:
        if step is None:
            raise ValueError(f"reduce={how!r} needs a step: ranks are brought together by it")
        now_ms = clock.now_ms()
        for part in values.chunks(metrics, values.METRICS_PER_RECORD_MAX):
            self._keep(records.pack_reduce(how, part, step, now_ms))

    def log_metric(self, key: str, value: Any, step: int | None = None) -> None:
        """Log one value: see `log_metrics`."""
        self.log_metrics({key: value}, step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params, as text. A key keeps its first value: another one is a dead letter.

        Raises: TypeError, ValueError: a key that is none, or text that cannot be encoded.
        """
        self._log_texts("param", records.pack_params, params)

    def log_param(self, key: str, value: Any) -> None:
        """Log one param: see `log_params`."""
        self.log_params({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, as text. The last value of a key stands.

        Raises: TypeError, ValueError: a key that is none, or text that cannot be encoded.
        """
        self._log_texts("tag", records.pack_tags, tags)

    def set_tag(self, key: str, value: Any) -> None:
        """Set one tag: see `set_tags`."""
        self.set_tags({key: value})

    def _log_texts(self, what: str, pack: Any, items: Mapping[str, Any]) -> None:
        texts = {
            values.check_key(what, key): values.to_text(what, key, value)
            for key, value in items.items()
        }
        now_ms = clock.now_ms()
        for part in values.text_chunks(texts):
            self._keep(pack(part, now_ms))

    # ── the end ──

    def end(self, status: str = "FINISHED", *, reason: str = "") -> None:
        """End this rank's part of the run; the run ends when all its ranks have.

        Returns as soon as the daemon has all on its disk, at the latest after `end_timeout_s`;
        what is not acknowledged by then stays in the journal, where a daemon finds it. A second
        call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
            reason: for people; becomes the tag `relay.end_reason`.

        Raises: ValueError: another status.
        """
        if status not in records.END_STATUSES:
            raise ValueError(f"status={status!r}: one of {', '.join(records.END_STATUSES)}")
        if self._ended:
            return
        if self._terminal is not None:
            self._terminal.stop()
        # Only if it is this process's own: a forked child that logged nothing has nothing to end.
        session = self._session
        if session is not None:
            session.journal.seal(records.pack_end(status, endings.cut(reason), clock.now_ms()))
        self._ended = True
        fluent.clear_active(self)
        endings.open_runs.discard(self)
        if session is not None and not session.end(self._end_timeout_s):
            log.warning(
                "no daemon has acknowledged the last %d records of run %s; they are kept in %s "
                "and delivered when one runs: mlflow-relay daemon --socket %s",
                session.journal.unacked,
                self.run_id,
                session.journal.path,
                self._socket,
            )

    def _keep_terminal(self) -> Capture | None:
        from . import terminal

        return terminal.start(self._card, self._socket, self._journal_bytes_max)

    @property
    def has_ended(self) -> bool:
        """Whether `end` was called: nothing more can be logged."""
        return self._ended

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        endings.end_by(self, error)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "running"
        return f"<Run {self.run_id} rank {self.rank}/{self.world_size} {state}>"

    # ── the session ──

    def _open_session(self) -> Session:
        endings.end_at_exit_of_worker()
        return Session(
            self._card,
            socket=self._socket,
            journal_bytes_max=self._journal_bytes_max,
            on_mlflow_run_id=self._set_mlflow_run_id,
            on_no_daemon=partial(start_daemon, self._socket) if self._autostart else None,
        )

    def _set_mlflow_run_id(self, mlflow_run_id: str) -> None:
        self.mlflow_run_id = mlflow_run_id

    def _keep(self, record: bytes) -> bool:
        """Return False if the record is lost, and counted."""
        session = self._living_session()
        return session is not None and session.journal.append(record)

    def _lose(self, why: str) -> None:
        """Count a log call whose content cannot be kept."""
        log.error("run %s: %s", self.run_id, why)
        session = self._living_session()
        if session is not None:
            session.journal.lose()

    def _living_session(self) -> Session | None:
        if self._ended:
            raise RelayError(f"run {self.run_id} has ended: start_run makes a new one")
        return self._session or self._open_session_of_child()

    def _open_session_of_child(self) -> Session | None:
        """First use after a fork. Returns None where there is no space for one more journal: that
        is no reason to stop a training that has begun."""
        try:
            self._session = self._open_session()
        except RelayError as error:
            if not self._is_cut_off:
                log.error("what this forked process logs is lost: %s", error)
            self._is_cut_off = True
        return self._session

    def _forked(self) -> None:
        """In a forked child: the parent's session stays the parent's. One of its own is made at
        first use; it is no rank, so its end says nothing of the run."""
        session, self._session = self._session, None
        self._card = {**self._card, "primary": False}
        if self._terminal is not None:
            self._terminal.leave_to_parent()
            self._terminal = None
        if session is not None:
            session.leave_to_parent()


def _name(what: str, name: object) -> str:
    """Raises: TypeError, ValueError: the daemon would not take it."""
    if not isinstance(name, str):
        raise TypeError(f"{what}={name!r} is a {type(name).__name__}; it must be a str")
    if len(name) > TEXT_CHARS_MAX:
        raise ValueError(f"{what} has {len(name)} characters; at most {TEXT_CHARS_MAX}")
    return values.to_text(what, "", name)


def _node_count(who: Launch) -> int:
    """Return the number of nodes; 0 if it was not told and there may be several."""
    if who.node_count is None and who.local_world_size == who.world_size:
        return 1
    return who.node_count or 0


def _node_rank(who: Launch) -> dict[str, int]:
    """Return what the card says of this node's number among the job's nodes; nothing if untold."""
    if who.node_rank is not None:
        return {"node_rank": who.node_rank}
    first = who.rank - who.local_rank  # of the ranks here, where each node has its share in a row
    if who.local_world_size and first >= 0 and first % who.local_world_size == 0:
        return {"node_rank": first // who.local_world_size}
    return {}


def _after_fork_in_child() -> None:
    for run in list(endings.open_runs):
        run._forked()  # noqa: SLF001  # the same room


os.register_at_fork(after_in_child=_after_fork_in_child)
