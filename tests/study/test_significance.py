"""Intervals, exact tests and equivalence err as seldom as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.study.decision import Rule, weigh
from pipeline.study.effect import (
    effect_of_draws,
    effect_of_groups,
    effect_of_samples,
    effect_of_slopes,
)
from pipeline.study.power import simulate_seeds
from pipeline.study.resampling import (
    bootstrap_documents,
    bootstrap_interaction,
    bootstrap_seeds,
)
from pipeline.study.significance import (
    adjust_by_holm,
    flip_signs,
    permute_groups,
    pool_deviation,
)


def test_effects_have_students_and_welchs_error() -> None:
    own, other = [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 9.0]
    mean = effect_of_samples(own)
    assert mean.value == pytest.approx(2.5)
    assert mean.standard_error == pytest.approx(stats.sem(own))
    assert mean.degrees == 3
    welch = stats.ttest_ind(own, other, equal_var=False)
    found = effect_of_groups(own, other)
    assert found.standard_error is not None
    assert found.value / found.standard_error == pytest.approx(float(welch.statistic))
    # Whole degrees, rounded down, are the more careful side.
    assert found.degrees == math.floor(float(welch.df))
    assert effect_of_groups([1.0], [2.0, 3.0]).standard_error is None


def test_draws_of_few_units_are_widened_to_the_true_error() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 3)
    weights = generator.multinomial(3, [1 / 3] * 3, size=20_000)
    effect = effect_of_draws(float(values.mean()), weights @ values / 3, num_units=3)
    assert effect.standard_error == pytest.approx(stats.sem(values), rel=0.02)
    assert effect_of_draws(0.0, [1.0, 2.0], num_units=1).standard_error is None


def test_the_load_of_a_round_cancels_in_a_difference_of_exponents() -> None:
    lengths = [64.0, 256.0, 1024.0]
    loads = (1.0, 4.0, 0.5)
    # The load bends one arm's curve as much as the other's: by a tenth of its own logarithm.
    arms = {
        slope: [[load * t ** (slope + 0.1 * math.log(load)) for t in lengths] for load in loads]
        for slope in (0.9, 0.1)
    }
    found = effect_of_slopes(lengths, arms[0.9], arms[0.1])
    assert found.value == pytest.approx(0.8)
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)
    alone = effect_of_slopes(lengths, arms[0.9])
    assert alone.standard_error is not None
    assert alone.standard_error > 0.05
    assert (alone.num, alone.degrees) == (3, 2)


def test_permutations_of_few_seeds_are_counted() -> None:
    # 20 assignments of 3 of 6; only the observed one and its mirror are as far apart.
    test = permute_groups([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (test.p, test.smallest_p, test.num_assignments) == (0.1, 0.1, 20)
    five = permute_groups([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0])
    assert five.p == pytest.approx(2 / 252)
    groups = ([1.0, 5.0, 3.0], [4.0, 2.0, 9.0, 7.0])
    scipy = stats.permutation_test(
        groups, lambda x, y: abs(np.mean(x) - np.mean(y)), n_resamples=1e5, alternative="greater"
    )
    own = permute_groups(*groups)
    assert own.num_assignments == 35
    assert own.p == pytest.approx(float(scipy.pvalue))
    assert flip_signs([0.1, 0.2, 0.3]).p == pytest.approx(2 / 8)
    assert flip_signs([0.1, -0.2, 0.3]).p == pytest.approx(6 / 8)
    with pytest.raises(ValueError, match="assignments"):
        permute_groups([0.0] * 20, [1.0] * 20)
    with pytest.raises(ValueError, match="at least one sample"):
        flip_signs([])


def test_holm_corrects_as_in_the_textbook() -> None:
    # Source: the ordered p 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never falling.
    assert adjust_by_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_by_holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_seed_deviation_is_pooled_within_cells() -> None:
    # Squares 2 and 8 about means that differ by 100; 1 + 2 degrees of freedom.
    deviation = pool_deviation([[0.0, 2.0], [98.0, 100.0, 102.0], [7.0]])
    assert deviation.value == pytest.approx(math.sqrt(10 / 3))
    assert deviation.degrees == 3
    with pytest.raises(ValueError, match="two seeds"):
        pool_deviation([[1.0], [2.0]])


def test_two_one_sided_tests_are_those_of_the_book() -> None:
    # Mean 0.1, error 0.05, 8 degrees of freedom, margin 0.2: t = 2 on the nearer side.
    p = weigh(
        Rule(direction="equivalent", threshold=0.0, margin=0.2),
        np.array(0.1), np.array(0.05), np.array(8),
    )  # fmt: skip
    assert float(p.supported) == pytest.approx(float(stats.t.sf(2.0, 8)))
    assert float(p.refuted) == 1.0


@pytest.mark.parametrize("is_paired", [True, False])
def test_intervals_over_seeds_and_documents_cover_a_difference(is_paired: bool) -> None:
    generator = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        documents = generator.normal(3.0, 0.5, (1, 50))
        seeds = generator.normal(0, 0.05, (2, 4, 1))
        own, other = documents + seeds + generator.normal(0, 0.1, (2, 4, 50))
        found = bootstrap_seeds(own + 0.2, other, np.ones(50), is_paired, num_draws=200).estimate
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 0.2 <= found.high
    # 5% of 200 are 10, with a deviation of 3.1.
    assert missed <= 20


def test_documents_count_by_their_tokens_and_pairs_cancel_what_they_share() -> None:
    generator = np.random.default_rng(0)
    shared, tokens = generator.normal(3, 2, 100), generator.integers(10, 1000, 100)
    own = shared + 0.1 + generator.normal(0, 0.01, 100)
    found = bootstrap_documents(own, shared, tokens)
    assert found.value == pytest.approx(float(np.average(own - shared, weights=tokens)))
    assert found.standard_error is not None
    # Documents differ by 2 nats, their differences by 0.01.
    assert found.standard_error < 0.003


def test_the_interaction_is_the_gain_on_some_tokens_less_that_on_the_rest() -> None:
    generator = np.random.default_rng(0)
    recall = generator.normal(0.5, 0.1, (5, 80))
    rest = generator.normal(0.1, 0.1, (5, 80))
    found = bootstrap_interaction(recall, rest, num_draws=500).estimate
    assert found.half_width is not None
    assert abs(found.value - 0.4) < 2 * found.half_width < 0.2


def test_losses_of_other_documents_do_not_pair() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        bootstrap_seeds(np.zeros((3, 10)), np.zeros((3, 9)), np.ones(10), False)
    with pytest.raises(ValueError, match="do not pair"):
        bootstrap_seeds(np.zeros((3, 10)), np.zeros((4, 10)), np.ones(10), True)


RULES = {
    "greater": Rule(direction="greater", threshold=0.0),
    "greater_or_none": Rule(direction="greater", threshold=0.0, margin=2.0),
    "less": Rule(direction="less", threshold=0.0),
    "different": Rule(direction="different", threshold=0.0, margin=2.0),
    "equivalent": Rule(direction="equivalent", threshold=0.0, margin=2.0),
}
NUM_STUDIES = 20_000
SLACK = 3 * (0.05 * 0.95 / NUM_STUDIES) ** 0.5
"""Three deviations of a share of 5%."""


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("name", list(RULES))
def test_false_verdicts_stay_within_one_in_twenty(name: str, num_seeds: int) -> None:
    rule = RULES[name]
    none, edge = simulate_seeds(rule, num_seeds, [0.0, 2.0], 0.05, NUM_STUDIES)
    if name == "equivalent":
        # No difference must not be refuted, one of the whole margin must not be called none.
        assert none.refuted_fraction <= 0.05 + SLACK
        assert edge.supported_fraction <= 0.05 + SLACK
        return
    assert none.supported_fraction <= 0.05 + SLACK
    if name != "less":
        assert edge.refuted_fraction <= 0.05 + SLACK


def test_power_grows_with_seeds_and_says_what_they_cannot_decide() -> None:
    rule = Rule(direction="greater", threshold=0.0)
    curve = {n: simulate_seeds(rule, n, [1.0], 0.05, 4000)[0] for n in (3, 5, 16)}
    supported = [curve[n].supported_fraction for n in (3, 5, 16)]
    assert supported == sorted(supported)
    # 16 seeds an arm find one deviation with 80% power two-sided: study section 4.6.
    assert curve[16].supported_fraction == pytest.approx(0.80, abs=0.03)
    assert curve[3].open_fraction > 0.7
