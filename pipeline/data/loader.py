"""From memory-mapped tokens to the micro-batches of one rank, in an order that nothing can disturb.

Legend: B samples of a micro-batch, T tokens of a sample.

Sample j of a source is its tokens [j*T, j*T + T], one more than T, so that every token but the
first is a label once. Training reads one endless stream of samples: the mixture says which source
sample i of the stream comes from and how many of that source came before it; these go through the
source pass by pass, each pass in an order of its own. All of it is a function of (seed, i), so no
index is built and the stream can be entered anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from pipeline.config.batching import IGNORED_LABEL, BatchPlan
from pipeline.config.data import MixtureConfig
from pipeline.data.checks import check_global_batch, check_validation_tokens
from pipeline.data.mixture import count_tokens, plan_mixture
from pipeline.data.order import permute
from pipeline.data.shards import ShardManifest, ShardSet, load_token_bytes
from pipeline.errors import DataError

BLOCK_SAMPLES = 1024
"""Samples that a rank looks up at once: the order costs 2 us a sample then, 100 alone."""

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


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
    """[B] which sample of the split each row is, the mixed sources back to back; -1 for a row that
    is all padding."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where the next step begins in the stream, which is the same at any world size."""

    num_samples: int = 0
    """Samples that were taken from the stream, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """What was read of one source, over all ranks."""

    samples: int
    tokens: int
    epochs: float
    """Passes over the source."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The samples of one rank in the steps that come next."""

    first: int
    """Number in the stream at which the first of its steps begins."""
    sources: Int64Array
    """[steps, micro-batches, B] place of the source in the mixture."""
    samples: Int64Array
    """[steps, micro-batches, B] sample of the source."""


