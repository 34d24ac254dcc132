"""Fits return what the data was made from."""

import math

import numpy as np
import pytest

from pipeline.study.fits import (
    estimate_mean,
    estimate_slope_over_rounds,
    find_quartiles,
    fit_line,
    fit_power_law,
)

LENGTHS = [32.0, 64.0, 128.0, 256.0, 512.0]


def test_an_exact_power_law_gives_its_exponent_and_factor() -> None:
    line = fit_power_law(LENGTHS, [0.003 * x**0.7 for x in LENGTHS])
    assert line.slope.value == pytest.approx(0.7)
    assert math.exp(line.intercept) == pytest.approx(0.003)
    assert line.slope.half_width == pytest.approx(0.0, abs=1e-6)


def test_a_mean_has_students_interval() -> None:
    # Mean 3, standard deviation 1.5811, t(0.975, 4) = 2.7764: 2.7764 * 1.5811 / sqrt(5) = 1.9632.
    estimate = estimate_mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.value == pytest.approx(3.0)
    assert estimate.half_width == pytest.approx(1.9632, abs=1e-4)


def test_a_slope_has_students_interval() -> None:
    # Residuals (0.1, -0.2, 0.1) of y = x: s = sqrt(0.06), error s / sqrt(2), t(0.975, 1) = 12.7062.
    line = fit_line([0.0, 1.0, 2.0], [0.1, 0.8, 2.1])
    assert line.slope.value == pytest.approx(1.0)
    assert line.slope.half_width == pytest.approx(
        12.7062 * math.sqrt(0.06) / math.sqrt(2), rel=1e-4
    )


def test_one_sample_gives_no_interval() -> None:
    estimate = estimate_mean([2.5])
    assert (estimate.value, estimate.low, estimate.high) == (2.5, None, None)
    assert not estimate.excludes_zero


def test_intervals_of_a_slope_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        noise = generator.normal(0.0, 0.05, len(LENGTHS))
        times = [0.01 * x**0.3 * math.exp(e) for x, e in zip(LENGTHS, noise, strict=True)]
        slope = fit_power_law(LENGTHS, times).slope
        assert slope.low is not None
        assert slope.high is not None
        covered += slope.low <= 0.3 <= slope.high
    # 95% of 400 is 380, with a standard deviation of 4.4.
    assert 362 <= covered <= 396


def test_the_slope_over_rounds_ignores_a_drift_of_the_machine() -> None:
    rounds = [[speed * x**0.5 for x in LENGTHS] for speed in (1.0, 3.0, 0.2)]
    slope = estimate_slope_over_rounds(LENGTHS, rounds)
    assert slope.value == pytest.approx(0.5)
    assert slope.half_width == pytest.approx(0.0, abs=1e-9)
    assert slope.num == 3


def test_quartiles_interpolate() -> None:
    quartiles = find_quartiles([1.0, 2.0, 3.0, 4.0])
    assert (quartiles.low, quartiles.median, quartiles.high) == (1.75, 2.5, 3.25)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0], [1.0]), ([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])]
)
def test_a_line_through_too_few_points_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="two distinct x"):
        fit_line(x, y)


def test_a_power_law_of_a_value_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        fit_power_law([1.0, 2.0], [0.0, 1.0])
