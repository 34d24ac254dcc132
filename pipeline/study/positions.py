"""From losses by position or by context to where a model stops gaining from what came before.

Shapes: D documents, T positions, S curves, G trial exponents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.effect import Effect, effect_of_draws, effect_of_samples
from pipeline.study.resampling import bootstrap_seeds

EXPONENTS = np.geomspace(0.02, 4.0, 400)
"""Trial exponents, 1.3% apart; a parabola through the best three gives the rest."""

TOLERANCE_FRACTION = 0.01
"""Share of the loss that a shorter context may cost. Source: Khandelwal et al. 2018."""


@dataclass(frozen=True, kw_only=True)
class Plateaus:
    """The constants of `floor + scale * t ** -gamma` for S curves."""

    floor_S: np.ndarray
    scale_S: np.ndarray
    gamma_S: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The same of one model, with the spread over documents."""

    floor: Effect
    """Loss that no context lowers further, nats per token; an extrapolation beyond T."""
    scale: float
    gamma: Effect


def fit_plateaus(position_T: np.ndarray, loss_ST: np.ndarray) -> Plateaus:
    """Fit many curves by least squares: linear in floor and scale, a search over gamma.

    Args:
        position_T: Positions, counted from 1.
        loss_ST: Mean loss at each.

    Raises:
        ValueError: Fewer than four positions.
    """
    if len(position_T) < 4:
        raise ValueError(f"a plateau has 3 constants: it needs 4 positions, got {len(position_T)}")
    basis_GT = np.asarray(position_T, dtype=float)[None] ** -EXPONENTS[:, None]
    basis_GT -= basis_GT.mean(axis=1, keepdims=True)
    centred_ST = loss_ST - loss_ST.mean(axis=1, keepdims=True)
    square_G = (basis_GT**2).sum(axis=1)
    explained_SG = (centred_ST @ basis_GT.T) ** 2 / square_G
    gamma_S = np.exp(find_peak(np.log(EXPONENTS), explained_SG))
    basis_ST = np.asarray(position_T, dtype=float)[None] ** -gamma_S[:, None]
    spread_ST = basis_ST - basis_ST.mean(axis=1, keepdims=True)
    scale_S = (spread_ST * centred_ST).sum(axis=1) / (spread_ST**2).sum(axis=1)
    floor_S = loss_ST.mean(axis=1) - scale_S * basis_ST.mean(axis=1)
    return Plateaus(floor_S=floor_S, scale_S=scale_S, gamma_S=gamma_S)


def find_peak(x_G: np.ndarray, y_SG: np.ndarray) -> np.ndarray:
    """Give the abscissa of each row's maximum, by a parabola through its neighbours."""
    best_S = np.clip(y_SG.argmax(axis=1), 1, y_SG.shape[1] - 2)
    rows_S = np.arange(len(y_SG))
    low_S, mid_S, high_S = (y_SG[rows_S, best_S + k] for k in (-1, 0, 1))
    bend_S = low_S - 2 * mid_S + high_S
    offset_S = np.where(bend_S < 0, 0.5 * (low_S - high_S) / np.where(bend_S < 0, bend_S, 1), 0.0)
    return np.asarray(x_G[best_S] + np.clip(offset_S, -1, 1) * (x_G[1] - x_G[0]))


def fit_plateau(
    loss_DT: np.ndarray, first_position: int = 1, num_draws: int = 2000, seed: int = 0
) -> Plateau:
    """Fit the mean curve of the documents, resampled for the spread.

    Args:
        loss_DT: Loss of each position of each document, nats.
        first_position: Position at which the fit starts, counted from 1.
        num_draws: S.
        seed: Of the draws.
    """
    position_T = np.arange(first_position, loss_DT.shape[1] + 1)
    kept_DT = loss_DT[:, first_position - 1 :]
    num = len(kept_DT)
    weight_SD = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_draws)
    whole = fit_plateaus(position_T, kept_DT.mean(axis=0)[None])
    draws = fit_plateaus(position_T, weight_SD @ kept_DT / num)
    return Plateau(
        floor=effect_of_draws(float(whole.floor_S[0]), draws.floor_S, num),
        scale=float(whole.scale_S[0]),
        gamma=effect_of_draws(float(whole.gamma_S[0]), draws.gamma_S, num),
    )


def late_slopes(loss_DT: np.ndarray) -> np.ndarray:
    """Give each document's slope over the last half, nats per doubling of the position, [D].

    A least-squares slope is linear in the losses: the mean of these is the slope of the mean.
    """
    length = loss_DT.shape[1]
    x_T = np.log2(np.arange(length // 2 + 1, length + 1))
    x_T -= x_T.mean()
    return np.asarray(loss_DT[:, length // 2 :] @ x_T / (x_T**2).sum())


def measure_late_slope(loss_DT: np.ndarray) -> Effect:
    """Give the slope of one model over the last half with its spread over documents."""
    return effect_of_samples([float(v) for v in late_slopes(loss_DT)])


def compare_late_slopes(own_KDT: np.ndarray, other_KDT: np.ndarray, is_paired: bool) -> Effect:
    """Give the difference of the late slopes of two families over seeds and documents."""
    own_KD = np.stack([late_slopes(loss_DT) for loss_DT in own_KDT])
    other_KD = np.stack([late_slopes(loss_DT) for loss_DT in other_KDT])
    return bootstrap_seeds(own_KD, other_KD, np.ones(own_KD.shape[1]), is_paired)


def effective_context(contexts: Sequence[int], losses: Sequence[float]) -> int | None:
    """Give the smallest context whose loss is within 1% of that of the longest one.

    Args:
        contexts: Tokens given, ascending; the longest is the whole window.
        losses: Loss at each, nats per token.

    Returns:
        None where only the longest one is within it: the reach is not seen to end.
    """
    bound = losses[-1] * (1 + TOLERANCE_FRACTION)
    enough = [c for c, loss in zip(contexts[:-1], losses[:-1], strict=True) if loss < bound]
    return min(enough) if enough else None
