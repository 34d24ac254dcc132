"""From an estimate that stood before a run to how far off it was, and what past runs say of it."""

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipeline.tracking.store import (
    RESULT_FILE,
    MetricValue,
    Number,
    Record,
    measured,
    write_json_atomic,
)

ESTIMATE_FILE = "estimate.json"

QUANTITIES = {
    "step": ("step_seconds", "perf/step_seconds"),
    "peak": ("peak_bytes", "memory/peak_bytes"),
    "state": ("state_bytes", "memory/model_state_bytes"),
}
"""What is compared: name, field of `Expectation`, and the metric that measures it."""

NEWEST_RUNS = 200
"""Finished runs of the family and device that count, the newest: older ones ran on older code."""


class Expectation(Record):
    """What an estimate said of a run before its ranks started: the content of `estimate.json`."""

    device: str
    """Name of the device in the cluster file; the kind where no hardware is stated."""
    kind: Literal["cpu", "cuda"]
    family: str
    num_ranks: int = Field(ge=1)
    step_seconds: Number | None = Field(default=None, gt=0.0)
    """Of one optimizer step; absent where no hardware is stated."""
    peak_bytes: Number = Field(gt=0.0)
    """Peak memory of one rank."""
    state_bytes: int = Field(ge=1)
    """Model state of the rank that holds most."""


@dataclass(frozen=True, kw_only=True)
class TypicalError:
    """How far off estimates of finished runs were."""

    quantity: str
    """A key of `QUANTITIES`."""
    median_fraction: float
    """Median of the absolute relative errors."""
    largest_fraction: float
    num_runs: int


def write_expectation(run_dir: Path, expected: Expectation) -> None:
    """Write what is expected of a run into its directory, over what stood there."""
    write_json_atomic(run_dir / ESTIMATE_FILE, expected)


def read_expectation(run_dir: Path) -> Expectation | None:
    """Give what was expected of a run; None where that is not known, or cannot be read."""
    try:
        return Expectation.model_validate_json((run_dir / ESTIMATE_FILE).read_bytes())
    except (OSError, ValidationError):
        # A run that has trained must not fail for want of a comparison.
        return None


def compare(
    expected: Expectation, metrics: Mapping[str, MetricValue], kind: str, num_ranks: int
) -> dict[str, MetricValue]:
    """Compare an estimate with a run.

    Args:
        expected: The estimate.
        metrics: What the run measured.
        kind: What its ranks computed on.
        num_ranks: World size of its last attempt.

    Returns:
        Metrics `estimate/...`; none where the run was on other machines than the estimate.
    """
    found: dict[str, MetricValue] = {}
    if (kind, num_ranks) != (expected.kind, expected.num_ranks):
        return found
    for quantity, (field, name) in QUANTITIES.items():
        value = getattr(expected, field)
        if value is None or name not in metrics or not metrics[name].value:
            continue
        error = value / metrics[name].value - 1.0
        found[f"estimate/{field}"] = measured(f"estimate/{field}", value)
        found[error_name(quantity)] = measured(error_name(quantity), error)
    return found


def error_name(quantity: str) -> str:
    """Give the metric of the relative error of an estimate."""
    return f"estimate/{quantity}_error_fraction"


def typical_errors(output_dir: Path, device: str, family: str) -> list[TypicalError]:
    """Summarise how far off the estimates of finished runs of a directory were.

    Args:
        output_dir: Directory of runs and studies.
        device: Only runs on it count.
        family: Only runs of it count.

    Returns:
        One entry a quantity that was compared.
    """
    by_quantity: dict[str, list[float]] = {}
    for errors in _stored_errors(output_dir, device, family):
        for quantity, error in errors.items():
            by_quantity.setdefault(quantity, []).append(abs(error))
    return [
        TypicalError(
            quantity=quantity, median_fraction=statistics.median(values),
            largest_fraction=max(values), num_runs=len(values),
        )
        for quantity, values in by_quantity.items()
    ]  # fmt: skip


def _stored_errors(output_dir: Path, device: str, family: str) -> Iterator[dict[str, float]]:
    """Give the errors of each finished run, the newest first."""
    files = [*output_dir.glob(f"*/{ESTIMATE_FILE}"), *output_dir.glob(f"*/runs/*/{ESTIMATE_FILE}")]
    num_found = 0
    for path in sorted(files, key=_modified, reverse=True):
        expected = read_expectation(path.parent)
        if expected is None or (expected.device, expected.family) != (device, family):
            continue
        try:
            metrics = json.loads((path.parent / RESULT_FILE).read_bytes())["metrics"]
            errors = {
                quantity: float(metrics[error_name(quantity)]["value"])
                for quantity in QUANTITIES
                if error_name(quantity) in metrics
            }
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not finished, or not readable: it says nothing
        yield errors
        num_found += 1
        if num_found == NEWEST_RUNS:
            return


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
