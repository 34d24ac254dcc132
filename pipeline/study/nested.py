"""From the points of two families to which constants of their scaling laws differ.

M0: one law. M1: A and B differ, the null of Hestness et al. 2017. M2: alpha and beta differ too.
M3: the floor E as well. On one corpus the entropy of the source is one number, so E is shared until
M3, which asks for a floor that the context imposes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.study.effect import Effect, effect_of_draws
from pipeline.study.huber import Terms, evaluate, polish, solve, sum_huber
from pipeline.study.scaling import (
    ScalingLaw,
    ScalingPoint,
    design,
    fit_scaling,
    law_of,
    log_centre,
    shift,
    theta_of,
)
from pipeline.study.trunks import NUM_DRAWS, constants_of, count_trunks

FREE: Mapping[str, tuple[int, ...]] = {
    "M0": (),
    "M1": (0, 1),
    "M2": (0, 1, 3, 4),
    "M3": (0, 1, 3, 4, 2),
}
"""Model to the parameters that the second family has of its own, by their index in `NAMES`."""

SOURCES = {
    "alpha": ("M2", "alpha"),
    "beta": ("M2", "beta"),
    "compute_exponent": ("M2", "compute_exponent"),
    "floor": ("M3", "E"),
}
"""Difference to the model that it is taken from and the constant that differs."""


@dataclass(frozen=True, kw_only=True)
class NestedModel:
    """One of the four models, fitted."""

    name: str
    num_parameters: int
    objective: float
    bic: float
    """Laplace's likelihood with each trunk counted as one observation."""
    held_out_error: float | None
    """Mean absolute error at the largest size of each family, fitted without it; nats per token."""
    laws: Mapping[str, ScalingLaw]
    """Family to its law."""


