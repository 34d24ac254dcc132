"""From losses over parameters and tokens to `L(N, D) = E + A / N^alpha + B / D^beta`.

Source: Hoffmann et al. 2022, approach 3; grid of starts and sum of Huber's losses as in the refit
of Besiroglu et al. 2024. Shapes: N points, P=5 parameters in the order of `NAMES`, S draws.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.huber import Terms, evaluate, polish, solve

NAMES = ("log_a", "log_b", "log_e", "alpha", "beta")
START_VALUES = (
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
    (-1.0, -0.5, 0.0, 0.5, 1.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
    (0.0, 0.5, 1.0, 1.5, 2.0),
)
"""Starts of each parameter in the order of `NAMES`; all 4500 combinations are tried."""

ROUNDS = ((0, 300), (5, 40), (20, 4))
"""Steps of the batch, and how many of the best starts go on; L-BFGS finishes the last ones. On the
published points and on 11 planted grids this ends where six steps of every start do, to 1e-12."""


@dataclass(frozen=True, kw_only=True)
class ScalingPoint:
    """One finished schedule: a size, a number of tokens and the loss that it reached."""

    family: str
    run: str
    trunk: str
    """Name of the constant-rate run that it branched from; branches of one trunk share noise."""
    num_parameters: float
    tokens: float
    loss: float
    """Validation loss, nats per token."""
    flops: float | None = None
    """Training FLOPs, attention and head included."""
    device_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The parameters of a law."""

    floor: float
    """E, nats per token."""
    a: float
    b: float
    alpha: float
    beta: float

    def predict(self, num_parameters: float, tokens: float) -> float:
        """Give the loss of a model of that size after that many tokens."""
        size, data = num_parameters**-self.alpha, tokens**-self.beta
        return float(self.floor + self.a * size + self.b * data)

    @property
    def compute_exponent(self) -> float:
        """Exponent of the reducible loss along the compute-optimal frontier."""
        return self.alpha * self.beta / (self.alpha + self.beta)


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """A fitted law with what its trust depends on."""

    law: ScalingLaw
    objective: float
    """Sum of Huber's losses of the log losses."""
    is_converged: bool
    runs: tuple[str, ...]


def design(points: Sequence[ScalingPoint]) -> tuple[Terms, np.ndarray]:
    """Give the log terms of the law and the log losses, logarithms taken from their centre.

    Raises:
        ValueError: Too few points, sizes or token counts, or a value that is not positive.
    """
    sizes, budgets = {p.num_parameters for p in points}, {p.tokens for p in points}
    if len(points) < 6 or len(sizes) < 3 or len(budgets) < 3:
        raise ValueError(
            f"a scaling law has 5 parameters: it needs 6 points, 3 sizes and 3 token counts; got "
            f"{len(points)}, {len(sizes)} and {len(budgets)}"
        )
    if min(*sizes, *budgets, *(p.loss for p in points)) <= 0:
        raise ValueError("a scaling law needs positive parameters, tokens and losses")
    x_N, y_N = centred_logs(points)
    matrix_KNP = np.zeros((3, len(points), 5))
    matrix_KNP[0, :, 0] = matrix_KNP[1, :, 1] = matrix_KNP[2, :, 2] = 1.0
    matrix_KNP[0, :, 3], matrix_KNP[1, :, 4] = -x_N, -y_N
    terms = Terms(matrix_KNP=matrix_KNP, offset_K=np.zeros(3))
    return terms, np.log([p.loss for p in points])


def log_centre(points: Sequence[ScalingPoint]) -> tuple[float, float]:
    """Give the mean logarithms of parameters and tokens."""
    return (
        float(np.mean([np.log(p.num_parameters) for p in points])),
        float(np.mean([np.log(p.tokens) for p in points])),
    )


