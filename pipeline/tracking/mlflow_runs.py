"""From one planned run to the MLflow run that equals it, sending only what is not there yet.

MLflow keeps every point for ever, so a run whose sent points no longer belong to the surviving
lineage (it was killed and resumed from an older checkpoint) cannot be corrected in place: a new run
takes its place and the old one is deleted, which in MLflow means hidden and restorable.

What was sent is remembered in a tag of the MLflow run itself, so it cannot be lost apart from it.
Should the tag lag behind, the run's own history tells what is there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.tracking.replica import Point, ReplicaRun
from pipeline.tracking.replica_files import identify_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATE_TAG = "tandem.sync"
"""One tag for all bookkeeping, so that people see their own tags."""
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"

MAX_METRICS = 1000
"""Most metrics in one request."""
MAX_PARAMS = 100
"""Most params, and most tags, in one request."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SyncState:
    """What a sync remembers about a run: which one it is, and what was sent to it."""

    slot: str
    """Place of the run below its parent."""
    key: str
    """What tells it from another run in the same place."""
    attempt: int = 0
    num_points: int = 0
    points_digest: str = ""
    """Of the points sent, in order."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Digest of each artifact."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Size and time of each artifact that is sent as it is."""
    first_child: str | None = None
    """Key of a study's first child, by which the study is known before it has more."""


