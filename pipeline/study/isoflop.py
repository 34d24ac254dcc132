"""From a grid of losses to parabolas of loss over size at equal training FLOPs, for pictures.

The minimum of a parabola is a biased estimate of the best size even without noise, because the true
curve is not one; `scaling` gives the numbers. Source: Czech et al. 2026 (arXiv 2603.22339).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.scaling import ScalingPoint

MIN_SIZES = 4
"""Sizes a parabola needs, so that one is left over to show its misfit."""


@dataclass(frozen=True, kw_only=True)
class IsoFlopCurve:
    """Losses at one budget, interpolated along each size's own curve, and their parabola."""

    family: str
    flops: float
    num_parameters: tuple[float, ...]
    losses: tuple[float, ...]
    coefficients: tuple[float, float, float]
    """Of the square of ln N, of ln N, and the constant."""
    optimum_parameters: float | None
    """Size at the minimum; None where that is not inside the measured ones."""
    runs: tuple[str, ...]


def draw_isoflops(points: Sequence[ScalingPoint], budgets: Sequence[float]) -> list[IsoFlopCurve]:
    """Give the parabola of each family at each budget that enough of its sizes span.

    Args:
        points: Points with FLOPs; those without are left out.
        budgets: Training FLOPs.
    """
    curves = []
    for family in sorted({p.family for p in points}):
        for flops in budgets:
            own = [p for p in points if p.family == family and p.flops is not None]
            curve = _curve(family, own, flops)
            if curve is not None:
                curves.append(curve)
    return curves


def choose_budgets(points: Sequence[ScalingPoint], num_budgets: int = 5) -> list[float]:
    """Give budgets, evenly spaced in their logarithm, inside the measured FLOPs."""
    flops = [p.flops for p in points if p.flops is not None]
    if not flops:
        return []
    return [float(v) for v in np.geomspace(min(flops), max(flops), num_budgets + 2)[1:-1]]


def _curve(family: str, points: Sequence[ScalingPoint], flops: float) -> IsoFlopCurve | None:
    found: list[tuple[float, float]] = []
    runs: list[str] = []
    for size in sorted({p.num_parameters for p in points}):
        own = [p for p in points if p.num_parameters == size]
        budgets = sorted({p.flops for p in own if p.flops is not None})
        if len(budgets) < 2 or not budgets[0] <= flops <= budgets[-1]:
            continue
        means = [np.mean([p.loss for p in own if p.flops == budget]) for budget in budgets]
        # Straight in logarithms, as between the points of a power law.
        loss = float(np.exp(np.interp(np.log(flops), np.log(budgets), np.log(means))))
        found.append((size, loss))
        runs += [p.run for p in own]
    if len(found) < MIN_SIZES:
        return None
    logs = np.log([size for size, _ in found])
    centre = float(logs.mean())
    # Fitted about the centre, where the three powers are nearly orthogonal, then written plainly.
    a, b, c = (float(v) for v in np.polyfit(logs - centre, [loss for _, loss in found], 2))
    best = centre - b / (2 * a) if a > 0 else None
    inside = best is not None and float(logs.min()) < best < float(logs.max())
    return IsoFlopCurve(
        family=family,
        flops=flops,
        num_parameters=tuple(size for size, _ in found),
        losses=tuple(loss for _, loss in found),
        coefficients=(a, b - 2 * a * centre, a * centre**2 - b * centre + c),
        optimum_parameters=float(np.exp(best)) if best is not None and inside else None,
        runs=tuple(runs),
    )