def centred_logs(points: Sequence[ScalingPoint]) -> tuple[np.ndarray, np.ndarray]:
    """Give the logarithms of parameters and tokens less their means.

    At the centre the scale A and the exponent alpha hardly trade off, so the fit is well posed.
    """
    centre_x, centre_y = log_centre(points)
    x_N = np.log([p.num_parameters for p in points]) - centre_x
    return x_N, np.log([p.tokens for p in points]) - centre_y


def shift(theta_SP: np.ndarray, centre: tuple[float, float], sign: int) -> np.ndarray:
    """Move A and B to (`sign` 1) or from (-1) the origin of the plain logarithms."""
    moved_SP = np.array(theta_SP, dtype=float)
    moved_SP[..., 0] += sign * moved_SP[..., 3] * centre[0]
    moved_SP[..., 1] += sign * moved_SP[..., 4] * centre[1]
    return moved_SP


def fit_scaling(points: Sequence[ScalingPoint]) -> ScalingFit:
    """Fit the law from the published grid of starts.

    All starts are weighed together; the best take damped steps, and L-BFGS finishes the last.

    Raises:
        ValueError: As `design`.
    """
    terms, log_loss_N = design(points)
    centre = log_centre(points)
    start_SP = shift(np.array(list(itertools.product(*START_VALUES))), centre, -1)
    for num_steps, num_kept in ROUNDS:
        solution = solve(terms, log_loss_N[None], start_SP, num_steps=num_steps)
        start_SP = solution.theta_SP[np.argsort(solution.objective_S)[:num_kept]]
    found = [polish(terms, log_loss_N, start_P) for start_P in start_SP]
    best = min(found, key=lambda p: (not p.is_converged, p.objective))
    return ScalingFit(
        law=law_of(shift(best.theta_P, centre, 1)),
        objective=best.objective,
        is_converged=best.is_converged,
        runs=tuple(p.run for p in points),
    )


def law_of(theta_P: np.ndarray) -> ScalingLaw:
    """Give the law of parameters at the origin of the plain logarithms."""
    log_a, log_b, log_e, alpha, beta = (float(v) for v in theta_P)
    return ScalingLaw(
        floor=float(np.exp(log_e)),
        a=float(np.exp(log_a)),
        b=float(np.exp(log_b)),
        alpha=alpha,
        beta=beta,
    )


def theta_of(law: ScalingLaw) -> np.ndarray:
    """Give the parameters of a law in the order of `NAMES`."""
    return np.array([np.log(law.a), np.log(law.b), np.log(law.floor), law.alpha, law.beta])


def profile_floor(
    points: Sequence[ScalingPoint], fit: ScalingFit, floors: Sequence[float]
) -> list[float]:
    """Give Huber's sum of the best law with each floor E held fixed."""
    terms, log_loss_N = design(points)
    rest = [0, 1, 3, 4]
    start_P = shift(theta_of(fit.law), log_centre(points), -1)[rest]
    objectives = []
    for floor in floors:
        held = Terms(
            matrix_KNP=terms.matrix_KNP[:, :, rest],
            offset_K=np.array([0.0, 0.0, float(np.log(floor))]),
        )
        objectives.append(float(solve(held, log_loss_N[None], start_P[None]).objective_S[0]))
    return objectives


def measure_held_out_error(points: Sequence[ScalingPoint]) -> float | None:
    """Fit without the largest size and give the mean absolute error there, nats per token.

    Returns:
        None where the rest is too small for a fit.
    """
    largest = max(p.num_parameters for p in points)
    rest = [p for p in points if p.num_parameters < largest]
    held = [p for p in points if p.num_parameters == largest]
    if len({p.num_parameters for p in rest}) < 3:
        return None
    law = fit_scaling(rest).law
    return float(np.mean([abs(law.predict(p.num_parameters, p.tokens) - p.loss) for p in held]))


def log_residuals(points: Sequence[ScalingPoint], law: ScalingLaw) -> np.ndarray:
    """Give predicted less measured log losses, [N]."""
    terms, log_loss_N = design(points)
    theta_P = shift(theta_of(law), log_centre(points), -1)
    return np.asarray(evaluate(terms, theta_P[None])[0][0] - log_loss_N)
