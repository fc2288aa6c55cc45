"""Who may use the local endpoint: loopback is shared by all users of a node.

Asked for is a token, kept in a file that only this user can read; or that the connection comes from
a process of this user, which the kernel tells in /proc/net/tcp. A page of the internet, opened in
this user's own browser, is neither's word: requests from other origins are refused.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mlflow_relay_daemon.api.errors import ApiError
from mlflow_relay_daemon.api.peers import peer_uid

if TYPE_CHECKING:
    from starlette.requests import Request

TOKEN_NAME = "http-token"  # noqa: S105  # the file's name
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Guard:
    """Checks requests.

    Args: folder: of the socket; the token's file is made there, anew at each start.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(16)
        self._path = folder / TOKEN_NAME
        self._path.unlink(missing_ok=True)
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(self.token)

    def close(self) -> None:
        """The token is void: its file goes."""
        self._path.unlink(missing_ok=True)

    def check(self, request: Request) -> None:
        """Raises: ApiError: this request is nobody's of ours."""
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).hostname not in _LOOPBACK:
            raise ApiError("PERMISSION_DENIED", f"a page of {origin} may not use this endpoint")
        if self._has_token(request.headers.get("authorization", "")):
            return
        if peer_uid(request) not in (os.getuid(), 0):
            raise ApiError(
                "UNAUTHENTICATED",
                "this is another user's mlflow-relay: set MLFLOW_TRACKING_TOKEN to the content of "
                f"its file {TOKEN_NAME}, or start a daemon of your own",
            )

    def _has_token(self, header: str) -> bool:
        """Return whether the header has the token, as a bearer's or as anybody's password."""
        kind, _, given = header.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given).decode().partition(":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(given.strip().encode(), self.token.encode())
