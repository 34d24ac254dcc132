"""The order of an epoch: a permutation, computed place by place."""

import tracemalloc

import numpy as np
import pytest

from pipeline.data.order import permute


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 70_000])
def test_the_order_is_a_permutation(num_samples: int) -> None:
    order = permute(np.arange(num_samples), num_samples, [5, 2])
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_any_position_can_be_asked_for_alone() -> None:
    order = permute(np.arange(1000), 1000, [1, 0])
    for position in (0, 17, 999):
        assert permute(np.array([position]), 1000, [1, 0])[0] == order[position]


@pytest.mark.parametrize("num_samples", [10**10, 10**13])
def test_huge_splits_need_memory_for_the_asked_positions_only(num_samples: int) -> None:
    starts = np.linspace(0, num_samples - 100, num=100).astype(np.int64)
    positions = np.unique(starts[:, None] + np.arange(100))
    tracemalloc.start()
    order = permute(positions, num_samples, [0, 0])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(order)) == len(positions) == 10_000
    assert 0 <= order.min() < order.max() < num_samples
    # 10,000 positions of 8 bytes and the network's few temporaries of them.
    assert peak_bytes < 20 * positions.nbytes


def permute_one(position: int, num_samples: int, entropy: list[int]) -> int:
    """A second implementation, one position at a time with Python's integers."""
    word = 2**64 - 1
    half = max(4, ((num_samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(entropy).generate_state(8, np.uint64).tolist()
    value = position
    while True:
        left, right = divmod(value, 2**half)
        for key in keys:
            mixed = right ^ key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> shift)) * factor & word
            mixed ^= mixed >> 31
            left, right = right, left ^ (mixed % 2**half)
        value = left * 2**half + right
        if value < num_samples:
            return value


@pytest.mark.parametrize("num_samples", [1, 10, 300, 10**12])
def test_the_order_equals_that_of_a_second_implementation(num_samples: int) -> None:
    positions = np.linspace(0, num_samples - 1, num=min(num_samples, 50)).astype(np.int64)
    expected = [permute_one(p, num_samples, [11, 3, 7]) for p in positions.tolist()]
    assert permute(positions, num_samples, [11, 3, 7]).tolist() == expected


def test_the_order_of_a_seed_never_changes_between_versions() -> None:
    assert permute(np.arange(10), 10, [0, 0]).tolist() == [8, 6, 1, 5, 4, 7, 0, 2, 9, 3]


def test_every_sample_reaches_every_position_equally_often() -> None:
    """Chi-square of 10 samples at position 0 over 300 seeds; 27.9 is the 99.9 % quantile."""
    first = [int(permute(np.array([0]), 10, [seed, 0])[0]) for seed in range(300)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 30.0) ** 2 / 30.0).sum() < 27.9


def test_neighbours_are_torn_apart() -> None:
    order = permute(np.arange(10_000), 10_000, [0, 0])
    assert (np.diff(order) == 1).mean() < 0.001
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_order_differs_between_all_of_its_entropy() -> None:
    orders = [
        tuple(permute(np.arange(50), 50, [seed, epoch, source]))
        for seed in range(3)
        for epoch in range(3)
        for source in range(3)
    ]
    assert len(set(orders)) == 27
