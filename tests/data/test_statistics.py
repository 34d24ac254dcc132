"""Statistics of documents whose lengths can be counted by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.data.shards import ShardManifest
from pipeline.data.statistics import (
    Sizes,
    count_lengths,
    describe_lengths,
    describe_split,
    left_out,
    sample_documents,
)
from pipeline.errors import DataError

Make = Callable[..., ShardManifest]
SHARDS = [[[1, 0], [2, 3, 4, 0]], [[5, 0], [6, 7, 8, 9, 10, 11, 12, 0], [13, 14, 0]]]


def test_sizes_are_sums_over_the_shards_of_each_source(make_prepared: Make) -> None:
    manifest = make_prepared([*SHARDS, [[1, 2, 0]]], [[[3, 0]]], sources=["web", "code", "web"])
    train = describe_split(manifest, "train")
    assert train.sizes == Sizes(num_shards=3, documents=6, tokens=22, text_bytes=22)
    assert list(train.sources.items()) == [
        ("web", Sizes(num_shards=2, documents=3, tokens=9, text_bytes=9)),
        ("code", Sizes(num_shards=1, documents=3, tokens=13, text_bytes=13)),
    ]
    assert train.sizes.bytes_per_token == 22 / 16
    assert describe_split(manifest, "validation").sizes.tokens == 2


def test_lengths_are_counted_over_shards(make_prepared: Make) -> None:
    lengths, counts = count_lengths(make_prepared(SHARDS), "train")
    assert lengths.tolist() == [2, 3, 4, 8]
    assert counts.tolist() == [2, 1, 1, 1]


def test_the_histogram_has_a_bin_for_every_power_of_two(make_prepared: Make) -> None:
    lengths = describe_split(make_prepared(SHARDS), "train").lengths
    assert lengths is not None
    assert lengths.histogram == {2: 3, 4: 1, 8: 1}
    assert (lengths.smallest, lengths.median, lengths.largest) == (2, 3, 8)
    sparse = describe_lengths(np.array([1, 1023, 1024]), np.array([2, 3, 4]))
    assert sparse is not None
    expected = dict.fromkeys([2**n for n in range(11)], 0)
    assert sparse.histogram == expected | {1: 2, 512: 3, 1024: 4}


@pytest.mark.parametrize("num_documents", [1, 2, 19, 20, 21, 1000])
def test_quantiles_are_those_of_numpy(num_documents: int) -> None:
    documents = np.random.default_rng(num_documents).geometric(0.01, num_documents)
    lengths = describe_lengths(*np.unique(documents, return_counts=True))
    assert lengths is not None
    median, percentile_95 = np.quantile(documents, [0.5, 0.95], method="inverted_cdf")
    assert (lengths.median, lengths.percentile_95) == (median, percentile_95)


def test_a_split_without_documents_has_no_lengths_and_no_samples(make_prepared: Make) -> None:
    manifest = make_prepared(SHARDS)
    validation = describe_split(manifest, "validation")
    assert validation.lengths is None
    assert validation.sizes.bytes_per_token is None
    assert sample_documents(manifest, "validation", 5, seed=0, num_tokens=4) == []


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_samples_are_the_beginnings_of_the_documents_they_name(
    make_prepared: Make, dtype: str
) -> None:
    manifest = make_prepared(SHARDS, dtype=dtype, sources=["web", "code"])
    samples = sample_documents(manifest, "train", 99, seed=0, num_tokens=4)
    assert [(s.shard, s.document, s.source, s.tokens, s.first_ids) for s in samples] == [
        ("train-00000", 0, "web", 2, [1]),
        ("train-00000", 1, "web", 4, [2, 3, 4]),
        ("train-00001", 0, "code", 2, [5]),
        ("train-00001", 1, "code", 8, [6, 7, 8, 9]),
        ("train-00001", 2, "code", 3, [13, 14]),
    ]


def test_a_seed_draws_the_same_documents_and_every_document_is_as_likely(
    make_prepared: Make,
) -> None:
    manifest = make_prepared(SHARDS)
    drawn = [
        sample_documents(manifest, "train", 2, seed=seed, num_tokens=1) for seed in range(1000)
    ]
    assert drawn[7] == sample_documents(manifest, "train", 2, seed=7, num_tokens=1)
    assert all(len({sample.first_ids[0] for sample in samples}) == 2 for samples in drawn)
    first_ids = [sample.first_ids[0] for samples in drawn for sample in samples]
    _, counts = np.unique(first_ids, return_counts=True)
    # 1000 draws of 2 of 5: each 400 times, with a standard deviation of 15.5.
    assert len(counts) == 5
    assert np.abs(counts - 400).max() < 5 * 15.5


def test_a_shard_that_ends_early_is_named(make_prepared: Make) -> None:
    manifest = make_prepared([[[1, 2, 3, 0]]])
    path = manifest.directory / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(DataError, match=r"train-00000\.bin ends inside document 0"):
        sample_documents(manifest, "train", 1, seed=0, num_tokens=4)


def test_reasons_stand_by_their_number() -> None:
    assert list(left_out({"a": 1, "b": 3, "c": 2}).items()) == [("b", 3), ("c", 2), ("a", 1)]
