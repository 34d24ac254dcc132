"""From the points of a scaling law to the spread of its constants, by resampling whole trunks.

The branches of one trunk share its noise, so a trunk is drawn with all of them or not at all, and
within its family and size, so that every draw has the design of the study.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.fits import CONFIDENCE, Estimate
from pipeline.study.huber import solve
from pipeline.study.scaling import (
    ScalingFit,
    ScalingPoint,
    design,
    log_centre,
    shift,
    theta_of,
)

NUM_DRAWS = 1000
"""Resamples; the refit of Besiroglu et al. 2024 took 4000 for 240 points."""


@dataclass(frozen=True, kw_only=True)
class TrunkDraws:
    """How often each point counts in each draw, [S, N]."""

    weight_SN: np.ndarray
    num_trunks: int
    num_strata: int
    """Pairs of family and size; trunks are exchanged within one."""


def count_trunks(
    points: Sequence[ScalingPoint],
    num_draws: int,
    generator: np.random.Generator,
    is_by_size: bool = True,
) -> TrunkDraws:
    """Draw whole trunks within each family and size, or within each family alone."""
    strata: dict[tuple[str, float], list[str]] = {}
    for point in points:
        size = point.num_parameters if is_by_size else 0.0
        stratum = strata.setdefault((point.family, size), [])
        if point.trunk not in stratum:
            stratum.append(point.trunk)
    counts: dict[tuple[str, float, str], np.ndarray] = {}
    for (family, size), trunks in strata.items():
        share = np.full(len(trunks), 1 / len(trunks))
        drawn = generator.multinomial(len(trunks), share, size=num_draws)
        counts |= {(family, size, trunk): drawn[:, i] for i, trunk in enumerate(trunks)}
    keys = [(p.family, p.num_parameters if is_by_size else 0.0, p.trunk) for p in points]
    return TrunkDraws(
        weight_SN=np.stack([counts[key] for key in keys], axis=1).astype(float),
        num_trunks=len(counts),
        num_strata=len(strata),
    )


def bootstrap_scaling(
    points: Sequence[ScalingPoint],
    fit: ScalingFit,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    is_by_size: bool = True,
) -> np.ndarray:
    """Refit the law to resampled trunks, from the law itself as start.

    Args:
        points: The points of the fit, several trunks a size.
        fit: Their fit.
        num_draws: S.
        seed: Of the draws.
        is_by_size: Whether trunks are exchanged within their size alone; false where nearly every
            run has a size of its own.

    Returns:
        [S, P], in the order of `NAMES`: the joint cloud, A and alpha or E and alpha in one row.
    """
    terms, log_loss_N = design(points)
    centre = log_centre(points)
    weight_SN = count_trunks(points, num_draws, np.random.default_rng(seed), is_by_size).weight_SN
    start_P = shift(theta_of(fit.law), centre, -1)
    solution = solve(terms, log_loss_N[None], np.tile(start_P, (num_draws, 1)), weight_SN)
    return shift(solution.theta_SP, centre, 1)


def interval_of(value: float, draws: np.ndarray, num_units: int) -> Estimate:
    """Give the percentile interval of a fitted constant, which may be lopsided."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = (float(v) for v in np.percentile(draws, [tail, 100 - tail]))
    return Estimate(value=value, low=low, high=high, num=num_units)


def summarize_draws(fit: ScalingFit, draws_SP: np.ndarray, num_trunks: int) -> dict[str, Estimate]:
    """Give E, A, B, alpha, beta and the compute exponent, each with its percentile interval."""
    values, columns = constants_of(theta_of(fit.law)[None]), constants_of(draws_SP)
    return {
        name: interval_of(float(values[name][0]), draws_S, num_trunks)
        for name, draws_S in columns.items()
    }


def standard_errors(draws_SP: np.ndarray) -> dict[str, float]:
    """Give the standard error of each constant: the deviation of its draws."""
    return {name: float(np.std(v, ddof=1)) for name, v in constants_of(draws_SP).items()}


def constants_of(theta_SP: np.ndarray) -> dict[str, np.ndarray]:
    """Give the constants of a cloud of parameters by the names that people use, [S] each."""
    alpha_S, beta_S = theta_SP[:, 3], theta_SP[:, 4]
    return {
        "E": np.exp(theta_SP[:, 2]),
        "A": np.exp(theta_SP[:, 0]),
        "B": np.exp(theta_SP[:, 1]),
        "alpha": alpha_S,
        "beta": beta_S,
        "compute_exponent": alpha_S * beta_S / (alpha_S + beta_S),
    }
