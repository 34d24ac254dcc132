"""Tasks of memory: numbers to add, symbols to give back after a delay, sequences to copy.

Shapes: `B` examples, `T` time, `S` symbols to copy.
"""

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.config.batching import IGNORED_LABEL
from pipeline.probes.task_base import Array, Examples, Generator, Task

ADDING_TOLERANCE = 0.04
"""Largest error of a sum that counts as right. Source: Hochreiter and Schmidhuber 1997, section
5.4."""


class Adding(Task):
    """T numbers of 0 to 1, two of them marked, one in each half: give the sum of these two.

    Source: Hochreiter and Schmidhuber 1997, section 5.4, in the form of Arjovsky et al. 2016,
    section 4.2. Always saying 1 has a mean squared error of 1/6, twice the variance of one number.
    """

    reads: ClassVar[Literal["tokens", "numbers"]] = "numbers"
    train_lengths: tuple[int, int] = (100, 100)
    """Numbers T; published 100, 200, 400 and 750."""

    @property
    def vocab_size(self) -> int:
        """Two rows that nothing reads: a model has an embedding table, this task has no tokens."""
        return 2

    @property
    def chance_accuracy(self) -> float:
        """Share of sums within the tolerance of 1, where their density is highest."""
        return ADDING_TOLERANCE * (2 - ADDING_TOLERANCE)

    @property
    def baseline_loss(self) -> float:
        """Mean squared error of always saying 1."""
        return 1 / 6

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw numbers and marks."""
        inputs_BT2 = np.zeros((num_samples, length, 2), dtype=np.float32)
        inputs_BT2[:, :, 0] = generator.random((num_samples, length), dtype=np.float32)
        half, rows_B = length // 2, np.arange(num_samples)
        first_B = generator.integers(0, half, num_samples)
        second_B = generator.integers(half, length, num_samples)
        inputs_BT2[rows_B, first_B, 1] = 1.0
        inputs_BT2[rows_B, second_B, 1] = 1.0
        sums_B = (inputs_BT2[:, :, 0] * inputs_BT2[:, :, 1]).sum(axis=1)
        return Examples(inputs=inputs_BT2, labels=sums_B)


class CopyMemory(Task):
    """Ten symbols, a delay of T, a mark, and then the ten symbols are asked for.

    Ids 0 to 7 are symbols, 8 is blank and 9 the mark. The input is 10 symbols, T - 1 blanks, the
    mark and 10 blanks; the output T + 10 blanks and the symbols. Without memory the cross-entropy
    is 10 ln 8 / (T + 20). The length of this task is the delay.

    Source: Hochreiter and Schmidhuber 1997, in the form of Arjovsky et al. 2016, section 4.1.
    """

    SYMBOLS: ClassVar[int] = 8
    COUNT: ClassVar[int] = 10
    train_lengths: tuple[int, int] = (100, 100)
    """Delay T; published 100, 200, 300 and 500."""

    @property
    def vocab_size(self) -> int:
        """Symbols, blank and mark."""
        return self.SYMBOLS + 2

    @property
    def chance_accuracy(self) -> float:
        """One symbol of eight."""
        return 1.0 / self.SYMBOLS

    def counted(self, labels: Array) -> Array:
        """Count the symbols only: a model that says blank throughout is right nearly everywhere."""
        counted_BT = np.zeros(labels.shape, dtype=np.bool_)
        counted_BT[:, -self.COUNT :] = True
        return counted_BT

    @property
    def baseline_loss(self) -> float:
        """Cross-entropy of a guess that knows when to answer and not what."""
        return self.COUNT * math.log(self.SYMBOLS) / self.count_tokens(self.train_lengths[1])

    def count_tokens(self, length: int) -> int:
        """Give T + 20."""
        return length + 2 * self.COUNT

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw symbols; every position is asked for, blanks too."""
        blank, mark = self.SYMBOLS, self.SYMBOLS + 1
        symbols = generator.integers(0, self.SYMBOLS, (num_samples, self.COUNT))
        inputs_BT = np.full((num_samples, self.count_tokens(length)), blank, dtype=np.int64)
        labels_BT = inputs_BT.copy()
        inputs_BT[:, : self.COUNT] = symbols
        inputs_BT[:, length + self.COUNT - 1] = mark
        labels_BT[:, -self.COUNT :] = symbols
        return Examples(inputs=inputs_BT, labels=labels_BT)


