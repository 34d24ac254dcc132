"""From gradient norms over distance to a half-life, and to whether they decay as a power instead.

Shapes: Q sequences, K distances from 0.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.study.effect import Effect, effect_of_samples
from pipeline.study.fits import Estimate

FIRST_DISTANCE = 8
"""Distance at which fits start: nearer ones mix in the head and the last layers."""


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How the logarithm of a gradient's norm falls with distance."""

    rate: Effect
    """Of `exp(-rate * distance)`, per token; negative where gradients grow."""
    exponent: Effect
    """Of `distance ** -exponent`."""
    aic_exponential: float
    aic_power: float
    tail_log_ratio: Effect
    """ln g(T/2) - ln g(8): zero where distance costs nothing."""
    num_sequences: int

    @property
    def is_exponential(self) -> bool:
        """Whether Akaike's criterion takes the exponential over the power."""
        return self.aic_exponential < self.aic_power

    @property
    def half_life_tokens(self) -> Estimate | None:
        """Distance over which the norm halves; None where it does not fall.

        A bound is absent where the interval of the rate reaches zero: the half-life is unbounded.
        """
        rate = self.rate.estimate
        if rate.value <= 0:
            return None
        high = None if rate.low is None or rate.low <= 0 else float(np.log(2)) / rate.low
        low = None if rate.high is None else float(np.log(2)) / rate.high
        return Estimate(value=float(np.log(2)) / rate.value, low=low, high=high, num=rate.num)


def fit_decay(log_norm_QK: np.ndarray) -> Decay:
    """Fit both forms to the mean log norm over distances 8 to T/2.

    Args:
        log_norm_QK: ln of the gradient's norm at the token k places before the target, for each
            sequence; K is at least 24.

    Raises:
        ValueError: Fewer than 24 distances.
    """
    last = log_norm_QK.shape[1] // 2
    if last < FIRST_DISTANCE + 4:
        raise ValueError(
            f"a decay needs {2 * (FIRST_DISTANCE + 4)} distances, got {log_norm_QK.shape[1]}"
        )
    distance_K = np.arange(FIRST_DISTANCE, last + 1, dtype=float)
    kept_QK = log_norm_QK[:, FIRST_DISTANCE : last + 1]
    rates_Q, error_exponential = _regress(distance_K, kept_QK)
    exponents_Q, error_power = _regress(np.log(distance_K), kept_QK)
    tail_Q = kept_QK[:, -1] - kept_QK[:, 0]
    return Decay(
        rate=effect_of_samples([-float(v) for v in rates_Q]),
        exponent=effect_of_samples([-float(v) for v in exponents_Q]),
        aic_exponential=_aic(error_exponential, len(distance_K)),
        aic_power=_aic(error_power, len(distance_K)),
        tail_log_ratio=effect_of_samples([float(v) for v in tail_Q]),
        num_sequences=len(log_norm_QK),
    )


def _regress(x_K: np.ndarray, y_QK: np.ndarray) -> tuple[np.ndarray, float]:
    """Give each sequence's slope, [Q], and the sum of squares that the mean curve's line leaves."""
    centred_K = x_K - x_K.mean()
    slope_Q = y_QK @ centred_K / (centred_K**2).sum()
    mean_K = y_QK.mean(axis=0)
    rest_K = mean_K - mean_K.mean() - slope_Q.mean() * centred_K
    return slope_Q, float((rest_K**2).sum())


def _aic(squares: float, num_points: int) -> float:
    """Give Akaike's criterion of a line with Gaussian errors: two constants and a variance."""
    return num_points * float(np.log(max(squares, 1e-300) / num_points)) + 2 * 3
