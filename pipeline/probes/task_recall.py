"""Tasks of recall: what stood beside a token when it was seen before.

Shapes: `B` examples, `T` time, `K` pairs of key and value.
"""

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config.batching import IGNORED_LABEL
from pipeline.probes.task_base import (
    Array,
    Examples,
    Generator,
    Task,
    Trial,
    ask_last,
    choose_distinct,
)


class Mqar(Task):
    """Multi-query associative recall: K pairs, then every key once more, which asks for its value.

    Keys are 1 to V/2 - 1 and values V/2 to V - 1, each K distinct ones. A query stands an even
    number of tokens behind the pairs, the nearer the likelier; all other places are filled with
    random ids, or with 0. The answer is asked where the key stands, not one place later.

    Source: Arora et al. 2023, section 4 and released code (HazyResearch/zoology, multiquery_ar).
    The distribution is that of the code, the random numbers are not.
    """

    train_lengths: tuple[int, int] = (64, 64)
    """Tokens T of an example, even; the published sizes are (T, K) = (64, 4), (128, 8), (256, 16)
    and (512, 64)."""
    ids: int = Field(default=8192, ge=8)
    """Token ids V, even."""
    pairs: int = Field(default=4, ge=1)
    """Pairs K, at most T/4."""
    gap_power: float = Field(default=0.01, gt=0.0)
    """Exponent a of the probability g^(a - 1) of the gap g to the query; 1 is uniform."""
    random_fill: bool = True
    """Whether places without pair or query hold random ids; False leaves 0 there."""
    test_lags: list[int] = Field(default_factory=list)
    """Distances from key to query that a trained model is tested at, one query an example; even."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        low, tokens = self.train_lengths
        for length in (low, tokens, *self.test_lengths):
            if length % 2 or 4 * self.pairs > length:
                raise ValueError(
                    f"length {length} has to be even and at least 4 x pairs={4 * self.pairs}; "
                    f"nearest: {max(4 * self.pairs, length + length % 2)}"
                )
        if self.ids % 2 or self.ids // 2 <= self.pairs:
            raise ValueError(
                f"ids={self.ids} has to be even, with more than pairs={self.pairs} in each half"
            )
        for lag in self.test_lags:
            if lag % 2 or not 2 <= lag < tokens:
                raise ValueError(f"test_lags holds {lag}; legal: even numbers of 2 to {tokens - 2}")
        return self

    @property
    def vocab_size(self) -> int:
        """Keys and values together."""
        return self.ids

    @property
    def chance_accuracy(self) -> float:
        """One in K: the values of the example are known, which belongs to which key is not."""
        return 1.0 / self.pairs

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw examples with one query a key."""
        keys_BK, values_BK = self._pairs(num_samples, generator)
        places = (length - 2 * self.pairs) // 2
        weights = np.arange(1, places + 1) ** (self.gap_power - 1)
        # The largest of log p + Gumbel noise are K draws without replacement.
        noisy = np.log(weights) + generator.gumbel(size=(num_samples, places))
        gaps_BK = np.argsort(-noisy, axis=1)[:, : self.pairs]
        queries_BK = 2 * self.pairs + 2 * gaps_BK
        return self._place(keys_BK, values_BK, queries_BK, (keys_BK, values_BK), length, generator)

    def trials(self) -> list[Trial]:
        """Give the lengths, then the lags."""
        lags = [Trial(quantity="lag_tokens", value=lag) for lag in self.test_lags]
        return [*super().trials(), *lags]

    def draw_trial(self, trial: Trial, num_samples: int, generator: Generator) -> Examples:
        """Draw examples of a length, or with a single query at a distance from its key."""
        if trial.quantity == "length":
            return super().draw_trial(trial, num_samples, generator)
        length, lag = self.train_lengths[1], trial.value
        keys_BK, values_BK = self._pairs(num_samples, generator)
        chosen = [j for j in range(self.pairs) if 2 * self.pairs <= 2 * j + lag < length]
        pair_B1 = generator.choice(np.array(chosen), size=(num_samples, 1))
        asked = tuple(np.take_along_axis(part, pair_B1, axis=1) for part in (keys_BK, values_BK))
        return self._place(keys_BK, values_BK, 2 * pair_B1 + lag, asked, length, generator)

    def _pairs(self, num_samples: int, generator: Generator) -> tuple[Array, Array]:
        half = self.ids // 2
        keys_BK = choose_distinct(num_samples, self.pairs, 1, half, generator)
        return keys_BK, choose_distinct(num_samples, self.pairs, half, self.ids, generator)

    def _place(
        self,
        keys_BK: Array,
        values_BK: Array,
        queries_BQ: Array,
        asked: tuple[Array, ...],
        length: int,
        generator: Generator,
    ) -> Examples:
        inputs_BT = np.zeros((len(keys_BK), length), dtype=np.int64)
        labels_BT = np.full(inputs_BT.shape, IGNORED_LABEL, dtype=np.int64)
        inputs_BT[:, 0 : 2 * self.pairs : 2] = keys_BK
        inputs_BT[:, 1 : 2 * self.pairs : 2] = values_BK
        np.put_along_axis(inputs_BT, queries_BQ, asked[0], axis=1)
        np.put_along_axis(labels_BT, queries_BQ, asked[1], axis=1)
        if self.random_fill:
            fill_BT = generator.integers(0, self.ids, inputs_BT.shape)
            inputs_BT = np.where(inputs_BT == 0, fill_BT, inputs_BT)
        return Examples(inputs=inputs_BT, labels=labels_BT)


