"""From one run directory to the run that MLflow shows of it, a training run or a probe cell.

Points carry the time of their event, so planning twice gives the same points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.load import PLACE_FIELDS, read_run
from pipeline.config.schema import RunConfig
from pipeline.tracking.events import SOURCES, Event, read_events, surviving_events
from pipeline.tracking.metrics import result_name
from pipeline.tracking.notes import describe_probe, describe_run
from pipeline.tracking.replica import (
    Point,
    ReplicaRun,
    Status,
    event_points,
    flatten,
    identity_key,
    read_json,
    read_texts,
    table_text,
    unix_ms,
)
from pipeline.tracking.replica_data import data_tags, read_shards
from pipeline.tracking.replica_files import list_files
from pipeline.tracking.store import (
    RESULT_FILE,
    Cell,
    ProbeResult,
    RunResult,
    read_probe_result,
    read_result,
)


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
    start, end = unix_ms(events[0].time_unix_seconds), unix_ms(events[-1].time_unix_seconds)
    if result is not None:
        end = unix_ms(result.ended.timestamp())
    status = _run_status(cell, is_over)
    shards = read_shards(config.data, None if result is None else result.data_fingerprint)
    return ReplicaRun(
        role="training",
        name=cell.name,
        key=identity_key(study or "", cell.name, start),
        attempt=events[-1].attempt,
        status=status,
        start_unix_ms=start,
        end_unix_ms=None if status == "RUNNING" else end,
        tags={
            **_run_tags(config, events, result, environment, study, status),
            **({} if shards is None else data_tags(shards)),
        },
        params={
            **flatten(config.model_dump(mode="json", exclude=set(PLACE_FIELDS))),
            **_size(result),
        },
        note=describe_run(config, result, events[-1].attempt),
        points=(
            *event_points(map(_with_sources, _with_hosts(events, cell.run_dir))),
            *_result_points(result),
        ),
        texts=read_texts(cell.run_dir),
        files=list_files(cell.run_dir),
        datasets=() if shards is None else (shards,),
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
    start, end = unix_ms(result.started.timestamp()), unix_ms(result.ended.timestamp())
    table = f"{result.probe}.json"
    return ReplicaRun(
        role="probe",
        name=cell.name,
        key=identity_key(study or "", cell.name, start),
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
        texts={**read_texts(cell.run_dir), table: table_text(result.records)},
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


def _with_sources(event: Event) -> Event:
    """Tell mixed sources apart; of a single one `progress/tokens` says it all."""
    counts = event.values.get(SOURCES, {})
    named = {
        f"source/{source}/{name}": count[name]
        for source, count in counts.items()
        for name in ("tokens", "epochs")
        if len(counts) > 1
    }
    return replace(event, values={**event.values, **named})


def _result_points(result: RunResult | None) -> Iterable[Point]:
    if result is None:
        return
    ended = unix_ms(result.ended.timestamp())
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
