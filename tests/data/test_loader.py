"""Sample order, state and ranks of the loader; coverage of the validation batches."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.config.batching import BatchPlan
from pipeline.data.loader import (
    LoaderState,
    TokenLoader,
    ValidationBatches,
    label_bytes,
    permute,
)
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.errors import DataError

Make = Callable[..., ShardManifest]
T = 4


def plan(world_size: int = 1, micro_batch_samples: int = 2, global_batch: int = 8) -> BatchPlan:
    return BatchPlan(
        world_size=world_size,
        micro_batch_samples=micro_batch_samples,
        accumulation_steps=global_batch // micro_batch_samples // world_size,
        sequence_tokens=T,
    )


@pytest.fixture
def shards(make_prepared: Make) -> ShardSet:
    """The numbers 0 to 404 over two shards: 101 samples of 4 tokens."""
    return ShardSet(make_prepared([[list(range(150))], [list(range(150, 405))]]), "train")


def step_ids(loader: TokenLoader) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in loader.next_step()]


def all_ranks(shards: ShardSet, world_size: int, state: LoaderState, steps: int) -> list[list[int]]:
    """Give the sample ids of each step over all ranks, in micro-batch order."""
    loaders = [TokenLoader(shards, plan(world_size), rank, 3) for rank in range(world_size)]
    for loader in loaders:
        loader.load_state(state)
    result = []
    for _ in range(steps):
        parts = [step_ids(loader) for loader in loaders]
        result.append([i for micro in zip(*parts, strict=True) for ids in micro for i in ids])
    return result


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 70_000])
def test_the_order_is_a_permutation(num_samples: int) -> None:
    order = permute(np.arange(num_samples), num_samples, seed=5, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_any_position_can_be_asked_for_alone() -> None:
    order = permute(np.arange(1000), 1000, seed=1, epoch=0)
    for position in (0, 17, 999):
        assert permute(np.array([position]), 1000, seed=1, epoch=0)[0] == order[position]


def test_huge_splits_need_no_index() -> None:
    num_samples = 10**13
    order = permute(np.arange(num_samples - 1000, num_samples), num_samples, seed=0, epoch=0)
    assert len(set(order.tolist())) == 1000
    assert 0 <= order.min() < order.max() < num_samples


def permute_one(position: int, num_samples: int, seed: int, epoch: int) -> int:
    """A second implementation, one position at a time with Python's integers."""
    word = 2**64 - 1
    half = max(4, ((num_samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64).tolist()
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
    expected = [permute_one(p, num_samples, 11, 3) for p in positions.tolist()]
    assert permute(positions, num_samples, seed=11, epoch=3).tolist() == expected


def test_the_order_of_a_seed_never_changes_between_versions() -> None:
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [8, 6, 1, 5, 4, 7, 0, 2, 9, 3]


def test_every_sample_reaches_every_position_equally_often() -> None:
    """Chi-square of 10 samples at position 0 over 1,000 seeds; 27.9 is the 99.9 % quantile."""
    first = [int(permute(np.array([0]), 10, seed, 0)[0]) for seed in range(1000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 27.9


def test_neighbours_are_torn_apart() -> None:
    order = permute(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert (np.diff(order) == 1).mean() < 0.001
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_order_differs_between_seeds_and_epochs() -> None:
    orders = [
        tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)
    ]
    assert len(set(orders)) == 25


def test_a_sample_is_its_tokens_and_labels_are_one_ahead(shards: ShardSet) -> None:
    for batch in TokenLoader(shards, plan(), rank=0, seed=0).next_step():
        assert batch.inputs.dtype == batch.labels.dtype == np.int64
        expected = batch.sample_ids[:, None] * T + np.arange(T)
        assert np.array_equal(batch.inputs, expected)
        assert np.array_equal(batch.labels, expected + 1)


def test_no_sample_comes_twice_in_an_epoch(shards: ShardSet) -> None:
    seen: Counter[int] = Counter()
    for ids in all_ranks(shards, 1, LoaderState(), steps=12):
        seen.update(ids)
    assert len(seen) == 12 * 8 == 96
    assert set(seen.values()) == {1}


def test_the_next_epoch_has_a_new_order_and_leaves_out_other_samples(shards: ShardSet) -> None:
    steps = all_ranks(shards, 1, LoaderState(), steps=24)
    first, second = steps[:12], steps[12:]
    assert first != second
    everything = set(range(101))
    left_out = [everything - {i for ids in epoch for i in ids} for epoch in (first, second)]
    assert [len(ids) for ids in left_out] == [5, 5]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_world_size_sees_the_same_global_batches(shards: ShardSet, world_size: int) -> None:
    alone = all_ranks(shards, 1, LoaderState(), steps=15)
    assert all_ranks(shards, world_size, LoaderState(), steps=15) == alone


def test_two_resumes_across_an_epoch_border_at_changed_world_sizes_repeat_nothing(
    shards: ShardSet,
) -> None:
    whole = all_ranks(shards, 2, LoaderState(), steps=30)
    state, parts = LoaderState(), []
    for world_size, steps in ((2, 7), (1, 9), (4, 14)):
        parts += all_ranks(shards, world_size, state, steps)
        loader = TokenLoader(shards, plan(world_size), 0, 3)
        loader.load_state(state)
        for _ in range(steps):
            loader.next_step()
        state = loader.state
    assert parts == whole
    assert state.epoch == 2


def test_the_state_counts_global_samples(shards: ShardSet) -> None:
    loader = TokenLoader(shards, plan(world_size=2), rank=1, seed=0)
    loader.next_step()
    loader.next_step()
    assert loader.state == LoaderState(epoch=0, sample_index=16)


@pytest.mark.parametrize(
    "state", [LoaderState(sample_index=102), LoaderState(sample_index=-1), LoaderState(epoch=-1)]
)
def test_a_state_of_other_data_is_refused(shards: ShardSet, state: LoaderState) -> None:
    with pytest.raises(DataError, match="belongs to other data"):
        TokenLoader(shards, plan(), 0, 0).load_state(state)


def test_less_than_one_global_batch_is_an_error_with_numbers(make_prepared: Make) -> None:
    shards = ShardSet(make_prepared([[list(range(32))]]), "train")
    with pytest.raises(DataError, match="32 tokens = 7 samples of 4 tokens, fewer than .* of 8"):
        TokenLoader(shards, plan(), 0, 0)


def validation(make_prepared: Make, num_tokens: int) -> ShardSet:
    return ShardSet(make_prepared([[[1]]], [[list(range(num_tokens))]]), "validation")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [5, 6, 17, 33, 100])
def test_every_validation_token_but_the_first_is_scored_once_over_all_ranks(
    make_prepared: Make, world_size: int, num_tokens: int
) -> None:
    shards = validation(make_prepared, num_tokens)
    ranks = [list(ValidationBatches(shards, T, 2, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    scored: Counter[int] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.inputs.shape == batch.labels.shape == (2, T)
        valid = batch.labels != -100
        assert np.array_equal(batch.labels[valid], batch.inputs[valid] + 1)
        assert (batch.sample_ids >= 0).tolist() == valid.any(axis=1).tolist()
        scored.update(batch.labels[valid].tolist())
    assert scored == Counter(range(1, num_tokens))


def test_max_tokens_scores_that_many_labels_from_the_start(make_prepared: Make) -> None:
    batches = ValidationBatches(validation(make_prepared, 100), T, 2, 0, 1, max_tokens=10)
    labels = np.concatenate([batch.labels.ravel() for batch in batches])
    assert labels[labels != -100].tolist() == list(range(1, 11))
    assert len(batches) == 2


def test_a_validation_split_below_one_sample_says_what_to_do(make_prepared: Make) -> None:
    with pytest.raises(DataError, match=r"4 tokens, one sample needs 5.*validation_fraction"):
        ValidationBatches(validation(make_prepared, 4), T, 2, 0, 1)


def test_ignored_labels_and_document_ends_have_no_bytes() -> None:
    token_bytes = np.array([0, 3, 5], dtype=np.int32)
    labels = np.array([[1, -100, 0], [2, 2, -100]])
    assert label_bytes(labels, token_bytes).tolist() == [[3, 0, 0], [5, 5, 0]]
