"""From accuracy at several distances to the distance at which half of it is gone.

`accuracy = chance + (top - chance) / (1 + (distance / half) ** steepness)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

MIN_DISTANCES = 4


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The constants of the curve; the distance is None where accuracy never halves in range."""

    top: float
    """Accuracy at no distance."""
    half_distance_tokens: float | None
    steepness: float
    is_converged: bool


def fit_reach(
    distances: Sequence[float],
    num_correct: Sequence[int],
    num_asked: Sequence[int],
    chance: float,
) -> Reach:
    """Fit the curve by the likelihood of the counts.

    Args:
        distances: Tokens between key and query, at least four.
        num_correct: Right answers at each.
        num_asked: Questions at each.
        chance: Accuracy of a guess.

    Raises:
        ValueError: Too few distances.
    """
    if len(distances) < MIN_DISTANCES:
        raise ValueError(f"a reach needs {MIN_DISTANCES} distances, got {len(distances)}")
    x_N = np.log(np.asarray(distances, dtype=float))
    right_N, asked_N = np.asarray(num_correct, dtype=float), np.asarray(num_asked, dtype=float)

    def misfit(theta_P: np.ndarray) -> float:
        top = chance + (1 - chance) * float(special.expit(theta_P[0]))
        kept_N = special.expit(-np.exp(theta_P[2]) * (x_N - theta_P[1]))
        share_N = np.clip(chance + (top - chance) * kept_N, 1e-9, 1 - 1e-9)
        return -float((right_N * np.log(share_N) + (asked_N - right_N) * np.log1p(-share_N)).sum())

    starts = [
        (top, middle, 0.5) for top in (0.0, 4.0) for middle in np.quantile(x_N, (0.2, 0.8, 1.0))
    ]
    # An accuracy that does not fall puts the middle at a bound and the steepness anywhere.
    bounds = [(-10, 10), (float(x_N.min()) - 3, float(x_N.max()) + 3), (-3, 4)]
    options = {"maxiter": 2000}
    found = [
        optimize.minimize(misfit, start, method="Nelder-Mead", bounds=bounds, options=options)
        for start in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    top, middle, steepness = (float(v) for v in best.x)
    in_range = float(x_N.min()) <= middle <= float(x_N.max())
    return Reach(
        top=chance + (1 - chance) * float(special.expit(top)),
        half_distance_tokens=float(np.exp(middle)) if in_range else None,
        steepness=float(np.exp(steepness)),
        is_converged=bool(best.success),
    )
