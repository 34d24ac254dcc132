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
    """Failures expected until the token budget is reached; None where their rate is not stated."""
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
    checkpoints a failure costs half of all that was trained.

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
    if hardware.failures is None:
        wait = cost / interval if cost is not None and interval is not None else 0.0
        return Goodput(
            fraction=1.0 / (1.0 + wait), checkpoint_seconds=cost, interval_seconds=interval,
            best_interval_seconds=None, num_failures=None,
            note="hardware.failures is not stated, so none counts",
        )  # fmt: skip
    between = hardware.failures.mean_hours_between * SECONDS_PER_HOUR / num_ranks
    lost = min(interval or total, total) / 2 + hardware.failures.restart_seconds
    wait = cost / interval if cost is not None and interval is not None else 0.0
    unknown = "" if cost is not None else "hardware.storage_bytes_per_second is not stated: "
    return Goodput(
        fraction=1.0 / (1.0 + wait + lost / between),
        checkpoint_seconds=cost,
        interval_seconds=interval,
        best_interval_seconds=young_interval(cost, between) if cost else None,
        num_failures=total / between,
        note=f"{unknown}checkpoints cost nothing here" if unknown else "",
    )


def _interval_seconds(run: RunConfig, step_seconds: float) -> float | None:
    policy = run.checkpoint
    by_steps = policy.every_steps * step_seconds if policy.every_steps is not None else None
    stated = [value for value in (by_steps, policy.every_seconds) if value is not None]
    return min(stated, default=None)
