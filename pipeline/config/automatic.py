"""From a model's size to batch, learning rate, betas, warm-up and length of its training.

N is the number of non-embedding parameters, so no tokenizer is needed.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from pipeline.config.explain import validate
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.config.section import check_multiple
from pipeline.config.tree import merge
from pipeline.errors import ConfigError

REFERENCE_PARAMETERS = 108e6
"""Size N at which the coefficients of a rule are stated."""

LARGE_BATCH_TOKENS = 524_288
"""From this global batch on, a rule takes the shorter second moment."""

TOKENS_PER_PARAMETER = 20.0
"""Training tokens per non-embedding parameter. Source: Hoffmann et al. 2022, table 3: 20 to 22."""

RANK_MULTIPLES = (8, 4, 2, 1)
"""World sizes that a filled batch should divide over, the best first."""

ROUNDING_FRACTION = 0.1
"""How far rounding for a larger world size may move the batch."""


@dataclass(frozen=True, kw_only=True)
class SizeRule:
    """Coefficients at the reference size; the exponents are those of the published rule.

    Source: OLMo-core, `model_ladder/wsds_chinchilla_run_configurator.py`, after Porian et al. 2024.
    """

    learning_rate: float
    """Peak at the reference size; falls as N^(-1/3)."""
    batch_tokens: float
    """Global batch at the reference size; grows as N^(2/3)."""
    warmup_tokens_per_parameter: float
    """Tokens of the linear rise, over N."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2_small_batch: float
    """Decay of the second moment below `LARGE_BATCH_TOKENS`."""
    beta2_large_batch: float
    """The same from `LARGE_BATCH_TOKENS` on."""

    def learning_rate_at(self, num_parameters: int) -> float:
        """Give the peak learning rate at N non-embedding parameters."""
        return self.learning_rate * math.pow(num_parameters / REFERENCE_PARAMETERS, -1 / 3)

    def batch_tokens_at(self, num_parameters: int) -> int:
        """Give the global batch at N non-embedding parameters, before rounding to samples."""
        return round(self.batch_tokens * math.pow(num_parameters / REFERENCE_PARAMETERS, 2 / 3))

    def beta2_at(self, batch_tokens: int) -> float:
        """Give the decay of the second moment for a global batch."""
        is_large = batch_tokens >= LARGE_BATCH_TOKENS
        return self.beta2_large_batch if is_large else self.beta2_small_batch


PUBLISHED_RULE = SizeRule(
    learning_rate=0.0047 / 2,
    batch_tokens=2048 * 160,
    warmup_tokens_per_parameter=1.0,
    beta2_small_batch=0.99,
    beta2_large_batch=0.95,
)
"""The rule of the OLMo-2 and OLMo-3 ladders, for Transformers trained on 20 tokens a parameter."""

LSTM_RULE = PUBLISHED_RULE
"""PROVISIONAL: the published coefficients, each times the ratio of LSTM to GPT in one random search
of the same trials for both, where that ratio's 95% interval excludes 1; here none does.

12 trials for each of four models of 14,000 and 38,000 parameters, 10 tokens a parameter, one seed:
learning rate 1.39 (0.70 to 2.04), warm-up 0.86 (0.62 to 1.39), 1 - beta2 1.08 (0.53 to 1.78). The
batch is not known: both families were best at the smallest.

Source: `configs/study/search.yaml`; docs/hyperparameters.md has its results.
"""

RULES: Mapping[str, SizeRule] = {"gpt": PUBLISHED_RULE, "lstm_attention": LSTM_RULE}
"""Model family to its rule."""


def fill_train(run: RunConfig, origin: str, rule: SizeRule | None = None) -> RunConfig:
    """Fill what `train` leaves open by the rule of the model's family; stated values stay.

    A run whose `train.automatic` is off, or that was filled before, comes back as it is.

    Args:
        run: The run as stated; fields that were set count as stated, equal to the default or not.
        origin: What to name in an error.
        rule: Instead of the family's own.

    Raises:
        ConfigError: One micro-batch exceeds the rule's batch, stated tokens and filled batch do not
            divide, the warm-up does not fit into the run, or another field contradicts what was
            filled.
    """
    if not run.train.is_open:
        return run
    num_parameters = run.model.num_parameters(0).non_embedding
    stated = _stated(run.train)
    origin = f"{origin}: train.automatic at N={num_parameters:,}"
    try:
        values = _resolve(rule or RULES[run.model.family], num_parameters, run.train, stated)
    except ValueError as exc:
        raise ConfigError(f"{origin}: {exc}") from exc
    by_rule = {path: value for path, value in values.items() if path not in stated}
    filled: dict[str, Any] = {"filled_by_rule": tuple(by_rule)}
    for path, value in by_rule.items():
        section, _, leaf = path.rpartition(".")
        target = filled.setdefault(section, {}) if section else filled
        target[leaf] = value
    tree = merge(run.train.model_dump(exclude_unset=True), filled)
    stated_fields = {name: getattr(run, name) for name in run.model_fields_set}
    return validate(
        RunConfig, {**stated_fields, "train": validate(TrainConfig, tree, origin)}, origin
    )


