"""From memory-mapped tokens to the micro-batches of one rank, in an order that nothing can disturb.

Legend: B samples of a micro-batch, T tokens of a sample.

Sample i of a split is its tokens [i*T, i*T + T], one more than T, so that every token but the first
is a label once. The order of an epoch is a permutation of the samples computed point by point from
(seed, epoch, position): no index is built, and any position can be asked for at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config.batching import IGNORED_LABEL, BatchPlan
from pipeline.data.checks import check_train_tokens, check_validation_tokens
from pipeline.data.shards import ShardSet, load_token_bytes
from pipeline.errors import DataError

FEISTEL_ROUNDS = 8
SMALLEST_HALF_BITS = 4
"""Halves of fewer bits give too few different permutations of a handful of samples."""

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch of one rank."""

    inputs: Int64Array
    """[B, T] token ids."""
    labels: Int64Array
    """[B, T] ids of the tokens that follow; -100 is not scored."""
    text_bytes: Int32Array
    """[B, T] raw bytes of each label; 0 where it is not scored or ends a document."""
    sample_ids: Int64Array
    """[B] which sample of the split each row is; -1 for a row that is all padding."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where the next step begins, in samples over all ranks, so that it holds at any world size."""

    epoch: int = 0
    sample_index: int = 0


class TokenLoader:
    """Cuts the shuffled samples of a split into steps and gives one rank its micro-batches.

    Micro-batch k of a global batch goes to rank k modulo world size, so the micro-batches of a step
    are the same at every world size; only who computes them changes. The samples behind the last
    full global batch of an epoch are left out; as every epoch has its own order, they differ.
    """

    def __init__(self, shards: ShardSet, plan: BatchPlan, rank: int, seed: int) -> None:
        """Prepare for the first step of epoch 0.

        Args:
            shards: The split to read.
            plan: How a global batch is cut.
            rank: This rank, from 0.
            seed: Seed of the sample order.

        Raises:
            DataError: The split is too small for one global batch, or `token_bytes.npy` is gone.
        """
        self.num_samples = max(shards.num_tokens - 1, 0) // plan.sequence_tokens
        check_train_tokens(shards.num_tokens, plan.sequence_tokens, plan.global_batch_samples)
        self._shards = shards
        self._token_bytes = load_token_bytes(shards.manifest.directory)
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self.state = LoaderState()

    def load_state(self, state: LoaderState) -> None:
        """Continue from a state, at this or any other world size.

        Raises:
            DataError: The state lies outside the split.
        """
        if state.epoch < 0 or not 0 <= state.sample_index <= self.num_samples:
            raise DataError(
                f"{state} does not fit a split of {self.num_samples} samples: "
                "it belongs to other data or to another sequence length"
            )
        self.state = state

    def next_step(self) -> list[TokenBatch]:
        """Give this rank's micro-batches of the next optimizer step; the state moves past it."""
        size = self._plan.global_batch_samples
        epoch, start = self.state.epoch, self.state.sample_index
        if start + size > self.num_samples:
            epoch, start = epoch + 1, 0
        positions = np.arange(start, start + size, dtype=np.int64)
        samples = permute(positions, self.num_samples, self._seed, epoch)
        self.state = LoaderState(epoch=epoch, sample_index=start + size)
        mine = samples.reshape(-1, self._plan.micro_batch_samples)
        return [self._read(ids) for ids in mine[self._rank :: self._plan.world_size]]

    def _read(self, sample_ids: Int64Array) -> TokenBatch:
        length = self._plan.sequence_tokens
        rows = np.empty((len(sample_ids), length + 1), dtype=np.int64)
        for row, sample in zip(rows, sample_ids.tolist(), strict=True):
            row[:] = self._shards.tokens(sample * length, (sample + 1) * length + 1)
        labels = np.ascontiguousarray(rows[:, 1:])
        return TokenBatch(
            inputs=np.ascontiguousarray(rows[:, :-1]),
            labels=labels,
            text_bytes=label_bytes(labels, self._token_bytes),
            sample_ids=sample_ids,
        )


class ValidationBatches:
    """The validation split in its own order, every label once over all ranks.

    Every rank yields the same number of batches of the same shape: what is missing at the end is
    padded with labels of -100, because a rank that stops early would leave the others waiting.
    """

    def __init__(
        self,
        shards: ShardSet,
        sequence_tokens: int,
        micro_batch_samples: int,
        rank: int,
        world_size: int,
        max_tokens: int | None = None,
    ) -> None:
        """Plan the batches.

        Args:
            shards: The split to read.
            sequence_tokens: T.
            micro_batch_samples: B.
            rank: This rank, from 0.
            world_size: Number of ranks.
            max_tokens: Labels to score, from the start of the split; None scores all.

        Raises:
            DataError: The split holds less than one sample, or `token_bytes.npy` is gone.
        """
        check_validation_tokens(shards.num_tokens, sequence_tokens)
        available = shards.num_tokens - 1
        self.num_labels = available if max_tokens is None else min(available, max_tokens)
        self._shards = shards
        self._token_bytes = load_token_bytes(shards.manifest.directory)
        self._shape = (micro_batch_samples, sequence_tokens)
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        micro_batch_samples, sequence_tokens = self._shape
        num_samples = -(-self.num_labels // sequence_tokens)
        return -(-num_samples // (micro_batch_samples * self._world_size))

    def __iter__(self) -> Iterator[TokenBatch]:
        for step in range(len(self)):
            yield self._read((step * self._world_size + self._rank) * self._shape[0])

    def _read(self, first_sample: int) -> TokenBatch:
        length = self._shape[1]
        inputs = np.zeros(self._shape, dtype=np.int64)
        labels = np.full(self._shape, IGNORED_LABEL, dtype=np.int64)
        sample_ids = np.full(self._shape[0], -1, dtype=np.int64)
        for row in range(self._shape[0]):
            start = (first_sample + row) * length
            stop = min(start + length, self.num_labels)
            if start >= stop:
                break
            tokens = self._shards.tokens(start, stop + 1)
            inputs[row, : stop - start] = tokens[:-1]
            labels[row, : stop - start] = tokens[1:]
            sample_ids[row] = first_sample + row
        return TokenBatch(
            inputs=inputs,
            labels=labels,
            text_bytes=label_bytes(labels, self._token_bytes),
            sample_ids=sample_ids,
        )


def label_bytes(labels_BT: Int64Array, token_bytes: Int32Array) -> Int32Array:
    """Give the raw bytes of each label.

    Args:
        labels_BT: Token ids, -100 where a label is not scored.
        token_bytes: Raw bytes of each token id, 0 for the end of a document.

    Returns:
        int32 [B, T]; 0 where a label is not scored or ends a document.
    """
    is_label = labels_BT != IGNORED_LABEL
    return np.where(is_label, token_bytes[np.where(is_label, labels_BT, 0)], np.int32(0))


def permute(positions: Int64Array, num_samples: int, seed: int, epoch: int) -> Int64Array:
    """Give which sample stands at each position of an epoch.

    A Feistel network over the next even power of two is a bijection whatever its round function
    is; a value that falls outside the samples is sent through again until it falls inside.

    Args:
        positions: Positions in the epoch, each in [0, num_samples).
        num_samples: Number of samples.
        seed: Seed of the order.
        epoch: Epoch, from 0.

    Returns:
        Sample numbers in [0, num_samples), all different for different positions.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 4.
    """
    half_bits = max(SMALLEST_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    words = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    keys = words.astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


def _feistel(values: UInt64Array, keys: UInt64Array, half_bits: int) -> UInt64Array:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """Scatter the bits of each value (the finaliser of splitmix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
