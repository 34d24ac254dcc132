"""Results of runs and probes: their files, written atomically, and their reading back from disk.

A `result.json` is written last and by rename, so its presence is the proof that a run is complete.
What was not measured is absent from it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.config.load import RUN_FILE, STUDY_FILE, read_run
from pipeline.config.schema import RunConfig
from pipeline.errors import TrackingError
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.events import Event, read_events, surviving_events
from pipeline.tracking.metrics import METRICS, check_metric

SCHEMA_VERSION: Literal[1] = 1
PROBE_FILE = "probe.yaml"
RESULT_FILE = "result.json"
STOPPED_FILE = "stopped.json"

Verdict = Literal["complete", "stopped"]
CellKind = Literal["training", "probe"]
ModelType = TypeVar("ModelType", bound=BaseModel)
Number = Annotated[float, Field(allow_inf_nan=False)]


def _check_name(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"{name!r} is not a metric of pipeline/tracking/metrics.py")
    return name


class Record(BaseModel):
    """A part of a result file: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class MetricValue(Record):
    """One measured number of a whole run."""

    value: Number
    """The number, in `unit`."""
    num: int = Field(ge=1)
    """How many measurements it stands for."""
    spread: Number | None = None
    """Interquartile range of the measurements; absent for a single one."""
    unit: str
    """Unit as in `METRICS`."""


def measured(name: str, value: float, num: int = 1, spread: float | None = None) -> MetricValue:
    """Give a metric value with the unit of its name.

    Args:
        name: A name in `METRICS`.
        value: The number, in that metric's unit.
        num: How many measurements it stands for.
        spread: Their interquartile range, in the same unit.

    Raises:
        TrackingError: The name is unknown, or the value is not finite.
    """
    unit = check_metric(name).unit
    try:
        return MetricValue(value=value, num=num, spread=spread, unit=unit)
    except ValidationError as exc:
        raise TrackingError(f"metric {name}: {_explain(exc)}") from exc


class NumParameters(Record):
    """Parameters of the built model."""

    total: int = Field(ge=1)
    non_embedding: int = Field(ge=1)


class RankStateBytes(Record):
    """Bytes of training state that one rank holds, measured from its tensors."""

    parameters: int = Field(ge=0)
    gradients: int = Field(ge=0)
    optimizer: int = Field(ge=0)


class SourceRead(Record):
    """What a run read of one source, over all ranks."""

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    epochs: Number = Field(ge=0)
    """Passes over the source."""


class RunResult(Record):
    """What a complete training run did: the content of `result.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run: str
    """Name of the run."""
    study: str | None = None
    """Name of the study, for a cell of one."""
    family: str
    """`model.family` of the config."""
    status: Literal["complete"] = "complete"
    """Always complete: a run that stopped or failed leaves no result."""
    config_hash: str
    """`pipeline.config.load.config_hash` of the run."""
    data_fingerprint: str
    """Fingerprint of the shards it read."""
    git_commit: str | None = None
    """Commit of this project's checkout; absent for an installed package."""
    seed: int
    world_size: int = Field(ge=1)
    """Ranks of the last attempt."""
    zero_stage: int = Field(ge=0, le=3)
    precision: Literal["fp32", "bf16", "fp16"]
    num_parameters: NumParameters
    flops_per_token: Number
    """Training FLOPs of one token, by the closed form."""
    steps: int = Field(ge=0)
    """Optimizer steps."""
    tokens: int = Field(ge=0)
    """Trained tokens over all ranks."""
    metrics: dict[Annotated[str, AfterValidator(_check_name)], MetricValue]
    """One value per metric for the whole run."""
    per_position_loss: list[Number] | None = None
    """Validation loss at each position of a sample, nats per token, length T."""
    model_state_bytes: list[RankStateBytes] | None = None
    """One entry per rank."""
    sources: dict[str, SourceRead] = Field(default_factory=dict)
    """What was read of each source of the mixture."""
    goodput: dict[str, Number] = Field(default_factory=dict)
    """Seconds of wall time by what they went into."""
    attempts: int = Field(ge=1)
    """How often the run was started, or went back to a checkpoint by itself."""
    skipped_steps: int = Field(default=0, ge=0)
    """Steps that were not applied, for a non-finite number or a spike."""
    rewinds: int = Field(default=0, ge=0)
    """How often a spike made the run go back to a checkpoint by itself."""
    environment: dict[str, Any]
    """As `collect_environment`."""
    started: AwareDatetime
    """Start of the first attempt; a number is taken as Unix seconds."""
    ended: AwareDatetime

    @model_validator(mode="after")
    def _units_are_those_of_the_names(self) -> Self:
        for name, metric in self.metrics.items():
            if metric.unit != METRICS[name].unit:
                raise ValueError(f"{name} is in {METRICS[name].unit}, got unit {metric.unit!r}")
        return self


