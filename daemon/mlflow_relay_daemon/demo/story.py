"""The conductor: starts everything, kills what the story wants killed, and counts at the end."""

from __future__ import annotations

import http.client
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from mlflow_relay_daemon.control_client import ControlClient
from mlflow_relay_daemon.exits import CommandError

from .children import HOST, RANKS, Daemon, Folders, Rank, Server, choose_port
from .compare import compare
from .digits import save_digits
from .mlflow_api import MlflowApi, RunSeen
from .narrator import Narrator, View
from .report import Bridge, Report
from .trainer import ENOUGH, EXPERIMENT
from .witness import Point, Testimony, read_testimony

METRICS = 10
STEP_S = 0.016  # 2,500 points a second; MLflow's server takes about 10,000
USUAL_START_S, SLOWNESS_MAX = 8.0, 5.0

BEFORE_S, AWAY_S, DEAD_S, AFTER_S = 3.0, 3.0, 1.0, 4.0
TRAINING_S_MIN = 24.0
#: Points of the backlog that are delivered when the daemon is killed: it is in the middle of it.
CAUGHT_UP_POINTS = 2000
#: The whole story, and what of it is kept for the count. Tidying up takes a second more.
STORY_S_MAX, COUNT_S = 85.0, 9.0

POLL_S, LOOK_S = 0.05, 0.25


class Interrupted(Exception):
    """Somebody wants the demo to end now."""


class Outage(NamedTuple):
    """On time.monotonic's clock."""

    begin_s: float
    end_s: float


