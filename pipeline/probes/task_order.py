"""Tasks that only the order of the tokens answers: a bag of them does not.

Shapes: `B` examples, `T` time.
"""

import numpy as np
from pydantic import Field

from pipeline.probes.task_base import Examples, Generator, Task, ask_last, choose_distinct


class TokenAtIndex(Task):
    """Random symbols, then a token that names an index: give the symbol that stands there.

    Indices are those of the shortest training example, so longer tests name none that is new.
    """

    train_lengths: tuple[int, int] = (16, 16)
    """Symbols before the query."""
    symbols: int = Field(default=16, ge=2)
    """Different symbols; tokens that name indices come after them."""

    @property
    def vocab_size(self) -> int:
        """Symbols and indices."""
        return self.symbols + self.train_lengths[0]

    @property
    def chance_accuracy(self) -> float:
        """One symbol of all."""
        return 1.0 / self.symbols

    def count_tokens(self, length: int) -> int:
        """Give the symbols and the query."""
        return length + 1

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw symbols and an index."""
        symbols_BT = generator.integers(0, self.symbols, (num_samples, length))
        index_B1 = generator.integers(0, min(length, self.train_lengths[0]), (num_samples, 1))
        answers_B1 = np.take_along_axis(symbols_BT, index_B1, axis=1)
        inputs_BT = np.concatenate((symbols_BT, self.symbols + index_B1), axis=1)
        return ask_last(inputs_BT, answers_B1[:, 0])


class WhichCameFirst(Task):
    """Two symbols occur once each among others; both are named again: give the earlier one."""

    train_lengths: tuple[int, int] = (16, 16)
    """Symbols before the two that are named, at least 2."""
    symbols: int = Field(default=16, ge=4)
    """Different symbols; the token that asks comes after them."""

    @property
    def vocab_size(self) -> int:
        """Symbols and the token that asks."""
        return self.symbols + 1

    @property
    def chance_accuracy(self) -> float:
        """One of the two that are named."""
        return 0.5

    def count_tokens(self, length: int) -> int:
        """Give the symbols, the two named, and the token that asks."""
        return length + 3

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw two symbols and their places; the rest is filled with others."""
        pair_B2 = choose_distinct(num_samples, 2, 0, self.symbols, generator)
        low_B1, high_B1 = pair_B2.min(axis=1, keepdims=True), pair_B2.max(axis=1, keepdims=True)
        fill_BT = generator.integers(0, self.symbols - 2, (num_samples, length))
        # Numbers of the others: each of the two, the lower one first, is stepped over.
        fill_BT += fill_BT >= low_B1
        fill_BT += fill_BT >= high_B1
        places_B2 = np.sort(choose_distinct(num_samples, 2, 0, length, generator), axis=1)
        np.put_along_axis(fill_BT, places_B2, pair_B2, axis=1)
        named_B2 = generator.permuted(pair_B2, axis=1)
        ask_B1 = np.full((num_samples, 1), self.symbols)
        inputs_BT = np.concatenate((fill_BT, named_B2, ask_B1), axis=1)
        return ask_last(inputs_BT, pair_B2[:, 0])
