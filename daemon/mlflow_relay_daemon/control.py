"""What operators ask of a living daemon: ping, status, flush, dead letters, lineage.

See PROTOCOL.md, CONTROL.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mlflow_relay._version import __version__
from mlflow_relay.errors import FormatError
from mlflow_relay.messages import pack_map, unpack_map
from mlflow_relay_daemon.artifacts import refused
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.lane import by_hand
from mlflow_relay_daemon.lane.relatives import IDS_MAX, relatives
from mlflow_relay_daemon.retry import Stopped
from mlflow_relay_daemon.sinks import SinkError

log = logging.getLogger(__name__)

#: Of what the plugin and the local endpoint say to each other besides MLflow's own API.
API_VERSION = 1
RETRY_THREAD, RELATIVES_THREAD = "dead letters", "relatives"
#: Requests that wait for the server at a time, each in a thread.
WAITING_MAX = 8


class Control:
    """Answers control requests, from the intake's thread.

    Args:
        read_status: returns the status object.
        look: takes over what dead ranks left, now.
        in_journals: returns a run's records that its ranks hold.
        open_door: starts the local endpoint if there is none, and returns port and token.
        answer_later: sends an answer from another thread; set by the service.
    """

    def __init__(
        self,
        runs: Runs,
        read_status: Callable[[], dict[str, Any]],
        look: Callable[[], None],
        in_journals: Callable[[Hosted], int],
        open_door: Callable[[], tuple[int, str]] | None = None,
    ) -> None:
        self._open_door = open_door
        self._runs, self._read_status = runs, read_status
        self._look, self._in_journals = look, in_journals
        self.answer_later: Callable[[bytes, bytes], None] = lambda _peer, _payload: None

    def answer(self, peer: bytes, payload: bytes, uid: int | None = None) -> bytes | None:
        """Return the answer; None: it comes later, from a thread that waits for the server.

        Args: uid: of who asks: only what is his is shown and done.
        Raises: FormatError: not a control request.
        """
        request = unpack_map(payload)
        command = request.get("command")
        try:
            match command:
                case "ping":
                    return _ok(pid=os.getpid(), version=__version__)
                case "status":
                    return _ok(status=self.status_for(uid))
                case "door":
                    self._door(peer, uid)
                    return None
                case "flush":
                    return _ok(targets=self._flush(request, uid))
                case "dead_letters":
                    return self._dead_letters(peer, request, uid)
                case "lineage":
                    return self._lineage(peer, request, uid)
        except (KeyError, TypeError, ValueError) as error:
            return _failed(f"{command}: {error}")
        except OSError as error:
            return _failed(f"{command}: the spool's disk: {error.strerror or error}")
        if not isinstance(command, str):
            raise FormatError("a control request without a command")
        return _failed(f"{command[:40]!r} is no command of this daemon ({__version__})")

    def _door(self, peer: bytes, uid: int | None) -> None:
        """Open the local endpoint and tell where it is, and the token that opens all runs."""
        if not self._runs.access.is_admin(uid):
            raise ValueError(
                "the local endpoint is for the user whose daemon this is: start one of your own"
            )
        threading.Thread(target=self._open, args=(peer,), name="door").start()

    def _open(self, peer: bytes) -> None:
        try:
            if self._open_door is None:
                raise CommandError("this daemon has no local endpoint")
            port, token = self._open_door()
            fields = {"port": port, "token": token, "api": API_VERSION, "version": __version__}
            self.answer_later(peer, _ok(**fields))
        except (CommandError, OSError) as error:
            self.answer_later(peer, _failed(f"the local endpoint: {error}"))

    def status_for(self, uid: int | None) -> dict[str, Any]:
        """Return the status object with the runs that this user may see."""
        status = self._read_status()
        if self._runs.access.is_admin(uid):
            return status
        own = {each.run.card.run_id for each in self._runs.of_user(uid)}
        return {**status, "runs": [run for run in status["runs"] if run["run_id"] in own]}

    def _flush(self, request: dict[str, Any], uid: int | None) -> dict[str, int]:
        if self._runs.delivery is None:
            raise ValueError("this daemon is offline and delivers nothing: see `mlflow-relay sync`")
        self._look()
        chosen = self._chosen(request.get("runs"), uid)
        self._runs.delivery.deliver_now([each.lane for each in chosen if each.lane is not None])
        if self._runs.uploads is not None:
            self._runs.uploads.try_now()
        return {
            each.run.card.run_id: each.run.accepted_records + self._in_journals(each)
            for each in chosen
        }

    def _dead_letters(self, peer: bytes, request: dict[str, Any], uid: int | None) -> bytes | None:
        run = request.get("run")
        chosen = self._chosen([run] if run else None, uid)
        ids = None if request.get("ids") is None else {int(each) for each in request["ids"]}
        match request.get("action"):
            case "list":
                letters = [
                    {**asdict(letter), "run_id": each.run.card.run_id}
                    for each in chosen
                    for letter in each.letters.list()
                ]
                return _ok(dead_letters=letters)
            case "drop":
                return _ok(count=sum(_drop(each, ids) for each in chosen))
            case "retry":
                self._check_threads()
                thread = threading.Thread(
                    target=self._retry, args=(peer, chosen, ids), name=RETRY_THREAD, daemon=True
                )
                thread.start()
                return None
        raise ValueError("action is list, retry or drop")

    def _retry(self, peer: bytes, chosen: list[Hosted], ids: set[int] | None) -> None:
        try:
            taken = sum(each.lane.retry_letters(ids) for each in chosen if each.lane is not None)
            taken += sum(refused.try_again(each.run, each.letters, ids) for each in chosen)
            self.answer_later(peer, _ok(count=taken))
        except (SinkError, OSError) as error:
            self.answer_later(peer, _failed(str(error)))
        except Stopped:
            self.answer_later(peer, _failed("the daemon is stopping"))

    def _lineage(self, peer: bytes, request: dict[str, Any], uid: int | None) -> bytes | None:
        if request.get("action") == "relatives":
            if not self._runs.access.is_admin(uid):
                raise ValueError("the server is asked only for the user whose daemon this is")
            self._check_threads()
            self._ask_for_relatives(peer, [str(each) for each in request["ids"]])
            return None
        [hosted] = self._chosen([request["run"]], uid)
        match request.get("action"):
            case "link":
                decided = [by_hand.link(hosted.run, request["to"], request.get("kind"))]
            case "drop":
                decided = by_hand.drop(hosted.run)
            case _:
                raise ValueError("action is link, drop or relatives")
        if hosted.lane is not None:
            hosted.lane.look_again()
            self._runs.notify(hosted)
        return _ok(links=[each._asdict() for each in decided])

    def _ask_for_relatives(self, peer: bytes, ids: list[str]) -> None:
        """Raises: ValueError: the server cannot be asked now."""
        runs = self._runs
        if runs.sink is None or runs.breaker is None or runs.breaker.snapshot().state != "up":
            raise ValueError("the server cannot be asked now")
        if len(ids) > IDS_MAX:
            raise ValueError(f"{len(ids)} ids; at most {IDS_MAX}")
        sink = runs.sink

        def ask() -> None:
            try:
                self.answer_later(peer, _ok(runs=relatives(sink, ids)))
            except SinkError as error:
                self.answer_later(peer, _failed(str(error)))

        threading.Thread(target=ask, name=RELATIVES_THREAD, daemon=True).start()

    def _chosen(self, run_ids: list[str] | None, uid: int | None) -> list[Hosted]:
        """Return the runs of these ids, all if there are none. Raises: KeyError."""
        own = self._runs.of_user(uid)
        if not run_ids:
            return own
        by_id = {each.run.card.run_id: each for each in own}
        return [by_id[run_id] for run_id in run_ids]

    def _check_threads(self) -> None:
        """Raises: ValueError: too many requests wait for the server already."""
        names = (RETRY_THREAD, RELATIVES_THREAD)
        if sum(each.name in names for each in threading.enumerate()) >= WAITING_MAX:
            raise ValueError("other requests wait for the server already: try again later")


def _drop(hosted: Hosted, ids: set[int] | None) -> int:
    if ids is None:
        ids = {letter.id for letter in hosted.letters.list()}
    refused.drop(hosted.run, hosted.letters, ids)
    return hosted.letters.remove(ids) if ids else 0


def _ok(**fields: Any) -> bytes:
    return pack_map({"ok": True, **fields})


def _failed(error: str) -> bytes:
    return pack_map({"ok": False, "error": error})