def list_origins(run: RunConfig) -> dict[str, dict[str, float]]:
    """Give what a rule filled and what was stated instead, by dotted path below `train`.

    Args:
        run: A run as loaded.

    Returns:
        `by_rule` and `stated`, path to value; empty where the run is not automatic.
    """
    train = run.train
    if train.filled_by_rule is None:
        return {}
    values: dict[str, float] = {
        "global_batch_tokens": train.global_batch_tokens,
        "total_tokens": train.total_tokens,
        "optimizer.learning_rate": train.optimizer.learning_rate,
        "optimizer.beta1": train.optimizer.beta1,
        "optimizer.beta2": train.optimizer.beta2,
        "schedule.warmup_fraction": train.schedule.warmup_fraction,
    }
    by_rule = {path: value for path, value in values.items() if path in train.filled_by_rule}
    return {
        "by_rule": by_rule,
        "stated": {path: value for path, value in values.items() if path not in by_rule},
    }


def _stated(train: TrainConfig) -> set[str]:
    """Give the dotted paths of all numbers that the config sets."""
    paths = set(train.model_fields_set)
    for section, part in (("optimizer", train.optimizer), ("schedule", train.schedule)):
        paths |= {f"{section}.{name}" for name in part.model_fields_set}
    return paths


def _resolve(
    rule: SizeRule, num_parameters: int, train: TrainConfig, stated: Set[str]
) -> dict[str, float]:
    """Give every field that a rule can fill, later ones following from stated earlier ones."""
    batch_tokens = train.global_batch_tokens
    if "global_batch_tokens" not in stated:
        wanted = rule.batch_tokens_at(num_parameters)
        batch_tokens = _round_batch(wanted, train.micro_batch_samples, train.sequence_tokens)
    total_tokens = train.total_tokens
    if "total_tokens" not in stated:
        per_parameter = train.tokens_per_parameter or TOKENS_PER_PARAMETER
        num_steps = max(1, round(per_parameter * num_parameters / batch_tokens))
        total_tokens = num_steps * batch_tokens
    check_multiple("total_tokens", total_tokens, batch_tokens, "global_batch_tokens")
    warmup_tokens = rule.warmup_tokens_per_parameter * num_parameters
    if "schedule.warmup_fraction" not in stated and warmup_tokens >= total_tokens:
        raise ValueError(
            f"the warm-up of {warmup_tokens:,.0f} tokens outlasts total_tokens={total_tokens:,}; "
            f"state train.schedule.warmup_fraction, or train on more tokens"
        )
    return {
        "global_batch_tokens": batch_tokens,
        "total_tokens": total_tokens,
        "optimizer.learning_rate": rule.learning_rate_at(num_parameters),
        "optimizer.beta1": rule.beta1,
        "optimizer.beta2": rule.beta2_at(batch_tokens),
        "schedule.warmup_fraction": warmup_tokens / total_tokens,
    }


def _round_batch(batch_tokens: int, micro_batch_samples: int, sequence_tokens: int) -> int:
    """Give the nearest batch that divides over 8, 4, 2 or 1 ranks.

    The largest of these world sizes is taken whose rounding moves the batch by at most
    `ROUNDING_FRACTION`; one rank always does.
    """
    micro_tokens = micro_batch_samples * sequence_tokens
    if micro_tokens > batch_tokens:
        fits = batch_tokens // sequence_tokens
        advice = f"lower train.micro_batch_samples to {fits}" if fits else "shorten the sequence"
        raise ValueError(
            f"one micro-batch of micro({micro_batch_samples}) x seq({sequence_tokens})="
            f"{micro_tokens} tokens exceeds the rule's batch of {batch_tokens}; {advice}, or "
            f"state train.global_batch_tokens"
        )
    for num_ranks in RANK_MULTIPLES:
        unit = num_ranks * micro_tokens
        rounded = round(batch_tokens / unit) * unit
        if abs(rounded - batch_tokens) <= ROUNDING_FRACTION * batch_tokens:
            return rounded
    return round(batch_tokens / micro_tokens) * micro_tokens
