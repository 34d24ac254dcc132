"""From steps to a threshold, some of them never reached, to medians and a test between arms."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class StepsToThreshold:
    """One run: the step at which it reached the threshold, or at which it was stopped short."""

    run: str
    steps: float
    is_reached: bool


@dataclass(frozen=True, kw_only=True)
class SurvivalCurve:
    """Kaplan and Meier's share of runs that have not reached the threshold yet."""

    steps: tuple[float, ...]
    share: tuple[float, ...]
    """Just after each of the steps."""
    median_steps: float | None
    """First step by which half of the runs have reached it; None where they have not."""
    num_reached: int
    num_runs: int


def draw_survival(times: Sequence[StepsToThreshold]) -> SurvivalCurve:
    """Give the curve of one arm.

    Raises:
        ValueError: There is no run.
    """
    if not times:
        raise ValueError("a survival curve needs at least one run")
    curve = stats.ecdf(_censored(times)).sf
    reached = [t.steps for t in times if t.is_reached]
    steps = [float(v) for v in curve.quantiles if v in reached]
    share = [float(v) for v in np.atleast_1d(curve.evaluate(steps))] if steps else []
    below = [step for step, left in zip(steps, share, strict=True) if left <= 0.5]
    return SurvivalCurve(
        steps=tuple(steps),
        share=tuple(share),
        median_steps=below[0] if below else None,
        num_reached=len(reached),
        num_runs=len(times),
    )


def compare_by_logrank(own: Sequence[StepsToThreshold], other: Sequence[StepsToThreshold]) -> float:
    """Give the two-sided p that both arms reach the threshold at the same rate.

    Raises:
        ValueError: No run of either arm has reached it: there is nothing to compare.
    """
    if not any(t.is_reached for t in (*own, *other)):
        raise ValueError("no run reached the threshold; run longer or lower it")
    return float(stats.logrank(x=_censored(own), y=_censored(other)).pvalue)


def _censored(times: Sequence[StepsToThreshold]) -> stats.CensoredData:
    return stats.CensoredData(
        uncensored=[t.steps for t in times if t.is_reached],
        right=[t.steps for t in times if not t.is_reached],
    )
