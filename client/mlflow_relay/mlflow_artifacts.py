"""`relay:/...`: MLflow's artifacts through the daemon's local endpoint. Imported by MLflow."""

from __future__ import annotations

import os
from typing import Any

from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

from .mlflow_door import SCHEME, Door, read_uri

SERVERS = "mlflow-artifacts:/"  #: what the server calls its own artifacts
OURS = f"{SCHEME}:/"
_SERVICE = "/api/2.0/mlflow-artifacts/artifacts"


class RelayArtifactRepository(HttpArtifactRepository):
    """Artifacts of a run, a model or a trace."""

    def __init__(
        self,
        artifact_uri: str,
        tracking_uri: str | None = None,
        registry_uri: str | None = None,
        **_: Any,
    ) -> None:
        address = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address.startswith(f"{SCHEME}://"):
            address = f"{SCHEME}://"
        url = Door(read_uri(address)).endpoint().url
        path = artifact_uri.removeprefix(OURS).lstrip("/")
        super().__init__(f"{url}{_SERVICE}/{path}")


def to_ours(uri: str) -> str:
    """Return an address of the server's artifacts as one that this repository serves."""
    is_servers = uri.startswith(SERVERS) and not uri.startswith(SERVERS + "/")
    return OURS + uri.removeprefix(SERVERS) if is_servers else uri


def to_servers(text: str) -> str:
    """Return a request with the server's addresses in the place of ours."""
    return text.replace(f'"{OURS}', f'"{SERVERS}')
