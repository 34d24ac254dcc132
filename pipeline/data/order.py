"""From a place in an epoch to the sample that stands there, without an index of the samples.

Memory is that of the places asked for, whatever the number of samples, and any place can be asked
for at once.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FEISTEL_ROUNDS = 8
SMALLEST_HALF_BITS = 4
"""Halves of fewer bits give too few different permutations of a handful of samples."""
SMALL_SAMPLES = 256
"""Epochs up to here are kept whole: few samples in a wide network take many walks to fall inside,
and a step may cross many such epochs."""

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


def permute(positions: Int64Array, num_samples: int, entropy: Sequence[int]) -> Int64Array:
    """Give which sample stands at each position of an epoch.

    A Feistel network over the next even power of two is a bijection whatever its round function
    is; a value that falls outside the samples is sent through again until it falls inside.

    Args:
        positions: Positions in the epoch, each in [0, num_samples).
        num_samples: Number of samples.
        entropy: Numbers from 0 that together name the order, such as seed and epoch.

    Returns:
        Sample numbers in [0, num_samples), all different for different positions.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 4.
    """
    if num_samples <= SMALL_SAMPLES:
        return _small_order(num_samples, tuple(entropy))[positions]
    return _walk(positions, num_samples, entropy)


@lru_cache(maxsize=1024)
def _small_order(num_samples: int, entropy: tuple[int, ...]) -> Int64Array:
    return _walk(np.arange(num_samples), num_samples, entropy)


def _walk(positions: Int64Array, num_samples: int, entropy: Sequence[int]) -> Int64Array:
    half_bits = max(SMALLEST_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(entropy).generate_state(FEISTEL_ROUNDS, np.uint64)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], keys.astype(np.uint64), half_bits)
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
