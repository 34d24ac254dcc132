"""From a run and a world size to the batch plan that every rank follows."""

from dataclasses import dataclass

from pipeline.config.schema import TrainConfig
from pipeline.config.section import check_multiple
from pipeline.errors import ConfigError

IGNORED_LABEL = -100
"""A label that is no prediction target: its loss is 0 and it counts nowhere."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one global batch is cut over ranks and micro-batches."""

    world_size: int
    micro_batch_samples: int
    accumulation_steps: int
    sequence_tokens: int

    @property
    def global_batch_samples(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.world_size * self.micro_batch_samples * self.accumulation_steps

    @property
    def global_batch_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch_samples * self.sequence_tokens

    @property
    def samples_per_rank(self) -> int:
        """Samples of one optimizer step on one rank."""
        return self.micro_batch_samples * self.accumulation_steps


def plan_batches(train: TrainConfig, world_size: int) -> BatchPlan:
    """Cut the global batch for a world size.

    The global batch, in samples and in tokens, is the same for every legal world size.

    Args:
        train: Batch sizes, in tokens and samples.
        world_size: Number of ranks.

    Raises:
        ConfigError: The global batch is not a multiple of one micro-batch on every rank.
    """
    if world_size < 1:
        raise ConfigError(f"world size {world_size} is not positive; nearest: 1")
    round_tokens = train.micro_batch_samples * train.sequence_tokens * world_size
    try:
        check_multiple(
            "train.global_batch_tokens", train.global_batch_tokens, round_tokens,
            f"micro({train.micro_batch_samples}) x seq({train.sequence_tokens}) "
            f"x world({world_size})",
        )  # fmt: skip
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return BatchPlan(
        world_size=world_size,
        micro_batch_samples=train.micro_batch_samples,
        accumulation_steps=train.global_batch_tokens // round_tokens,
        sequence_tokens=train.sequence_tokens,
    )