@dataclass(frozen=True, kw_only=True)
class NestedComparison:
    """The four models, the one that BIC takes, and the differences, family minus reference."""

    family: str
    reference: str
    models: Mapping[str, NestedModel]
    chosen: str
    differences: Mapping[str, Effect]
    """`alpha`, `beta` and `compute_exponent` from M2, `floor` from M3."""
    draws: Mapping[str, np.ndarray]
    """Family to the cloud of its parameters under M2, [S, 5], rows shared by both families."""
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The points of two families, and which of them the differences are taken from."""

    points: Sequence[ScalingPoint]
    family: str
    reference: str

    @property
    def labels(self) -> tuple[str, str]:
        """The family and its reference."""
        return self.family, self.reference

    def points_of(self, label: str) -> list[ScalingPoint]:
        """Give the points of one family."""
        return [p for p in self.points if p.family == label]


def compare_families(
    points: Sequence[ScalingPoint],
    family: str,
    reference: str,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> NestedComparison:
    """Fit the four models and resample trunks under the two that give differences.

    Raises:
        ValueError: A family is missing, or as `fit_scaling`.
    """
    own = [p for p in points if p.family in (family, reference)]
    missing = [label for label in (family, reference) if label not in {p.family for p in own}]
    if missing:
        raise ValueError(f"no point of {', '.join(missing)} among {len(points)} points")
    pair = Pair(points=own, family=family, reference=reference)
    models, thetas = _fit_models(pair)
    draws = {name: _resample(name, thetas[name], pair, num_draws, seed) for name in ("M2", "M3")}
    return NestedComparison(
        family=family,
        reference=reference,
        models=models,
        chosen=min(models, key=lambda name: models[name].bic),
        differences=_differences(models, draws, pair),
        draws=draws["M2"],
        runs=tuple(p.run for p in own),
    )


def nested_terms(name: str, pair: Pair) -> tuple[Terms, np.ndarray]:
    """Append a column for each parameter that the family has of its own: its difference."""
    shared, log_loss_N = design(pair.points)
    is_own_N = np.array([p.family == pair.family for p in pair.points], dtype=float)
    extra_KNP = shared.matrix_KNP[:, :, list(FREE[name])] * is_own_N[None, :, None]
    matrix_KNP = np.concatenate([shared.matrix_KNP, extra_KNP], axis=2)
    return Terms(matrix_KNP=matrix_KNP, offset_K=shared.offset_K), log_loss_N


def _fit_models(pair: Pair) -> tuple[dict[str, NestedModel], dict[str, np.ndarray]]:
    held_out = _measure_held_out(pair)
    thetas = _fit_thetas(pair)
    models = {}
    for name, theta_P in thetas.items():
        clouds = clouds_of(name, theta_P[None], pair)
        laws = {label: law_of(cloud_SP[0]) for label, cloud_SP in clouds.items()}
        described = _describe(name, pair, theta_P, laws)
        models[name] = replace(described, held_out_error=held_out.get(name))
    return models, thetas


def _fit_thetas(pair: Pair) -> dict[str, np.ndarray]:
    """Fit each model from the common law, from the families' own laws, and from their middle.

    The common law alone is no start: where families differ it may have no floor left, and a term
    without a share has no gradient.
    """
    centre = log_centre(pair.points)
    common, own, other = (
        shift(theta_of(fit_scaling(points).law), centre, -1)
        for points in (pair.points, pair.points_of(pair.family), pair.points_of(pair.reference))
    )
    thetas = {}
    for name, indices in FREE.items():
        free = list(indices)
        starts = [
            np.concatenate([common, np.zeros(len(free))]),
            np.concatenate([other, (own - other)[free]]),
            np.concatenate([(own + other) / 2, np.zeros(len(free))]),
        ]
        terms, log_loss_N = nested_terms(name, pair)
        near = solve(terms, log_loss_N[None], np.stack(starts))
        found = [polish(terms, log_loss_N, theta_P) for theta_P in near.theta_SP]
        thetas[name] = min(found, key=lambda p: p.objective).theta_P
    return thetas


def _describe(
    name: str, pair: Pair, theta_P: np.ndarray, laws: Mapping[str, ScalingLaw]
) -> NestedModel:
    terms, log_loss_N = nested_terms(name, pair)
    residual_SN = evaluate(terms, theta_P[None])[0] - log_loss_N
    num_trunks = len({(p.family, p.num_parameters, p.trunk) for p in pair.points})
    spread = max(float(np.abs(residual_SN).mean()), 1e-12)
    penalty = terms.num_parameters * float(np.log(num_trunks))
    return NestedModel(
        name=name,
        num_parameters=terms.num_parameters,
        objective=float(sum_huber(residual_SN, np.ones_like(residual_SN))[0]),
        bic=2 * num_trunks * float(np.log(spread)) + penalty,
        held_out_error=None,
        laws=laws,
    )


def clouds_of(name: str, theta_SP: np.ndarray, pair: Pair) -> dict[str, np.ndarray]:
    """Give each family its five parameters at the origin of the plain logarithms, [S, 5]."""
    own_SP = np.array(theta_SP[:, :5])
    own_SP[:, list(FREE[name])] += theta_SP[:, 5:]
    centre = log_centre(pair.points)
    return {
        pair.family: shift(own_SP, centre, 1),
        pair.reference: shift(theta_SP[:, :5], centre, 1),
    }


def _resample(
    name: str, theta_P: np.ndarray, pair: Pair, num_draws: int, seed: int
) -> dict[str, np.ndarray]:
    terms, log_loss_N = nested_terms(name, pair)
    weight_SN = count_trunks(pair.points, num_draws, np.random.default_rng(seed)).weight_SN
    start_SP = np.tile(theta_P, (num_draws, 1))
    return clouds_of(name, solve(terms, log_loss_N[None], start_SP, weight_SN).theta_SP, pair)


def _measure_held_out(pair: Pair) -> dict[str, float]:
    """Fit each model without the largest size of each family and give its error there."""
    largest = {label: max(p.num_parameters for p in pair.points_of(label)) for label in pair.labels}
    held = [p for p in pair.points if p.num_parameters == largest[p.family]]
    rest = replace(pair, points=[p for p in pair.points if p not in held])
    if min(len({p.num_parameters for p in rest.points_of(label)}) for label in pair.labels) < 3:
        return {}
    errors = {}
    for name, theta_P in _fit_thetas(rest).items():
        laws = {label: law_of(c[0]) for label, c in clouds_of(name, theta_P[None], rest).items()}
        missed = [abs(laws[p.family].predict(p.num_parameters, p.tokens) - p.loss) for p in held]
        errors[name] = float(np.mean(missed))
    return errors


def _differences(
    models: Mapping[str, NestedModel], draws: Mapping[str, Mapping[str, np.ndarray]], pair: Pair
) -> dict[str, Effect]:
    counted = count_trunks(pair.points, 1, np.random.default_rng(0))
    effects = {}
    for name, (model, key) in SOURCES.items():
        own, other = (constants_of(draws[model][label])[key] for label in pair.labels)
        first, second = (
            constants_of(theta_of(models[model].laws[label])[None])[key][0] for label in pair.labels
        )
        effects[name] = effect_of_draws(
            float(first - second), own - other, counted.num_trunks, counted.num_strata
        )
    return effects
