"""The source of every sample: exact shares, every prefix within one sample of them."""

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import MixtureConfig
from pipeline.data.mixture import Mixture, count_samples, plan_mixture, spread_evenly
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError

Make = Callable[..., ShardManifest]
T = 4


def random_counts() -> list[list[int]]:
    """Periods of 1, 2, 3 and 10 sources, even and skewed, some with one sample beside many."""
    choose = random.Random(5)
    return [
        [choose.randint(1, choose.choice([2, 20, 300])) for _ in range(num_sources)]
        for num_sources in (1, 2, 3, 10)
        for _ in range(12)
    ] + [[1, 499], [997, 1, 1], [1] * 10, [500] + [1] * 9, [7], [1, 1]]


@pytest.mark.parametrize("counts", random_counts(), ids=str)
def test_every_prefix_is_within_tijdemans_bound_of_every_share(counts: list[int]) -> None:
    num_sources, length = len(counts), sum(counts)
    bound = Fraction(1) - Fraction(1, 2 * num_sources - 2) if num_sources > 1 else Fraction(0)
    seen = [0] * num_sources
    for place, source in enumerate(spread_evenly(counts).tolist(), start=1):
        seen[source] += 1
        for count, found in zip(counts, seen, strict=True):
            assert abs(found - Fraction(count * place, length)) <= bound < 1
    assert seen == counts


@pytest.fixture
def manifest(make_prepared: Make) -> ShardManifest:
    """Samples of 4 tokens: 10 of code, 30 of web over two shards, 60 of books."""
    sizes = {"code": [41], "web": [61, 60], "books": [241]}
    shards = [[[1] * tokens] for name in sizes for tokens in sizes[name]]
    return make_prepared(shards, sources=["code", "web", "web", "books"])


def mixture(manifest: ShardManifest, **fields: Any) -> Mixture:
    return plan_mixture(manifest, MixtureConfig(**fields), T)


def test_samples_of_a_source_are_counted_over_all_of_its_shards(manifest: ShardManifest) -> None:
    assert count_samples(manifest, T) == {"code": 10, "web": 30, "books": 60}


def test_by_default_each_source_is_passed_over_equally_often(manifest: ShardManifest) -> None:
    plan = mixture(manifest)
    assert plan.shares == (Fraction(1, 10), Fraction(3, 10), Fraction(6, 10))
    assert plan.seen_epochs(700) == {"code": 7.0, "web": 7.0, "books": 7.0}


def test_epochs_are_relative_to_each_other(manifest: ShardManifest) -> None:
    seen = mixture(manifest, epochs={"code": 3.0, "books": 0.5}).seen_epochs(90)
    assert seen == {"code": 3.0, "web": 1.0, "books": 0.5}


def test_weights_are_the_decimals_that_the_config_states(manifest: ShardManifest) -> None:
    plan = mixture(manifest, weights={"code": 0.1, "web": 0.2, "books": 0.7})
    assert plan.shares == (Fraction(1, 10), Fraction(2, 10), Fraction(7, 10))
    assert len(plan.period) == 10
    assert plan.seen_samples(1_000_000_007) == {
        name: plan.period[:7].tolist().count(place) + share * 100_000_000
        for place, (name, share) in enumerate({"code": 1, "web": 2, "books": 7}.items())
    }


def test_a_source_of_weight_zero_is_left_out(manifest: ShardManifest) -> None:
    plan = mixture(manifest, weights={"code": 0, "web": 5, "books": 5})
    assert plan.names == ("web", "books")
    assert plan.seen_samples(11) == {"web": 6, "books": 5}


def test_shares_without_a_small_denominator_are_rounded_to_65536ths(
    manifest: ShardManifest,
) -> None:
    weights = {"code": 0.123456789, "web": 0.2, "books": 0.676543211}
    plan = mixture(manifest, weights=weights)
    assert len(plan.period) == 65_536
    for share, weight in zip(plan.shares, weights.values(), strict=True):
        assert abs(share - Fraction(str(weight))) < Fraction(1, 65_536)
    assert sum(plan.shares) == 1


@pytest.mark.parametrize(
    "weights", [{"code": 1, "web": 2, "books": 5}, {"code": 0.0001, "web": 1, "books": 0.3}]
)
def test_numbers_within_a_source_rise_by_one_from_any_place_on(
    manifest: ShardManifest, weights: dict[str, float]
) -> None:
    plan = mixture(manifest, weights=weights)
    for start in (0, 1, len(plan.period) - 3, 10**10 + 11):
        before = list(plan.seen_samples(start).values())
        sources, turns = plan.locate(np.arange(start, start + 200))
        for source, turn in zip(sources.tolist(), turns.tolist(), strict=True):
            assert turn == before[source]
            before[source] += 1
        assert before == list(plan.seen_samples(start + 200).values())


def test_a_share_below_one_65536th_says_by_which_factor_to_raise_it(
    manifest: ShardManifest,
) -> None:
    weights = {"code": 1e-6, "web": 1.0, "books": 0.5}
    with pytest.raises(ConfigError, match=r"gives code 1 of 1,500,001 samples.*factor of 23,"):
        mixture(manifest, weights=weights)
    mixture(manifest, weights=weights | {"code": 23e-6})


@pytest.mark.parametrize("field", ["weights", "epochs", "max_epochs"])
def test_a_source_that_the_shards_lack_is_refused(manifest: ShardManifest, field: str) -> None:
    named = {field: {"code": 1.0, "web": 1.0, "books": 1.0, "wiki": 1.0}}
    with pytest.raises(ConfigError, match=r"names \['wiki'\].*sources are \['books', 'code'"):
        mixture(manifest, **named)


def test_a_source_without_a_weight_is_refused(manifest: ShardManifest) -> None:
    with pytest.raises(ConfigError, match=r"weights lacks \['books'\]; 0 leaves a source out"):
        mixture(manifest, weights={"code": 1.0, "web": 1.0})


def test_leaving_out_all_is_refused(make_prepared: Make) -> None:
    manifest = make_prepared([[[1] * 9]], sources=["web"])
    with pytest.raises(ConfigError, match="leaves out every source"):
        mixture(manifest, epochs={"web": 0.0})


@pytest.mark.parametrize("fields", [{"epochs": {}}, {"weights": {"tiny": 1, "web": 1}}])
def test_a_source_below_one_sample_is_refused_unless_left_out(
    make_prepared: Make, fields: dict[str, Any]
) -> None:
    manifest = make_prepared([[[1] * 4], [[1] * 9]], sources=["tiny", "web"])
    ((field, values),) = fields.items()
    with pytest.raises(DataError, match="tiny has fewer than the 5 train tokens") as caught:
        mixture(manifest, **fields)
    assert str(caught.value).endswith(f"or leave it out with data.mixture.{field}.tiny=0")
    assert mixture(manifest, **{field: values | {"tiny": 0}}).names == ("web",)
