"""Tasks of state: what a small machine says after it has read the sequence, token by token.

Each trains on lengths of 1 to 40 and is tested beyond; the published score of a run is the mean
accuracy over unseen lengths, and 0.9 counts as solved (Deletang et al. 2023, section 4).

Shapes: `B` examples, `T` time, `E` elements of a group, `G` generators.
"""

import itertools
from typing import Literal

import numpy as np

from pipeline.probes.task_base import Array, Examples, Generator, Task, ask_last

MODULUS = 5
"""Numbers of the arithmetic, places of the cycle. Source: Deletang et al. 2023, released code."""
PLUS, MINUS, TIMES = range(MODULUS, MODULUS + 3)
GENERATORS = 3
"""Tokens of the word problem: nothing, the swap of the first two, the shift of all."""


class Parity(Task):
    """Whether the number of ones is odd. Source: Deletang et al. 2023, appendix A."""

    train_lengths: tuple[int, int] = (1, 40)

    @property
    def vocab_size(self) -> int:
        """Two bits."""
        return 2

    @property
    def chance_accuracy(self) -> float:
        """One in two."""
        return 0.5

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw bits."""
        bits_BT = generator.integers(0, 2, (num_samples, length))
        return ask_last(bits_BT, bits_BT.sum(axis=1) % 2)


class EvenPairs(Parity):
    """Whether the number of neighbours that differ is odd: whether first and last bit differ.

    Source: Deletang et al. 2023, appendix A.
    """

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw bits."""
        bits_BT = generator.integers(0, 2, (num_samples, length))
        return ask_last(bits_BT, (bits_BT[:, 1:] != bits_BT[:, :-1]).sum(axis=1) % 2)


class CycleNavigation(Task):
    """The place on a cycle of five after steps of -1, 0 or 1, which are ids 0, 1 and 2.

    Source: Deletang et al. 2023, appendix A.
    """

    train_lengths: tuple[int, int] = (1, 40)

    @property
    def vocab_size(self) -> int:
        """Five places, the first three ids of which are also the steps."""
        return MODULUS

    @property
    def chance_accuracy(self) -> float:
        """One place of five."""
        return 1.0 / MODULUS

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw steps."""
        steps_BT = generator.integers(0, 3, (num_samples, length))
        return ask_last(steps_BT, (steps_BT - 1).sum(axis=1) % MODULUS)


class ModularArithmetic(Task):
    """The value modulo 5 of numbers joined by plus, minus and times, products first, no brackets.

    An even length is shortened by one, since an expression ends with a number.

    Source: Deletang et al. 2023, appendix A and released code.
    """

    train_lengths: tuple[int, int] = (1, 40)

    @property
    def vocab_size(self) -> int:
        """Five numbers and three operators."""
        return MODULUS + 3

    @property
    def chance_accuracy(self) -> float:
        """One number of five."""
        return 1.0 / MODULUS

    def count_tokens(self, length: int) -> int:
        """Give the odd length."""
        return length - (length % 2 == 0)

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw numbers and operators."""
        length = self.count_tokens(length)
        inputs_BT = generator.integers(0, MODULUS, (num_samples, length))
        inputs_BT[:, 1::2] = generator.integers(PLUS, TIMES + 1, (num_samples, length // 2))
        return ask_last(inputs_BT, evaluate(inputs_BT))


def evaluate(inputs_BT: Array) -> Array:
    """Give the value modulo 5 of expressions, from a finished sum and a product still open."""
    sums_B, open_B = np.zeros(len(inputs_BT), dtype=np.int64), inputs_BT[:, 0].copy()
    for place in range(1, inputs_BT.shape[1], 2):
        operator_B, number_B = inputs_BT[:, place], inputs_BT[:, place + 1]
        is_product = operator_B == TIMES
        sums_B = np.where(is_product, sums_B, sums_B + open_B)
        signed_B = np.where(operator_B == MINUS, -number_B, number_B)
        open_B = np.where(is_product, open_B * number_B, signed_B) % MODULUS
    return (sums_B + open_B) % MODULUS


class WordProblem(Task):
    """The permutation that a word of generators amounts to, asked for at every place.

    Tokens are the identity, the swap of the first two items and the shift of all by one; together
    they generate all permutations. S3 has 6 and is solvable, S5 has 120 and is not, so that its
    word problem is complete for NC1. Labels are numbers of permutations in lexicographic order.

    Source: Merrill et al. 2024, section 5; Liu et al. 2023, section 3 (generators).
    """

    degree: Literal[3, 5]
    """Items that are permuted."""
    train_lengths: tuple[int, int] = (1, 40)

    @property
    def vocab_size(self) -> int:
        """Permutations; the first three ids are also the generators."""
        return len(self.steps())

    @property
    def chance_accuracy(self) -> float:
        """One permutation of all; of the first places fewer can be reached."""
        return 1.0 / self.vocab_size

    def steps(self) -> Array:
        """Give the number of the permutation `[E, G]` that each generator leads to from each."""
        elements = list(itertools.permutations(range(self.degree)))
        number = {element: index for index, element in enumerate(elements)}
        identity = tuple(range(self.degree))
        swap, shift = (1, 0, *identity[2:]), (*identity[1:], 0)
        return np.array(
            [
                [number[tuple(element[i] for i in move)] for move in (identity, swap, shift)]
                for element in elements
            ]
        )

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw words."""
        steps_EG = self.steps()
        inputs_BT = generator.integers(0, GENERATORS, (num_samples, length))
        labels_BT = np.empty_like(inputs_BT)
        state_B = np.zeros(num_samples, dtype=np.int64)
        for place in range(length):
            state_B = steps_EG[state_B, inputs_BT[:, place]]
            labels_BT[:, place] = state_B
        return Examples(inputs=inputs_BT, labels=labels_BT)