class ProbeResult(Record):
    """What a probe measured: the content of a probe cell's `result.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run: str
    """Name of the cell."""
    study: str | None = None
    probe: str
    """A name in `pipeline.probes.PROBES`."""
    status: Literal["complete"] = "complete"
    world_size: int = Field(ge=1)
    params: dict[str, Any]
    """Arguments of the probe."""
    records: list[dict[str, Any]]
    """One flat mapping per measurement."""
    environment: dict[str, Any]
    started: AwareDatetime
    ended: AwareDatetime


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A complete training run as it stands on disk."""

    run_dir: Path
    config: RunConfig
    result: RunResult
    events: list[Event]
    """The surviving lineage."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run directory, finished or not."""

    run_dir: Path
    kind: CellKind
    verdict: Verdict | None
    """None while it runs, and after it failed."""

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.run_dir.name


def write_json_atomic(path: Path, payload: Mapping[str, Any] | BaseModel) -> None:
    """Write a JSON file so that readers see the old content or all of the new, also after a crash.

    Args:
        path: The file.
        payload: A mapping of plain values, or a model, whose None fields are left out.

    Raises:
        TrackingError: A number is not finite, or a value has no JSON form.
    """
    if isinstance(payload, BaseModel):
        payload = payload.model_dump(mode="json", exclude_none=True)
    try:
        text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
    except (ValueError, TypeError) as exc:
        raise TrackingError(f"cannot write {path}: {exc}") from exc
    write_text_atomic(path, text)


def write_result(run_dir: Path, result: RunResult | ProbeResult) -> None:
    """Write `result.json`, the last thing a run or probe does, and drop an older stop mark."""
    write_json_atomic(run_dir / RESULT_FILE, result)
    (run_dir / STOPPED_FILE).unlink(missing_ok=True)


def write_stopped(run_dir: Path, step: int, reason: str) -> None:
    """Write `stopped.json`: the ranks agreed to stop after `step` with a checkpoint behind them."""
    write_json_atomic(
        run_dir / STOPPED_FILE, {"schema_version": SCHEMA_VERSION, "step": step, "reason": reason}
    )


def clear_stopped(run_dir: Path) -> None:
    """Drop the stop mark, which a run does when it starts again."""
    (run_dir / STOPPED_FILE).unlink(missing_ok=True)


def read_verdict(run_dir: Path) -> Verdict | None:
    """Tell how the run ended; None while it runs, and after it failed."""
    if (run_dir / RESULT_FILE).exists():
        return "complete"
    return "stopped" if (run_dir / STOPPED_FILE).exists() else None


def read_result(run_dir: Path) -> RunResult:
    """Read the result of a training run.

    Raises:
        TrackingError: The file is missing or malformed; file and field are named.
    """
    return _read_model(RunResult, run_dir / RESULT_FILE)


def read_probe_result(run_dir: Path) -> ProbeResult:
    """Read the result of a probe cell.

    Raises:
        TrackingError: As `read_result`.
    """
    return _read_model(ProbeResult, run_dir / RESULT_FILE)


def list_cells(root: Path) -> list[Cell]:
    """List the run directories of a study, or those directly under an output directory, by name.

    Args:
        root: A study directory, an output directory, or a single run directory.
    """
    candidates = [root]
    if _cell_kind(root) is None:
        parent = root / "runs" if (root / STUDY_FILE).exists() else root
        candidates = sorted(parent.iterdir()) if parent.is_dir() else []
    return [
        Cell(run_dir=path, kind=kind, verdict=read_verdict(path))
        for path in candidates
        if (kind := _cell_kind(path)) is not None
    ]


def read_runs(root: Path) -> list[RunRecord]:
    """Read every complete training run, sorted by name; `list_cells` tells of the others.

    Args:
        root: As for `list_cells`.

    Raises:
        TrackingError: A result or an event log is malformed.
        ConfigError: A `run.yaml` is malformed.
    """
    return [
        RunRecord(
            run_dir=cell.run_dir,
            config=read_run(cell.run_dir),
            result=read_result(cell.run_dir),
            events=surviving_events(read_events(cell.run_dir / "events.jsonl")),
        )
        for cell in list_cells(root)
        if cell.kind == "training" and cell.verdict == "complete"
    ]


def read_probes(root: Path) -> list[ProbeResult]:
    """Read every complete probe cell, sorted by name.

    Args:
        root: As for `list_cells`.

    Raises:
        TrackingError: A result is malformed.
    """
    return [
        read_probe_result(cell.run_dir)
        for cell in list_cells(root)
        if cell.kind == "probe" and cell.verdict == "complete"
    ]


def _cell_kind(path: Path) -> CellKind | None:
    if (path / PROBE_FILE).is_file():
        return "probe"
    return "training" if (path / RUN_FILE).is_file() else None


def _read_model(schema: type[ModelType], path: Path) -> ModelType:
    try:
        return schema.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise TrackingError(f"cannot read {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        raise TrackingError(f"{path}: {_explain(exc)}") from exc


def _explain(exc: ValidationError) -> str:
    problems = [(".".join(map(str, e["loc"])), e["msg"]) for e in exc.errors()]
    return "; ".join(f"{field}: {text}" if field else text for field, text in problems)
