"""From steps to a target loss at several batches to the batch beyond which more of it is waste.

`steps = least_steps * (1 + critical / batch)`: far below the critical batch a doubling halves the
steps, far above it saves none. Source: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11.
Shapes: K seeds, B batches, S draws, G trial values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.effect import Effect, effect_of_draws
from pipeline.study.positions import find_peak


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """The two constants, and whether the batches tried span the critical one."""

    log_tokens: Effect
    """Natural logarithm of the critical batch in tokens."""
    least_steps: float
    is_bracketed: bool
    """Whether the critical batch lies between the smallest and the largest one tried."""

    @property
    def tokens(self) -> float:
        """The critical batch."""
        return float(np.exp(self.log_tokens.value))


def fit_critical_batch(
    batch_tokens: Sequence[float], steps_KB: np.ndarray, num_draws: int = 2000, seed: int = 0
) -> CriticalBatch:
    """Fit the mean log steps; seeds are resampled for the spread.

    Args:
        batch_tokens: Batches, at least three.
        steps_KB: Steps to the target for each seed and batch, all reached.
        num_draws: S.
        seed: Of the draws.

    Raises:
        ValueError: Fewer than three batches, or steps that are missing.
    """
    batch_B = np.asarray(batch_tokens, dtype=float)
    if len(batch_B) < 3 or not np.isfinite(steps_KB).all() or (steps_KB <= 0).any():
        raise ValueError(
            f"a critical batch needs three batches whose targets were all reached; got "
            f"{len(batch_B)} batches, {int((~np.isfinite(steps_KB)).sum())} targets not reached"
        )
    log_KB = np.log(steps_KB)
    num = len(log_KB)
    weight_SK = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_draws)
    value_S, least_S = _fit(batch_B, log_KB.mean(axis=0)[None])
    draws_S, _ = _fit(batch_B, weight_SK @ log_KB / num)
    value = float(value_S[0])
    return CriticalBatch(
        log_tokens=effect_of_draws(value, draws_S, num),
        least_steps=float(np.exp(least_S[0])),
        is_bracketed=float(batch_B.min()) < np.exp(value) < float(batch_B.max()),
    )


def _fit(batch_B: np.ndarray, log_SB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    trial_G = np.linspace(np.log(batch_B.min()) - 5, np.log(batch_B.max()) + 5, 400)
    shape_GB = np.log1p(np.exp(trial_G)[:, None] / batch_B)
    rest_SGB = log_SB[:, None] - shape_GB
    # With the critical batch held, the best least steps are a mean.
    misfit_SG = rest_SGB.var(axis=2)
    found_S = find_peak(trial_G, -misfit_SG)
    least_S = (log_SB - np.log1p(np.exp(found_S)[:, None] / batch_B)).mean(axis=1)
    return found_S, least_S


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """The simple gradient-noise scale, tr(covariance) / |gradient|^2, in tokens."""

    tokens: float
    squared_gradient: float
    variance_trace: float
    """Trace of the covariance of one token's gradient."""


def measure_noise_scale(
    small_tokens: float,
    small_squares: Sequence[float],
    large_tokens: float,
    large_squares: Sequence[float],
) -> NoiseScale | None:
    """Give the noise scale from squared gradient norms at two batches.

    Both parts are averaged before they are divided, for their ratio step by step is biased.
    Source: McCandlish et al. 2018, appendix A.1.

    Args:
        small_tokens: The smaller batch.
        small_squares: Squared norm of the gradient of each small batch.
        large_tokens: The larger batch.
        large_squares: The same of large batches.

    Returns:
        None where noise hides the gradient, so that its estimated square is not positive.

    Raises:
        ValueError: The batches are not in ascending order.
    """
    if not 0 < small_tokens < large_tokens:
        raise ValueError(f"batches must ascend; got {small_tokens} and {large_tokens} tokens")
    small, large = float(np.mean(small_squares)), float(np.mean(large_squares))
    square = (large_tokens * large - small_tokens * small) / (large_tokens - small_tokens)
    trace = (small - large) / (1 / small_tokens - 1 / large_tokens)
    if square <= 0 or trace < 0:
        return None
    return NoiseScale(tokens=trace / square, squared_gradient=square, variance_trace=trace)
