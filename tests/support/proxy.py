"""A loopback proxy in front of a server, which fails when it is told to.

    proxy.fail(refuse())                                 every connection, until heal()
    proxy.fail(lose_response(), on=b"runs/create", times=1)
    proxy.fail(answer(429, headers={"Retry-After": "7"}))

It speaks just enough HTTP/1.1 to see single requests on a keep-alive connection.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

IO_TIMEOUT_S = 60.0

#: What to do with one request: (client socket, request bytes, ask the server) → keep connection?
Action = Callable[["Exchange"], bool]


@dataclass
class Exchange:
    """One request on its way through the proxy."""

    client: socket.socket
    head: bytes
    body: bytes
    proxy: TcpProxy
    upstream: _Upstream

    def forward(self) -> bytes:
        """Send the request to the server and return its whole response."""
        return self.upstream.ask(self.head + self.body)


@dataclass
class Fault:
    """An action for the requests that it fits, `times` times (None: until healed)."""

    action: Action
    on: bytes | Callable[[bytes], bool]
    times: int | None
    hits: int = 0

    def fits(self, head: bytes) -> bool:
        """Tell whether this fault is for a request with this head."""
        if self.times is not None and self.hits >= self.times:
            return False
        return self.on(head) if callable(self.on) else self.on in head


def pass_on() -> Action:
    """Forward the request, and the response."""

    def act(exchange: Exchange) -> bool:
        exchange.client.sendall(exchange.forward())
        return True

    return act


def reset() -> Action:
    """Reset the connection without telling the server anything."""

    def act(exchange: Exchange) -> bool:
        _reset(exchange.client)
        return False

    return act


def lose_response() -> Action:
    """Let the server do it, then reset the connection instead of passing the response on."""

    def act(exchange: Exchange) -> bool:
        exchange.forward()
        _reset(exchange.client)
        return False

    return act


def black_hole() -> Action:
    """Swallow the request and never answer, until the client or the proxy goes away."""

    def act(exchange: Exchange) -> bool:
        exchange.proxy.wait_for_close(exchange.client)
        return False

    return act


def delay(delay_s: float) -> Action:
    """Forward the request after a while."""

    def act(exchange: Exchange) -> bool:
        exchange.proxy.closing.wait(delay_s)
        return pass_on()(exchange)

    return act


def hold(until: threading.Event, asked: threading.Event | None = None) -> Action:
    """Forward the request once the event is set; `asked` is set when the request has arrived."""

    def act(exchange: Exchange) -> bool:
        if asked is not None:
            asked.set()
        until.wait(IO_TIMEOUT_S)
        return pass_on()(exchange)

    return act


def cut(response_bytes: int) -> Action:
    """Pass on only the first bytes of the response, then close."""

    def act(exchange: Exchange) -> bool:
        exchange.client.sendall(exchange.forward()[:response_bytes])
        return False

    return act


def answer(
    status: int,
    body: bytes = b"",
    *,
    headers: Mapping[str, str] | None = None,
    content_type: str = "text/html",
) -> Action:
    """Answer in the server's place; it never hears of the request."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {content_type}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    response = "\r\n".join([*lines, "", ""]).encode() + body

    def act(exchange: Exchange) -> bool:
        exchange.client.sendall(response)
        return True

    return act


