"""From a tracking URI to the command that serves MLflow's pages here; nothing is started."""

import sys

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow_client import artifact_root, sqlite_path
from pipeline.tracking.redaction import redact

ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""For the serving process: no background jobs, no reports to anybody."""


def ui_command(uri: str, port: int, host: str = "127.0.0.1") -> list[str]:
    """Give the command that serves a store; run it with `ENVIRONMENT` added.

    Args:
        uri: An SQLite store.
        port: TCP port to listen on.
        host: Address to listen on; there is no password, so anything but loopback is open to all.

    Raises:
        TrackingError: The store is a server already, or does not exist.
    """
    path, artifacts = sqlite_path(uri), artifact_root(uri)
    if path is None or artifacts is None:
        raise TrackingError(f"{redact(uri)} is served already: open it in a browser")
    if not path.exists():
        raise TrackingError(f"there is no tracking store {path} yet; train, or run `sync`, first")
    return [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", uri,
        "--artifacts-destination", str(artifacts),
        "--host", host,
        "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
