"""The daemon's one local HTTP port: the server's life, who may ask, and what is mounted there.

Loaded only when `http_port` is set. The server runs in a thread of its own; what a handler wants
of the daemon's state it asks for with `Service.in_loop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mlflow_relay_daemon.api import health, metrics, page, tracking_routes
from mlflow_relay_daemon.api.guard import Guard

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from mlflow_relay_daemon.service import Service

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
#: Another name in the Host header is a page of the internet that had its own name resolved to
#: loopback (DNS rebinding), in a browser on this machine or behind a tunnel to it.
HOST_NAMES = [HOST, "localhost"]
CONNECTIONS_MAX = 256  # a thousand clients of one port are a mistake, and must not take all memory
STOP_TIMEOUT_S = 2.0


class HttpServer:
    """The HTTP server of one daemon.

    Args: port: 0: one that is free; `port` says which.
    Raises: OSError: the port is taken.
    """

    def __init__(self, service: Service, port: int) -> None:
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._guard = Guard(service.config.socket.parent)
        self.token = self._guard.token
        config = uvicorn.Config(
            Starlette(
                routes=_routes(service, self._guard),
                middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOST_NAMES)],
            ),
            log_config=None,  # the daemon's own logging
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=1,
        )
        self._server = _QuietServer(config)
        # Signals are the main thread's: uvicorn leaves them alone in any other.
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()
        log.info("http://%s:%d/relay/ shows this daemon", HOST, self.port)

    def stop(self) -> None:
        """Let requests under way end, if that is soon."""
        self._server.ask_to_stop()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        self._listener.close()
        self._guard.close()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except Exception:  # the port may be lost, the daemon goes on
            log.exception("the HTTP server has ended")


class _QuietServer(uvicorn.Server):
    """Wakes once a second, for the Date header; uvicorn's own looks ten times whether it is to end.

    Of a core, idle: 0.27 % with uvicorn's, more than all the rest of the daemon.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = asyncio.Event()

    def ask_to_stop(self) -> None:
        """End soon. For any thread, at any time."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended by itself
                self._loop.call_soon_threadsafe(self._asked.set)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), 1.0)


def _listen(port: int) -> socket.socket:
    # The protocol is named, because asyncio switches Nagle's algorithm off only where it is: else
    # each answer waits 40 ms for the client's delayed ack.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # A daemon that comes back must not wait for the kernel to forget old connections.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _routes(service: Service, guard: Guard) -> list[BaseRoute]:
    """Return all that is served here; one room each, and the one that takes all the rest last."""
    own = [route for room in (health, metrics, page) for route in room.routes(service)]
    return [*own, *tracking_routes.routes(service, guard)]
