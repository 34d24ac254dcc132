"""From a search config to its trials: hyperparameters drawn from the seed, the same for all."""

import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.automatic import PUBLISHED_RULE, SizeRule
from pipeline.config.study import SearchConfig

PARAMETERS = ("learning_rate", "batch_tokens", "warmup_tokens", "beta2")
"""What a search varies; all but beta2 are multiples of the published rule."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One draw."""

    index: int
    learning_rate: float
    """Multiple of the published peak learning rate."""
    batch_tokens: float
    """Multiple of the published global batch."""
    warmup_tokens: float
    """Multiple of the published warm-up."""
    beta2: float
    """The decay of the second moment."""

    @property
    def rule(self) -> SizeRule:
        """The published rule with this trial's coefficients."""
        return replace(
            PUBLISHED_RULE,
            learning_rate=PUBLISHED_RULE.learning_rate * self.learning_rate,
            batch_tokens=PUBLISHED_RULE.batch_tokens * self.batch_tokens,
            warmup_tokens_per_parameter=PUBLISHED_RULE.warmup_tokens_per_parameter
            * self.warmup_tokens,
            beta2_small_batch=self.beta2,
            beta2_large_batch=self.beta2,
        )


def draw_trials(search: SearchConfig) -> list[Trial]:
    """Draw the trials; trial k depends on the seed and k alone."""
    return [_draw(search, index) for index in range(search.num_trials)]


def trial_name(label: str, index: int) -> str:
    """Give the name of the cell of one trial."""
    return f"{label}-trial{index:03d}"


def place_in_range(name: str, value: float, search: SearchConfig) -> float:
    """Give where a value stands in the range it was drawn from: 0 at the start, 1 at the end.

    Args:
        name: One of `PARAMETERS`.
        value: In the unit of the range.
        search: The ranges.
    """
    low, high, value = (as_drawn(name, v) for v in (*getattr(search, name), value))
    return math.log(value / low) / math.log(high / low)


def as_drawn(name: str, value: float) -> float:
    """Turn a value into the quantity that is log-uniform, and back: 1 - beta2 for beta2."""
    return 1.0 - value if name == "beta2" else value


def _draw(search: SearchConfig, index: int) -> Trial:
    generator = np.random.default_rng([search.seed, index])
    values = {}
    for name in PARAMETERS:
        low, high = (as_drawn(name, bound) for bound in getattr(search, name))
        values[name] = as_drawn(name, low * (high / low) ** float(generator.random()))
    return Trial(index=index, **values)
