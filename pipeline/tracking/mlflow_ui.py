"""From a tracking URI to the command that serves MLflow's pages, and the page to open."""

import sys

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow_client import artifact_root, connected, sqlite_path
from pipeline.tracking.redaction import redact
from pipeline.tracking.replica_study import EXPERIMENT_PREFIX

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


def ui_url(uri: str, port: int, host: str = "127.0.0.1") -> str:
    """Give the page to open: the runs of the experiment that was written to last.

    Without an experiment and the form in the address MLflow opens its pages about agents.

    Args:
        uri: As for `ui_command`.
        port: As for `ui_command`.
        host: As for `ui_command`.

    Raises:
        TrackingError: The store cannot be read.
    """
    with connected(uri, lambda message: None) as client:
        experiments = client.search_experiments(filter_string=f"name LIKE '{EXPERIMENT_PREFIX}/%'")
        newest = client.search_runs(
            [experiment.experiment_id for experiment in experiments],
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
    page = f"experiments/{newest[0].info.experiment_id}/runs" if newest else "experiments"
    return f"http://{host}:{port}/#/{page}?workflowType=machine_learning"