class TokenLoader:
    """Cuts the stream of samples into steps and gives one rank its micro-batches.

    Micro-batch k of a global batch goes to rank k modulo world size, so the micro-batches of a step
    are the same at every world size; only who computes them changes. A global batch may hold the
    end of one pass over a source and the start of the next: no sample is left out.
    """

    def __init__(
        self,
        manifest: ShardManifest,
        mixture: MixtureConfig,
        plan: BatchPlan,
        rank: int,
        seed: int,
    ) -> None:
        """Prepare for the first step.

        Args:
            manifest: The shards, whose train split is read.
            mixture: How its sources are mixed.
            plan: How a global batch is cut.
            rank: This rank, from 0.
            seed: Seed of the sample order.

        Raises:
            ConfigError: The mixture does not fit the shards.
            DataError: The split is too small for one global batch, or a file is gone.
        """
        self.mixture = plan_mixture(manifest, mixture, plan.sequence_tokens)
        check_global_batch(self.mixture, plan.sequence_tokens, plan.global_batch_samples)
        self._shards = ShardSet(manifest, "train", self.mixture.names)
        tokens = count_tokens(manifest)
        self._first_tokens = np.cumsum([0, *(tokens[name] for name in self.mixture.names)])
        self._token_bytes = load_token_bytes(manifest.directory)
        self._first_ids = np.cumsum([0, *self.mixture.num_samples])
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self._block: _Block | None = None
        self.state = LoaderState()

    def load_state(self, state: LoaderState) -> None:
        """Continue from a state, at this or any other world size.

        Raises:
            DataError: The state is none of a loader.
        """
        if state.num_samples < 0:
            raise DataError(f"{state} lies before the first sample: the checkpoint is damaged")
        self.state = state
        self._block = None

    def next_step(self) -> list[TokenBatch]:
        """Give this rank's micro-batches of the next optimizer step; the state moves past it.

        Raises:
            DataError: A shard holds an id outside the vocabulary.
        """
        first, size = self.state.num_samples, self._plan.global_batch_samples
        if self._block is None or first >= self._block.first + size * len(self._block.samples):
            self._block = self._look_up(first)
        step = (first - self._block.first) // size
        self.state = LoaderState(num_samples=first + size)
        return [
            self._read(sources_B, samples_B)
            for sources_B, samples_B in zip(
                self._block.sources[step], self._block.samples[step], strict=True
            )
        ]

    def seen(self) -> dict[str, SourceCount]:
        """Count what was read of each source up to the state, by closed forms."""
        first, length = self.state.num_samples, self._plan.sequence_tokens
        epochs = self.mixture.seen_epochs(first)
        return {
            name: SourceCount(samples=count, tokens=count * length, epochs=epochs[name])
            for name, count in self.mixture.seen_samples(first).items()
        }

    def _look_up(self, first: int) -> _Block:
        plan = self._plan
        steps = -(-BLOCK_SAMPLES // plan.samples_per_rank)
        numbers = np.arange(first, first + steps * plan.global_batch_samples, dtype=np.int64)
        by_micro_batch = numbers.reshape(steps, -1, plan.micro_batch_samples)
        mine = by_micro_batch[:, self._rank :: plan.world_size]
        sources, turns = self.mixture.locate(mine.ravel())
        samples = np.empty_like(turns)
        for index in range(len(self.mixture.names)):
            samples[sources == index] = self._order(index, turns[sources == index])
        return _Block(
            first=first, sources=sources.reshape(mine.shape), samples=samples.reshape(mine.shape)
        )

    def _order(self, index: int, turns: Int64Array) -> Int64Array:
        """Give the sample of a source that its turns from 0 on fall to."""
        size = self.mixture.num_samples[index]
        epochs, positions = np.divmod(turns, size)
        samples = np.empty_like(positions)
        # By its name, so that no source's order depends on which others are there.
        key = int.from_bytes(sha256(self.mixture.names[index].encode()).digest()[:8], "little")
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            samples[chosen] = permute(positions[chosen], size, (self._seed, epoch, key))
        return samples

    def _read(self, sources_B: Int64Array, samples_B: Int64Array) -> TokenBatch:
        length = self._plan.sequence_tokens
        starts_B = self._first_tokens[sources_B] + samples_B * length
        rows = self._shards.rows(starts_B, length + 1)
        labels = rows[:, 1:].astype(np.int64)
        return TokenBatch(
            inputs=rows[:, :-1].astype(np.int64),
            labels=labels,
            text_bytes=self._token_bytes[labels],
            sample_ids=self._first_ids[sources_B] + samples_B,
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
            max_tokens: Labels to score, in samples spread evenly over the split, so that every
                source has its share; None scores all.

        Raises:
            DataError: The split holds less than one sample, or `token_bytes.npy` is gone.
        """
        check_validation_tokens(shards.num_tokens, sequence_tokens)
        available = shards.num_tokens - 1
        self.num_labels = available if max_tokens is None else min(available, max_tokens)
        self._num_available_samples = -(-available // sequence_tokens)
        self._num_samples = -(-self.num_labels // sequence_tokens)
        self._shards = shards
        self._token_bytes = load_token_bytes(shards.manifest.directory)
        self._shape = (micro_batch_samples, sequence_tokens)
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return -(-self._num_samples // (self._shape[0] * self._world_size))

    def __iter__(self) -> Iterator[TokenBatch]:
        for step in range(len(self)):
            yield self._read((step * self._world_size + self._rank) * self._shape[0])

    def _read(self, first_sample: int) -> TokenBatch:
        length = self._shape[1]
        inputs = np.zeros(self._shape, dtype=np.int64)
        labels = np.full(self._shape, IGNORED_LABEL, dtype=np.int64)
        sample_ids = np.full(self._shape[0], -1, dtype=np.int64)
        rows = range(first_sample, min(first_sample + self._shape[0], self._num_samples))
        for row, sample in enumerate(rows):
            num_labels = min(length, self.num_labels - sample * length)
            start = sample * self._num_available_samples // self._num_samples * length
            tokens = self._shards.tokens(start, start + num_labels + 1)
            inputs[row, :num_labels] = tokens[:-1]
            labels[row, :num_labels] = tokens[1:]
            sample_ids[row] = sample
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
