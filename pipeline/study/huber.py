"""From log losses and linear log terms to the Huber fits of many scaling laws at once.

A law is a sum of three powers, so its logarithm is the log-sum-exp of three terms that are linear
in the parameters: `a - alpha x`, `b - beta y` and `e`. Extra columns give families parameters of
their own. Shapes: S problems, N points, P parameters, K=3 terms.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize

DELTA = 1e-3
"""Residual of log loss beyond which Huber's loss grows linearly. Source: Hoffmann et al. 2022,
section 3.3; the refit of Besiroglu et al. 2024 keeps it."""

NUM_STEPS = 60
"""Damped steps of a batch of problems; from a start near the optimum 20 reach four digits."""

CHUNK_VALUES = 400_000
"""Values of one Jacobian in memory at a time: 3 MB, which stays in a core's cache."""

POLISH_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The log terms of a law: term k of point n is `matrix[k, n] @ theta + offset[k]`."""

    matrix_KNP: np.ndarray
    offset_K: np.ndarray
    """Known constants, one a term; a profile over the floor sets the third one."""

    @property
    def num_parameters(self) -> int:
        """P."""
        return int(self.matrix_KNP.shape[2])


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Parameters of S problems and Huber's sum at each."""

    theta_SP: np.ndarray
    objective_S: np.ndarray


def evaluate(terms: Terms, theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the log losses of the laws and the share that each term has in the loss.

    Returns:
        Log losses, [S, N], and shares, [K, S, N].
    """
    z_KSN = np.matmul(theta_SP, terms.matrix_KNP.transpose(0, 2, 1))
    z_KSN += terms.offset_K[:, None, None]
    top_SN = z_KSN.max(axis=0)
    # Far starts overflow nothing: the largest term is taken out first.
    shares_KSN = np.exp(z_KSN - top_SN)
    total_SN = shares_KSN.sum(axis=0)
    return top_SN + np.log(total_SN), shares_KSN / total_SN


def sum_huber(residual_SN: np.ndarray, weight_SN: np.ndarray) -> np.ndarray:
    """Give Huber's loss summed over the points, [S].

    The sum, not the mean: the mean's tiny values stop optimizers that test absolute progress.
    """
    size_SN = np.abs(residual_SN)
    inner_SN = 0.5 * residual_SN**2
    outer_SN = DELTA * (size_SN - 0.5 * DELTA)
    return np.asarray((weight_SN * np.where(size_SN <= DELTA, inner_SN, outer_SN)).sum(axis=1))


def solve(
    terms: Terms,
    log_loss_SN: np.ndarray,
    start_SP: np.ndarray,
    weight_SN: np.ndarray | None = None,
    num_steps: int = NUM_STEPS,
) -> Solution:
    """Fit many problems by damped, reweighted least squares.

    Args:
        terms: The law, shared by all problems.
        log_loss_SN: Log losses, [S, N], or [1, N] where the problems share them.
        start_SP: A start for each problem.
        weight_SN: How often each point counts in each problem; None counts each once.
        num_steps: Steps of every problem; a step that does not help is undone and damped.
    """
    num_problems, num_points = len(start_SP), terms.matrix_KNP.shape[1]
    y_SN = np.broadcast_to(log_loss_SN, (num_problems, num_points))
    w_SN = np.ones((1, num_points)) if weight_SN is None else weight_SN
    w_SN = np.broadcast_to(w_SN, (num_problems, num_points))
    size = max(1, CHUNK_VALUES // (num_points * terms.num_parameters))
    parts = [
        _solve_chunk(
            terms, y_SN[i : i + size], start_SP[i : i + size], w_SN[i : i + size], num_steps
        )
        for i in range(0, num_problems, size)
    ]
    return Solution(
        theta_SP=np.concatenate([part.theta_SP for part in parts]),
        objective_S=np.concatenate([part.objective_S for part in parts]),
    )


def _solve_chunk(
    terms: Terms, y_SN: np.ndarray, start_SP: np.ndarray, weight_SN: np.ndarray, num_steps: int
) -> Solution:
    theta_SP = np.array(start_SP, dtype=float)
    damping_S = np.full(len(theta_SP), 1e-3)
    f_SN, shares_KSN = evaluate(terms, theta_SP)
    best_S = sum_huber(f_SN - y_SN, weight_SN)
    diagonal = np.arange(terms.num_parameters)
    for _ in range(num_steps):
        residual_SN = f_SN - y_SN
        # Huber's own weights majorize it, so a full step never climbs on a linear law.
        curvature_SN = weight_SN * np.minimum(1.0, DELTA / np.maximum(np.abs(residual_SN), 1e-300))
        jacobian_SNP = np.einsum("ksn,knp->snp", shares_KSN, terms.matrix_KNP, optimize=True)
        weighted_SPN = (jacobian_SNP * curvature_SN[:, :, None]).transpose(0, 2, 1)
        normal_SPP = weighted_SPN @ jacobian_SNP
        gradient_SP = (weighted_SPN @ residual_SN[:, :, None])[:, :, 0]
        scale_SP = normal_SPP[:, diagonal, diagonal]
        # A term without a share has no curvature; the floor keeps the system regular.
        floor_SP = 1e-12 + 1e-10 * scale_SP.max(axis=1, keepdims=True)
        normal_SPP[:, diagonal, diagonal] += damping_S[:, None] * scale_SP + floor_SP
        step_SP = np.linalg.solve(normal_SPP, gradient_SP[:, :, None])[:, :, 0]
        trial_SP = theta_SP - np.clip(step_SP, -20.0, 20.0)
        trial_f_SN, trial_shares_KSN = evaluate(terms, trial_SP)
        trial_S = sum_huber(trial_f_SN - y_SN, weight_SN)
        helps_S = trial_S < best_S
        theta_SP = np.where(helps_S[:, None], trial_SP, theta_SP)
        f_SN = np.where(helps_S[:, None], trial_f_SN, f_SN)
        shares_KSN = np.where(helps_S[None, :, None], trial_shares_KSN, shares_KSN)
        best_S = np.where(helps_S, trial_S, best_S)
        damping_S = np.clip(np.where(helps_S, damping_S / 3, damping_S * 4), 1e-9, 1e9)
    return Solution(theta_SP=theta_SP, objective_S=best_S)


@dataclass(frozen=True, kw_only=True)
class Polished:
    """One optimum and whether the optimizer says that it converged."""

    theta_P: np.ndarray
    objective: float
    is_converged: bool


def polish(terms: Terms, log_loss_N: np.ndarray, start_P: np.ndarray) -> Polished:
    """Finish one problem with L-BFGS and the exact gradient.

    The objective is divided by delta squared, for the tolerances of L-BFGS are absolute near zero.
    """
    scale = DELTA**-2

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        f_SN, shares_KSN = evaluate(terms, theta_P[None])
        residual_SN = f_SN - log_loss_N
        jacobian_NP = np.einsum("kn,knp->np", shares_KSN[:, 0], terms.matrix_KNP)
        slope_N = np.clip(residual_SN[0], -DELTA, DELTA)
        value = float(sum_huber(residual_SN, np.ones_like(residual_SN))[0])
        return scale * value, scale * (slope_N @ jacobian_NP)

    found = optimize.minimize(
        objective,
        start_P,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": POLISH_STEPS, "maxfun": 4 * POLISH_STEPS, "ftol": 1e-14, "gtol": 1e-7},
    )
    return Polished(
        theta_P=np.asarray(found.x),
        objective=float(found.fun) / scale,
        is_converged=bool(found.success),
    )
