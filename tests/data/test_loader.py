"""Samples, state and ranks of the loader; coverage of the validation batches."""

import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pipeline.config.batching import BatchPlan
from pipeline.config.data import MixtureConfig
from pipeline.data.loader import (
    LoaderState,
    SourceCount,
    TokenLoader,
    ValidationBatches,
    label_bytes,
)
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.errors import DataError

Make = Callable[..., ShardManifest]
T = 4
WEIGHTS = MixtureConfig(weights={"a": 1.0, "b": 2.0, "c": 0.5})
SIZES = {"a": 7, "b": 29, "c": 11}
"""Samples of each source of `mixed`."""


def plan(world_size: int = 1, micro_batch_samples: int = 2, global_batch: int = 12) -> BatchPlan:
    return BatchPlan(
        world_size=world_size,
        micro_batch_samples=micro_batch_samples,
        accumulation_steps=global_batch // micro_batch_samples // world_size,
        sequence_tokens=T,
    )


def loader_of(manifest: ShardManifest, world_size: int = 1, rank: int = 0) -> TokenLoader:
    """Mix by `WEIGHTS` what has several sources."""
    is_mixed = len({shard.source for shard in manifest.splits["train"].shards}) > 1
    return TokenLoader(
        manifest, WEIGHTS if is_mixed else MixtureConfig(), plan(world_size), rank, 3
    )


@pytest.fixture
def single(make_prepared: Make) -> ShardManifest:
    """The numbers 0 to 404 over two shards: 101 samples of 4 tokens."""
    return make_prepared([[list(range(150))], [list(range(150, 405))]])


@pytest.fixture
def mixed(make_prepared: Make) -> ShardManifest:
    """Sources whose tokens are numbers from 100, 200 and 300; b lies over two shards."""
    a, c = list(range(100, 129)), list(range(300, 345))
    b = list(range(200, 317))
    return make_prepared([[a], [b[:50]], [c], [b[50:]]], sources=["a", "b", "c", "b"])


def read(loader: TokenLoader, steps: int) -> list[list[int]]:
    """Give the sample ids of each step of one rank."""
    taken = [loader.next_step() for _ in range(steps)]
    return [[i for batch in step for i in batch.sample_ids.tolist()] for step in taken]


def take(
    manifest: ShardManifest, world_size: int, state: LoaderState, steps: int
) -> tuple[list[list[int]], LoaderState]:
    """Give the sample ids of each step over all ranks, in micro-batch order, and the state then."""
    loaders = [loader_of(manifest, world_size, rank) for rank in range(world_size)]
    for loader in loaders:
        loader.load_state(state)
    result = []
    for _ in range(steps):
        parts = [[b.sample_ids.tolist() for b in loader.next_step()] for loader in loaders]
        result.append([i for micro in zip(*parts, strict=True) for ids in micro for i in ids])
    assert len({loader.state for loader in loaders}) == 1
    return result, loaders[0].state


def check_every_pass_is_whole(ids: Sequence[int], size: int) -> None:
    """Each pass over a source holds each sample once; a last one, cut short, none twice."""
    passes = [ids[start : start + size] for start in range(0, len(ids), size)]
    for one in passes:
        assert len(set(one)) == len(one)
    for one in passes[:-1]:
        assert sorted(one) == sorted(set(passes[0]))
    assert len(passes) > 1


def by_source(steps: list[list[int]]) -> dict[str, list[int]]:
    """Cut the ids of a mixed stream by source, where each source's samples start at 0."""
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    for sample in (sample for ids in steps for sample in ids):
        for name, size in SIZES.items():
            if sample < size:
                found[name].append(sample)
                break
            sample -= size
    return found


def test_a_sample_is_its_tokens_and_labels_are_one_ahead(single: ShardManifest) -> None:
    for batch in loader_of(single).next_step():
        assert batch.inputs.dtype == batch.labels.dtype == np.int64
        expected = batch.sample_ids[:, None] * T + np.arange(T)
        assert np.array_equal(batch.inputs, expected)
        assert np.array_equal(batch.labels, expected + 1)
        assert batch.text_bytes.tolist() == np.ones((2, T), dtype=np.int32).tolist()


def test_samples_never_cross_sources(mixed: ShardManifest) -> None:
    loader = loader_of(mixed)
    first_ids = {"a": 0, "b": 7, "c": 36}
    for batch in (batch for _ in range(20) for batch in loader.next_step()):
        for sample, inputs, labels in zip(
            batch.sample_ids.tolist(), batch.inputs.tolist(), batch.labels.tolist(), strict=True
        ):
            name = "c" if sample >= 36 else "b" if sample >= 7 else "a"
            start = {"a": 100, "b": 200, "c": 300}[name] + (sample - first_ids[name]) * T
            assert inputs == list(range(start, start + T))
            assert labels == list(range(start + 1, start + T + 1))


def test_every_epoch_of_one_source_holds_each_sample_once_with_no_tail(
    single: ShardManifest,
) -> None:
    """101 samples in batches of 12: epochs end inside batches."""
    steps, _ = take(single, 1, LoaderState(), 40)
    stream = [sample for ids in steps for sample in ids]
    epochs = [stream[start : start + 101] for start in range(0, 404, 101)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(101))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_epoch_of_every_mixed_source_holds_each_sample_once(mixed: ShardManifest) -> None:
    steps, _ = take(mixed, 1, LoaderState(), 40)
    found = by_source(steps)
    for name, ids in found.items():
        check_every_pass_is_whole(ids, SIZES[name])
    # 480 samples in periods of 7: 2 of a, 4 of b, 1 of c each.
    for name, share in {"a": 2 / 7, "b": 4 / 7, "c": 1 / 7}.items():
        assert abs(len(found[name]) - 480 * share) < 1.0


