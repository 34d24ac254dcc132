"""From the weights of several sources to the source of every sample of an endless stream.

The stream repeats one period, laid out once, in which every prefix holds each source within one
sample of its share. The source of sample i, its number within the source, and how often each source
came before it are therefore closed forms of i: nothing is drawn and nothing has to be remembered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from pipeline.config.data import MixtureConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError

LONGEST_PERIOD_SAMPLES = 65_536
"""Shares whose common denominator is larger are rounded to multiples of its inverse."""

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which source each sample of the stream comes from."""

    names: tuple[str, ...]
    """The sources that take part."""
    num_samples: tuple[int, ...]
    """Samples that each holds, at least one."""
    shares: tuple[Fraction, ...]
    """Share of each in the stream; they sum to 1 and their common denominator is the period."""
    period: Int64Array
    """Source of each sample of a period, as its place in `names`."""
    ranks: Int64Array
    """Of each sample of a period, how many of the same source stand before it in the period."""

    @property
    def counts(self) -> Int64Array:
        """Samples of each source in a period."""
        return np.bincount(self.period, minlength=len(self.names))

    def locate(self, numbers: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Find samples of the stream by their numbers from 0.

        Returns:
            The source of each, as its place in `names`, and its number among the samples of that
            source in the stream, which goes on from one pass over the source to the next.
        """
        periods, places = np.divmod(numbers, len(self.period))
        sources = self.period[places]
        return sources, periods * self.counts[sources] + self.ranks[places]

    def seen_samples(self, num_samples: int) -> dict[str, int]:
        """Count the samples of each source among the first ones of the stream."""
        periods, rest = divmod(num_samples, len(self.period))
        begun = np.bincount(self.period[:rest], minlength=len(self.names))
        seen = periods * self.counts + begun
        return dict(zip(self.names, seen.tolist(), strict=True))

    def seen_epochs(self, num_samples: int) -> dict[str, float]:
        """Give how often each source was passed over by the first samples of the stream."""
        sizes = zip(self.seen_samples(num_samples).items(), self.num_samples, strict=True)
        return {name: seen / size for (name, seen), size in sizes}


def plan_mixture(manifest: ShardManifest, config: MixtureConfig, sequence_tokens: int) -> Mixture:
    """Lay out the stream of a train split.

    A share is the source's weight over the sum of weights, exactly, as the decimal that the config
    states; without weights it is the source's passes times its samples. Should the common
    denominator exceed 65,536, shares are rounded to the nearest multiples of 1/65,536 that sum to
    1, those with the largest remainders upwards.

    Args:
        manifest: Prepared shards.
        config: Weights or passes.
        sequence_tokens: T.

    Raises:
        ConfigError: The mixture and the shards name different sources, or a share is too small.
        DataError: A source that takes part holds less than one sample.
    """
    sizes = count_samples(manifest, sequence_tokens)
    weights = _weights(config, sizes)
    for name in weights:
        if sizes[name] < 1:
            raise DataError(
                f"source {name} has fewer than the {sequence_tokens + 1} train tokens of one "
                "sample (train.sequence_tokens + 1); give it more text, lower "
                f"train.sequence_tokens, or leave it out with {leave_out(config, name)}"
            )
    counts = _whole_counts(weights)
    period = spread_evenly(list(counts.values()))
    ranks = np.empty_like(period)
    for source, count in enumerate(counts.values()):
        ranks[period == source] = np.arange(count)
    return Mixture(
        names=tuple(counts),
        num_samples=tuple(sizes[name] for name in counts),
        shares=tuple(Fraction(count, len(period)) for count in counts.values()),
        period=period,
        ranks=ranks,
    )


def count_samples(manifest: ShardManifest, sequence_tokens: int) -> dict[str, int]:
    """Count the samples of each source of the train split, in the order of the shards.

    Args:
        manifest: Prepared shards.
        sequence_tokens: T; a sample reads one token more, which the next one begins with.
    """
    tokens = count_tokens(manifest)
    return {name: max(count - 1, 0) // sequence_tokens for name, count in tokens.items()}


def count_tokens(manifest: ShardManifest) -> dict[str, int]:
    """Count the tokens of each source of the train split, in the order of the shards."""
    tokens: dict[str, int] = {}
    for shard in manifest.splits["train"].shards:
        tokens[shard.source] = tokens.get(shard.source, 0) + shard.tokens
    return tokens


def leave_out(config: MixtureConfig, name: str) -> str:
    """Give the override that leaves a source out of a mixture."""
    # Weights have to name every source, passes only those that differ from 1.
    return f"data.mixture.{'epochs' if config.weights is None else 'weights'}.{name}=0"


def spread_evenly(counts: list[int]) -> Int64Array:
    """Order a period so that every prefix holds each source within one sample of its share.

    Sample r of a source may stand at place n (from 1) once n times its share has reached
    r + 1/(2k - 2), and has to stand before n times its share has passed r + 1 - 1/(2k - 2), for k
    sources. Both can be kept, and taking the most urgent of those that may stand keeps them.

    Args:
        counts: Samples of each source in the period, each at least 1.

    Returns:
        Source of each place; no prefix is further than 1 - 1/(2k - 2) samples from any share.

    Source: Tijdeman 1980, The chairman assignment problem, Discrete Mathematics 32, theorem 1.
    """
    length, spare = sum(counts), max(2 * len(counts) - 2, 1)
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(length + 1)]
    for source, count in enumerate(counts):
        for rank in range(count):
            opens = -(-(rank * spare + 1) * length // (spare * count))
            closes = ((rank + 1) * spare - 1) * length // (spare * count)
            waiting[opens].append((closes, source))
    period = np.empty(length, dtype=np.int64)
    ready: list[tuple[int, int]] = []
    for place in range(1, length + 1):
        for sample in waiting[place]:
            heappush(ready, sample)
        period[place - 1] = heappop(ready)[1]
    return period


def _weights(config: MixtureConfig, sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """Give the positive weights; sources of weight 0 are left out."""
    stated = config.weights if config.weights is not None else (config.epochs or {})
    wanted = {name for name, much in {**(config.max_epochs or {}), **stated}.items() if much > 0}
    unknown = sorted(wanted - set(sizes))
    if unknown:
        raise ConfigError(
            f"data.mixture names {unknown}, of which the prepared shards hold no train text; "
            f"their sources are {sorted(sizes)}"
        )
    if config.weights is not None:
        missing = sorted(set(sizes) - set(stated))
        if missing:
            raise ConfigError(f"data.mixture.weights lacks {missing}; 0 leaves a source out")
        weights = {name: _exact(stated[name]) for name in sizes}
    else:
        weights = {name: _exact(stated.get(name, 1.0)) * sizes[name] for name in sizes}
        # A source too small for a sample must be refused, not left out.
        weights |= {name: Fraction(1) for name in sizes if sizes[name] < 1 and stated.get(name, 1)}
    if not any(weights.values()):
        raise ConfigError(f"data.mixture leaves out every source of the shards: {sorted(sizes)}")
    return {name: weight for name, weight in weights.items() if weight > 0}


def _whole_counts(weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Give the samples of each source in a period.

    Raises:
        ConfigError: A share is below half of 1/65,536.
    """
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    length = math.lcm(*(share.denominator for share in shares.values()))
    if length <= LONGEST_PERIOD_SAMPLES:
        return {name: int(share * length) for name, share in shares.items()}
    exact = {name: share * LONGEST_PERIOD_SAMPLES for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: LONGEST_PERIOD_SAMPLES - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count == 0:
            factor = math.ceil(1 / exact[name])
            raise ConfigError(
                f"data.mixture gives {name} 1 of {float(1 / shares[name]):,.0f} samples; shares "
                f"are counted in 1/{LONGEST_PERIOD_SAMPLES:,}: raise its weight or epochs by a "
                f"factor of {factor}, or set it to 0"
            )
    return counts


def _exact(number: float) -> Fraction:
    """Give the decimal that a config states, not the binary number next to it."""
    return Fraction(str(number))
