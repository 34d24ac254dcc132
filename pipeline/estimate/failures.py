"""From checkpoints and the rate of failures to the share of time that trains.

Source: Young 1974, A first order approximation to the optimum checkpoint interval.
"""

import math
from dataclasses import dataclass

from pipeline.config.hardware import HardwareConfig
from pipeline.config.schema import RunConfig

CHECKPOINT_BYTES = 12
"""Of one parameter in a canonical checkpoint: the weight and two moments in float32."""

HOST_COPY_BYTES_PER_SECOND = 2.0e10
"""From a GPU to pinned memory of its host, which an asynchronous checkpoint waits for. PCIe 4 x16
carries 3.2e10 by its specification; the share of two thirds is assumed."""

SECONDS_PER_HOUR = 3600.0
UNKNOWN_STORAGE = "hardware.storage_bytes_per_second is not stated"
LARGEST_EXPONENT = 500.0
"""Runs that fail this often before they are through never are; e^500 still is a number."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """What checkpoints and failures leave of the time."""

    fraction: float
    """Share of the time in steps that the run keeps."""
    checkpoint_seconds: float | None
    """What training waits for at one checkpoint; None where the storage is not stated."""
    interval_seconds: float | None
    """Between two checkpoints as the run states it; None without any, or one at the end."""
    best_interval_seconds: float | None
    """Between two checkpoints by Young's formula; None where it has no answer."""
    num_failures: float | None
    """Failures expected until the token budget is reached, in the time that they cost themselves
    as well; None where their rate is not stated."""
    note: str
    """What was left out, for want of a figure."""


def checkpoint_seconds(
    run: RunConfig, num_parameters: int, num_ranks: int, hardware: HardwareConfig
) -> float | None:
    """Give what training waits for at one checkpoint.

    Args:
        run: Says whether files are written beside training.
        num_parameters: All parameters.
        num_ranks: Ranks that copy their share.
        hardware: Storage and kind of device.
    """
    num_bytes = CHECKPOINT_BYTES * num_parameters
    if run.checkpoint.asynchronous and hardware.kind == "cuda":
        return num_bytes / num_ranks / HOST_COPY_BYTES_PER_SECOND
    if run.checkpoint.asynchronous:
        return num_bytes / num_ranks / hardware.memory_bytes_per_second
    if hardware.storage_bytes_per_second is None:
        return None
    return num_bytes / hardware.storage_bytes_per_second


def young_interval(cost_seconds: float, mean_seconds_between: float) -> float:
    """Give the time between checkpoints that loses least: sqrt(2 x cost x time between failures).

    Args:
        cost_seconds: What training waits for at one checkpoint.
        mean_seconds_between: Failures of the whole machine.
    """
    return math.sqrt(2.0 * cost_seconds * mean_seconds_between)


def predict_goodput(
    run: RunConfig, num_parameters: int, num_ranks: int, hardware: HardwareConfig,
    step_seconds: float,
) -> Goodput:  # fmt: skip
    """Give the share of time that trains.

    A checkpoint costs its wait, a failure half an interval of steps and a restart. Without
    checkpoints a failure costs all that was trained.

    Args:
        run: Its checkpoint policy and budget.
        num_parameters: All parameters.
        num_ranks: Ranks, each of which may fail.
        hardware: Storage, and how often a device fails.
        step_seconds: Of one optimizer step.
    """
    cost = checkpoint_seconds(run, num_parameters, num_ranks, hardware)
    interval = _interval_seconds(run, step_seconds)
    total = run.train.total_steps * step_seconds
    wait = cost / interval if cost is not None and interval is not None else 0.0
    unknown = cost is None and interval is not None
    note = f"{UNKNOWN_STORAGE}: checkpoints cost nothing here" if unknown else ""
    if hardware.failures is None:
        told = "hardware.failures is not stated, so none counts"
        return Goodput(
            fraction=1.0 / (1.0 + wait), checkpoint_seconds=cost, interval_seconds=interval,
            best_interval_seconds=None, num_failures=None,
            note=f"{note}; {told}" if note else told,
        )  # fmt: skip
    between = hardware.failures.mean_hours_between * SECONDS_PER_HOUR / num_ranks
    restart = hardware.failures.restart_seconds
    if interval is None or interval >= total:
        fraction = undivided_fraction(total, between, restart)
        note = "a failure begins anew, for want of a checkpoint before the end"
    else:
        fraction = 1.0 / (1.0 + wait + (interval / 2 + restart) / between)
    return Goodput(
        fraction=fraction,
        checkpoint_seconds=cost,
        interval_seconds=interval,
        best_interval_seconds=young_interval(cost, between) if cost else None,
        num_failures=total / fraction / between,
        note=note,
    )


def undivided_fraction(total_seconds: float, between: float, restart_seconds: float) -> float:
    """Give the share of time that trains where every failure begins the whole run anew.

    The time until a run without failures is through is (between + restart) x (e^x - 1), with x =
    total / between.

    Args:
        total_seconds: Of all steps.
        between: Mean time between failures of all ranks together.
        restart_seconds: From a failure to the first step.

    Source: Daly 2006, A higher order estimate of the optimum checkpoint interval, equation 13, for
    one segment.
    """
    times = min(total_seconds / between, LARGEST_EXPONENT)
    return total_seconds / ((between + restart_seconds) * math.expm1(times))


def _interval_seconds(run: RunConfig, step_seconds: float) -> float | None:
    policy = run.checkpoint
    by_steps = policy.every_steps * step_seconds if policy.every_steps is not None else None
    stated = [value for value in (by_steps, policy.every_seconds) if value is not None]
    return min(stated, default=None)
