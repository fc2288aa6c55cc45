"""One HTTP exchange with the server, over a pool of keep-alive connections.

Nothing here knows MLflow. What goes wrong on the way is `ServerAway`; what the server answers,
whatever it is, comes back as an `Answer`.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakKeyDictionary

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

from mlflow_relay_daemon.sinks import ServerAway, TimedOut
from mlflow_relay_daemon.sinks.credentials import TlsSettings, read_credentials, read_tls_settings
from mlflow_relay_daemon.sinks.redact import UNREADABLE, redact_uri, scrub

if TYPE_CHECKING:
    from urllib3._base_connection import BaseHTTPConnection

IDLE_S_MAX = 3.0  # uvicorn closes idle connections after 5 s; a NAT in between, in silence
SEND_BYTES = (
    1 << 20
)  # of a body that is read in pieces; urllib3's own 16 KiB cost ten times the CPU
FETCH_BYTES = 1 << 20
ANSWER_BYTES_MAX = 64 << 20  # a run with 100,000 metric keys is about 10 MB


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever it says."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    #: what must not be shown, should the server echo it
    secrets: tuple[str, ...] = field(default=(), repr=False)


class Readable(Protocol):
    """A body that is read in pieces."""

    def read(self, size: int = ..., /) -> bytes: ...


class HttpClient:
    """Connections to one base URL; safe to use from many threads.

    Args:
        url: http(s)://[user:password@]host[:port][/prefix]
        token_file: see read_credentials.
        connections_max: callers beyond this number wait for a free connection.
    Raises:
        ValueError: this is no address; the message does not show it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        connections_max: int,
        token_file: str = "",
    ) -> None:
        if redact_uri(url).endswith(f"://{UNREADABLE}") or not urlsplit(url).hostname:
            raise ValueError(
                "the tracking URI cannot be taken apart: is there a host in it, and are special "
                "characters in user and password percent-encoded?"
            )
        parts = urlsplit(url)
        userinfo, _, host = parts.netloc.rpartition("@")
        #: where requests go, without credentials; never ends in a slash
        self.base = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
        self.uri = redact_uri(self.base)
        self._userinfo, self._token_file = userinfo, token_file
        self._timeout = urllib3.Timeout(connect=connect_timeout_s, read=timeout_s)
        self._connections_max = connections_max
        self._lock = threading.Lock()
        self._pool: urllib3.PoolManager | None = None
        self._pool_tls: TlsSettings | None = None

    def __repr__(self) -> str:
        return f"HttpClient({self.uri!r})"

    def exchange(
        self, method: str, path: str, body: bytes | None = None, *, repeatable: bool = True
    ) -> Answer:
        """Send one request and return the answer, whatever its status.

        Args:
            repeatable: whether to send it once more, at once, if the connection breaks without
                an answer. The first request may have been carried out.
        Raises:
            ServerAway: no answer; for a request that is not repeatable it may have been carried
                out all the same.
            NotAllowed: our credentials cannot even be sent.
        """
        credentials = read_credentials(os.environ, self._userinfo, token_file=self._token_file)
        headers = {"User-Agent": "mlflow-relay", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        headers.update(credentials.headers)
        secrets = credentials.secrets
        try:
            try:
                return self._exchange_once(method, path, body, headers, secrets)
            except ProtocolError:
                if not repeatable:
                    raise
                return self._exchange_once(method, path, body, headers, secrets)
        except (HTTPError, OSError, ValueError) as error:
            why = scrub(_in_words(error, self._timeout), secrets)
            kind = TimedOut if isinstance(error, ReadTimeoutError) else ServerAway
            raise kind(f"{self.uri} cannot be reached: {why}") from None

    def open(
        self,
        method: str,
        target: str,
        body: bytes | IO[bytes] | None,
        headers: Mapping[str, str],
    ) -> urllib3.BaseHTTPResponse:
        """Send somebody else's request, with our credentials; return the answer, unread.

        Args: target: path and query, below the base.
        Raises: ServerAway: no answer.
        """
        credentials = read_credentials(os.environ, self._userinfo)
        try:
            return self._current_pool().request(
                method,
                self.base + target,
                body=body,
                headers={**headers, **credentials.headers},
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError, ValueError) as error:
            why = scrub(_in_words(error, self._timeout), credentials.secrets)
            raise ServerAway(f"{self.uri} cannot be reached: {why}") from None

    def send(
        self,
        path: str,
        body: Readable,
        *,
        size: int,
        content_type: str,
        answer_timeout_s: float,
    ) -> Answer:
        """PUT what is too large for memory, and return the answer, whatever its status.

        Args: body: read once, from begin to end; what its `read` raises comes out here, but for
            OSErrors, which are taken for the connection's.
        Raises: ServerAway, NotAllowed: as `exchange`; the request may have been carried out.
        """
        credentials = read_credentials(os.environ, self._userinfo)
        headers = {
            "User-Agent": "mlflow-relay",
            "Accept": "application/json",
            "Content-Type": content_type,
            "Content-Length": str(size),
            **credentials.headers,
        }
        timeout = urllib3.Timeout(connect=self._timeout.connect_timeout, read=answer_timeout_s)
        try:
            return self._exchange_once(
                "PUT", path, body, headers, credentials.secrets, timeout=timeout
            )
        except (HTTPError, OSError, ValueError) as error:
            why = scrub(_in_words(error, timeout), credentials.secrets)
            raise ServerAway(f"{self.uri} cannot be reached: {why}") from None

    def fetch(self, path: str, into: BinaryIO) -> None:
        """GET what is too large for memory into a file.

        Raises: ServerAway: no answer, or another than 200; OSError: of the file.
        """
        credentials = read_credentials(os.environ, self._userinfo)
        headers = {"User-Agent": "mlflow-relay", **credentials.headers}
        try:
            response = self._current_pool().request(
                "GET",
                self.base + path,
                headers=headers,
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            try:
                if response.status != 200:
                    raise ServerAway(f"HTTP {response.status} for {path.partition('?')[0]}")
                pieces = response.stream(FETCH_BYTES, decode_content=True)
                while (piece := next(pieces, None)) is not None:
                    into.write(piece)
            finally:
                response.close()
        except HTTPError as error:
            why = scrub(_in_words(error, self._timeout), credentials.secrets)
            raise ServerAway(f"{self.uri} cannot be reached: {why}") from None

    def close(self) -> None:
        """Close the idle connections; the next exchange opens new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.clear()
            self._pool = None

    def _exchange_once(
        self,
        method: str,
        path: str,
        body: bytes | Readable | None,
        headers: Mapping[str, str],
        secrets: tuple[str, ...],
        *,
        timeout: urllib3.Timeout | None = None,
    ) -> Answer:
        response = self._current_pool().request(
            method,
            self.base + path,
            body=body,  # type: ignore[arg-type]  # its stub wants more of a file than it uses
            headers=headers,
            timeout=timeout or self._timeout,
            retries=False,  # repeats are the breaker's business; redirects would lose the POST
            redirect=False,
            preload_content=False,
        )
        try:
            data = response.read(ANSWER_BYTES_MAX + 1, decode_content=True)
            if len(data) > ANSWER_BYTES_MAX:
                response.close()
                raise ValueError(f"an answer of more than {ANSWER_BYTES_MAX >> 20} MB")
            return Answer(response.status, dict(_lower(response.headers)), data, secrets)
        finally:
            response.release_conn()

    def _current_pool(self) -> urllib3.PoolManager:
        """Return the pool, made anew if the certificates have changed."""
        tls = read_tls_settings(os.environ)
        with self._lock:
            if self._pool is None or tls != self._pool_tls:
                self._pool = _make_pool(self.base, tls, self._connections_max)
                self._pool_tls = tls
            return self._pool


class _ShortIdle(urllib3.HTTPConnectionPool):
    """A pool that closes what lay idle too long, so that no request meets a stale connection."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._idle_since: WeakKeyDictionary[BaseHTTPConnection, float] = WeakKeyDictionary()
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # urllib3's own, passed on

    def _get_conn(self, timeout: float | None = None) -> BaseHTTPConnection:
        connection = super()._get_conn(timeout)
        idle_since = self._idle_since.get(connection, float("inf"))
        if time.monotonic() - idle_since > IDLE_S_MAX:
            connection.close()  # urllib3 opens a closed connection again by itself
        return connection

    def _put_conn(self, conn: BaseHTTPConnection | None) -> None:
        if conn is not None:
            self._idle_since[conn] = time.monotonic()
        super()._put_conn(conn)


class _ShortIdleTls(_ShortIdle, urllib3.HTTPSConnectionPool):
    """The same over TLS."""


def _make_pool(base: str, tls: TlsSettings, connections_max: int) -> urllib3.PoolManager:
    """Return a pool for one server, through the proxy that the environment names, if any."""
    scheme, _, rest = base.partition("://")
    options: dict[str, object] = {"maxsize": connections_max, "block": True, "retries": False}
    options["blocksize"] = SEND_BYTES
    if scheme == "https":
        options["ssl_context"] = _tls_context(tls)
        if not tls.verify:
            options["assert_hostname"] = False
    proxy = getproxies().get(scheme, "")
    pool: urllib3.PoolManager
    if proxy and not proxy_bypass(rest.partition("/")[0]):
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        userinfo = urlsplit(proxy).netloc.rpartition("@")[0]
        proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(userinfo) or None)
        address = redact_uri(proxy)
        pool = urllib3.ProxyManager(address, proxy_headers=proxy_headers, **options)  # type: ignore[arg-type]
    else:
        pool = urllib3.PoolManager(**options)  # type: ignore[arg-type]
    pool.pool_classes_by_scheme = {"http": _ShortIdle, "https": _ShortIdleTls}
    return pool


def _tls_context(tls: TlsSettings) -> ssl.SSLContext:
    """Return the TLS rules for one server. Raises: OSError: a certificate file cannot be read."""
    context = ssl.create_default_context(cafile=tls.ca_file or None)
    if not tls.ca_file:
        _add_certifi(context)
    if tls.client_cert_file:
        context.load_cert_chain(tls.client_cert_file)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _add_certifi(context: ssl.SSLContext) -> None:
    """Trust certifi's list too, as MLflow does: slim containers have none of their own."""
    try:
        import certifi
    except ImportError:
        return
    context.load_verify_locations(certifi.where())


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _in_words(error: Exception, timeout: urllib3.Timeout) -> str:
    """Return what went wrong on the way, for an operator."""
    if isinstance(error, ProxyError):
        return f"the proxy of HTTP_PROXY/HTTPS_PROXY failed ({error.original_error})"
    if isinstance(error, NameResolutionError):
        return "its host name is not known here"
    if isinstance(error, NewConnectionError):
        return str(error.__cause__ or error)
    if isinstance(error, ConnectTimeoutError):
        return f"no connection within {timeout.connect_timeout} s"
    if isinstance(error, ReadTimeoutError):
        return f"no answer within {timeout.read_timeout} s"
    if isinstance(error, SSLError):
        return f"TLS: {error} (its CA can be given in MLFLOW_TRACKING_SERVER_CERT_PATH)"
    if isinstance(error, ProtocolError):
        return f"the connection broke ({error.args[-1] if error.args else error})"
    return f"{type(error).__name__}: {error}"
