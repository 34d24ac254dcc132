"""From an effect with its error to the p values that support and that refute a hypothesis.

Works on arrays, so that simulations of thousands of studies decide by the very rule of the verdict.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.config.claims import Direction

MIN_ERROR = 1e-12
"""Error below which samples are called equal; it keeps a p value defined."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which values of a statistic support a hypothesis."""

    direction: Direction
    threshold: float
    margin: float | np.ndarray | None = None
    """Differences from the threshold that count as none, in the unit of the statistic; one for each
    study where it was measured in each."""


@dataclass(frozen=True, kw_only=True)
class PValues:
    """P of the nulls that supporting and refuting each have to reject; both may be large."""

    supported: np.ndarray
    refuted: np.ndarray


def weigh(rule: Rule, value: np.ndarray, error: np.ndarray, degrees: np.ndarray) -> PValues:
    """Give both p values.

    A side's p is doubled, so that a verdict agrees with the two-sided 95% interval. Equivalence is
    two one-sided tests at their own level (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657).
    Of an effect with a margin, either the wrong side or equivalence refutes.

    Args:
        rule: Direction, threshold and margin.
        value: Measured statistics.
        error: Their standard errors.
        degrees: Their degrees of freedom, at least 1.
    """
    scale = np.maximum(error, MIN_ERROR)

    def above(bound: float | np.ndarray) -> np.ndarray:
        return np.asarray(stats.t.sf((value - bound) / scale, degrees))

    def below(bound: float | np.ndarray) -> np.ndarray:
        return np.asarray(stats.t.cdf((value - bound) / scale, degrees))

    def side(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.minimum(1.0, 2 * p))

    centre = rule.threshold
    if rule.margin is None:
        equal = outside = np.ones_like(np.asarray(value, dtype=float))
    else:
        equal = np.maximum(above(centre - rule.margin), below(centre + rule.margin))
        outside = side(np.minimum(above(centre + rule.margin), below(centre - rule.margin)))
    if rule.direction == "equivalent":
        return PValues(supported=equal, refuted=outside)
    if rule.direction == "different":
        return PValues(supported=side(np.minimum(above(centre), below(centre))), refuted=equal)
    first, second = (above, below) if rule.direction == "greater" else (below, above)
    return PValues(supported=side(first(centre)), refuted=np.minimum(side(second(centre)), equal))
