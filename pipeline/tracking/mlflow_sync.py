"""From event logs and results on disk to MLflow, as often as wanted, without a point sent twice.

MLflow is a replica: training never waits for it, and what it missed while a server was down is sent
by the next sync.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.load import read_run, read_study
from pipeline.errors import PipelineError
from pipeline.tracking.mlflow_client import (
    artifact_root,
    connected,
    default_uri,
    one_writer,
    sqlite_path,
    sqlite_uri,
)
from pipeline.tracking.mlflow_runs import PARENT_TAG, RunStore, read_state
from pipeline.tracking.replica import Replica, ReplicaRun
from pipeline.tracking.replica_data import is_prepared
from pipeline.tracking.replica_study import plan_replicas

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

POLL_SECONDS = 0.2
"""How soon a request to stop is seen."""
SILENT_SECONDS = 5.0
"""A failure that took as long was one of a time limit; `mlflow_client` sets this one for a call."""


def _ignore(message: str) -> None:
    """Take a message and do nothing."""


def sync(
    root: Path,
    uri: str | None = None,
    *,
    is_over: bool = False,
    on_event: Callable[[str], None] = _ignore,
) -> int:
    """Bring MLflow up to date with a directory; a second call sends nothing.

    Args:
        root: A study, run or prepared directory, or an output directory with several of them.
        uri: MLflow tracking URI; None takes SQLite in the output directory.
        is_over: Nothing runs any more, so a run without a verdict has failed.
        on_event: Told what takes long.

    Returns:
        How many metric points were sent.

    Raises:
        TrackingError: The store cannot be reached or refuses, or a file is malformed.
        ConfigError: A `run.yaml` or `study.yaml` is malformed.
    """
    root = root.absolute()
    uri = resolve_uri(root, uri)
    replicas = [r for r in plan_replicas(root, is_over) if r.children]
    if not replicas:
        return 0
    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(root if path is None else path.parent), connected(uri, on_event) as client:
        return sum(_send_alone(client, uri, replica, root) for replica in replicas)


def follow(
    root: Path,
    uri: str | None = None,
    *,
    interval_seconds: float,
    should_stop: Callable[[], bool],
    on_event: Callable[[str], None] = _ignore,
) -> bool:
    """Sync again and again until told to stop, then once more.

    A store that is down is tried again at each interval; one line tells that it went, one that it
    is back. One that does not even refuse, so that each try takes its whole time limit, is not
    tried once more when the word to stop has come.

    Args:
        root: As for `sync`.
        uri: As for `sync`.
        interval_seconds: Pause between two syncs.
        should_stop: Asked several times a second; from then on nothing runs any more.
        on_event: Told what a person should know.

    Returns:
        Whether the last sync went through, so that MLflow has everything.
    """
    is_up = True
    while True:
        is_over = should_stop()
        begin = time.monotonic()
        try:
            sync(root, uri, is_over=is_over, on_event=on_event)
            if not is_up:
                on_event("tracking is back; nothing was lost")
            is_up = True
        except PipelineError as exc:
            if is_up:
                on_event(f"tracking is behind, training goes on: {exc}")
            is_up = False
            is_silent = time.monotonic() - begin > SILENT_SECONDS
            if is_over or (is_silent and should_stop()):
                return False
        if is_over:
            return True
        deadline = time.monotonic() + interval_seconds
        while time.monotonic() < deadline and not should_stop():
            time.sleep(min(POLL_SECONDS, interval_seconds))


def resolve_uri(root: Path, uri: str | None) -> str:
    """Give the URI to use: the given, else the configured one, else SQLite in the output directory.

    Args:
        root: As for `sync`.
        uri: As for `sync`.
    """
    output_dir = root
    store = sqlite_path(default_uri(root))
    if store is not None and store.exists():
        # An output directory, in which a user's own `study.yaml` may stand.
        return uri_beside(root, uri)
    if (root / "study.yaml").exists():
        output_dir = root.parent
        uri = uri or read_study(root).base.get("tracking", {}).get("uri")
    elif (root / "run.yaml").exists():
        output_dir = root.parent
        uri = uri or read_run(root).tracking.uri
    elif is_prepared(root):
        output_dir = root.parent.parent if root.parent.name == "data" else root.parent
    return uri_beside(output_dir, uri)


def uri_beside(output_dir: Path, uri: str | None) -> str:
    """Give the configured URI, else SQLite in a directory that is known to be the output directory.

    `resolve_uri` would take a user's own `run.yaml` or `study.yaml` in it for that of a run.
    """
    if uri is None:
        return default_uri(output_dir)
    path = sqlite_path(uri)
    return uri if path is None else sqlite_uri(path)


def _send_alone(client: "MlflowClient", uri: str, replica: Replica, root: Path) -> int:
    """Send a replica that other directories lead to as well, each under a lock of its own."""
    shared = replica.shared_dir
    if shared is None or sqlite_path(uri) is not None or shared.samefile(root):
        return _send_replica(client, uri, replica)
    with one_writer(shared):
        return _send_replica(client, uri, replica)


def _send_replica(client: "MlflowClient", uri: str, replica: Replica) -> int:
    store = RunStore(client=client, experiment_id=_experiment_id(client, uri, replica.experiment))
    existing = store.list_runs()
    num_points, tags = 0, {}
    if replica.parent is not None:
        parent = _find_parent(replica, existing)
        first_child = replica.children[0].key
        parent_id, num_points = store.send(replica.parent, parent, {}, first_child)
        tags = {PARENT_TAG: parent_id}
    for child in replica.children:
        _, num_sent = store.send(child, _find_child(child, tags, existing), tags)
        num_points += num_sent
    return num_points


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage != "active":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)
    root = artifact_root(uri)
    location = None if root is None else (root / name.replace("/", "-")).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _find_parent(replica: Replica, existing: "list[Run]") -> "Run | None":
    """The study's run: the parent of a child that is known by what it is, not by where it stands.

    So a study that was moved keeps its run, and one that was deleted and run anew gets a new one.
    """
    keys = {child.key for child in replica.children if child.key}
    by_id = {run.info.run_id: run for run in existing}
    states = [(run, state) for run in existing if (state := read_state(run)) is not None]
    for run, state in states:
        parent = by_id.get(run.data.tags.get(PARENT_TAG, ""))
        if state.key in keys and parent is not None:
            return parent
    return next((run for run, state in states if state.first_child in keys), None)


def _find_child(
    child: ReplicaRun, parent_tags: dict[str, str], existing: "list[Run]"
) -> "Run | None":
    """The run in the child's place: below its parent; for a single run the one with its key."""
    for run in existing:
        state = read_state(run)
        if state is None or state.slot != child.slot:
            continue
        if parent_tags and parent_tags.items() <= run.data.tags.items():
            return run
        if not parent_tags and state.key == child.key:
            return run
    return None