class CopyString(Task):
    """A string of letters, then the same once more, or backwards: `$ s | s .` with 26 letters.

    The second string and the full stop are asked for, each where the token before it stands.

    Source: Jelassi et al. 2024, section 3.1 and released code.
    """

    LETTERS: ClassVar[int] = 26
    train_lengths: tuple[int, int] = (5, 20)
    """Letters of the string; the published code trains on 5 to 20 and tests beyond."""
    backwards: bool = False
    """Whether the string is asked for from its end."""

    @property
    def vocab_size(self) -> int:
        """Letters, begin, bar and full stop."""
        return self.LETTERS + 3

    @property
    def chance_accuracy(self) -> float:
        """One letter of all, at every place but the full stop's, which the length does not tell."""
        return 1.0 / self.LETTERS

    def count_tokens(self, length: int) -> int:
        """Give both strings, begin and bar; nothing follows the last letter."""
        return 2 * length + 2

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw strings."""
        begin, bar, stop = range(self.LETTERS, self.LETTERS + 3)
        letters_BS = generator.integers(0, self.LETTERS, (num_samples, length))
        answer_BS = letters_BS[:, ::-1] if self.backwards else letters_BS

        def column(token: int) -> Array:
            return np.full((num_samples, 1), token, dtype=np.int64)

        inputs_BT = np.concatenate((column(begin), letters_BS, column(bar), answer_BS), axis=1)
        labels_BT = np.full(inputs_BT.shape, IGNORED_LABEL, dtype=np.int64)
        labels_BT[:, length + 1 : -1] = answer_BS
        labels_BT[:, -1] = stop
        return Examples(inputs=inputs_BT, labels=labels_BT)


class SelectiveCopy(Task):
    """Some symbols scattered among blanks, to be given in their order once all have been seen.

    The input is `length` places, of which `count` hold symbols, a mark, and count - 1 blanks.

    Source: Gu and Dao 2023, section 4.1.1, there with 16 symbols in 4096 places.
    """

    train_lengths: tuple[int, int] = (64, 64)
    """Places that symbols are scattered over."""
    symbols: int = Field(default=16, ge=2)
    """Different symbols; blank and mark come after them."""
    count: int = Field(default=8, ge=1)
    """Symbols of an example."""

    @property
    def vocab_size(self) -> int:
        """Symbols, blank and mark."""
        return self.symbols + 2

    @property
    def chance_accuracy(self) -> float:
        """One symbol of all."""
        return 1.0 / self.symbols

    def count_tokens(self, length: int) -> int:
        """Give the places, the mark and the blanks that the answer is read from."""
        return length + self.count

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw symbols and places."""
        blank, mark = self.symbols, self.symbols + 1
        places = generator.permuted(np.tile(np.arange(length), (num_samples, 1)), axis=1)
        places = np.sort(places[:, : self.count], axis=1)
        symbols = generator.integers(0, self.symbols, (num_samples, self.count))
        inputs_BT = np.full((num_samples, self.count_tokens(length)), blank, dtype=np.int64)
        np.put_along_axis(inputs_BT, places, symbols, axis=1)
        inputs_BT[:, length] = mark
        labels_BT = np.full(inputs_BT.shape, IGNORED_LABEL, dtype=np.int64)
        labels_BT[:, length:] = symbols
        return Examples(inputs=inputs_BT, labels=labels_BT)
