"""From one run directory to the run that MLflow shows of it, a training run or a probe cell.

Points carry the time of their event, so planning twice gives the same points.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.config.load import PLACE_FIELDS, read_run
from pipeline.config.schema import RunConfig
from pipeline.tracking.events import Event, read_events, surviving_events
from pipeline.tracking.metrics import result_name
from pipeline.tracking.notes import describe_probe, describe_run
from pipeline.tracking.redaction import redact
from pipeline.tracking.replica import (
    Dataset,
    Point,
    ReplicaRun,
    Status,
    flatten,
    read_json,
    read_texts,
)
from pipeline.tracking.store import (
    RESULT_FILE,
    Cell,
    ProbeResult,
    RunResult,
    read_probe_result,
    read_result,
)

DIGEST_CHARACTERS = 36
"""Longest dataset digest that MLflow takes."""


def plan_cells(
    cells: list[Cell], study: str | None, root: Path, is_over: bool
) -> Iterable[ReplicaRun]:
    """Plan the runs of cells; one that has left no event and no result is passed over.

    Args:
        cells: Run directories.
        study: Name of their study, if they belong to one.
        root: The study or output directory.
        is_over: Nothing runs any more.

    Raises:
        TrackingError: A result or an event log is malformed.
        ConfigError: A `run.yaml` is malformed.
    """
    for cell in cells:
        if cell.kind == "training":
            run = _plan_training(cell, study, is_over or _is_left_behind(cell, root))
            if run is not None:
                yield run
        elif cell.verdict == "complete":
            yield _plan_probe(cell, read_probe_result(cell.run_dir), study)


def _is_left_behind(cell: Cell, root: Path) -> bool:
    """The study ended after this run's last sign of life."""
    events, result = cell.run_dir / "events.jsonl", root / RESULT_FILE
    return (
        cell.run_dir != root
        and result.exists()
        and events.exists()
        and result.stat().st_mtime > events.stat().st_mtime
    )


def _plan_training(cell: Cell, study: str | None, is_over: bool) -> ReplicaRun | None:
    """None as long as the run has left no event."""
    events = read_events(cell.run_dir / "events.jsonl")
    if not events:
        return None
    config = read_run(cell.run_dir)
    result = read_result(cell.run_dir) if cell.verdict == "complete" else None
    environment = read_json(cell.run_dir / "environment.json") or {}
    start, end = _unix_ms(events[0].time_unix_seconds), _unix_ms(events[-1].time_unix_seconds)
    if result is not None:
        end = _unix_ms(result.ended.timestamp())
    status = _run_status(cell, is_over)
    return ReplicaRun(
        role="training",
        name=cell.name,
        key=_key(study, cell.name, start),
        attempt=events[-1].attempt,
        status=status,
        start_unix_ms=start,
        end_unix_ms=None if status == "RUNNING" else end,
        tags=_run_tags(config, events, result, environment, study, status),
        params={
            **flatten(config.model_dump(mode="json", exclude=set(PLACE_FIELDS))),
            **_size(result),
        },
        note=describe_run(config, result, events[-1].attempt),
        points=(*_event_points(_with_hosts(events, cell.run_dir)), *_result_points(result)),
        texts=read_texts(cell.run_dir),
        dataset=_read_dataset(config, result),
    )


def _run_status(cell: Cell, is_over: bool) -> Status:
    if cell.verdict is not None:
        return "FINISHED" if cell.verdict == "complete" else "KILLED"
    return "FAILED" if is_over else "RUNNING"


