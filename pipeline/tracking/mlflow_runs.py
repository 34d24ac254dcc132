"""From one planned run to the MLflow run that equals it, sending only what is not there yet.

MLflow keeps every point for ever, so a run whose sent points no longer belong to the surviving
lineage (it was killed and resumed from an older checkpoint) cannot be corrected in place: a new run
takes its place and the old one is deleted, which in MLflow means hidden and restorable.

What was sent is remembered in tags of the MLflow run itself, so it cannot be lost apart from it.
Should the tags lag behind, the run's own history tells what is there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.tracking.replica import Dataset, Point, ReplicaRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SLOT_TAG = "tandem.slot"
KEY_TAG = "tandem.key"
SENT_TAG = "tandem.sent"
TEXTS_TAG = "tandem.texts"
ATTEMPT_TAG = "tandem.attempt"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"

MAX_METRICS = 1000
"""Most metrics in one request."""
MAX_PARAMS = 100
"""Most params, and most tags, in one request."""

Item = TypeVar("Item")


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
                filter_string=f"tags.`{SLOT_TAG}` LIKE '%'",
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def send(
        self, run: ReplicaRun, existing: "Run | None", tags: Mapping[str, str]
    ) -> tuple[str, int]:
        """Make MLflow's run equal the planned one.

        Args:
            run: The run as it should be.
            existing: MLflow's run in its place, if there is one.
            tags: Tags that only the caller knows, such as the parent.

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
            existing = self._create(run, tags)
        run_id = existing.info.run_id
        self._send_params(run, existing)
        self._send_points(run_id, points)
        self._send_tags(run_id, {**_tags(run), **tags}, existing.data.tags)
        self._send_texts(run, existing)
        if run.dataset is not None and not existing.inputs.dataset_inputs:
            self._send_dataset(run_id, run.dataset)
        self._send_status(run, existing)
        return run_id, len(points)

    def _create(self, run: ReplicaRun, tags: Mapping[str, str]) -> "Run":
        return self.client.create_run(
            self.experiment_id,
            start_time=run.start_unix_ms,
            run_name=run.name,
            tags={SLOT_TAG: run.slot, KEY_TAG: run.key, **tags},
        )

    def _unsent(self, run: ReplicaRun, existing: "Run") -> list[Point] | None:
        """Points still to send; None if points were sent that are no longer part of the run."""
        if existing.data.tags.get(KEY_TAG) != run.key:
            return None
        num_sent = _num_sent(run, existing.data.tags)
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

    def _send_texts(self, run: ReplicaRun, existing: "Run") -> None:
        """Send the artifacts that changed; a digest of each stands in a tag."""
        run_id = existing.info.run_id
        known = json.loads(existing.data.tags.get(TEXTS_TAG, "{}"))
        digests = {name: _digest(text) for name, text in run.texts.items()}
        for name, text in run.texts.items():
            if known.get(name) != digests[name]:
                self.client.log_text(run_id, text, name)
        if digests != known:
            self.client.set_tag(run_id, TEXTS_TAG, json.dumps(digests))

    def _send_dataset(self, run_id: str, dataset: Dataset) -> None:
        from mlflow import entities

        entity = entities.Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=json.dumps({"uri": dataset.source}),
            profile=json.dumps(dict(dataset.profile)),
        )
        context = entities.InputTag(key="mlflow.data.context", value="training")
        self.client.log_inputs(run_id, [entities.DatasetInput(dataset=entity, tags=[context])])

    def _send_status(self, run: ReplicaRun, existing: "Run") -> None:
        info = existing.info
        if (info.status, info.end_time) == (run.status, run.end_unix_ms):
            return
        if run.end_unix_ms is None:
            self.client.update_run(info.run_id, status=run.status)
        else:
            self.client.set_terminated(info.run_id, run.status, run.end_unix_ms)


def _tags(run: ReplicaRun) -> dict[str, str]:
    tags = {
        **run.tags,
        "role": run.role,
        SLOT_TAG: run.slot,
        KEY_TAG: run.key,
        ATTEMPT_TAG: str(run.attempt),
        SENT_TAG: f"{len(run.points)}:{_digest_points(run.points)}",
        NOTE_TAG: run.note,
    }
    if run.table_name is not None:
        tags[TABLES_TAG] = json.dumps([{"path": run.table_name, "type": "table"}])
    return tags


def _num_sent(run: ReplicaRun, tags: Mapping[str, str]) -> int | None:
    """How many leading points were sent; None if the tags do not vouch for them.

    After a new attempt they do not: points may have followed that the tag had not counted yet.
    """
    number, _, digest = tags.get(SENT_TAG, "").partition(":")
    if not number or tags.get(ATTEMPT_TAG) != str(run.attempt):
        return None
    num_sent = int(number)
    is_prefix = digest == _digest_points(run.points[:num_sent])
    return num_sent if is_prefix and num_sent <= len(run.points) else None


def _digest_points(points: Sequence[Point]) -> str:
    return _digest(repr([_identity(point) for point in points]))


def _identity(point: Point) -> tuple[str, int, int]:
    return point.name, point.step, point.time_unix_ms


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
