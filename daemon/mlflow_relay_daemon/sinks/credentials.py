"""Who we are to the server: MLflow's own variables and files, read anew for each request.

Reading costs microseconds, and a renewed token, certificate or file counts at once.
"""

from __future__ import annotations

import base64
import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from mlflow_relay_daemon.sinks import NotAllowed

CREDENTIALS_FILE = "~/.mlflow/credentials"  # mlflow.utils.credentials
TOKEN_BYTES_MAX = 1 << 16  # servers refuse longer headers long before
WORKSPACE_HEADER = "X-MLFLOW-WORKSPACE"  # mlflow.utils.workspace_utils
SET_CREDENTIALS = (
    "give the daemon MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "or MLFLOW_TRACKING_TOKEN"
)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """What goes into one request's headers, and what must never be shown."""

    headers: Mapping[str, str]
    secrets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Which certificates count. Equal settings mean that open connections are still good."""

    verify: bool
    ca_file: str
    client_cert_file: str
    #: modification times in ns of the two files, so that a renewed certificate is noticed
    changed_ns: tuple[int, int]


def read_credentials(
    environ: Mapping[str, str],
    userinfo: str = "",
    credentials_file: str = CREDENTIALS_FILE,
    token_file: str = "",
) -> Credentials:
    """Return the headers for one request, in MLflow's order of precedence.

    Args:
        userinfo: the tracking URI's own "user:password", percent-encoded; it wins if given.
        token_file: holds a bearer token; wins over all but that.
    Raises:
        NotAllowed: a credential cannot be sent in a header; the message does not show it.
    """
    headers: dict[str, str] = {}
    secrets: tuple[str, ...] = ()
    if token_file and not userinfo:
        username, password, origin = "", "", token_file
        token = read_token(token_file)
    else:
        username, password = _user_and_password(environ, userinfo, credentials_file)
        origin = "MLFLOW_TRACKING_TOKEN"
        token = environ.get(origin, "").strip()
    if username and password:
        encoded = base64.standard_b64encode(f"{username}:{password}".encode()).decode("ascii")
        headers["Authorization"] = f"Basic {encoded}"
        secrets = (password, encoded)
    elif token:
        headers["Authorization"] = f"Bearer {_header_safe(token, origin)}"
        secrets = (token,)
    workspace = environ.get("MLFLOW_WORKSPACE", "").strip()
    if workspace:
        headers[WORKSPACE_HEADER] = _header_safe(workspace, "MLFLOW_WORKSPACE")
    return Credentials(headers, secrets)


def read_token(path: str) -> str:
    """Return the token in a file. Raises: NotAllowed: there is none; says what to do."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            token = file.read(TOKEN_BYTES_MAX).strip()
    except OSError as error:
        raise NotAllowed(
            f"the token file {path} cannot be read: {error.strerror}: mend that, it is read again "
            "at each request"
        ) from None
    if not token:
        raise NotAllowed(f"the token file {path} is empty: write the server's token into it")
    return token


def read_tls_settings(environ: Mapping[str, str]) -> TlsSettings:
    """Return which certificates to use now; the CA variables of requests count as in MLflow."""
    ca_file = (
        environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        or environ.get("REQUESTS_CA_BUNDLE")
        or environ.get("CURL_CA_BUNDLE")
        or ""
    )
    client_cert_file = environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH", "")
    insecure = environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    return TlsSettings(
        verify=not insecure,
        ca_file=ca_file,
        client_cert_file=client_cert_file,
        changed_ns=(_changed_ns(ca_file), _changed_ns(client_cert_file)),
    )


def _user_and_password(
    environ: Mapping[str, str], userinfo: str, credentials_file: str
) -> tuple[str, str]:
    """Return the user and password that count, "" for each that nobody gave."""
    if userinfo:
        user, _, password = userinfo.partition(":")
        return unquote(user), unquote(password)
    user = environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user and password:
        return user, password
    file_user, file_password = _from_file(os.path.expanduser(credentials_file))
    return user or file_user, password or file_password


def _from_file(path: str) -> tuple[str, str]:
    """Return user and password of MLflow's credentials file, "" where it has none."""
    if not os.path.exists(path):  # the usual case, at each request: 2 µs instead of 80
        return "", ""
    # Without interpolation: a "%" in a password is a "%".
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
    except (configparser.Error, OSError, UnicodeDecodeError):
        # Parse errors quote the line, which may be the password.
        raise NotAllowed(f"{path} cannot be read as an INI file") from None
    section = "mlflow"
    return (
        parser.get(section, "mlflow_tracking_username", fallback=""),
        parser.get(section, "mlflow_tracking_password", fallback=""),
    )


def _header_safe(value: str, variable: str) -> str:
    """Return the value if a header can carry it.

    http.client would raise an error that shows the whole header, the secret included.
    """
    if value.isascii() and value.isprintable():
        return value
    raise NotAllowed(f"{variable} holds characters that cannot be sent (a line break, an accent)")


def _changed_ns(path: str) -> int:
    """Return when the file was last changed, 0 if there is none."""
    try:
        return os.stat(path).st_mtime_ns if path else 0
    except OSError:
        return 0
