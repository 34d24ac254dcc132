"""From a design and a true effect to how often its study supports, refutes or leaves it open.

Studies are simulated and decided by the rule of the verdicts, so that the power promised for a grid
is the power that its verdict has. Shapes: S studies, R draws of each, N points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.study.decision import Rule, weigh
from pipeline.study.huber import Terms, evaluate, solve
from pipeline.study.nested import Pair, clouds_of, nested_terms
from pipeline.study.scaling import ScalingLaw, ScalingPoint, log_centre, shift, theta_of
from pipeline.study.trunks import constants_of, count_trunks

NUM_STUDIES = 2000
FIT_STEPS = 25
"""Damped steps of a simulated fit: it starts at the truth."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """How simulated studies of one true effect ended."""

    effect: float
    """The truth."""
    supported_fraction: float
    refuted_fraction: float
    num_studies: int

    @property
    def open_fraction(self) -> float:
        """Share of the studies that decide nothing."""
        return 1 - self.supported_fraction - self.refuted_fraction


def decide(rule: Rule, effects: tuple[np.ndarray, np.ndarray, int], level: float) -> np.ndarray:
    """Give 1 for each study that supports, -1 for each that refutes, else 0.

    Args:
        rule: Of the hypothesis.
        effects: Values, standard errors and degrees of freedom.
        level: Of the verdict.
    """
    value_S, error_S, degrees = effects
    p = weigh(rule, value_S, error_S, np.full(len(value_S), degrees))
    return np.where(p.refuted <= level, -1, np.where(p.supported <= level, 1, 0))


def summarize(effect: float, decided_S: np.ndarray) -> Power:
    """Count the outcomes."""
    return Power(
        effect=effect,
        supported_fraction=float(np.mean(decided_S == 1)),
        refuted_fraction=float(np.mean(decided_S == -1)),
        num_studies=len(decided_S),
    )


def simulate_seeds(
    rule: Rule,
    num_seeds: int,
    effects_in_deviations: Sequence[float],
    level: float,
    num_studies: int = NUM_STUDIES,
    seed: int = 0,
) -> list[Power]:
    """Give the power of a difference of means between two arms of seeds.

    Args:
        rule: Its threshold in seed deviations; a margin likewise, as a multiple of the deviation
            that each study measures itself.
        num_seeds: Of each arm.
        effects_in_deviations: True differences, in deviations between seeds.
        level: Of the verdict: 0.05, or less where Holm corrects for other claims.
        num_studies: S.
        seed: Of the simulation.
    """
    generator = np.random.default_rng(seed)
    curve = []
    for effect in effects_in_deviations:
        own_SK = generator.normal(effect, 1.0, (num_studies, num_seeds))
        other_SK = generator.normal(0.0, 1.0, (num_studies, num_seeds))
        variance_S = (own_SK.var(axis=1, ddof=1) + other_SK.var(axis=1, ddof=1)) / 2
        margin = None if rule.margin is None else rule.margin * np.sqrt(variance_S)
        measured = Rule(direction=rule.direction, threshold=rule.threshold, margin=margin)
        value_S = own_SK.mean(axis=1) - other_SK.mean(axis=1)
        error_S = np.sqrt(2 * variance_S / num_seeds)
        decided_S = decide(measured, (value_S, error_S, 2 * num_seeds - 2), level)
        curve.append(summarize(effect, decided_S))
    return curve


@dataclass(frozen=True, kw_only=True)
class GridDesign:
    """The grid of a scaling study and the noise of its losses."""

    sizes: tuple[float, ...]
    """Parameters."""
    tokens: tuple[float, ...]
    """Branches of every trunk."""
    num_seeds: int
    """Trunks of each family and size."""
    trunk_deviation: float
    """Relative deviation of the loss that all branches of a trunk share."""
    branch_deviation: float
    """Relative deviation of each branch on top of it."""


def plant_points(design: GridDesign, laws: dict[str, ScalingLaw], seed: int) -> list[ScalingPoint]:
    """Give the points that a study of that grid would have measured, were the laws true.

    Args:
        design: Grid and noise.
        laws: Family to its true law.
        seed: Of the noise.
    """
    generator = np.random.default_rng(seed)
    points = []
    for family, law in laws.items():
        for size in design.sizes:
            for replicate in range(design.num_seeds):
                trunk = f"{family}-{size:g}-seed{replicate}"
                shared = generator.normal(0.0, design.trunk_deviation)
                for tokens in design.tokens:
                    noise = shared + generator.normal(0.0, design.branch_deviation)
                    points.append(
                        ScalingPoint(
                            family=family,
                            run=f"{trunk}-{tokens:g}",
                            trunk=trunk,
                            num_parameters=size,
                            tokens=tokens,
                            loss=law.predict(size, tokens) * float(np.exp(noise)),
                            flops=6 * size * tokens,
                        )
                    )
    return points


def simulate_grid(
    rule: Rule,
    design: GridDesign,
    laws: tuple[ScalingLaw, ScalingLaw],
    level: float,
    num_studies: int = 200,
    num_draws: int = 50,
    seed: int = 0,
) -> Power:
    """Give the power of the difference of two families' compute exponents on a grid.

    Every simulated study is fitted and its trunks are resampled, as a real one.

    Args:
        rule: On the difference, first family less second.
        design: Grid and noise.
        laws: True laws of both, with one floor.
        level: Of the verdict.
        num_studies: S.
        num_draws: R.
        seed: Of the simulation.
    """
    silent = GridDesign(
        sizes=design.sizes, tokens=design.tokens, num_seeds=design.num_seeds,
        trunk_deviation=0.0, branch_deviation=0.0,
    )  # fmt: skip
    points = plant_points(silent, {"own": laws[0], "other": laws[1]}, seed)
    pair = Pair(points=points, family="own", reference="other")
    terms, _ = nested_terms("M2", pair)
    truth_P = _truth(pair, laws)
    generator = np.random.default_rng(seed)
    log_loss_SN = evaluate(terms, truth_P[None])[0] + _noise(points, design, num_studies, generator)
    theta_SP = solve(
        terms, log_loss_SN, np.tile(truth_P, (num_studies, 1)), None, FIT_STEPS
    ).theta_SP
    value_S = _difference(theta_SP, pair)
    counted = count_trunks(points, num_draws, generator)
    error_S = np.array(
        [
            _spread(terms, log_loss_SN[s], theta_SP[s], counted.weight_SN, pair)
            for s in range(num_studies)
        ]
    )
    degrees = counted.num_trunks - counted.num_strata
    error_S *= (counted.num_trunks / degrees) ** 0.5
    decided_S = decide(rule, (value_S, error_S, degrees), level)
    return summarize(laws[0].compute_exponent - laws[1].compute_exponent, decided_S)


def _truth(pair: Pair, laws: tuple[ScalingLaw, ScalingLaw]) -> np.ndarray:
    centre = log_centre(pair.points)
    own_P, other_P = (shift(theta_of(law), centre, -1) for law in laws)
    return np.concatenate([other_P, (own_P - other_P)[[0, 1, 3, 4]]])


def _noise(
    points: Sequence[ScalingPoint], design: GridDesign, num: int, generator: np.random.Generator
) -> np.ndarray:
    trunks = list(dict.fromkeys(p.trunk for p in points))
    index_N = np.array([trunks.index(p.trunk) for p in points])
    shared_SN = generator.normal(0.0, design.trunk_deviation, (num, len(trunks)))[:, index_N]
    return shared_SN + generator.normal(0.0, design.branch_deviation, (num, len(points)))


def _difference(theta_SP: np.ndarray, pair: Pair) -> np.ndarray:
    clouds = clouds_of("M2", theta_SP, pair)
    own, other = (constants_of(clouds[label])["compute_exponent"] for label in pair.labels)
    return np.asarray(own - other)


def _spread(
    terms: Terms,
    log_loss_N: np.ndarray,
    theta_P: np.ndarray,
    weight_SN: np.ndarray,
    pair: Pair,
) -> float:
    start_SP = np.tile(theta_P, (len(weight_SN), 1))
    drawn = solve(terms, log_loss_N[None], start_SP, weight_SN, FIT_STEPS).theta_SP
    return float(np.std(_difference(drawn, pair), ddof=1))
