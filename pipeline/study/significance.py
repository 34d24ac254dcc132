"""From samples of a few seeds to exact p values, pooled deviations and corrected p values."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_ASSIGNMENTS = 200_000
"""Assignments that are all gone through; ten seeds against ten are 184,756."""

TIE = 1e-12
"""Relative difference below which two statistics count as equal, lest rounding split a tie."""


@dataclass(frozen=True, kw_only=True)
class ExactTest:
    """The p of an exact permutation test and the smallest that its design can give."""

    p: float
    smallest_p: float
    """Where this is above the level, no data of this design can decide."""
    num_assignments: int


def permute_groups(values: Sequence[float], reference: Sequence[float]) -> ExactTest:
    """Test whether two independent groups differ in their mean, over all assignments, two-sided.

    Raises:
        ValueError: A group is empty, or there are too many assignments to go through.
    """
    pooled = np.array([*values, *reference], dtype=float)
    num_own, num_all = len(values), len(pooled)
    num = math.comb(num_all, num_own)
    _check_size(min(num_own, num_all - num_own), num)
    chosen = np.array(list(itertools.combinations(range(num_all), num_own)))
    sums = pooled[chosen].sum(axis=1)
    means = sums / num_own - (pooled.sum() - sums) / (num_all - num_own)
    return _count(np.abs(means), abs(float(np.mean(values)) - float(np.mean(reference))))


def flip_signs(differences: Sequence[float]) -> ExactTest:
    """Test whether paired differences have mean zero, over all signs, two-sided.

    Raises:
        ValueError: There is no difference, or too many to go through all signs.
    """
    _check_size(len(differences), 2 ** len(differences))
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
    means = signs @ np.asarray(differences, dtype=float) / len(differences)
    return _count(np.abs(means), abs(float(np.mean(differences))))


def _check_size(smallest: int, num_assignments: int) -> None:
    if smallest < 1:
        raise ValueError("a permutation test needs at least one sample on each side")
    if num_assignments > MAX_ASSIGNMENTS:
        raise ValueError(
            f"{num_assignments} assignments are more than {MAX_ASSIGNMENTS}; with so many samples "
            "Welch's interval serves"
        )


def _count(sizes: np.ndarray, observed: float) -> ExactTest:
    slack = TIE * max(1.0, observed)
    largest = float(sizes.max())
    return ExactTest(
        p=float(np.mean(sizes >= observed - slack)),
        smallest_p=float(np.mean(sizes >= largest - slack)),
        num_assignments=len(sizes),
    )


@dataclass(frozen=True, kw_only=True)
class SeedDeviation:
    """How much a value moves from seed to seed, pooled over cells."""

    value: float
    degrees: int
    runs: tuple[str, ...] = ()


def pool_deviation(groups: Sequence[Sequence[float]], runs: Sequence[str] = ()) -> SeedDeviation:
    """Pool the standard deviation of seeds over cells that differ in nothing else within a group.

    Raises:
        ValueError: No group has two seeds.
    """
    usable = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in usable)
    if degrees == 0:
        raise ValueError("a seed deviation needs a cell with at least two seeds")
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in usable)
    return SeedDeviation(value=(squares / degrees) ** 0.5, degrees=degrees, runs=tuple(runs))


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Give p values that hold for the whole family of tests, in the order of the input.

    Source: Holm 1979, Scand. J. Statist. 6, 65.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
