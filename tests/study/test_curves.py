"""Curves over position, distance, batch and steps give the constants that they were drawn from."""

import math

import numpy as np
import pytest

from pipeline.study.critical_batch import fit_critical_batch, measure_noise_scale
from pipeline.study.decay import fit_decay
from pipeline.study.positions import (
    compare_late_slopes,
    effective_context,
    fit_plateau,
    fit_plateaus,
    measure_late_slope,
)
from pipeline.study.recall_distance import fit_reach
from pipeline.study.survival import StepsToThreshold, compare_by_logrank, draw_survival

T = 256
POSITIONS = np.arange(1, T + 1)


def test_exact_curves_give_floor_scale_and_exponent() -> None:
    truths = [(2.0, 3.0, 0.5), (1.2, 4.0, 1.1), (3.0, 1.0, 0.2)]
    curves = np.array([floor + scale * POSITIONS**-gamma for floor, scale, gamma in truths])
    found = fit_plateaus(POSITIONS, curves)
    for index, (floor, scale, gamma) in enumerate(truths):
        assert found.gamma_S[index] == pytest.approx(gamma, rel=1e-3)
        assert found.floor_S[index] == pytest.approx(floor, abs=3e-3)
        assert found.scale_S[index] == pytest.approx(scale, rel=3e-3)


def test_the_interval_of_a_plateau_holds_the_truth_and_names_its_documents() -> None:
    generator = np.random.default_rng(0)
    # Documents differ in level as a whole, and each position has noise of its own.
    losses = 2.0 + 3.0 * POSITIONS**-0.6 + generator.normal(0, 0.5, (200, T))
    losses += generator.normal(0, 0.3, (200, 1))
    plateau = fit_plateau(losses, num_draws=500)
    assert plateau.floor.num == 200
    for effect, truth in ((plateau.floor, 2.0), (plateau.gamma, 0.6)):
        interval = effect.estimate
        assert interval.half_width is not None
        assert 0 < interval.half_width < 0.2
        assert abs(interval.value - truth) < 2 * interval.half_width


def test_a_flat_half_has_slope_zero_and_a_falling_one_its_slope() -> None:
    flat = np.tile(np.where(POSITIONS <= T // 2, 5.0, 2.0), (3, 1))
    assert measure_late_slope(flat).value == pytest.approx(0.0, abs=1e-9)
    falling = np.tile(5.0 - 0.25 * np.log2(POSITIONS), (3, 1))
    slope = measure_late_slope(falling)
    assert slope.value == pytest.approx(-0.25)
    assert slope.standard_error == pytest.approx(0.0, abs=1e-9)


def test_late_slopes_of_families_differ_by_what_was_put_in() -> None:
    generator = np.random.default_rng(1)
    documents = generator.normal(0, 0.5, (1, 60, 1))
    curves = {
        slope: 5 + slope * np.log2(POSITIONS) + documents + generator.normal(0, 0.2, (4, 60, T))
        for slope in (-0.1, -0.3)
    }
    found = compare_late_slopes(curves[-0.1], curves[-0.3], is_paired=True).estimate
    assert found.num == 4
    assert found.half_width is not None
    assert abs(found.value - 0.2) < 2 * found.half_width < 0.2


def test_the_effective_context_is_the_shortest_within_one_percent() -> None:
    contexts = [1, 10, 100, 200, 1000]
    assert effective_context(contexts, [5.0, 3.0, 2.019, 2.01, 2.0]) == 100
    assert effective_context(contexts, [5.0, 3.0, 2.5, 2.1, 2.0]) is None


def test_gradients_that_halve_have_that_half_life_and_are_exponential() -> None:
    generator = np.random.default_rng(0)
    distances = np.arange(128)
    norms = -math.log(2) / 10 * distances + generator.normal(0, 0.1, (40, 128))
    decay = fit_decay(norms)
    assert decay.is_exponential
    half_life = decay.half_life_tokens
    assert half_life is not None
    assert half_life.low is not None
    assert half_life.high is not None
    assert half_life.low < half_life.value < half_life.high
    assert half_life.value == pytest.approx(10.0, rel=0.01)
    # From 8 to 64 the logarithm falls by 56 tenths of ln 2.
    assert decay.tail_log_ratio.value == pytest.approx(-5.6 * math.log(2), abs=0.1)


def test_gradients_that_fall_as_a_power_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    norms = -1.5 * np.log(np.maximum(np.arange(128), 1)) + generator.normal(0, 0.1, (40, 128))
    decay = fit_decay(norms)
    assert not decay.is_exponential
    assert decay.exponent.value == pytest.approx(1.5, abs=0.05)


def test_gradients_that_do_not_decay_have_no_half_life() -> None:
    generator = np.random.default_rng(0)
    growing = fit_decay(0.1 * np.arange(64) + generator.normal(0, 0.01, (5, 64)))
    assert growing.half_life_tokens is None
    flat = fit_decay(np.tile(generator.normal(0, 0.1, (20, 1)), (1, 64)) + 0.0)
    assert flat.tail_log_ratio.estimate.value == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="24 distances"):
        fit_decay(np.zeros((2, 20)))


def test_steps_over_batches_give_the_critical_batch() -> None:
    generator = np.random.default_rng(0)
    batches = [256.0, 1024.0, 4096.0, 16384.0, 65536.0]
    steps = 500 * (1 + 5000 / np.array(batches)) * np.exp(generator.normal(0, 0.02, (4, 5)))
    found = fit_critical_batch(batches, steps)
    interval = found.log_tokens.estimate
    assert interval.half_width is not None
    assert abs(interval.value - math.log(5000)) < 2 * interval.half_width < 0.5
    assert found.tokens == pytest.approx(5000, rel=0.1)
    assert found.least_steps == pytest.approx(500, rel=0.05)
    assert found.is_bracketed
    beyond = fit_critical_batch(batches, 500 * (1 + 5e6 / np.tile(batches, (4, 1)) ** 1.0))
    assert not beyond.is_bracketed


def test_a_target_that_a_batch_never_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="1 targets not reached"):
        fit_critical_batch([1.0, 2.0, 4.0], np.array([[3.0, 2.0, np.nan]]))