class Story:
    """Tells it once; a context manager, which ends all processes and removes all files.

    Args:
        narrator: is told what happens.
        is_stopped: asked all the time; True ends the story with Interrupted.
        port: of the MLflow server; None: a free one.

    Raises: CommandError: the port is taken, no folder can be made.
    """

    def __init__(
        self, narrator: Narrator, is_stopped: Callable[[], bool], port: int | None
    ) -> None:
        self._narrator, self._is_stopped = narrator, is_stopped
        self._until_s = time.monotonic() + STORY_S_MAX
        self._looked_s = 0.0
        self._step_s = STEP_S
        self._view: View | None = None  # None: no training yet
        self._run_state = ""
        self.page_url = ""  #: of the run, once it is known
        port = choose_port(port)
        self._folders = Folders()
        self.server = Server(self._folders.files, port)
        self._daemon = Daemon(self._folders, self.server.uri)
        self._ranks = [Rank(rank, self._folders) for rank in range(RANKS)]

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        for child in (*self._ranks, self._daemon, self.server):
            child.kill()
        self._folders.remove()

    def tell(self) -> Report:
        """Tell the story and return what came of it.

        Raises: Interrupted; CommandError: a part of it failed; OSError: a file, a process.
        """
        self._set_the_stage()
        trained_s = self._begin_to_train()
        server_away = self._take_the_server_away()
        daemon_dead = self._kill_the_daemon()
        self._let_all_arrive(trained_s)
        return self._count(server_away, daemon_dead)

    # ── the scenes ──

    def _set_the_stage(self) -> None:
        begin_s = time.monotonic()
        self._say(f"An MLflow server starts (SQLite, port {self.server.port}).")
        self.server.begin()
        self._daemon.begin()
        self._wait(self._daemon.is_up, "the daemon")
        self._say("A relay daemon runs: it keeps on disk what ranks log, and brings it to MLflow.")
        train, test = save_digits(self._folders.files / "digits.npz")
        self._say(f"The data are loaded: {train:,} handwritten digits to learn, {test} to test.")
        self._wait(self.server.is_up, "the MLflow server")
        start_s = time.monotonic() - begin_s
        self._say(f"The MLflow server answers, after {start_s:.1f} s.")
        self._step_s = step_s_for(start_s)

    def _begin_to_train(self) -> float:
        """Return when the training has lasted long enough."""
        self._view = View(0, math.nan, 0, 0)
        for rank in self._ranks:
            rank.begin(self._step_s, self._daemon.socket)
        self._say(
            f"{RANKS} ranks train one model together: softmax regression, gradients averaged at "
            f"each step. Each rank logs {METRICS} metrics at each step."
        )
        self._wait(lambda: self._now.step and self._now.delivered, "the first points in MLflow")
        begin_s = time.monotonic()
        self._pause(BEFORE_S)
        return begin_s + TRAINING_S_MIN

    def _take_the_server_away(self) -> Outage:
        begin_s = time.monotonic()
        self.server.kill()
        self._say(
            f"Step {self._now.step:,}: the MLflow server is KILLED. "
            "A plain mlflow.log_metrics would now hold up the training for minutes.",
            "red",
        )
        self._pause(AWAY_S)
        self._say(
            f"Step {self._now.step:,}: no rank has noticed. {self._now.kept:,} points are kept on "
            "this node, and more come. The server is started again."
        )
        self.server.begin()
        self._wait(self.server.is_up, "the MLflow server, again")
        end_s = time.monotonic()
        self._say(
            f"Step {self._now.step:,}: the MLflow server is back after {end_s - begin_s:.1f} s. "
            f"The daemon finds out by itself, and brings the {self._now.kept:,} points that wait.",
            "green",
        )
        return Outage(begin_s, end_s)

    def _kill_the_daemon(self) -> Outage:
        target = self._now.delivered + min(CAUGHT_UP_POINTS, self._now.kept)
        self._wait(lambda: self._now.delivered >= target, "the backlog to be delivered")
        begin_s = time.monotonic()
        self._daemon.kill()
        self._say(
            f"Step {self._now.step:,}: {self._now.kept:,} points are still to come, and the daemon "
            "is KILLED (SIGKILL). The ranks log on, into memory that outlives them.",
            "red",
        )
        self._pause(DEAD_S)
        self._daemon.begin()
        self._wait(self._daemon.is_up, "the daemon, again")
        end_s = time.monotonic()
        self._say(
            f"Step {self._now.step:,}: the daemon is back after {end_s - begin_s:.1f} s. It reads "
            "its disk, and asks the ranks for what is not on it.",
            "green",
        )
        return Outage(begin_s, end_s)

    def _let_all_arrive(self, trained_s: float) -> None:
        self._pause(max(AFTER_S, trained_s - time.monotonic()))
        (self._folders.files / ENOUGH).touch()
        self._wait(lambda: all(rank.has_finished() for rank in self._ranks), "the training's end")
        self._look()
        self._say(
            f"The training is over and the ranks are gone: {self._now.accuracy:.1%} of the test "
            f"digits are told rightly. {self._now.kept:,} points are on their way."
        )
        until_s = self._until_s - COUNT_S
        self._wait(
            lambda: self._run_state == "ended" or time.monotonic() > until_s, "the last points"
        )
        if self._run_state == "ended":
            self._say("The daemon has delivered all it had. Now MLflow is asked for every point.")
        else:
            self._say("Time is up. Now MLflow is asked for every point, all there or not.", "red")

    def _count(self, server_away: Outage, daemon_dead: Outage) -> Report:
        testimonies = [read_testimony(self._folders.files, rank) for rank in range(RANKS)]
        steps = len(testimonies[0].calls)
        try:
            runs, found = self._read_back()
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise CommandError(f"MLflow could not be asked what it has: {error!r}") from error
        values = {(key, step): value for key, step, value in found}

        def ends_of(key: str) -> tuple[float, float]:
            return values.get((key, 0), math.nan), values.get((key, steps - 1), math.nan)

        return Report(
            verdict=compare((point for each in testimonies for point in each.points()), found),
            statuses=[run.status for run in runs],
            ranks=RANKS,
            steps=steps,
            is_late=self._run_state != "ended",
            calls_s=[call_s for each in testimonies for call_s in each.calls_s()],
            ends_s=[each.end_ns / 1e9 for each in testimonies],
            server_away=_bridge(server_away, testimonies[0]),
            daemon_dead=_bridge(daemon_dead, testimonies[0]),
            accuracy=ends_of("test/accuracy"),
            loss=ends_of("train/mean_loss"),
        )

    def _read_back(self) -> tuple[list[RunSeen], list[Point]]:
        """Return all runs and all points that MLflow has."""
        api = MlflowApi(HOST, self.server.port)
        runs, points = api.runs(EXPERIMENT), []
        for run in runs:
            self.page_url = f"{self.server.uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
            for key in run.keys:
                self._check("the points")
                points += api.history(run.run_id, key)
        return runs, points

    # ── between the scenes ──

    @property
    def _now(self) -> View:
        assert self._view is not None  # since _begin_to_train
        return self._view

    def _say(self, text: str, style: str = "") -> None:
        self._narrator.say(text, style)

    def _pause(self, pause_s: float) -> None:
        until_s = time.monotonic() + pause_s
        self._wait(lambda: time.monotonic() >= until_s, "a moment")

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until the condition is true, and show how far things are. Raises: see _check."""
        while not condition():
            self._check(what)
            if time.monotonic() - self._looked_s >= LOOK_S:
                self._look()
            time.sleep(POLL_S)

    def _check(self, what: str) -> None:
        """Raises: Interrupted; CommandError: an unplanned death, or the time is up."""
        if self._is_stopped():
            raise Interrupted
        if time.monotonic() > self._until_s:
            raise CommandError(
                f"the demo ends after {STORY_S_MAX:g} s, and it was still waiting for {what}: this "
                "machine is too slow for it, or too busy just now"
            )
        for child in (self.server, self._daemon, *self._ranks):
            child.check()

    def _look(self) -> None:
        """Ask how far things are, and show it. Whoever is dead just now is not asked."""
        self._looked_s = time.monotonic()
        if self._view is None:
            return
        words = self._ranks[0].last_line().split()
        if len(words) == 2 and words[0].isdigit():
            step, accuracy = words
            self._view = self._view._replace(step=int(step), accuracy=float(accuracy))
        delivered, self._run_state = self._ask_daemon()
        self._view = self._view._replace(
            logged=self._view.step * RANKS * METRICS,
            delivered=max(delivered, self._view.delivered),
        )
        if self._view.step:
            self._narrator.show(self._view)

    def _ask_daemon(self) -> tuple[int, str]:
        """Return points delivered, and the run's state."""
        try:
            with ControlClient(self._daemon.socket, timeout_s=1.0) as client:
                runs = client.status()["runs"]
        except CommandError:
            return 0, ""
        return (runs[0]["delivered_points"], runs[0]["state"]) if runs else (0, "")


def step_s_for(server_start_s: float) -> float:
    """Return the pace of the training. Pure.

    A machine on which a server starts slowly delivers slowly, too, and is given less to do.
    """
    return STEP_S * min(max(1.0, server_start_s / USUAL_START_S), SLOWNESS_MAX)


def _bridge(outage: Outage, testimony: Testimony) -> Bridge:
    return Bridge(outage.end_s - outage.begin_s, testimony.calls_between(*outage))
