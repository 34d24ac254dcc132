"""From run and study directories to all the runs that MLflow shows of them.

A study becomes a parent run, one child per training run and probe cell, and one summary run per
family whose step axis is sequence length, ranks or parameters, so that comparing two of them draws
scaling curves.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import STUDY_FILE, read_study
from pipeline.errors import TrackingError
from pipeline.tracking.metrics import check_metric
from pipeline.tracking.notes import describe_study, describe_summary
from pipeline.tracking.replica import (
    Point,
    Replica,
    ReplicaRun,
    Status,
    flatten,
    read_json,
    read_texts,
)
from pipeline.tracking.replica_cells import plan_cells
from pipeline.tracking.replica_data import EVENTS_FILE, is_prepared, plan_data
from pipeline.tracking.store import RESULT_FILE, list_cells

EXPERIMENT_PREFIX = "tandem"
STATUSES: dict[str, Status] = {"complete": "FINISHED", "stopped": "KILLED"}
"""MLflow's word for the status of a study; any other is a failure."""


def plan_replicas(root: Path, is_over: bool = False) -> list[Replica]:
    """Plan what MLflow should show of a directory.

    Args:
        root: A study, run or prepared directory, or an output directory with several of them.
        is_over: Nothing runs any more, so what has no verdict has failed.

    Returns:
        Runs and studies, with the prepared directories that they read or that stand with them.

    Raises:
        TrackingError: A result or an event log is malformed.
        ConfigError: A `run.yaml` or `study.yaml` is malformed.
    """
    if is_prepared(root):
        return plan_data([root], is_over)
    if (root / STUDY_FILE).exists():
        study = _plan_study(root, is_over)
        return [study, *plan_data(_shards_of([study]))]
    studies = sorted(path.parent for path in root.glob(f"*/{STUDY_FILE}"))
    children = tuple(plan_cells(list_cells(root), None, root, is_over))
    single = Replica(experiment=f"{EXPERIMENT_PREFIX}/runs", parent=None, children=children)
    replicas = [single, *(_plan_study(path, is_over) for path in studies)]
    beside = [path.parent for path in root.glob(f"data/*/{EVENTS_FILE}")]
    return [*replicas, *plan_data([*_shards_of(replicas), *beside])]


def _shards_of(replicas: Sequence[Replica]) -> list[Path]:
    """The prepared directories that training runs read."""
    return [
        Path(dataset.source["uri"])
        for replica in replicas
        for child in replica.children
        for dataset in child.datasets
        if "uri" in dataset.source
    ]


def _plan_study(study_dir: Path, is_over: bool) -> Replica:
    study = read_study(study_dir)
    cells = list_cells(study_dir)
    children = tuple(plan_cells(cells, study.name, study_dir, is_over))
    outcome = read_json(study_dir / RESULT_FILE) or {}
    start = min((child.start_unix_ms for child in children), default=0)
    end = max((child.end_unix_ms or child.start_unix_ms for child in children), default=0)
    status = _study_status(outcome, children, is_over)
    num_ended = sum(cell.verdict is not None for cell in cells)
    parent = ReplicaRun(
        role="study",
        name=study.name,
        status=status,
        start_unix_ms=start,
        end_unix_ms=None if status == "RUNNING" else end,
        tags={"study": study.name, "families": ", ".join(study.families), "status": status.lower()},
        params=flatten(study.base),
        note=describe_study(study, outcome.get("headline", []), num_ended, len(cells)),
        texts=read_texts(study_dir),
    )
    return Replica(
        experiment=f"{EXPERIMENT_PREFIX}/{study.name}",
        parent=parent,
        children=(*children, *_plan_summaries(study_dir, outcome, study.name, end)),
    )


def _study_status(
    outcome: Mapping[str, Any], children: Sequence[ReplicaRun], is_over: bool
) -> Status:
    is_running = not outcome or any(child.status == "RUNNING" for child in children)
    if is_running and not is_over:
        return "RUNNING"
    return STATUSES.get(outcome.get("status", ""), "FAILED")


def _plan_summaries(
    study_dir: Path, outcome: Mapping[str, Any], study: str, end: int
) -> Iterable[ReplicaRun]:
    """One run per family with points, which carry the end of the last cell as their time."""
    summaries = outcome.get("summaries", {})
    for family, rows in ((family, rows) for family, rows in summaries.items() if rows):
        try:
            points = tuple(
                Point(
                    name=row["metric"],
                    value=float(row["value"]),
                    step=int(row["step"]),
                    time_unix_ms=end,
                )
                for row in rows
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise TrackingError(f"{study_dir / RESULT_FILE}: summaries.{family}: {exc!r}") from exc
        names = {point.name: check_metric(point.name) for point in points}
        yield ReplicaRun(
            role="summary",
            name=f"scaling: {family}",
            status="FINISHED",
            start_unix_ms=end,
            end_unix_ms=end,
            tags={"study": study, "family": family, "status": "finished"},
            note=describe_summary(family, names),
            points=points,
        )
