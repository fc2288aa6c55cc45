"""A run's artifact URI → the store that takes its files.

mlflow-artifacts:   the MLflow server itself, over our own HTTP, streamed
all else            mlflow's artifact repositories, in a process of their own
"""

from __future__ import annotations

import mimetypes
import posixpath
import time
from typing import Protocol
from urllib.parse import quote, urlsplit

from mlflow_relay_daemon.artifacts.helper_client import Helper
from mlflow_relay_daemon.artifacts.source import Source
from mlflow_relay_daemon.sinks.answers import answer_object
from mlflow_relay_daemon.sinks.http_client import HttpClient
from mlflow_relay_daemon.sinks.redact import redact_uri

SERVICE = "/api/2.0/mlflow-artifacts/artifacts"
#: The stock server answers when it has brought the whole file to where it keeps it: as long as that
#: may take for an empty file, and for each byte.
ANSWER_TIMEOUT_S = 120.0
ANSWER_BYTES_PER_S_MIN = 5e6


class Store(Protocol):
    """Where the artifacts of a run go."""

    root: str  #: what is up or down as one; for people, without credentials

    def put(self, path: str, source: Source) -> str:
        """Bring a file there, in the place of one that is there already; return its sha256.

        Raises: SinkError; NoSuchContent, OSError: of the source.
        """
        ...


class ProxyStore:
    """An MLflow server that takes artifacts.

    Args: folder: the run's artifact root on that server.
    """

    def __init__(self, http: HttpClient, folder: str) -> None:
        self._http, self._folder = http, folder.strip("/")
        self.root = http.uri

    def put(self, path: str, source: Source) -> str:
        target = posixpath.join(SERVICE, self._folder, path)
        answer = self._http.send(
            quote(target),
            source,
            size=source.size,
            content_type=mimetypes.guess_type(path)[0] or "application/octet-stream",
            answer_timeout_s=ANSWER_TIMEOUT_S + source.size / ANSWER_BYTES_PER_S_MIN,
        )
        if answer.status == 200 and not answer.body:
            return source.sha256  # as the stock server says it
        answer_object(f"upload {path!r} to {self.root}", answer, time.time())
        return source.sha256


class RepositoryStore:
    """What mlflow's artifact repositories reach: folders, S3, GCS, Azure, ..."""

    def __init__(self, helper: Helper, uri: str) -> None:
        self._helper, self._uri = helper, uri
        self.root = _root_of(uri)

    def put(self, path: str, source: Source) -> str:
        while source.read():  # at the rate that is allowed; within a file it is the repository's
            pass
        self._helper.put(self._uri, path, source.path)
        source.check()
        return source.sha256


class Stores:
    """Makes stores; keeps what they share.

    Args:
        tracking_uri: where `mlflow-artifacts:` without a host goes.
        token_file: see sinks.credentials.
        is_direct: the tracking server is spoken to by our own HTTP; else mlflow's package is asked
            for everything, because requests need its plugins.
    """

    def __init__(
        self, tracking_uri: str, *, is_direct: bool, helper: Helper, token_file: str = ""
    ) -> None:
        self._token_file = token_file
        self._tracking_uri, self._is_direct, self.helper = tracking_uri, is_direct, helper
        self._clients: dict[str, HttpClient] = {}

    def open(self, artifact_uri: str) -> Store:
        """Return the store of a run."""
        parts = urlsplit(artifact_uri)
        if parts.scheme == "mlflow-artifacts" and self._is_direct:
            return ProxyStore(self._client(parts.netloc), parts.path.removeprefix(SERVICE))
        return RepositoryStore(self.helper, artifact_uri)

    def close(self) -> None:
        self.helper.stop()
        for client in self._clients.values():
            client.close()

    def _client(self, netloc: str) -> HttpClient:
        url = self._tracking_uri
        if netloc:  # as mlflow does: that host, and the rest as for the tracking server
            parts = urlsplit(url)
            userinfo, at, _ = parts.netloc.rpartition("@")
            url = parts._replace(netloc=userinfo + at + netloc).geturl()
        if url not in self._clients:
            self._clients[url] = HttpClient(
                url,
                timeout_s=ANSWER_TIMEOUT_S,
                connect_timeout_s=5.0,
                connections_max=16,
                token_file=self._token_file,
            )
        return self._clients[url]


def _root_of(uri: str) -> str:
    parts = urlsplit(redact_uri(uri))
    return f"{parts.scheme or 'file'}://{parts.netloc}"