def read_state(run: "Run") -> SyncState | None:
    """Read the bookkeeping of an MLflow run; None if it is damaged or not ours."""
    try:
        return SyncState(**json.loads(run.data.tags[STATE_TAG]))
    except (KeyError, ValueError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class RunStore:
    """The runs of one experiment."""

    client: "MlflowClient"
    experiment_id: str

    def list_runs(self) -> "list[Run]":
        """List the runs of this experiment that this project made and nobody deleted."""
        runs: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.`{STATE_TAG}` LIKE '%'",
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def send(
        self,
        run: ReplicaRun,
        existing: "Run | None",
        tags: Mapping[str, str],
        first_child: str | None = None,
    ) -> tuple[str, int]:
        """Make MLflow's run equal the planned one.

        Args:
            run: The run as it should be.
            existing: MLflow's run in its place, if there is one.
            tags: Tags that only the caller knows, such as the parent.
            first_child: For a study, the key of its first child.

        Returns:
            Id of the MLflow run, and how many points were sent.
        """
        points = list(run.points)
        if existing is not None:
            unsent = self._unsent(run, existing)
            if unsent is None:
                self.client.delete_run(existing.info.run_id)
                existing = None
            else:
                points = unsent
        if existing is None:
            existing = self._create(run, tags, first_child)
        run_id = existing.info.run_id
        self._send_params(run, existing)
        self._send_points(run_id, points)
        state = _state_after(run, first_child)
        self._send_texts(run, run_id, state, read_state(existing))
        self._send_files(run, run_id, state, read_state(existing))
        self._send_tags(run_id, {**_tags(run, state), **tags}, existing.data.tags)
        self._send_datasets(run, existing)
        self._send_status(run, existing)
        return run_id, len(points)

    def _create(self, run: ReplicaRun, tags: Mapping[str, str], first_child: str | None) -> "Run":
        state = SyncState(slot=run.slot, key=run.key, first_child=first_child)
        return self.client.create_run(
            self.experiment_id,
            start_time=run.start_unix_ms,
            run_name=run.name,
            tags={STATE_TAG: json.dumps(asdict(state)), **tags},
        )

    def _unsent(self, run: ReplicaRun, existing: "Run") -> list[Point] | None:
        """Points still to send; None if points were sent that are no longer part of the run."""
        state = read_state(existing)
        if state is not None and state.key != run.key:
            return None
        num_sent = _num_sent(run, state)
        if num_sent is not None:
            return list(run.points[num_sent:])
        sent = {
            (metric.key, metric.step, metric.timestamp)
            for name in existing.data.metrics
            for metric in self.client.get_metric_history(existing.info.run_id, name)
        }
        planned = {_identity(point): point for point in run.points}
        if not sent <= planned.keys():
            return None
        return [point for identity, point in planned.items() if identity not in sent]

    def _send_params(self, run: ReplicaRun, existing: "Run") -> None:
        """Params are immutable in MLflow, so those that stand there stay."""
        from mlflow.entities import Param

        params = [Param(k, v) for k, v in run.params.items() if k not in existing.data.params]
        for batch in _batches(params, MAX_PARAMS):
            self.client.log_batch(existing.info.run_id, params=batch)

    def _send_points(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time_unix_ms, p.step) for p in points]
        for batch in _batches(metrics, MAX_METRICS):
            self.client.log_batch(run_id, metrics=batch)

    def _send_tags(self, run_id: str, tags: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = [RunTag(key, value) for key, value in tags.items() if known.get(key) != value]
        for batch in _batches(changed, MAX_PARAMS):
            self.client.log_batch(run_id, tags=batch)

    def _send_texts(
        self, run: ReplicaRun, run_id: str, state: SyncState, before: SyncState | None
    ) -> None:
        """Send the artifacts that changed."""
        known = {} if before is None else before.texts
        for name, text in run.texts.items():
            if known.get(name) != state.texts[name]:
                self.client.log_text(run_id, text, name)

    def _send_files(
        self, run: ReplicaRun, run_id: str, state: SyncState, before: SyncState | None
    ) -> None:
        known = {} if before is None else before.files
        for name, path in run.files.items():
            if known.get(name) != state.files[name]:
                self.client.log_artifact(run_id, str(path), str(PurePosixPath(name).parent))

    def _send_datasets(self, run: ReplicaRun, existing: "Run") -> None:
        from mlflow import entities

        known = {(i.dataset.name, i.dataset.digest) for i in existing.inputs.dataset_inputs}
        inputs = [
            entities.DatasetInput(
                dataset=entities.Dataset(
                    name=dataset.name,
                    digest=dataset.digest,
                    source_type=dataset.source_type,
                    source=json.dumps(dict(dataset.source)),
                    profile=json.dumps(dict(dataset.profile)),
                ),
                tags=[entities.InputTag(key="mlflow.data.context", value=dataset.context)],
            )
            for dataset in run.datasets
            if (dataset.name, dataset.digest) not in known
        ]
        if inputs:
            self.client.log_inputs(existing.info.run_id, inputs)

    def _send_status(self, run: ReplicaRun, existing: "Run") -> None:
        info = existing.info
        if (info.status, info.end_time) == (run.status, run.end_unix_ms):
            return
        if run.end_unix_ms is None:
            self.client.update_run(info.run_id, status=run.status)
        else:
            self.client.set_terminated(info.run_id, run.status, run.end_unix_ms)


def _tags(run: ReplicaRun, state: SyncState) -> dict[str, str]:
    tags = {
        **run.tags,
        "role": run.role,
        NOTE_TAG: run.note,
        STATE_TAG: json.dumps(asdict(state)),
    }
    if run.table_name is not None:
        tags[TABLES_TAG] = json.dumps([{"path": run.table_name, "type": "table"}])
    return tags


def _state_after(run: ReplicaRun, first_child: str | None) -> SyncState:
    return SyncState(
        slot=run.slot,
        key=run.key,
        attempt=run.attempt,
        num_points=len(run.points),
        points_digest=_digest_points(run.points),
        texts={name: _digest(text) for name, text in run.texts.items()},
        files=identify_files(run.files),
        first_child=first_child,
    )


def _num_sent(run: ReplicaRun, state: SyncState | None) -> int | None:
    """How many leading points were sent; None if the bookkeeping does not vouch for them.

    After a new attempt it does not: points may have been sent that it had not counted yet.
    """
    if state is None or state.attempt != run.attempt or state.num_points > len(run.points):
        return None
    sent = run.points[: state.num_points]
    return len(sent) if _digest_points(sent) == state.points_digest else None


def _digest_points(points: Sequence[Point]) -> str:
    return _digest(repr([_identity(point) for point in points]))


def _identity(point: Point) -> tuple[str, int, int]:
    return point.name, point.step, point.time_unix_ms


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