class TcpProxy:
    """Listens on a loopback port of its own; `uri` is the tracking URI through it.

    Args:
        target: the server's URI.
        host: the loopback address to listen on; the server sees it in the Host header.
        tls: speak TLS with the client (never with the server).
    """

    def __init__(
        self, target: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._host = host
        self._tls = tls
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._sockets: set[socket.socket] = set()
        self._requests: Counter[str] = Counter()
        self._heads: list[bytes] = []
        self._listener: socket.socket | None = None
        self.closing = threading.Event()
        self.connections = 0
        self.port = 0
        self._listen()

    @property
    def uri(self) -> str:
        """The tracking URI that goes through this proxy."""
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}"

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fail(
        self,
        action: Action,
        *,
        on: bytes | Callable[[bytes], bool] = b"",
        times: int | None = None,
    ) -> Fault:
        """Do this to requests whose head (request line and headers) holds or satisfies `on`.

        The first fault that fits counts. Returns: the fault, whose `hits` may be looked at.
        """
        fault = Fault(action, on, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults and listen again."""
        with self._lock:
            self._faults.clear()
        if self._listener is None:
            self._listen()

    def refuse(self) -> None:
        """Refuse new connections and drop the open ones, until heal()."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), close() alone would not
            listener.close()
        self._drop_all()

    def close(self) -> None:
        """Stop listening and drop all connections."""
        self.closing.set()
        self.refuse()

    def requests(self, path: str = "") -> int:
        """Return how many requests came whose path contains this text."""
        with self._lock:
            return sum(count for seen, count in self._requests.items() if path in seen)

    def heads(self) -> list[bytes]:
        """Return request line and headers of all requests so far."""
        with self._lock:
            return list(self._heads)

    def wait_for_close(self, client: socket.socket) -> None:
        """Return once the client has closed its end, or the proxy is closed."""
        while not self.closing.is_set():
            readable, _, _ = select.select([client], [], [], 0.1)
            with contextlib.suppress(BlockingIOError):
                if readable and not client.recv(65536):
                    return

    def _listen(self) -> None:
        """Listen, on the port that it had before if it had one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deadline_s = time.monotonic() + 10.0
        while True:
            try:
                listener.bind((self._host, self.port))
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._sockets.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Serve one connection, request by request."""
        client.settimeout(IO_TIMEOUT_S)
        upstream = _Upstream(self._target)
        try:
            if self._tls is not None:
                client = self._secured(client, self._tls)
            reader = _Reader(client)
            while (request := reader.request()) is not None:
                head, body = request
                exchange = Exchange(client, head, body, self, upstream)
                if not self._action_for(head)(exchange):
                    return
        except OSError:
            _reset(client)
        finally:
            upstream.close()
            with self._lock:
                self._sockets.discard(client)
            client.close()

    def _secured(self, client: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        """Return the same connection after the TLS handshake; `client` itself is used up."""
        with self._lock:
            self._sockets.discard(client)
        secured = tls.wrap_socket(client, server_side=True)
        with self._lock:
            self._sockets.add(secured)
        return secured

    def _action_for(self, head: bytes) -> Action:
        path = head.split(b" ", 2)[1].decode("latin-1")
        with self._lock:
            self._requests[path.partition("?")[0]] += 1
            self._heads.append(head)
            for fault in self._faults:
                if fault.fits(head):
                    fault.hits += 1
                    return fault.action
        return pass_on()

    def _drop_all(self) -> None:
        with self._lock:
            clients = list(self._sockets)
        for client in clients:
            # The thread that serves it wakes up and closes it. The client learns at once: closing
            # here would do nothing while that thread is reading.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


class _Upstream:
    """One connection to the real server, opened when it is first needed."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> bytes:
        """Send a request and return the whole response, head and body."""
        # A new connection for each: the proxy has no stale keep-alive trouble of its own.
        self.close()
        self._socket = socket.create_connection(self._target, timeout=IO_TIMEOUT_S)
        self._socket.sendall(request)
        response = _Reader(self._socket).response()
        if response is None:
            raise ConnectionError("the server closed the connection")
        return response

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Reader:
    """Whole HTTP messages from a socket."""

    def __init__(self, source: socket.socket) -> None:
        self._file = source.makefile("rb")

    def request(self) -> tuple[bytes, bytes] | None:
        """Return head and body of the next request; None if the client has closed."""
        head, length, _ = self._head()
        if not head:
            return None
        return head, self._file.read(length)

    def response(self) -> bytes | None:
        """Return the next response; None if the server has closed."""
        head, length, chunked = self._head()
        if not head:
            return None
        return head + (self._chunks() if chunked else self._file.read(length))

    def _head(self) -> tuple[bytes, int, bool]:
        """Return the head with its empty line, the body's length, and whether it is chunked."""
        lines = []
        length, chunked = 0, False
        while True:
            line = self._file.readline()
            if not line:
                return b"", 0, False
            lines.append(line)
            if line == b"\r\n":
                return b"".join(lines), length, chunked
            name, _, value = line.lower().partition(b":")
            if name == b"content-length":
                length = int(value)
            chunked = chunked or (name == b"transfer-encoding" and b"chunked" in value)

    def _chunks(self) -> bytes:
        """Return a chunked body as it stands on the wire."""
        parts = []
        while True:
            line = self._file.readline()
            parts.append(line)
            size = int(line.partition(b";")[0], 16)
            parts.append(self._file.read(size + 2))
            if size == 0:
                return b"".join(parts)


def _reset(client: socket.socket) -> None:
    """Close with a RST, as a crashed machine's kernel or a firewall would."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