def test_the_noise_scale_is_variance_over_squared_gradient() -> None:
    # |G|^2 = 4 and a trace of 800: batches of 10 and 100 tokens add 80 and 8 to the square.
    found = measure_noise_scale(10, [84.0, 84.0], 100, [12.0])
    assert found is not None
    assert found.squared_gradient == pytest.approx(4.0)
    assert found.variance_trace == pytest.approx(800.0)
    assert found.tokens == pytest.approx(200.0)
    # Noise alone: ten times the batch has a tenth of the square.
    assert measure_noise_scale(10, [80.0], 100, [8.0]) is None
    with pytest.raises(ValueError, match="ascend"):
        measure_noise_scale(100, [1.0], 10, [1.0])


def test_accuracy_over_distance_gives_where_half_of_it_is_gone() -> None:
    distances = [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    asked = [2000] * 7
    truth = [0.1 + 0.8 / (1 + (d / 40) ** 2) for d in distances]
    right = [round(2000 * share) for share in truth]
    reach = fit_reach(distances, right, asked, chance=0.1)
    assert reach.is_converged
    assert reach.half_distance_tokens == pytest.approx(40, rel=0.03)
    assert reach.top == pytest.approx(0.9, abs=0.01)
    assert reach.steepness == pytest.approx(2.0, rel=0.05)
    saturated = fit_reach(distances, [1980] * 7, asked, chance=0.1)
    assert saturated.half_distance_tokens is None
    with pytest.raises(ValueError, match="4 distances"):
        fit_reach([1.0], [1], [2], chance=0.1)


REMISSION_6MP = [6, 6, 6, 7, 10, 13, 16, 22, 23]
CENSORED_6MP = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
REMISSION_PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
"""Weeks in remission. Source: Freireich et al. 1963, Blood 21, 699."""


def test_survival_and_logrank_are_those_of_the_textbook() -> None:
    treated = [StepsToThreshold(run="a", steps=t, is_reached=True) for t in REMISSION_6MP]
    treated += [StepsToThreshold(run="b", steps=t, is_reached=False) for t in CENSORED_6MP]
    placebo = [StepsToThreshold(run="c", steps=t, is_reached=True) for t in REMISSION_PLACEBO]
    curve = draw_survival(treated)
    # Published: 0.857 after week 6, 0.690 after 13, median 23 and 8 weeks, chi square 16.79.
    share = dict(zip(curve.steps, curve.share, strict=True))
    assert share[6] == pytest.approx(0.857, abs=5e-4)
    assert share[13] == pytest.approx(0.690, abs=5e-4)
    assert (curve.median_steps, curve.num_reached, curve.num_runs) == (23, 9, 21)
    assert draw_survival(placebo).median_steps == 8
    # A chi square of 16.79 with one degree of freedom.
    assert compare_by_logrank(treated, placebo) == pytest.approx(4.17e-5, rel=0.02)


def test_runs_that_never_reach_the_threshold_have_no_median_and_no_test() -> None:
    never = [StepsToThreshold(run=f"r{i}", steps=1000, is_reached=False) for i in range(3)]
    curve = draw_survival(never)
    assert (curve.median_steps, curve.num_reached, curve.steps) == (None, 0, ())
    with pytest.raises(ValueError, match="no run reached"):
        compare_by_logrank(never, never)
    with pytest.raises(ValueError, match="at least one run"):
        draw_survival([])
