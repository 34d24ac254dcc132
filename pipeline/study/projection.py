"""From the same losses to the same law by another road: a linear solve inside a 2-D search.

With alpha and beta held, E, A and B are linear, so only two numbers are searched. Weights that
follow the residuals make the fixed point that of Huber's loss on log losses, the optimum that
`scaling` finds with L-BFGS in five dimensions; the two check each other.
Source: Golub and Pereyra 1973; for scaling laws Czech et al. 2026 (arXiv 2603.22339).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from pipeline.study.huber import DELTA
from pipeline.study.scaling import ScalingLaw, ScalingPoint

GRID = tuple(float(v) for v in np.linspace(0.05, 1.5, 30))
"""Exponents of the coarse search."""

NUM_REWEIGHTS = 200
"""Most rounds of weights; Huber's loss is nearly absolute, so they settle slowly."""

SETTLED = 1e-6
"""Change of both exponents below which the weights have settled."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Points with parameters and tokens as multiples of their geometric means, and weights."""

    n_N: np.ndarray
    d_N: np.ndarray
    loss_N: np.ndarray
    weight_N: np.ndarray


def fit_by_projection(points: Sequence[ScalingPoint]) -> ScalingLaw:
    """Fit the law by variable projection.

    Args:
        points: As `fit_scaling` takes them.
    """
    n_N = np.array([p.num_parameters for p in points])
    d_N = np.array([p.tokens for p in points])
    loss_N = np.array([p.loss for p in points])
    unit_n, unit_d = float(np.exp(np.log(n_N).mean())), float(np.exp(np.log(d_N).mean()))
    data = _Data(n_N=n_N / unit_n, d_N=d_N / unit_d, loss_N=loss_N, weight_N=loss_N**-2.0)
    exponents = min(((a, b) for a in GRID for b in GRID), key=lambda pair: _project(pair, data)[0])
    for _ in range(NUM_REWEIGHTS):
        found = optimize.minimize(
            lambda pair, own: _project(tuple(pair), own)[0],
            exponents,
            args=(data,),
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-15, "initial_simplex": _simplex(exponents)},
        )
        moved = max(abs(found.x[0] - exponents[0]), abs(found.x[1] - exponents[1]))
        exponents = (float(found.x[0]), float(found.x[1]))
        if moved < SETTLED:
            break
        data = _reweight(exponents, data)
    (alpha, beta), (floor, a, b) = exponents, _project(exponents, data)[1]
    return ScalingLaw(floor=floor, a=a * unit_n**alpha, b=b * unit_d**beta, alpha=alpha, beta=beta)


def _simplex(exponents: tuple[float, float]) -> list[list[float]]:
    alpha, beta = exponents
    return [[alpha, beta], [alpha + 0.01, beta], [alpha, beta + 0.01]]


def _project(exponents: tuple[float, ...], data: _Data) -> tuple[float, tuple[float, float, float]]:
    """Solve for E, A and B, none negative, and give the weighted sum of squares with them."""
    basis_N3 = _basis(exponents, data)
    root_N = np.sqrt(data.weight_N)
    found, distance = optimize.nnls(basis_N3 * root_N[:, None], data.loss_N * root_N)
    return float(distance) ** 2, (float(found[0]), float(found[1]), float(found[2]))


def _basis(exponents: tuple[float, ...], data: _Data) -> np.ndarray:
    powers = [np.ones_like(data.n_N), data.n_N ** -exponents[0], data.d_N ** -exponents[1]]
    return np.stack(powers, axis=1)


def _reweight(exponents: tuple[float, float], data: _Data) -> _Data:
    """Choose weights whose normal equations are the stationarity of Huber's loss on log losses."""
    predicted_N = _basis(exponents, data) @ np.array(_project(exponents, data)[1])
    log_N = np.log(predicted_N / data.loss_N)
    # psi(r) / r times r / (relative residual); both ratios tend to 1 where the residual vanishes.
    slope_N = np.minimum(1.0, DELTA / np.maximum(np.abs(log_N), 1e-12))
    relative_N = predicted_N / data.loss_N - 1
    ratio_N = np.where(
        np.abs(relative_N) > 1e-9, log_N / np.where(relative_N == 0, 1, relative_N), 1
    )
    weight_N = slope_N * ratio_N / (predicted_N * data.loss_N)
    return _Data(n_N=data.n_N, d_N=data.d_N, loss_N=data.loss_N, weight_N=weight_N)