class Induction(Task):
    """A special token occurs twice, and at the end asks for what followed it the first time.

    Source: Olsson et al. 2022, section "Induction heads"; the form with one special token is that
    of Fu et al. 2023, section 3.1.
    """

    train_lengths: tuple[int, int] = (64, 64)
    """Tokens T of an example."""
    symbols: int = Field(default=16, ge=2)
    """Ordinary ids; the special one comes after them."""
    test_lags: list[int] = Field(default_factory=list)
    """Distances between the two places of the special token that a trained model is tested at."""

    @model_validator(mode="after")
    def _bigram_fits(self) -> Self:
        if min(self.train_lengths[0], *self.test_lengths, 3) < 3:
            raise ValueError("the shortest example of the induction task has 3 tokens; nearest: 3")
        for lag in self.test_lags:
            if not 2 <= lag < self.train_lengths[1]:
                raise ValueError(f"test_lags holds {lag}; legal: 2 to {self.train_lengths[1] - 1}")
        return self

    @property
    def vocab_size(self) -> int:
        """Symbols and the special token."""
        return self.symbols + 1

    @property
    def chance_accuracy(self) -> float:
        """One symbol of all."""
        return 1.0 / self.symbols

    def trials(self) -> list[Trial]:
        """Give the lengths, then the lags."""
        lags = [Trial(quantity="lag_tokens", value=lag) for lag in self.test_lags]
        return [*super().trials(), *lags]

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw examples whose first special token stands anywhere before the last two places."""
        places_B = generator.integers(0, length - 2, num_samples)
        return self._build(num_samples, length, places_B, generator)

    def draw_trial(self, trial: Trial, num_samples: int, generator: Generator) -> Examples:
        """Draw examples of a length, or with a distance between the two special tokens."""
        if trial.quantity == "length":
            return super().draw_trial(trial, num_samples, generator)
        length = self.train_lengths[1]
        places_B = np.full(num_samples, length - 1 - trial.value)
        return self._build(num_samples, length, places_B, generator)

    def _build(
        self, num_samples: int, length: int, places_B: Array, generator: Generator
    ) -> Examples:
        inputs_BT = generator.integers(0, self.symbols, (num_samples, length))
        rows_B = np.arange(num_samples)
        inputs_BT[rows_B, places_B] = self.symbols
        inputs_BT[:, -1] = self.symbols
        return ask_last(inputs_BT, inputs_BT[rows_B, places_B + 1])
