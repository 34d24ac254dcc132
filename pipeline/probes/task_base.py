"""What a synthetic task is: from a generator of random numbers to examples and what they ask for.

Shapes: `B` examples, `T` time.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.config.batching import IGNORED_LABEL
from pipeline.probes.schema import ProbeParams

Array = npt.NDArray[Any]
Generator = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one length."""

    inputs: Array
    """[B, T] token ids, int64; of a task that reads numbers [B, T, channels], float32."""
    labels: Array
    """[B, T] the id to answer at each position, int64, -100 where none is asked; of a task that
    reads numbers [B] the number to give after the last position, float32."""

    @property
    def num_tokens(self) -> int:
        """Positions of all examples together."""
        return int(self.inputs.shape[0] * self.inputs.shape[1])


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A condition that a trained model is tested under."""

    quantity: Literal["length", "lag_tokens"]
    """What varies: the task's own length, or the distance to what is to be recalled."""
    value: int


class Task(ProbeParams):
    """One synthetic task; its fields are the arguments that a study states.

    Training examples of a step have one length, drawn uniformly from `train_lengths`.
    """

    reads: ClassVar[Literal["tokens", "numbers"]] = "tokens"
    train_lengths: tuple[int, int]
    """Shortest and longest training example, in the task's own unit of length."""
    test_lengths: list[int] = Field(default_factory=list)
    """Further lengths that a trained model is tested at."""

    @property
    def vocab_size(self) -> int:
        """Token ids, those of answers included."""
        raise NotImplementedError

    @property
    def chance_accuracy(self) -> float:
        """Share of right answers of a guess that knows which answers can occur."""
        raise NotImplementedError

    @property
    def baseline_loss(self) -> float | None:
        """Loss at the longest training length without any memory; None where nobody states one."""
        return None

    def count_tokens(self, length: int) -> int:
        """Count the positions of an example of a length."""
        return length

    def draw(self, num_samples: int, length: int, generator: Generator) -> Examples:
        """Draw examples of one length."""
        raise NotImplementedError

    def counted(self, labels: Array) -> Array:
        """Tell which labels count for the accuracy: bool, by default all that are asked for."""
        return np.not_equal(labels, IGNORED_LABEL)

    def trials(self) -> list[Trial]:
        """Give the conditions of the test."""
        return [Trial(quantity="length", value=length) for length in self.test_lengths]

    def draw_trial(self, trial: Trial, num_samples: int, generator: Generator) -> Examples:
        """Draw examples of one condition of the test."""
        return self.draw(num_samples, trial.value, generator)

    def draw_training(self, num_samples: int, generator: Generator) -> Examples:
        """Draw the examples of one training step."""
        low, high = self.train_lengths
        return self.draw(num_samples, int(generator.integers(low, high + 1)), generator)

    @property
    def max_tokens(self) -> int:
        """Positions of the longest example of training and test."""
        return max(self.count_tokens(n) for n in (self.train_lengths[1], *self.test_lengths))

    @model_validator(mode="after")
    def _lengths_rise(self) -> "Task":
        low, high = self.train_lengths
        if not 1 <= low <= high:
            raise ValueError(
                f"train_lengths=[{low}, {high}] is no range; state the shortest first, at least 1"
            )
        if self.test_lengths and min(self.test_lengths) < 1:
            raise ValueError(f"test_lengths holds {min(self.test_lengths)}; nearest: 1")
        return self


def ask_last(inputs_BT: Array, answers_B: Array) -> Examples:
    """Give examples that ask one answer each, at the last position."""
    labels_BT = np.full(inputs_BT.shape, IGNORED_LABEL, dtype=np.int64)
    labels_BT[:, -1] = answers_B
    return Examples(inputs=inputs_BT.astype(np.int64), labels=labels_BT)


def choose_distinct(num_samples: int, count: int, first: int, stop: int, rng: Generator) -> Array:
    """Draw `count` distinct ids from [first, stop) for each of some samples, in random order."""
    ids_N = np.arange(first, stop, dtype=np.int64)
    rows_BN = np.broadcast_to(ids_N, (num_samples, len(ids_N)))
    return rng.permuted(rows_BN, axis=1)[:, :count]