def _run_tags(
    config: RunConfig,
    events: list[Event],
    result: RunResult | None,
    environment: Mapping[str, Any],
    study: str | None,
    status: Status,
) -> dict[str, str]:
    world_size = result.world_size if result else _last_value(events, "world_size")
    tags = {
        "study": study,
        "family": config.model.family,
        "zero_stage": config.zero.stage,
        "world_size": world_size,
        "precision": config.precision,
        "seed": config.seed,
        "git_commit": environment.get("git_commit"),
        "status": status.lower(),
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def _last_value(events: list[Event], name: str) -> Any:
    return next((e.values[name] for e in reversed(events) if name in e.values), None)


def _plan_probe(cell: Cell, result: ProbeResult, study: str | None) -> ReplicaRun:
    start, end = _unix_ms(result.started.timestamp()), _unix_ms(result.ended.timestamp())
    table = f"{result.probe}.json"
    return ReplicaRun(
        role="probe",
        name=cell.name,
        key=_key(study, cell.name, start),
        status="FINISHED",
        start_unix_ms=start,
        end_unix_ms=end,
        tags={
            "probe": result.probe,
            "world_size": str(result.world_size),
            "status": "finished",
            **({"study": study} if study else {}),
        },
        params=flatten(result.params),
        note=describe_probe(result, table),
        texts={**read_texts(cell.run_dir), table: _table(result.records)},
        table_name=table,
    )


def _with_hosts(events: list[Event], run_dir: Path) -> list[Event]:
    """The surviving lineage, with the load of every host below a name of its own."""
    for path in sorted(run_dir.glob("events.*.jsonl")):
        host = path.name.removeprefix("events.").removesuffix(".jsonl")
        events = [*events, *(_name_host(event, host) for event in read_events(path))]
    in_order = sorted(events, key=lambda event: (event.attempt, event.time_unix_seconds))
    return surviving_events(in_order)


def _name_host(event: Event, host: str) -> Event:
    metrics = {name.replace("/", f"/{host}/", 1): value for name, value in event.metrics.items()}
    return replace(event, values=metrics)


def _event_points(events: list[Event]) -> Iterable[Point]:
    for event in events:
        values = {name: value for name, value in event.values.items() if "/" in name}
        if event.kind in ("start", "resume"):
            values.setdefault("progress/attempt", float(event.attempt))
        time_unix_ms = _unix_ms(event.time_unix_seconds)
        for name, value in values.items():
            yield Point(name=name, value=value, step=event.step, time_unix_ms=time_unix_ms)


def _result_points(result: RunResult | None) -> Iterable[Point]:
    if result is None:
        return
    ended = _unix_ms(result.ended.timestamp())
    for name, metric in result.metrics.items():
        yield Point(
            name=result_name(name), value=metric.value, step=result.steps, time_unix_ms=ended
        )
    for position, loss in enumerate(result.per_position_loss or []):
        yield Point(name="eval/position_loss", value=loss, step=position, time_unix_ms=ended)
    for rank, held in enumerate(result.model_state_bytes or []):
        for name, value in (
            ("memory/rank_parameter_bytes", held.parameters),
            ("memory/rank_gradient_bytes", held.gradients),
            ("memory/rank_optimizer_bytes", held.optimizer),
        ):
            yield Point(name=name, value=value, step=rank, time_unix_ms=ended)


def _size(result: RunResult | None) -> dict[str, str]:
    if result is None:
        return {}
    return {
        "num_parameters.total": str(result.num_parameters.total),
        "num_parameters.non_embedding": str(result.num_parameters.non_embedding),
        "flops_per_token": f"{result.flops_per_token:.0f}",
    }


def _table(records: list[dict[str, Any]]) -> str:
    """JSON in the layout of MLflow's table artifacts."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [[record.get(name) for name in columns] for record in records]
    return json.dumps({"columns": columns, "data": rows})


def _read_dataset(config: RunConfig, result: RunResult | None) -> Dataset | None:
    prepared_dir = config.data.prepared_dir
    manifest = read_json(prepared_dir / "manifest.json") if prepared_dir else None
    digest = (manifest or {}).get("fingerprint") or (result and result.data_fingerprint)
    if digest is None:
        return None
    splits = (manifest or {}).get("splits", {})
    profile: dict[str, Any] = {
        f"{split}_{count}": shards[count]
        for split, shards in splits.items()
        for count in ("tokens", "documents")
        if count in shards
    }
    if manifest and "vocab_size" in manifest:
        profile["vocab_size"] = manifest["vocab_size"]
    return Dataset(
        name=redact("+".join(_source_names(config.data))),
        digest=str(digest)[:DIGEST_CHARACTERS],
        source=str(prepared_dir or ""),
        profile=profile,
    )


def _source_names(data: DataConfig) -> list[str]:
    return [
        name if data.sources or not source.paths else Path(source.paths[0]).name
        for name, source in data.named_sources.items()
    ]


def _key(study: str | None, name: str, start_unix_ms: int) -> str:
    identity = f"{study or ''}/{name}/{start_unix_ms}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _unix_ms(seconds: float) -> int:
    return round(seconds * 1000)
