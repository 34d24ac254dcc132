"""From training text to a byte n-gram model, the baseline that bits per byte are compared with.

Interpolated Kneser-Ney over bytes, exact, by sorting: n bytes are one 64-bit key, its first byte
highest. Documents are joined by zero bytes, which are context but never scored.

Source: Kneser and Ney 1995; Chen and Goodman 1999, section 4.1.6 (interpolation, one discount an
order).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, DataError

MAX_ORDER = 8
"""Bytes that a 64-bit key holds."""
ALPHABET_SIZE = 256
BORDER = b"\0"
"""Stands before, between and after documents."""

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Level:
    """The counts of one order: of n-grams, and of the contexts that they stand in."""

    keys: Keys
    """Distinct n-grams, sorted."""
    counts: npt.NDArray[np.int64]
    """Occurrences at the highest order; below it, different bytes that stand before the n-gram."""
    contexts: Keys
    """Distinct first n - 1 bytes, sorted."""
    totals: npt.NDArray[np.int64]
    """Sum of the counts of a context's n-grams."""
    kinds: npt.NDArray[np.int64]
    """Number of a context's n-grams."""
    discount: float
    """Taken off every count, D = n1 / (n1 + 2 n2)."""


class ByteNgram:
    """Gives the probability of the next byte after the bytes before it."""

    def __init__(self, documents: Iterable[bytes], order: int) -> None:
        """Count the n-grams of a text.

        Args:
            documents: Training text.
            order: Bytes n of the longest n-gram, the predicted one included; 1 to `MAX_ORDER`.

        Raises:
            ConfigError: The order is out of range.
            DataError: There is no text.
        """
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"n-gram order {order} is outside 1..{MAX_ORDER}")
        self.order = order
        text = join(documents, order)
        if len(text) <= order:
            raise DataError("there is no text to count n-grams in")
        keys, counts = np.unique(_windows(text, order), return_counts=True)
        self._levels = [_build_level(keys, counts)]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(keys & _mask(length), return_counts=True)
            self._levels.append(_build_level(keys, counts))
        self._levels.reverse()

    def probabilities(self, keys: Keys) -> Floats:
        """Give the probability of the last byte of each n-gram of `order` bytes after the others.

        P_n(w | c) = (max(count(cw) - D_n, 0) + D_n kinds(c) P_{n-1}(w | c')) / total(c), with c'
        the context without its first byte; the uniform distribution below order 1. A context that
        never occurred has the probabilities of c'.
        """
        result = np.full(len(keys), 1.0 / ALPHABET_SIZE)
        for index, level in enumerate(self._levels):
            own = keys & _mask(index + 1)
            counts = _look_up(level.keys, level.counts, own)
            contexts = own >> np.uint64(8)
            totals = _look_up(level.contexts, level.totals, contexts)
            kinds = _look_up(level.contexts, level.kinds, contexts)
            seen = totals > 0
            spared = np.maximum(counts - level.discount, 0.0) + level.discount * kinds * result
            result = np.where(seen, spared / np.maximum(totals, 1), result)
        return result

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Give the bits that each byte of the documents costs; their ends are not scored.

        Raises:
            DataError: There is no text.
        """
        bits, num_bytes = 0.0, 0
        for document in documents:
            if document:
                text = join([document], self.order)[: -_num_borders(self.order)]
                keys = _windows(text, self.order)
                bits -= float(np.log2(self.probabilities(keys)).sum())
                num_bytes += len(document)
        if num_bytes == 0:
            raise DataError("there is no text to score")
        return bits / num_bytes


def join(documents: Iterable[bytes], order: int) -> npt.NDArray[np.uint8]:
    """Join documents by borders, so many that the context of a first byte is borders alone.

    So a document begins in the same context wherever it stands; empty ones are left out.
    """
    border = BORDER * _num_borders(order)
    text = BORDER * (order - 1) + b"".join(document + border for document in documents if document)
    return np.frombuffer(text, dtype=np.uint8)


def _num_borders(order: int) -> int:
    """Give the borders behind a document: a whole context, and one where contexts are empty."""
    return max(order - 1, 1)


def _windows(text: npt.NDArray[np.uint8], order: int) -> Keys:
    """Give the n-gram that ends at each byte from the n-th on, as a key."""
    num = len(text) - order + 1
    keys = np.zeros(num, dtype=np.uint64)
    for offset in range(order):
        keys <<= np.uint64(8)
        keys |= text[offset : offset + num]
    return keys


def _mask(num_bytes: int) -> np.uint64:
    return np.uint64((1 << (8 * num_bytes)) - 1)


def _build_level(keys: Keys, counts: npt.NDArray[np.int64]) -> _Level:
    contexts, starts, kinds = np.unique(keys >> np.uint64(8), return_index=True, return_counts=True)
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return _Level(
        keys=keys,
        counts=counts,
        contexts=contexts,
        totals=np.add.reduceat(counts, starts),
        kinds=kinds,
        # Where no count is 1 there is nothing to estimate it from.
        discount=ones / (ones + 2 * twos) if ones else 0.5,
    )


def _look_up(keys: Keys, values: npt.NDArray[np.int64], wanted: Keys) -> npt.NDArray[np.int64]:
    """Give the values of wanted keys, 0 where a key is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