def test_the_order_of_a_source_does_not_depend_on_the_others(mixed: ShardManifest) -> None:
    only_b = MixtureConfig(weights={"a": 0, "b": 1, "c": 0})
    alone = TokenLoader(mixed, only_b, plan(), 0, 3)
    ids = [i for step in read(alone, 5) for i in step]
    assert ids == by_source(read(loader_of(mixed), 10))["b"][:60]


@pytest.mark.parametrize("kind", ["single", "mixed"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_every_world_size_sees_the_same_global_batches(
    request: pytest.FixtureRequest, kind: str, world_size: int
) -> None:
    manifest = request.getfixturevalue(kind)
    alone, _ = take(manifest, 1, LoaderState(), 15)
    assert take(manifest, world_size, LoaderState(), 15)[0] == alone


@pytest.mark.parametrize("kind", ["single", "mixed"])
@pytest.mark.parametrize("world_sizes", [(1, 2, 3), (3, 1, 2), (2, 2, 6)])
def test_two_resumes_at_other_world_sizes_across_epochs_see_every_sample_exactly_once(
    request: pytest.FixtureRequest, kind: str, world_sizes: tuple[int, ...]
) -> None:
    manifest: ShardManifest = request.getfixturevalue(kind)
    whole, end = take(manifest, 1, LoaderState(), 40)
    state, parts = LoaderState(), []
    # The second part starts and ends in epoch 1 of the single source, which 8.4 steps pass over.
    for world_size, steps in zip(world_sizes, (10, 5, 25), strict=True):
        part, state = take(manifest, world_size, state, steps)
        parts += part
    assert parts == whole
    assert state == end == LoaderState(num_samples=480)


def test_counts_by_source_follow_from_the_state_alone(mixed: ShardManifest) -> None:
    loader = loader_of(mixed)
    ids: Counter[str] = Counter()
    for step in range(1, 30):
        for batch in loader.next_step():
            ids.update("c" if i >= 36 else "b" if i >= 7 else "a" for i in batch.sample_ids)
        fresh = loader_of(mixed, world_size=3, rank=2)
        fresh.load_state(LoaderState(num_samples=12 * step))
        assert fresh.seen() == loader.seen()
        assert loader.seen() == {
            name: SourceCount(samples=ids[name], tokens=T * ids[name], epochs=ids[name] / size)
            for name, size in SIZES.items()
        }


def test_a_state_below_zero_is_refused(single: ShardManifest) -> None:
    with pytest.raises(DataError, match="num_samples=-1.* the checkpoint is damaged"):
        loader_of(single).load_state(LoaderState(num_samples=-1))


def test_a_place_far_along_the_stream_costs_no_more_memory(mixed: ShardManifest) -> None:
    peaks = []
    for first in (0, 12 * 10**10):
        loader = loader_of(mixed)
        loader.load_state(LoaderState(num_samples=first))
        tracemalloc.start()
        loader.next_step()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 1_000_000


def test_less_than_one_global_batch_is_an_error_with_numbers(make_prepared: Make) -> None:
    with pytest.raises(DataError, match="has 11 samples of 4 tokens, fewer than .* of 12"):
        loader_of(make_prepared([[list(range(48))]]))


@pytest.mark.parametrize(
    ("dtype", "token_id"), [("uint16", 1000), ("int32", 70_000), ("int32", -1)]
)
def test_an_id_outside_the_vocabulary_names_its_file_and_place(
    make_prepared: Make, dtype: str, token_id: int
) -> None:
    manifest = make_prepared([[[1] * 60], [[1] * 60]], dtype=dtype)
    path = manifest.directory / "train-00001.bin"
    tokens = np.fromfile(path, dtype=np.dtype(dtype).newbyteorder("<"))
    tokens[33] = token_id
    tokens.tofile(path)
    loader = loader_of(manifest)
    with pytest.raises(DataError) as caught:
        read(loader, 3)
    assert f"{path} holds the id {token_id} as its token 33" in str(caught.value)
    assert f"python -m launch verify {manifest.directory}" in str(caught.value)


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_max_tokens_scores_that_many_labels_spread_over_the_split(
    make_prepared: Make, world_size: int
) -> None:
    shards = validation(make_prepared, 10 * T + 1)
    scored: list[int] = []
    for rank in range(world_size):
        batches = ValidationBatches(shards, T, 2, rank, world_size, max_tokens=2 * T + 2)
        for batch in batches:
            scored += batch.labels[batch.labels != -100].tolist()
    # Samples 0, 3 and 6 of ten, the last with two labels.
    starts = [0, 3 * T, 6 * T]
    lengths = [T, T, 2]
    expected = [s + i + 1 for s, n in zip(starts, lengths, strict=True) for i in range(n)]
    assert sorted(scored) == expected


def test_a_validation_split_below_one_sample_says_what_to_do(make_prepared: Make) -> None:
    with pytest.raises(DataError, match=r"4 tokens, one sample needs 5.*validation_fraction"):
        ValidationBatches(validation(make_prepared, 4), T, 2, 0, 1)


def test_ignored_labels_and_document_ends_have_no_bytes() -> None:
    token_bytes = np.array([0, 3, 5], dtype=np.int32)
    labels = np.array([[1, -100, 0], [2, 2, -100]])
    assert label_bytes(labels, token_bytes).tolist() == [[3, 0, 0], [5, 5, 0]]
