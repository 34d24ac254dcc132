"""From a manifest and its shard indexes to what a corpus is like: sizes, shares, lengths, samples.

Indexes are read one after the other, so that memory holds one of them and one count for each
different length; a split of n tokens has at most sqrt(2 n) of those.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.indexed import little_endian, read_index
from pipeline.data.shards import ShardManifest, ShardRecord, SplitName
from pipeline.errors import DataError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What some shards hold."""

    num_shards: int
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents before tokenization."""

    @property
    def bytes_per_token(self) -> float | None:
        """Text bytes over the tokens that stand for text; None where there are none."""
        text_tokens = self.tokens - self.documents
        return self.text_bytes / text_tokens if text_tokens else None


@dataclass(frozen=True, kw_only=True)
class LengthStatistics:
    """How long documents are, in tokens, the end-of-document token included.

    A quantile is the smallest length that this share of the documents does not exceed.
    """

    smallest: int
    median: int
    percentile_95: int
    largest: int
    histogram: Mapping[int, int]
    """Documents of at least this many tokens and fewer than twice as many, by powers of two."""


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """One split: in all, by source, and the lengths of its documents."""

    sizes: Sizes
    sources: Mapping[str, Sizes]
    """By the source's name, in the order of the shards."""
    lengths: LengthStatistics | None
    """None for a split without documents."""


@dataclass(frozen=True, kw_only=True)
class DocumentSample:
    """The beginning of one document."""

    shard: str
    document: int
    """Position in its shard, from 0."""
    source: str
    tokens: int
    """Of the whole document, the end-of-document token included."""
    first_ids: list[int]
    """Ids of its beginning, without the end-of-document token."""


def describe_split(manifest: ShardManifest, split: SplitName) -> SplitStatistics:
    """Add up the shards of a split and count the lengths of its documents.

    Raises:
        DataError: An index is missing or damaged.
    """
    shards = manifest.splits[split].shards
    sources = dict.fromkeys(shard.source for shard in shards)
    return SplitStatistics(
        sizes=_add_up(shards),
        sources={name: _add_up([s for s in shards if s.source == name]) for name in sources},
        lengths=describe_lengths(*count_lengths(manifest, split)),
    )


def count_lengths(manifest: ShardManifest, split: SplitName) -> tuple[Int64Array, Int64Array]:
    """Count the documents of each length.

    Returns:
        The different lengths in tokens, ascending, and how many documents have each.

    Raises:
        DataError: An index is missing or damaged.
    """
    lengths = counts = np.empty(0, dtype=np.int64)
    for shard in manifest.splits[split].shards:
        index = read_index(manifest.directory / f"{shard.name}.idx")
        new_lengths, new_counts = np.unique(index.lengths_tokens, return_counts=True)
        merged, places = np.unique(np.concatenate([lengths, new_lengths]), return_inverse=True)
        total = np.zeros(len(merged), dtype=np.int64)
        np.add.at(total, places, np.concatenate([counts, new_counts]))
        lengths, counts = merged, total
    return lengths, counts


def describe_lengths(lengths: Int64Array, counts: Int64Array) -> LengthStatistics | None:
    """Give quantiles and a histogram of lengths; None for no documents.

    Args:
        lengths: Different lengths, ascending, at least 1.
        counts: Documents of each.
    """
    if not len(lengths):
        return None
    num_up_to = np.cumsum(counts)
    median, percentile_95 = (
        int(lengths[np.searchsorted(num_up_to, fraction * num_up_to[-1])])
        for fraction in (0.5, 0.95)
    )
    exponents = np.frexp(lengths)[1] - 1
    num_in_bin = np.bincount(exponents, weights=counts).astype(np.int64)
    return LengthStatistics(
        smallest=int(lengths[0]),
        median=median,
        percentile_95=percentile_95,
        largest=int(lengths[-1]),
        histogram={
            2**exponent: int(num_in_bin[exponent])
            for exponent in range(int(exponents[0]), int(exponents[-1]) + 1)
        },
    )


def sample_documents(
    manifest: ShardManifest, split: SplitName, num_documents: int, seed: int, num_tokens: int
) -> list[DocumentSample]:
    """Read the beginning of documents drawn from a split, each document as likely as another.

    Args:
        manifest: The prepared directory.
        split: Which of its splits.
        num_documents: How many; a split with fewer gives all.
        seed: The same seed gives the same documents.
        num_tokens: Tokens of the beginning.

    Raises:
        DataError: A shard is missing or shorter than its index says.
    """
    shards = manifest.splits[split].shards
    stops = list(accumulate(shard.documents for shard in shards))
    total = stops[-1] if stops else 0
    drawn = np.random.default_rng(seed).choice(total, size=min(num_documents, total), replace=False)
    samples = []
    for number, shard in enumerate(shards):
        first = stops[number] - shard.documents
        inside = np.sort(drawn[(drawn >= first) & (drawn < stops[number])]) - first
        if len(inside):
            samples += _read_beginnings(manifest, shard, inside.tolist(), num_tokens)
    return samples


def left_out(counts: Mapping[str, int]) -> dict[str, int]:
    """Give counts by reason, the largest first."""
    return dict(Counter(counts).most_common())


def _add_up(shards: list[ShardRecord]) -> Sizes:
    return Sizes(
        num_shards=len(shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
    )


def _read_beginnings(
    manifest: ShardManifest, shard: ShardRecord, documents: list[int], num_tokens: int
) -> list[DocumentSample]:
    index = read_index(manifest.directory / f"{shard.name}.idx")
    path = manifest.directory / f"{shard.name}.bin"
    dtype = little_endian(manifest.dtype)
    samples = []
    try:
        with path.open("rb") as stream:
            for document in documents:
                length = int(index.lengths_tokens[document])
                num_wanted = min(length - 1, num_tokens)
                stream.seek(int(index.starts_bytes[document]))
                ids = _as_ids(stream.read(num_wanted * dtype.itemsize), dtype)
                if len(ids) != num_wanted:
                    raise DataError(f"shard {path} ends inside document {document}; verify it")
                samples.append(
                    DocumentSample(
                        shard=shard.name,
                        document=document,
                        source=shard.source,
                        tokens=length,
                        first_ids=ids,
                    )
                )
    except OSError as exc:
        raise DataError(f"cannot read shard {path}: {exc.strerror}") from exc
    return samples


def _as_ids(data: bytes, dtype: np.dtype[Any]) -> list[int]:
    whole = data[: len(data) // dtype.itemsize * dtype.itemsize]
    return [int(token) for token in np.frombuffer(whole, dtype)]
